"""`distseg prepare SRC STORE`: annotated volumes into a store."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distseg.errors import one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.data.prepare import prepare_store  # here, so that --help needs no scientific stack

    store = prepare_store(
        args.src,
        args.store,
        n_folds=args.folds,
        n_test=args.test_patients,
        seed=args.seed,
        workers=args.workers,
        intensity=args.intensity,
    )
    patients = {case.patient for case in store.cases}
    origins = Counter(case.intensity for case in store.cases)
    slices = sum(case.shape[0] for case in store.cases)
    print(
        f"{store.root}: {len(store.cases)} volumes of {len(patients)} patients, {slices} slices, "
        f"intensity {', '.join(f'{origin} x {n}' for origin, n in origins.items())}; "
        f"{len(store.folds.folds)} folds, {len(store.folds.test)} test patients"
    )
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="distseg prepare", description=__doc__)
    parser.add_argument("src", type=Path, metavar="SRC", help="folder in the layout of Zenodo 3757476")
    parser.add_argument(
        "store", type=Path, metavar="STORE", help="folder to write; an existing store is brought up to date"
    )
    parser.add_argument("--folds", type=positive_int, default=5, help="validation folds of patients (default 5)")
    parser.add_argument("--test-patients", type=int, default=0, help="patients that no fold sees (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds (default 0)")
    parser.add_argument(
        "--intensity", choices=("auto", "hu", "grey"), default="auto", help="of the volumes (default auto)"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.folds < 2:
        parser.error(f"--folds: got {args.folds}; at least 2 are needed to train and validate")
    if args.test_patients < 0:
        parser.error(f"--test-patients: got {args.test_patients}; must be 0 or more")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
