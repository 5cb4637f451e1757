"""Proposes a configuration for a store: `distseg plan STORE [key=value ...]`.

Prints YAML that `distseg train --config` takes, with the reason beside each value. Values that you give are kept. The same store and
kind of machine give the same text.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import DistsegError, one_line_errors, positive_float

SECONDS = {"s": 1, "m": 60, "h": 3600}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.config_files import flat, load_config, read_override  # these here, so that --help answers at once

    base = load_config(None, args.overrides)
    if args.out is not None and args.out.exists():
        raise DistsegError(
            f"--out: got {args.out}, which is there; nothing is overwritten; choose another, or move it away"
        )
    from distseg.config import Config
    from distseg.data.store import open_store
    from distseg.files import write_text
    from distseg.planning import as_yaml, machine_here, plan

    defaults = flat(Config().to_dict())
    named = tuple(f"{read_override(override)[0]}." for override in args.overrides)  # kept at the default's value too
    given = {
        key: value
        for key, value in flat(base.to_dict()).items()
        if f"{key}.".startswith(named) or defaults.get(key, {}) != value
    }
    choices = plan(open_store(args.store), base, machine_here(args.gpu_memory), args.budget, given)
    text = as_yaml(choices, f"distseg plan {args.store}")
    if args.out is None:
        print(text, end="")
    else:
        write_text(args.out, text)
        print(f"{args.out}: distseg train --config {args.out} output_dir=runs/planned")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "plan",
        __doc__,
        "distseg plan store --out plan.yaml",
        "distseg plan store --gpu-memory 24 --budget 12h model.encoder=gernet_l",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder that distseg prepare wrote")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to keep, such as the model's")
    parser.add_argument(
        "--gpu-memory", type=positive_float, metavar="GIB", help="of the GPU to plan for (default: of this machine's)"
    )
    parser.add_argument("--budget", type=_seconds, metavar="TIME", help="how long training may take: 90s, 30m, 12h")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: printed)")
    return parser.parse_intermixed_args(argv)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; must be a time such as 90s, 30m or 12h")
    return float(found[1]) * SECONDS[found[2]]


if __name__ == "__main__":
    raise SystemExit(main())
