"""The `distseg` command: finds the command's module and hands over. Each is also `python -m distseg.NAME`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from distseg import __version__

# In the order of the data's way. A command's module is imported only when it is asked for.
COMMANDS = {
    "phantom": "write a procedural chest CT set: the embedded sample",
    "download": "fetch a public record of annotated volumes",
    "prepare": "annotated volumes into a store",
    "preview": "a picture of augmented slices with their masks",
    "models": "what each encoder x decoder costs, and its pretrained weights",
    "train": "train a model on a store",
    "evaluate": "score a run",
    "study": "train and score an encoder x decoder grid",
    "export": "trace, verify and package a run's model",
    "predict": "segment volumes with a run or an exported model",
    "serve": "start a Triton server on an exported model",
    "report": "one self-contained HTML page about a run or a study",
    "doctor": "what this machine has, and what will be used",
}

MODULES = {"models": "model_table"}  # distseg.models is the networks' package


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    name, *rest = words
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(
            f"error: distseg: got command {name!r}; there is none; did you mean {nearest}? See --help", file=sys.stderr
        )
        return 2
    return importlib.import_module(f"distseg.{MODULES.get(name, name)}").main(rest)


def _usage() -> str:
    lines = [f"  {name:<10} {does}" for name, does in COMMANDS.items()]
    return "\n".join(["usage: distseg COMMAND ...", "", *lines, "", "distseg COMMAND --help says more."])


if __name__ == "__main__":
    raise SystemExit(main())
