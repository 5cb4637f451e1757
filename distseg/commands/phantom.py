"""`distseg phantom OUT`: a procedural chest CT set, the sample that needs no download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.phantoms.case import write_phantom  # here, so that --help needs no scientific stack

    write_phantom(args.out, args.cases, args.seed, args.size, args.slices, tuple(args.fields))
    print(f"{args.out}: {args.cases} cases of {args.slices} slices, {count_infected(args.out)} with infection")
    return 0


def count_infected(out: Path) -> int:
    """Cases whose written mask holds infection: a drawn lesion may be too small for a coarse grid."""
    import nibabel as nib
    import numpy as np

    masks = (nib.load(path) for path in (out / "Infection_Mask").iterdir())
    return sum(bool(np.any(mask.dataobj)) for mask in masks)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "phantom",
        __doc__,
        "distseg phantom volumes",
        "distseg phantom volumes --cases 12 --size 128 --slices 20",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, in the layout of Zenodo 3757476")
    parser.add_argument("--cases", metavar="N", type=positive_int, default=8, help="patients (default 8)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the set (default 0)")
    parser.add_argument("--size", metavar="P", type=int, default=256, help="pixels a side (default 256)")
    parser.add_argument("--slices", metavar="Z", type=int, default=28, help="slices a case (default 28)")
    parser.add_argument(
        "--fields", metavar=("LOW", "HIGH"), nargs=2, type=float, default=[360.0, 360.0],
        help="fields of view, mm, that patients' lie between (default 360 360)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not 200 <= args.fields[0] <= args.fields[1] <= 1000:
        parser.error(
            f"--fields: got {args.fields[0]:g} {args.fields[1]:g}; must be two sizes from 200 to 1000 mm, the lower first"
        )
    for name, value, least in (("seed", args.seed, 0), ("size", args.size, 64), ("slices", args.slices, 8)):
        if value < least:
            parser.error(f"--{name}: got {value}; must be at least {least}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
