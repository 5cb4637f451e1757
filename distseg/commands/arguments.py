"""How a command's parser begins, and what several commands, and the functions of their names, check in what they are told."""

import argparse
from collections.abc import Collection, Sequence

from distseg.errors import DistsegError


def command_parser(name: str, doc: str | None, *examples: str, usage: str | None = None) -> argparse.ArgumentParser:
    """The parser of `distseg NAME`.

    Args:
        name: of the command.
        doc: its module's.
        examples: lines that can be typed, with which its help ends.
        usage: in place of argparse's own.
    """
    return argparse.ArgumentParser(
        prog=f"distseg {name}",
        usage=usage,
        description=doc,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawTextHelpFormatter,
    )


def overrides_of_run(words: Sequence[str], tta: bool) -> list[str]:
    """`evaluate.key=value` over the configuration of a finished run.

    Args:
        words: as given.
        tta: whether flips are averaged, too.

    Raises:
        DistsegError: a word that would change what was trained.
    """
    overrides = [*words, *(["evaluate.tta=true"] if tta else [])]
    if wrong := [word for word in overrides if not word.startswith("evaluate.")]:
        raise DistsegError(
            f"override: got {wrong[0]}; a run is scored as it was trained and exported so; only evaluate.key=value changes a "
            "finished run; leave it out"
        )
    return overrides


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuses what a command's parser would: a function is told anything."""
    if value not in choices:
        raise DistsegError(f"{name}: got {value!r}; it must be one of {', '.join(map(str, choices))}; choose one")
