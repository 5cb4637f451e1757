"""The one exception a user of distseg is meant to read, and how a command turns failures into one clear line."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol


class DistsegError(Exception):
    """A mistake the user can mend; its text is one line: what, got, rule, remedy."""


class RankError(DistsegError):
    """A failure that one rank may have alone: every rank that has it says so."""


class Command(Protocol):
    """A command's `main`: words (None: those of the process) to an exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def one_line_errors(main: Callable[[Sequence[str] | None], int]) -> Command:
    """Makes a command's `main` report what a user can mend as one line on stderr.

    Exit status: 0 success, 1 failure, 130 interrupted; argparse exits with 2 on wrong use. Programming errors keep
    their traceback. In a job of many ranks, what all of them find wrong is printed by rank 0 alone.
    """

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (DistsegError, OSError) as error:
            if isinstance(error, RankError) or int(os.environ.get("RANK", "0")) == 0:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return command


def positive_int(text: str) -> int:
    """argparse type for counts: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}; must be at least 1")
    return value
