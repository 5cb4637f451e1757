"""Signals that ask a run to save and stop: SIGTERM and SIGUSR1 (preemption), SIGINT (a person; twice: at once)."""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal's Ctrl-C reaches a rank twice, from the terminal and by way of its launcher: that is one wish.
SAME_WISH_S = 1.0


class Interruption:
    """Within it, signals are noted, and all ranks learn of them in the same step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.signum = 0
        self._first_s = 0.0

    def __enter__(self) -> "Interruption":
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def agreed(self) -> int:
        """The signal that any rank has received, 0 for none. Every rank must call it; the host waits for the device."""
        if not dist.is_initialized():
            return self.signum
        received = torch.tensor(self.signum, device=self.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT == self.signum and now - self._first_s > SAME_WISH_S:
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._first_s = signum, now
