"""Resident memory of a piece of work, from Linux's own books."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

MMAP_THRESHOLD = -3  # of mallopt, glibc


def peak_mib(work: Callable[[], object]) -> float:
    """Resident memory that work holds at most, besides what was held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would count as held
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - before


def give_freed_memory_back() -> None:
    """From here on what is freed in pieces of 1 MiB or more is the system's at once: a peak is the work's own, and slower."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)


def _status_mib(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
