"""Fetches a public record of annotated volumes: `distseg download zenodo-3757476 OUT`.

A cut download goes on where it ended when the command is run again. `distseg prepare OUT STORE` comes next.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.data.records import ZENODO, download_record  # here, so that --help answers at once

    download_record(args.record, args.out, args.url or ZENODO)
    print(f"{args.out}: {args.record} is there; next: distseg prepare {args.out} STORE")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "download",
        __doc__,
        "distseg download zenodo-3757476 volumes",
        "distseg download zenodo-3757476 volumes --url https://mirror.example/records/3757476",
    )
    parser.add_argument(
        "record", metavar="RECORD", help="zenodo-3757476: 20 chest CT volumes with lung and infection masks"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder")
    parser.add_argument("--url", type=_url, metavar="BASE", help="a mirror with the paths of https://zenodo.org")
    return parser.parse_args(argv)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"got {text!r}; must start with http:// or https://")
    return text.rstrip("/")


if __name__ == "__main__":
    raise SystemExit(main())
