"""Packages a run's best model: `distseg export RUN OUT [evaluate.key=value ...]`.

OUT gets one file that needs no distseg, model.json about it, and Triton's repositories. The file takes int16 HU (N, 1, H, W)
and gives the label mask (uint8, N, 1, H, W) and the region probabilities (float32, N, R, H, W). It is compared with the
eager model, in a process of its own, before it gets its name.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distseg.commands.arguments import check_choice, command_parser, overrides_of_run
from distseg.errors import DistsegError, not_negative, one_line_errors, positive_float, positive_int
from distseg.serving.formats import FORMATS

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    described = export(**vars(args))
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


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    format: str = "torchscript",
    size: Sequence[int] = (512, 512),
    pixel_mm: Sequence[float] | None = None,
    precision: str = "auto",
    dice_tolerance: float = 0.002,
    frozen: bool = False,
    depth: int | None = None,
    tta: bool = False,
    ensemble: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any]:
    """Writes the verified model of a run, as `distseg export` does; on any failure `out` stays as it was.

    Args:
        run: folder of a trained run.
        out: folder to write; an earlier export there is replaced.
        overrides: `evaluate.key=value` over the run's configuration.
        format: "torchscript" (any size of slices), "pt2" or "onnx" (one `size`).
        size: height and width of the slices of pt2 and onnx.
        pixel_mm: sizes of their pixels, down and across, where the run has a data.spacing_mm (pt2 and onnx).
        precision: of convolutions: "float32", "bfloat16", "float16", or "auto": bfloat16 where Dice stays within the
            tolerance, else float32.
        dice_tolerance: largest change of a region's Dice, at least 0.
        frozen: fold norms into convolutions (TorchScript).
        depth: cut a deeply supervised Unet++ at depth 1, 2 or 3; None: whole.
        tta: average over flips, inside the file.
        ensemble: folders of other runs to average with, inside the file.

    Returns:
        What is in OUT/model.json.

    Raises:
        DistsegError: no finished run, `out` holds something else, wrong options, a precision that costs too much Dice, or a file
            that does not agree with the eager model.
        ModuleNotFoundError: without the extra `train`, or `onnx` for that format.

    Example:
        >>> import distseg
        >>> described = distseg.export("run", "exported", precision="float32")
        >>> described["regions"]
        {'lung': [1, 2], 'infection': [2]}
    """
    from distseg.serving.to_export import ExportOptions, run_to_export

    check_choice("format", format, FORMATS)
    check_choice("precision", precision, PRECISIONS)
    if len(size) != 2 or min(size) < 1:
        raise DistsegError(f"size: got {size!r}; it must be height and width in pixels; give e.g. (512, 512)")
    if pixel_mm is not None and (len(pixel_mm) != 2 or not all(0 < mm < float("inf") for mm in pixel_mm)):
        raise DistsegError(
            f"pixel_mm: got {pixel_mm!r}; it must be two sizes above 0, down and across; give e.g. (0.7, 0.7)"
        )
    if not 0 <= dice_tolerance < float("inf"):
        raise DistsegError(
            f"dice_tolerance: got {dice_tolerance}; it must be a finite number of at least 0; give e.g. 0.002"
        )
    options = ExportOptions(
        format=format,
        precision=precision,
        dice_tolerance=dice_tolerance,
        frozen=frozen,
        size=(size[0], size[1]),
        pixel_mm=(pixel_mm[0], pixel_mm[1]) if pixel_mm is not None else None,
        depth=depth,
        ensemble=[Path(other) for other in ensemble],
    )
    wanted = run_to_export(Path(run), Path(out), options, overrides_of_run(overrides, tta))
    from distseg.serving.exporting import write_export  # torch is imported once nothing is wrong

    return write_export(wanted)


def _of_precision(precision: dict[str, Any]) -> str:
    if "dice_change" in precision:
        changes = ", ".join(
            f"{name} {'undefined' if change is None else format(change, '+.4f')}"
            for name, change in precision["dice_change"].items()
        )
        return f"{precision['weights']}: Dice changes by {changes} on {precision['slices']} validation slices"
    return precision["weights"] + (f": {precision['because']}" if "because" in precision else "")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "export",
        __doc__,
        "distseg export runs/a model",
        "distseg export runs/a model --precision float32",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; an earlier export there is replaced")
    parser.add_argument("overrides", nargs="*", metavar="evaluate.key=value", help="over the run's configuration")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
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
        "--pixel-mm",
        nargs=2,
        type=positive_float,
        metavar=("Y", "X"),
        help="of their pixels, where the run has a data.spacing_mm (pt2, onnx)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
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
