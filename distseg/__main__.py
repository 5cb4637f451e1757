"""`python -m distseg` is the `distseg` command."""

from distseg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
