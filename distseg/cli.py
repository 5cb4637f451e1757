"""The `distseg` command, `python -m distseg` too: finds the command's module and hands over."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from distseg import __version__

# In the order of the data's way. A command's module is imported only when it is asked for.
MAP = {
    "volumes": {
        "phantom": "write a procedural chest CT set: the embedded sample",
        "download": "fetch a public record of annotated volumes",
    },
    "volumes -> store": {
        "prepare": "annotated volumes into a store of slices, patients and folds",
        "preview": "a picture of augmented slices with their masks",
    },
    "store -> run": {
        "plan": "propose a configuration for a store, with reasons",
        "models": "what each encoder x decoder costs, and its pretrained weights",
        "config": "what can be configured: meaning, default and range of each key",
        "train": "train a model on a store",
        "study": "train and score an encoder x decoder grid",
    },
    "run -> scores": {
        "evaluate": "score a run",
        "report": "one self-contained HTML page about a run or a study",
    },
    "run -> model -> masks": {
        "export": "trace, verify and package a run's model",
        "predict": "segment volumes with a run or an exported model",
        "serve": "start a Triton server on an exported model",
    },
    "this machine": {
        "doctor": "what this machine has, and what will be used",
    },
}
COMMANDS = {name: does for commands in MAP.values() for name, does in commands.items()}

OUTSIDE = {"train": "distseg.train"}  # where launchers look for it; the others are in distseg/commands/


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
    return importlib.import_module(OUTSIDE.get(name, f"distseg.commands.{name}")).main(rest)


def _usage() -> str:
    lines = ["usage: distseg COMMAND ...", ""]
    for what, commands in MAP.items():
        lines += [what, *(f"  {name:<10} {does}" for name, does in commands.items()), ""]
    return "\n".join(
        [
            *lines,
            "distseg COMMAND --help says more.",
            "",
            "examples:",
            "  distseg train --config quickstart data.store=store output_dir=runs/a",
            "  distseg predict model volume.nii.gz mask.nii.gz",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
