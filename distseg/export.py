"""Packages a run's best model: `distseg export RUN OUT [evaluate.key=value ...]`.

OUT gets one file that needs no distseg, model.json about it, and Triton's repositories. The file takes int16 HU (N, 1, H, W)
and gives the label mask (uint8, N, 1, H, W) and the region probabilities (float32, N, R, H, W). It is compared with the
eager model, in a process of its own, before it gets its name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distseg.errors import DistsegError, not_negative, one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.serving.formats import FORMATS
    from distseg.serving.to_export import ExportOptions, run_to_export

    options = ExportOptions(
        args.format, args.precision, args.dice_tolerance, args.frozen, tuple(args.size), args.depth, args.ensemble
    )
    overrides = [*args.overrides, *(["evaluate.tta=true"] if args.tta else [])]
    if wrong := [word for word in overrides if not word.startswith("evaluate.")]:
        raise DistsegError(f"export: got {wrong[0]}; only evaluate.key=value changes a finished run; leave it out")
    wanted = run_to_export(args.run, args.out, options, overrides)
    from distseg.serving.exporting import write_export  # torch is imported once nothing is wrong

    described = write_export(wanted)
    for row in described.get("depths", []):
        print(
            f"depth {row['depth']}: {row['parameters'] / 1e6:.2f} M parameters, {row['gmacs']} GMACs, Dice {row['dice']}"
        )
    print(_of_precision(described["precision"]))
    checks = described["verification"]["checks"]
    worst = max(check["max_probability_difference"] for check in checks)
    pixels = sum(check["differing_mask_pixels"] for check in checks)
    print(
        f"{args.out / FORMATS[args.format].file}: {described['model']['decoder']} on {described['model']['encoder']}; verified at "
        f"{len(checks)} inputs: largest probability difference {worst:.1e}, {pixels} mask pixels differ"
    )
    return 0


def _of_precision(precision: dict[str, Any]) -> str:
    if "dice_change" in precision:
        changes = ", ".join(
            f"{name} {'undefined' if change is None else format(change, '+.4f')}"
            for name, change in precision["dice_change"].items()
        )
        return f"{precision['weights']}: Dice changes by {changes} on {precision['slices']} validation slices"
    return precision["weights"] + (f": {precision['because']}" if "because" in precision else "")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distseg export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; an earlier export there is replaced")
    parser.add_argument("overrides", nargs="*", metavar="evaluate.key=value", help="over the run's configuration")
    parser.add_argument(
        "--format",
        choices=("torchscript", "pt2", "onnx"),
        default="torchscript",
        help="model.pt, any size of slices (default); model.pt2 (AOTInductor) or model.onnx, one --size",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=positive_int,
        default=(512, 512),
        metavar=("H", "W"),
        help="of pt2, onnx (default 512 512)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of convolutions (default auto: bfloat16 where Dice stays within the tolerance, else float32)",
    )
    parser.add_argument(
        "--dice-tolerance",
        type=not_negative,
        default=0.002,
        metavar="D",
        help="largest change of a region's Dice (default 0.002)",
    )
    parser.add_argument("--frozen", action="store_true", help="fold norms into convolutions (TorchScript)")
    parser.add_argument("--depth", type=int, help="cut a deeply supervised Unet++ at depth 1, 2 or 3 (default: whole)")
    parser.add_argument("--tta", action="store_true", help="average over flips, inside the file")
    parser.add_argument(
        "--ensemble", nargs="+", default=[], type=Path, metavar="RUN", help="average with these runs, inside the file"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
