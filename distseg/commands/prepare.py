"""`distseg prepare SRC STORE`: annotated volumes into a store. `distseg prepare --check STORE` verifies one."""

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.commands.arguments import check_choice, command_parser
from distseg.errors import DistsegError, one_line_errors, positive_float, positive_int

if TYPE_CHECKING:
    from distseg.data.masks import Readers
    from distseg.library.stores import Store

LAYOUTS = (
    "auto", "nnunet", "decathlon", "zenodo", "kaggle", "medseg9", "covid-19-20", "mosmed", "lits", "kits", "totalsegmentator",
    "medseg", "paired", "csv", "dicom-seg",
)  # fmt: skip
INTENSITIES = ("auto", "hu", "grey")
READERS = ("union", "majority", "first")
OFFICIAL_FOLDS = "ma2021"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.check:
        return check(args.check)
    options = {name: value for name, value in vars(args).items() if name != "check"}
    print(store_in_words(prepare(**options)))
    print(f"next: distseg plan {shlex.quote(str(args.store))} --out plan.yaml")
    return 0


def prepare(
    src: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    folds: int | str = 5,
    holdout: float | None = None,
    test_patients: int = 0,
    seed: int = 0,
    labels: Mapping[str, int] | None = None,
    ignore: int | None = None,
    patients: str | None = None,
    readers: "Readers" = "union",
    intensity: str = "auto",
    hu_offset: int | None = None,
    pixel_mm: Sequence[float] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
) -> "Store":
    """Turns annotated volumes into a store, as `distseg prepare` does; prints what you should know about them.

    Args:
        src: folder (or CSV) in one of the layouts.
        store: folder to write; an existing store is brought up to date.
        layout: of `src`, see docs/layouts.md; "auto": whichever it looks like.
        images, masks: in place of a layout, patterns of paths in `src`, such as "Train/{case}_ct.nii.gz"; `{label}` in that of masks
            stands for the label's name, `*` for anything in a name, `**/` for folders.
        folds: validation folds of patients, at least 2; or "ma2021": the benchmark's own.
        holdout: in place of folds one, with this share of the patients (of those not in test), above 0 and at most 0.5.
        test_patients: patients that no fold sees.
        seed: of the folds, 0 or more.
        labels: names and numbers (1 to 254) of your own, where the layout has none; None: as the data names them.
        ignore: the value of label maps that means "not annotated"; it counts in no loss and no score.
        patients: regular expression on a case's name, whose first group (or whole match) is the patient; None: as the layout says.
        readers: what several mask files of a volume become: their "union", what a "majority" has, or the "first".
        intensity: of the volumes: "hu", "grey" or "auto" (by their values).
        hu_offset: what was added to HU where files hold no values below 0, such as 1024 of 16-bit pictures.
        pixel_mm: sizes of pixels, down and across, of volumes that do not say it (pictures).
        workers: processes; None: one a core.
        cluster: tcp://HOST:PORT of a dask scheduler whose workers do the reading.

    Returns:
        The store, as `distseg.open_store` gives it.

    Raises:
        DistsegError: bad input (the line names the file), wrong options, or `store` holds something else.

    Example:
        >>> import distseg
        >>> store = distseg.prepare("volumes", "new_store", folds=3, workers=1)
        note: layout zenodo: 6 volumes with masks; labels: lung=1, infection=2 (as the set describes them); patients: 6, ...
        note: volumes that hold a label, of 6: lung 6, infection 4; in the others nothing is there
        >>> len(store.cases), len(store.splits)
        (6, 3)
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("intensity", intensity, INTENSITIES)
    check_choice("readers", readers, READERS)
    if workers is not None and workers < 1:
        raise DistsegError(f"workers: got {workers}; it must be at least 1; leave it out for one a core")
    try:
        _check(folds, holdout, test_patients, seed, labels or {})
    except ValueError as error:
        raise DistsegError(f"{error}; correct it") from None
    from distseg.data.layouts.finding import Asked  # here, so that --help needs no scientific stack
    from distseg.data.preparing import FoldRule, prepare_store
    from distseg.library.stores import open_store

    if holdout is not None:
        rule = FoldRule(2, test_patients, seed, holdout=holdout)
    elif isinstance(folds, str):
        rule = FoldRule(method=folds)
    else:
        rule = FoldRule(folds, test_patients, seed)
    written, notes = prepare_store(
        Path(src),
        Path(store),
        rule,
        asked=Asked(layout, images, masks, {"background": 0} | dict(labels) if labels else None, ignore, patients),
        readers=readers,
        intensity=intensity,
        hu_offset=hu_offset,
        pixel_mm=(pixel_mm[0], pixel_mm[1]) if pixel_mm else None,
        workers=workers or os.cpu_count() or 1,
        cluster=cluster,
    )
    for note in notes:
        print(f"note: {note}")
    return open_store(written.root)


def check(root: Path) -> int:
    """Verifies the sha256 of every file of a store; a line for each that is not what it was."""
    from distseg.data.store import damaged_files
    from distseg.library.stores import open_store

    store = open_store(root)
    problems = list(damaged_files(store))
    for problem in problems:
        print(problem)
    if problems:
        raise DistsegError(f"store {root}: got {len(problems)} missing or changed files; run `distseg prepare` again")
    print(f"{root}: every file is what it was when it was written; {store_in_words(store)}")
    return 0


def store_in_words(store: "Store") -> str:
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
    parser = command_parser(
        "prepare",
        __doc__,
        "distseg prepare volumes store",
        "distseg prepare my_data store --images '{case}/ct.nii.gz' --masks '{case}/seg.nii.gz' --labels lung=1,infection=2",
        usage="%(prog)s SRC STORE [options] | %(prog)s --check STORE",
    )
    parser.add_argument("src", type=Path, nargs="?", metavar="SRC", help="folder (or CSV) in one of the layouts")
    parser.add_argument(
        "store", type=Path, nargs="?", metavar="STORE", help="folder to write; an existing store is brought up to date"
    )
    parser.add_argument("--check", type=Path, metavar="STORE", help="verify the sha256 of every file of a store")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="of SRC (default auto)")
    parser.add_argument(
        "--images",
        metavar="PATTERN",
        help="in place of a layout: paths of volumes in SRC, e.g. 'Train/{case}_ct.nii.gz'; * is anything",
    )
    parser.add_argument(
        "--masks",
        metavar="PATTERN",
        help="and of masks: 'Train/{case}_seg.nii.gz', or a file a label: '{case}/{label}.nii.gz'",
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
    parser.add_argument("--labels", type=_labels, metavar="NAME=N,...", help="label names and numbers of your own")
    parser.add_argument(
        "--ignore",
        type=int,
        metavar="VALUE",
        help="of label maps: not annotated, counts in no loss and no score",
    )
    parser.add_argument(
        "--patients",
        metavar="REGEX",
        help="on a case's name, or else its file's path: its first group, or the whole match, is the patient, e.g. '^p[0-9]+'",
    )
    parser.add_argument(
        "--readers",
        choices=READERS,
        default="union",
        help="several mask files of a volume: what becomes of them (default union)",
    )
    parser.add_argument("--intensity", choices=INTENSITIES, default="auto", help="of the volumes (default auto)")
    parser.add_argument(
        "--pixel-mm",
        nargs=2,
        type=positive_float,
        metavar=("Y", "X"),
        help="of volumes that do not say it: down and across",
    )
    parser.add_argument("--hu-offset", type=int, metavar="N", help="values are HU plus N, e.g. 1024 in 16-bit pictures")
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--cluster", metavar="tcp://HOST:PORT", help="dask scheduler whose workers do the reading")
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.src) or bool(args.src) != bool(args.store):
        parser.error("give SRC and STORE, or --check STORE")
    try:
        _check(args.folds, args.holdout, args.test_patients, args.seed, args.labels or {})
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def _folds(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _labels(text: str) -> dict[str, int]:
    labels = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.isdigit():
            raise argparse.ArgumentTypeError(f"got {part!r}; must be NAME=NUMBER with a number from 1 to 254")
        if name in labels:
            raise argparse.ArgumentTypeError(f"got {name} twice; each label may be there once")
        labels[name] = int(number)
    return labels


def _check(folds: int | str, holdout: float | None, test_patients: int, seed: int, labels: Mapping[str, int]) -> None:
    """Refuses, as ValueError, what neither the parser nor a function's types do."""
    if folds != OFFICIAL_FOLDS and not (isinstance(folds, int) and folds >= 2):
        raise ValueError(f"folds: got {folds}; at least 2 are needed to train and validate, or {OFFICIAL_FOLDS}")
    if holdout is not None and not 0 < holdout <= 0.5:
        raise ValueError(f"holdout: got {holdout}; must be above 0 and at most 0.5")
    for name, value in (("test-patients", test_patients), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name}: got {value}; must be 0 or more")
    for name, number in labels.items():
        if not (name.isidentifier() and isinstance(number, int) and 1 <= number <= 254):
            raise ValueError(f"labels: got '{name}={number}'; must be NAME=NUMBER with a number from 1 to 254")
    if len(set(labels.values())) < len(labels):
        raise ValueError(f"labels: got {dict(labels)}; each label needs a number of its own")


if __name__ == "__main__":
    raise SystemExit(main())
