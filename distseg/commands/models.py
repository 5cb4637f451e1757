"""What the networks cost: `distseg models [--encoder NAME] [--decoder NAME] [--widths paper|reference] [--size 512] [--json]`.

Without names, every pair of the study's grid. GMACs and the MiB saved for the gradient are those of one slice in fp32.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence

from distseg.commands.arguments import command_parser
from distseg.errors import DistsegError, one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.bars import counted  # these here, so that --help answers at once
    from distseg.config import ModelConfig
    from distseg.models.network import OUTPUT_STRIDES
    from distseg.models.table import GRID, costs_as_text, pair_cost

    pairs = itertools.product(args.encoder or GRID, args.decoder or OUTPUT_STRIDES)
    models = [ModelConfig(encoder=e, decoder=d, decoder_widths=args.widths) for e, d in pairs]
    costs, refusals = [], []
    for model in counted(models, "measure", len(models), "pair", brief=True):
        try:
            costs.append(pair_cost(model, args.channels, args.size))
        except DistsegError as error:
            refusals.append(error)
    if not costs:
        raise refusals[0]
    for reason in dict.fromkeys(map(str, refusals)):
        print(f"left out: {reason}", file=sys.stderr)
    print(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=2) if args.json else costs_as_text(costs))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "models",
        __doc__,
        "distseg models --encoder densenet161",
        "distseg models --size 256 --json",
    )
    parser.add_argument("--encoder", action="append", metavar="NAME", help="any timm model with five feature levels")
    parser.add_argument("--decoder", action="append", metavar="NAME", help="unetplusplus, deeplabv3 or deeplabv3plus")
    parser.add_argument("--size", type=positive_int, default=512, help="side of the slice, pixels (default 512)")
    parser.add_argument("--channels", type=positive_int, default=1, help="of the image (default 1)")
    parser.add_argument(
        "--widths", choices=("paper", "reference"), default="paper", help="Unet++: model.decoder_widths (default paper)"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects in place of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
