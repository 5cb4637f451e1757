"""`python -m distseg.shipped [NAME]`: where a file lies that comes with distseg, or the names of all."""

import argparse
from collections.abc import Sequence

from distseg.errors import one_line_errors
from distseg.shipped import shipped, shipped_names


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distseg.shipped", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as launch/gpu.yaml; without it, all names")
    name = parser.parse_args(argv).name
    print(shipped(name) if name else "\n".join(shipped_names()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
