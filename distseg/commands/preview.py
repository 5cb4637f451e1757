"""A picture of what the network will be given: `distseg preview STORE --config X OUT.png [section.key=value ...]`.

A row a slice: unchanged, then as it comes in a few epochs. Labels are outlined; three windows show as red, green, blue.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.config_files import load_config  # these here, so that --help answers at once

    config = load_config(args.config, [*args.overrides, f"data.store={args.store}"])
    from distseg.data.store import open_store

    open_store(args.store).cases_of("train", config.data.fold)
    from distseg.data.augmented import draw_preview  # DALI is imported once nothing is wrong

    n_drawn = draw_preview(config, args.out, n_slices=args.slices, n_epochs=args.epochs)
    print(f"{args.out}: {n_drawn} training slices, unchanged and in {args.epochs} epochs")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "preview",
        __doc__,
        "distseg preview store augmented.png",
        "distseg preview store augmented.png --config covid_ct",
    )
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--config", type=Path, help="YAML file, or the name of a shipped one; without it, the defaults")
    parser.add_argument("--slices", type=positive_int, default=4, help="rows (default 4)")
    parser.add_argument("--epochs", type=positive_int, default=5, help="columns besides the first (default 5)")
    args = parser.parse_intermixed_args(argv)
    if args.out.suffix != ".png":
        parser.error(f"OUT.png: got {args.out}; its name must end in .png")
    if wrong := [override for override in args.overrides if "=" not in override]:
        parser.error(f"override: got {wrong[0]!r}; it must be section.key=value")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
