"""Packages a run's best model: `distseg export RUN OUT` writes OUT/model.pt and OUT/model.json.

The file takes int16 HU (N, 1, H, W) and gives the label mask (uint8, N, 1, H, W) and the region probabilities (float32,
N, R, H, W). It is compared with the eager model at several sizes before it gets its name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.training.artefact import export_run

    described = export_run(args.run, args.out, args.depth)
    checks = described["verification"]["checks"]
    worst = max(check["max_probability_difference"] for check in checks)
    pixels = sum(check["differing_mask_pixels"] for check in checks)
    for row in described.get("depths", []):
        print(
            f"depth {row['depth']}: {row['parameters'] / 1e6:.2f} M parameters, {row['gmacs']} GMACs, Dice {row['dice']}"
        )
    print(
        f"{args.out / 'model.pt'}: {described['model']['decoder']} on {described['model']['encoder']}; verified at "
        f"{len(checks)} inputs: largest probability difference {worst:.1e}, {pixels} mask pixels differ"
    )
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distseg export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; an earlier export there is replaced")
    parser.add_argument("--depth", type=int, help="cut a deeply supervised Unet++ at depth 1, 2 or 3 (default: whole)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
