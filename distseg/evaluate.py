"""Scores a run: `distseg evaluate RUN [--split val|test]` writes RUN/eval/<split>/.

Volumes are scored at their own resolution through the served model, so the figures are those of the exported file. The
predecessor's flags work too: `distseg/evaluate.py --datadir SRC --savedir_base RUNS -ei unetplus_densenet201`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    sys.path.pop(0)  # as in train.py

from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.training.evaluation import evaluate_run

    run = args.run or args.savedir_base / args.exp_id
    summary = evaluate_run(run, args.split, args.store)
    print(f"{run}, split {args.split}: {summary['n_cases']} cases of {summary['n_patients']} patients")
    for region, scores in summary["regions"].items():
        dice = scores["dice"]
        interval = "" if dice["ci95"] is None else f" (95% CI {dice['ci95'][0]:.4f} to {dice['ci95'][1]:.4f})"
        mean = "undefined" if dice["mean"] is None else f"{dice['mean']:.4f}"
        pooled = scores["pooled"]["dice"]
        print(
            f"  {region}: Dice {mean}{interval}, pooled {'undefined' if pooled is None else f'{pooled:.4f}'}; "
            f"{scores['n_empty_truth']} empty truths, {scores['n_empty_prediction']} empty predictions"
        )
    print(f"written to {run / 'eval' / args.split}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distseg evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="whose patients (default val)")
    parser.add_argument("--store", type=Path, help="the store, where it is no longer where the run found it")
    habits = parser.add_argument_group("the predecessor's flags")
    habits.add_argument("--datadir", type=Path, metavar="SRC", help="accepted; the run knows its store")
    habits.add_argument("--savedir_base", type=Path, metavar="RUNS")
    habits.add_argument("-ei", "--exp_id", metavar="NAME", help="the run is RUNS/NAME")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.savedir_base is None or args.exp_id is None):
        parser.error("give RUN, or --savedir_base RUNS -ei NAME")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
