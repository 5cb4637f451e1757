"""The one exception a user of distseg is meant to read, and how a command turns failures into one clear line."""

import argparse
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from distseg.packages import missing_extra


class DistsegError(Exception):
    """A mistake the user can mend; its text is one line: what, got, rule, remedy."""

    status = 1  # what a command exits with


class RankError(DistsegError):
    """A failure that one rank may have alone: every rank that has it says so."""


class Stopped(DistsegError):
    """A signal ended the work after it was saved; the exit status is 128 and the signal's number, as a shell's."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.status = 128 + signum


class Command(Protocol):
    """A command's `main`: words (None: those of the process) to an exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def one_line_errors(main: Callable[[Sequence[str] | None], int]) -> Command:
    """Makes a command's `main` report what a user can mend as one line on stderr.

    Exit status: 0 success, 1 failure, 128 + n stopped by signal n; argparse exits with 2 on wrong use. Programming errors keep
    their traceback. A package that is missing is named with the extra that brings it. In a job of many ranks, what all of them
    find wrong is printed once on each node: one may lack what others have.
    """

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal cannot show
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            return main(argv)
        except ModuleNotFoundError as error:
            if (line := missing_extra(error)) is None:
                raise
            if _speaks():
                print(f"error: {line}", file=sys.stderr)
            return 1
        except (DistsegError, OSError) as error:
            if isinstance(error, RankError) or _speaks():
                kind = "" if isinstance(error, Stopped) else "error: "
                # Another rank's progress bar may stand in the terminal's line.
                before = "\n" if isinstance(error, RankError) and sys.stderr.isatty() else ""
                print(f"{before}{kind}{' '.join(told(error).split())}", file=sys.stderr)
            return getattr(error, "status", 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return command


def _speaks() -> bool:
    """Whether this rank says what all ranks of its node find wrong."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def told(error: Exception) -> str:
    """What a user is told: of a file the system says neither rule nor remedy."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"file: got {error.filename}; {error.strerror}; mend it, or choose another place"
    return str(error)


def not_negative(text: str) -> float:
    """argparse type for tolerances: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}; must be a finite number of at least 0")
    return value


def positive_float(text: str) -> float:
    """argparse type for sizes: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; must be a finite number above 0")
    return value


def positive_int(text: str) -> int:
    """argparse type for counts: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}; must be at least 1")
    return value
