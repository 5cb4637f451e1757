"""Scores a run: `distseg evaluate RUN [--split val|test]` writes RUN/eval/<split>/.

Volumes are scored at their own resolution through the served model, so the figures are those of the exported file. Over
several ranks (`accelerate launch ... distseg/evaluate.py RUN`, `torchrun`) the figures are the same. RUN may also be a
folder of masks, <case>.nii.gz or as predict writes them, that anything else made: name the store then.

`distseg evaluate --compare RUN_A RUN_B` pairs two evaluations case by case. The predecessor's flags work too:
`distseg/evaluate.py --datadir SRC --savedir_base RUNS -ei unetplus_densenet161`.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg.commands.arguments import check_choice, command_parser, overrides_of_run
from distseg.errors import DistsegError, one_line_errors

if TYPE_CHECKING:
    from distseg.scoring.comparison import Requirement

SPLITS = ("val", "test")
NOT_OPTIONS = ("run", "compare", "datadir", "savedir_base", "exp_id")  # which say what is scored


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.compare:
        compare(args.compare[0], args.compare[1], args.split)
        return 0
    run = args.run or args.savedir_base / args.exp_id
    options = {name: value for name, value in vars(args).items() if name not in NOT_OPTIONS}
    summary = _score(run, **options)
    if int(os.environ.get("RANK", "0")) == 0:
        print_summary(run, args.split, summary)
        check(args.require, summary)
    return 0


def evaluate(
    run: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    split: str = "val",
    store: str | os.PathLike[str] | None = None,
    tta: bool = False,
    ensemble: Sequence[str | os.PathLike[str]] = (),
    tune: bool = False,
    raw: bool = False,
    config: str | os.PathLike[str] | None = None,
    require: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores a run, or a folder of masks, as `distseg evaluate` does, and writes RUN/eval/<split>/.

    Args:
        run: folder of a trained run; or of masks, <case>.nii.gz, and `store` says whose.
        overrides: `evaluate.key=value` over the run's configuration; of masks any `section.key=value` over `config`.
        split: whose patients: "val" (the fold that it was validated on) or "test".
        store: the store, where it is no longer where the run found it.
        tta: average over flips.
        ensemble: folders of other runs to average with.
        tune: first choose post-processing on the validation cases.
        raw: leave out the run's post-processing.
        config: of masks: a YAML file, or the name of a shipped one, with regions, data.fold and evaluate section.
        require: what must hold, e.g. "infection.dice>=0.70", "lung.pooled.dice>=0.9".

    Returns:
        What is in summary.json; undefined scores are None.

    Raises:
        DistsegError: no finished run, no case in the split, wrong options, or a requirement that does not hold.
        ModuleNotFoundError: without the extra `train`.

    Example:
        >>> import distseg
        >>> summary = distseg.evaluate("run", split="test", require=["lung.dice>=0"])
        >>> sorted(summary["regions"])
        ['infection', 'lung']
        >>> 0 <= summary["regions"]["lung"]["dice"]["mean"] <= 1
        True
    """
    check_choice("split", split, SPLITS)
    requirements = [_parsed(text) for text in require]
    summary = _score(
        Path(run),
        overrides=overrides,
        split=split,
        store=None if store is None else Path(store),
        tta=tta,
        ensemble=[Path(other) for other in ensemble],
        tune=tune,
        raw=raw,
        config=None if config is None else Path(config),
        require=requirements,
    )
    check(requirements, summary)
    return summary


def _score(
    run: Path,
    *,
    overrides: Sequence[str],
    split: str,
    store: Path | None,
    tta: bool,
    ensemble: Sequence[Path],
    tune: bool,
    raw: bool,
    config: Path | None,
    require: "Sequence[Requirement]",
) -> dict[str, Any]:
    """A run's scores, or those of masks; of what is required only that there is such a score."""
    if store is not None and run.is_dir() and not (run / "config.yaml").is_file():
        of_runs = {"tune": tune, "tta": tta, "raw": raw, "ensemble": ensemble}
        if given := [name for name, value in of_runs.items() if value]:
            raise DistsegError(f"--{given[0]}: got it for the masks in {run}; it is for a trained run; leave it out")
        return _score_masks(run, split, store, config, overrides, require)
    overrides = overrides_of_run(overrides, tta)
    if tune and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DistsegError("--tune: got several ranks; it runs in one process; leave the launcher out")
    if tune and ensemble:
        raise DistsegError("--tune: got --ensemble; rules are chosen for one run; tune it first, by itself")
    from distseg.scoring.to_score import run_to_score

    # Rules that are about to be chosen anew may be of other weights.
    found = run_to_score(run, split, store, overrides, ensemble, raw=raw or tune)
    for requirement in require:
        requirement.check(found.config.regions)
    from distseg.scoring.evaluation import score_run  # torch is imported once nothing is wrong

    if tune:
        from distseg.scoring.tuning import tune_run

        print_tuned(tune_run(run, store, overrides))
        print_stale(run, split)
        found = run_to_score(run, split, store, overrides, ensemble, raw)
    return score_run(found)


def _score_masks(
    masks: Path,
    split: str,
    store: Path,
    config: Path | None,
    overrides: Sequence[str],
    require: "Sequence[Requirement]",
) -> dict[str, Any]:
    from distseg.config_files import load_config
    from distseg.regions import in_words
    from distseg.scoring.to_score import masks_to_score

    found = masks_to_score(masks, split, store, load_config(config, overrides))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"regions: {in_words(found.config.region_labels, found.config.labels)}")
    for requirement in require:
        requirement.check(found.config.regions)
    from distseg.scoring.evaluation import score_masks  # torch is imported once nothing is wrong

    return score_masks(found)


