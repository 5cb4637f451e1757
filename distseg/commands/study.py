"""Trains and scores an encoder x decoder grid: `distseg study yaml_configs/study.yaml [key=value ...]`.

Keys of the study (`folds=[0,1]`, `output_dir=X`, `executor=slurm`) and of all its trainings (`train.epochs=5`) are changed
behind it. Started again, it does what is not done yet. The folder of the study gets results.csv and table.md;
`distseg report` draws them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.studies.grid import load_study  # here, so that --help answers at once

    study = load_study(args.study, args.overrides)
    if args.print_config:
        print(study.as_yaml(), end="")
        return 0
    from distseg.studies.running import list_runs, run_only, run_study

    if args.list:
        list_runs(study)
        return 0
    return run_study(study) if args.only is None else run_only(study, args.only)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "study",
        __doc__,
        "distseg study study",
        "distseg study study_cpu data.store=store output_dir=studies/a",
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="or the name of a shipped one: study, study_cpu")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the study and to its trainings")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs with their numbers and how far they are")
    what.add_argument("--only", type=int, metavar="INDEX", help="do this one run (a job of an array); no tables")
    what.add_argument("--print-config", action="store_true", help="print the study with its base written out, and stop")
    args = parser.parse_intermixed_args(argv)
    if wrong := [override for override in args.overrides if "=" not in override]:
        parser.error(f"override: got {wrong[0]!r}; it must be key=value or section.key=value")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
