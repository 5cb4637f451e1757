"""What a rank is doing, for whoever waits for it: the stacks of a hang, the name of the phase in which a rank was lost."""

import faulthandler
import math
import re
import time
from pathlib import Path

import torch.distributed as dist

from distseg.files import remove_if_empty

# faulthandler's thread prints the stacks even while Python's lock is held; the collective itself fails a little later.
SHARE_OF_TIMEOUT = 0.8
# Starting its thread takes a quarter of a millisecond, so not for every step.
AGAIN_AFTER = 0.02  # of that time
# gloo's errors are RuntimeErrors that only their text tells apart (torch 2.14).
LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|no route to host|caused pair closure",
    re.IGNORECASE,
)


class Watch:
    """Within it, writes RUN/stacks/rank<r>.txt when no step ends for most of the timeout; the file goes with a clean end."""

    def __init__(self, stacks: Path, rank: int, timeout_s: float) -> None:
        self.path = stacks / f"rank{rank}.txt"
        self.after_s = SHARE_OF_TIMEOUT * timeout_s
        self.phase = "start"
        self._started_s = -math.inf

    def __enter__(self) -> "Watch":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        return self

    def begin(self, phase: str) -> None:
        """A new phase: the time until the stacks are written starts again, to a fiftieth of it."""
        self.phase = phase
        now = time.monotonic()
        if now - self._started_s >= AGAIN_AFTER * self.after_s:
            faulthandler.dump_traceback_later(self.after_s, file=self._file)
            self._started_s = now

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()
            remove_if_empty(self.path.parent)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))
