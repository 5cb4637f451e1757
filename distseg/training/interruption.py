"""Signals that ask a run to save and stop: SIGTERM and SIGUSR1 (preemption), SIGINT (a person; twice: at once)."""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal's Ctrl-C reaches a rank twice, from the terminal and by way of its launcher: that is one wish.
SAME_WISH_S = 1.0


class Interrupted(Exception):
    """A signal that all ranks know of: what is done is to be saved, and the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interruption:
    """Within it, signals are noted, and all ranks learn of them in the same step.

    A thread hears them: Python runs a signal's handler between two of its instructions, which are a whole backward apart, or
    for ever where a rank waits for one that is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.signum = 0
        self._first_s = 0.0

    def __enter__(self) -> "Interruption":
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._before = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)
        self._listener.join()
        os.close(self._heard)

    def agreed(self) -> int:
        """The signal that any rank has received, 0 for none. Every rank must call it; the host waits for the device."""
        if not dist.is_initialized():
            return self.signum
        received = torch.tensor(self.signum, device=self.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def _listen(self) -> None:
        while heard := os.read(self._heard, 1):
            if heard[0] in SIGNALS:
                self._note(heard[0])

    def _note(self, signum: int) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT == self.signum and now - self._first_s > SAME_WISH_S:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + signum)  # whatever the other threads do: nothing half-written stands under a final name
        if not self.signum:
            self.signum, self._first_s = signum, now
