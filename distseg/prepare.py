"""`distseg prepare SRC STORE`: annotated volumes into a store. `distseg prepare --check STORE` verifies one."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.errors import DistsegError, one_line_errors, positive_int

if TYPE_CHECKING:
    from distseg.data.store import Store

OFFICIAL_FOLDS = "ma2021"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.check:
        return check(args.check)
    from distseg.data.layouts import LABELS  # here, so that --help needs no scientific stack
    from distseg.data.prepare import FoldRule, prepare_store

    if args.holdout:
        rule = FoldRule(2, args.test_patients, args.seed, holdout=args.holdout)
    elif args.folds == OFFICIAL_FOLDS:
        rule = FoldRule(method=OFFICIAL_FOLDS)
    else:
        rule = FoldRule(args.folds, args.test_patients, args.seed)
    store, notes = prepare_store(
        args.src,
        args.store,
        rule,
        layout=args.layout,
        labels={"background": 0} | args.labels if args.labels else LABELS,
        ignore=args.ignore,
        intensity=args.intensity,
        workers=args.workers,
        cluster=args.cluster,
    )
    for note in notes:
        print(f"note: {note}")
    print(describe(store))
    return 0


def check(root: Path) -> int:
    """Verifies the sha256 of every file of a store; a line for each that is not what it was."""
    from distseg.data.store import damaged_files, open_store

    store = open_store(root)
    problems = list(damaged_files(store))
    for problem in problems:
        print(problem)
    if problems:
        raise DistsegError(f"store {root}: got {len(problems)} missing or changed files; run `distseg prepare` again")
    print(f"{root}: every file is what it was when it was written; {describe(store)}")
    return 0


def describe(store: "Store") -> str:
    """One line: what a store holds."""
    cases = store.cases
    origins = Counter(case.intensity for case in cases)
    slices = store.slices_of(cases)
    findings = slices.holding([name for name in store.labels if name not in ("background", "lung")])
    low, high = min(case.hu_range[0] for case in cases), max(case.hu_range[1] for case in cases)
    return (
        f"{store.root}: layout {store.layout}, {len(cases)} volumes of {len({case.patient for case in cases})} patients, "
        f"{len(slices)} slices, {len(findings)} of them with findings, {low} to {high} HU, "
        f"intensity {', '.join(f'{origin} x {n}' for origin, n in origins.items())}; "
        f"{len(store.folds.folds)} folds ({store.folds.method}), {len(store.folds.test)} test patients"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distseg prepare", description=__doc__, usage="%(prog)s SRC STORE [options] | %(prog)s --check STORE"
    )
    parser.add_argument("src", type=Path, nargs="?", metavar="SRC", help="folder (or CSV) in one of the layouts")
    parser.add_argument(
        "store", type=Path, nargs="?", metavar="STORE", help="folder to write; an existing store is brought up to date"
    )
    parser.add_argument("--check", type=Path, metavar="STORE", help="verify the sha256 of every file of a store")
    parser.add_argument(
        "--layout", choices=("auto", "zenodo", "medseg", "paired", "csv"), default="auto", help="of SRC (default auto)"
    )
    folds = parser.add_mutually_exclusive_group()
    folds.add_argument(
        "--folds", type=_folds, default=5, help=f"validation folds of patients (default 5), or {OFFICIAL_FOLDS}: the benchmark's own"
    )  # fmt: skip
    folds.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="one fold, with this share of the patients (of those not in test)",
    )
    parser.add_argument("--test-patients", type=int, default=0, help="patients that no fold sees (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds (default 0)")
    parser.add_argument(
        "--labels", type=_labels, metavar="NAME=N,...", help="label names and numbers of your own (paired, csv)"
    )
    parser.add_argument(
        "--ignore",
        type=int,
        metavar="VALUE",
        help="of label maps: not annotated, counts in no loss and no score (paired, csv)",
    )
    parser.add_argument(
        "--intensity", choices=("auto", "hu", "grey"), default="auto", help="of the volumes (default auto)"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--cluster", metavar="tcp://HOST:PORT", help="dask scheduler whose workers do the reading")
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.src) or bool(args.src) != bool(args.store):
        parser.error("give SRC and STORE, or --check STORE")
    if args.holdout is not None and not 0 < args.holdout <= 0.5:
        parser.error(f"--holdout: got {args.holdout}; must be above 0 and at most 0.5")
    for option, value in (("--test-patients", args.test_patients), ("--seed", args.seed)):
        if value < 0:
            parser.error(f"{option}: got {value}; must be 0 or more")
    return args


def _folds(text: str) -> int | str:
    if text == OFFICIAL_FOLDS:
        return text
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"got {text}; at least 2 are needed to train and validate")
    return int(text)


def _labels(text: str) -> dict[str, int]:
    labels = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not name.isidentifier() or not number.isdigit() or not 1 <= int(number) <= 254:
            raise argparse.ArgumentTypeError(f"got {part!r}; must be NAME=NUMBER with a number from 1 to 254")
        if name in labels:
            raise argparse.ArgumentTypeError(f"got {name} twice; each label may be there once")
        labels[name] = int(number)
    if len(set(labels.values())) < len(labels):
        raise argparse.ArgumentTypeError(f"got {text}; each label needs a number of its own")
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
