"""What can be configured: `distseg config [KEY]`, such as `distseg config data.augment` or `distseg config optim.lr`.

For each key its default, its meaning with the unit, and what it may be. Without KEY, all keys as docs/configuration.md has them.
"""

import argparse
from collections.abc import Sequence

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.config_reference import as_markdown, entries_below  # here, so that --help answers at once

    print("\n".join(entry.as_text() for entry in entries_below(args.key)) if args.key else as_markdown(), end="")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "config",
        __doc__,
        "distseg config data.augment",
        "distseg config optim.lr",
    )
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key, or a section: what it holds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
