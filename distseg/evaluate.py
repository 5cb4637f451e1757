"""Scores a run over several ranks: `accelerate launch ... distseg/evaluate.py RUN` or `torchrun distseg/evaluate.py RUN`.

It is the command of distseg/commands/evaluate.py, at the place where launchers and the predecessor's users look for it.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    sys.path.pop(0)  # as in train.py

from distseg.commands.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