def print_summary(run: Path, split: str, summary: dict[str, Any]) -> None:
    print(f"{run}, split {split}: {summary['n_cases']} cases of {summary['n_patients']} patients")
    for region, scores in summary["regions"].items():
        dice = scores["dice"]
        print(
            f"  {region}: Dice {_shown(dice['mean'])}{_interval(dice)}, pooled {_shown(scores['pooled']['dice'])}, per patient "
            f"{_shown(scores['per_patient']['dice']['mean'])}; NSD at 1 and 2 mm {_shown(scores['nsd_1mm']['mean'])} and "
            f"{_shown(scores['nsd_2mm']['mean'])}, HD95 {_shown(scores['hd95_mm']['mean'], 2)} mm; "
            f"{scores['n_empty_truth']} empty truths, {scores['n_empty_prediction']} empty predictions"
        )
    if without := summary["n_without_spacing"]:
        print(f"  {without} cases without a voxel spacing have no NSD, HD95 and volumes")
    print(f"written to {run / 'eval' / split}")


def print_tuned(found: dict[str, Any]) -> None:
    for region, dice in found["dice"].items():
        rule = ", ".join(f"{key} {value}" for key, value in found["rules"][region].items() if value is not None)
        print(
            f"tuned on {found['n_cases']} validation cases, {region}: {rule}; Dice {_shown(dice['plain'])} -> {_shown(dice['chosen'])}"
        )
        if (n := found["n_cases_with"][region]) <= 1:
            print(
                f"note: {n or 'none'} of them holds {region}; a rule chosen by {'one case' if n else 'none'} may not hold for others"
            )


def print_stale(run: Path, scored_now: str) -> None:
    """Names the scores that were made with other rules; `distseg report` marks them too."""
    from distseg.reporting.evaluated import why_stale

    for split in SPLITS:
        summary = run / "eval" / split / "summary.json"
        if (
            split != scored_now
            and summary.is_file()
            and (why := why_stale(run, summary, json.loads(summary.read_text())))
        ):
            print(
                f"note: scores in {summary.parent} are stale. {why} To score again: distseg evaluate {run} --split {split}"
            )


def check(requirements: "Sequence[Requirement]", summary: dict[str, Any]) -> None:
    if unmet := [text for requirement in requirements if (text := requirement.unmet(summary))]:
        raise DistsegError(f"--require: {'; '.join(unmet)}; train longer or lower the bar")


def compare(first: Path, second: Path, split: str) -> None:
    from distseg.scoring.comparison import compare_runs

    found = compare_runs(first, second, split)
    print(f"{second} minus {first}, split {split}: {found['n_cases']} cases of {found['n_patients']} patients")
    for region, scores in found["regions"].items():
        for name, one in scores.items():
            p = "" if one["p"] is None else f", Wilcoxon p {one['p']:.3g}"
            print(
                f"  {region} {name}: {_shown(one['first'])} -> {_shown(one['second'])}, difference "
                f"{_shown(one['difference'])}{_interval(one)}{p} (n = {one['n']}, {one['n_patients']} patients)"
            )
            if one["n_only_first"] or one["n_only_second"]:
                print(
                    f"    left out: {one['n_only_first']} cases that only {first} has a score for, and {one['n_only_second']} "
                    f"that only {second} has (a false alarm scores 0, an empty mask nothing)"
                )


def _shown(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _interval(score: dict[str, Any]) -> str:
    return "" if score["ci95"] is None else f" (95% CI {score['ci95'][0]:.4f} to {score['ci95'][1]:.4f})"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "evaluate",
        __doc__,
        "distseg evaluate runs/a --tune",
        "distseg evaluate runs/a --split test",
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a trained run, or of masks")
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluate.key=value", help="changes to the run's evaluate section"
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="whose patients (default val)")
    parser.add_argument("--store", type=Path, help="the store, where it is no longer where the run found it")
    parser.add_argument("--tta", action="store_true", help="average over flips (evaluate.tta=true)")
    parser.add_argument("--ensemble", nargs="+", default=[], type=Path, metavar="RUN", help="average with these runs")
    parser.add_argument("--tune", action="store_true", help="first choose post-processing on the validation cases")
    parser.add_argument("--raw", action="store_true", help="leave out the run's post-processing")
    parser.add_argument(
        "--config",
        type=Path,
        help="of masks: a YAML file, or the name of a shipped one, with regions, data.fold and evaluate section",
    )
    parser.add_argument(
        "--require", action="append", default=[], type=_requirement, metavar="SCORE>=VALUE",
        help="exit with 1 unless it holds, e.g. infection.dice>=0.70, lung.pooled.dice>=0.9",
    )  # fmt: skip
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), help="differences, paired by case")
    habits = parser.add_argument_group("the predecessor's flags")
    habits.add_argument("--datadir", type=Path, metavar="SRC", help="accepted; the run knows its store")
    habits.add_argument("--savedir_base", type=Path, metavar="RUNS")
    habits.add_argument("-ei", "--exp_id", metavar="NAME", help="the run is RUNS/NAME")
    args = parser.parse_intermixed_args(argv)
    given = [bool(args.run), bool(args.savedir_base and args.exp_id), bool(args.compare)]
    if sum(given) != 1:
        parser.error("give RUN, --compare RUN_A RUN_B, or --savedir_base RUNS -ei NAME")
    if args.compare and (
        args.require or args.tune or args.tta or args.raw or args.ensemble or args.store or args.config
    ):
        parser.error("--compare reads two evaluations and takes --split alone")
    return args


def _requirement(text: str) -> "Requirement":
    from distseg.scoring.comparison import parse_requirement

    try:
        return parse_requirement(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parsed(text: str) -> "Requirement":
    try:
        return _requirement(text)
    except argparse.ArgumentTypeError as error:
        raise DistsegError(f"require: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
