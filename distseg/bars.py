"""How far long work is: a bar on a terminal, lines where there is none. In a log file a bar would be one endless line.

`prepare: 12/60 volumes, 0:01:20 left`, at the start, at the end, and now and then between.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TextIO, TypeVar

from tqdm import tqdm

EVERY_S = 30.0  # between two lines of one work

T = TypeVar("T")


class Bar:
    """Counts work that is done; a context manager, at whose end the last line is said."""

    def __init__(self, what: str, total: int | None, unit: str, *, brief: bool = False) -> None:
        """
        Args:
            what: is done, as the line begins.
            total: units; None where nobody knows.
            unit: what is counted, in the singular; "B" are bytes.
            brief: one of many: it leaves nothing behind, and where there is no terminal it is seen only if it lasts.
        """
        self.total, self.done = total, 0
        self._what, self._unit, self._brief = what, unit, brief
        self._first = 0
        self._start = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=what, total=total, unit=unit, unit_scale=unit == "B", leave=not brief, file=sys.stderr
            )
        elif not brief:
            self._say(self._count())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._brief:
            self._say(f"{self._count()} in {_clock(time.monotonic() - self._start)}")

    def set(self, done: int, total: int | None) -> None:
        """Starts counting at another place: what an earlier attempt did, or must be done again."""
        self.done = self._first = done
        self.total = total
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.total, self._bar.n = total, done

    def update(self, n: int = 1) -> None:
        """Counts `n` more units as done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._told >= EVERY_S and self.done != self.total:  # the end has a line of its own
            self._say(self._count() + self._left())

    def _count(self) -> str:
        if self._unit == "B":
            return _megabytes(self.done) + ("" if self.total is None else f" of {_megabytes(self.total)}")
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.done}{of} {self._unit}{'' if self.total == 1 else 's'}"

    def _left(self) -> str:
        here = self.done - self._first
        if self.total is None or here <= 0:
            return ""
        pace_s = (time.monotonic() - self._start) / here
        return f", {_clock(pace_s * max(self.total - self.done, 0))} left"

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        print(f"{self._what}: {text}", file=sys.stderr, flush=True)


def counted(
    items: Iterable[T], what: str, total: int, unit: str, *, brief: bool = False, shown: bool = True
) -> Iterator[T]:
    """The items one by one, each counted when the next one is asked for.

    Args:
        items: of the work.
        what, total, unit, brief: see `Bar`.
        shown: False: nothing is said (other ranks, no work).
    """
    if not shown:
        yield from items
        return
    with Bar(what, total, unit, brief=brief) as bar:
        for item in items:
            yield item
            bar.update()


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line (to stdout, or to `file`) above the bars that stand in the terminal."""
    tqdm.write(line, file if file is not None else sys.stdout)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
