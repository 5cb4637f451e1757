"""Memory of a piece of work: resident, from Linux's books, or what torch allocates, from its own."""

import ctypes
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_mib(work: Callable[[], object]) -> float:
    """Resident memory that work holds at most, besides what was held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would count as held
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - before


def peak_allocated_mib(work: Callable[[], object]) -> float:
    """Memory of torch's allocator on the CPU that work holds at most, by the profiler's count: exact, unlike pages."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 2**20


def _status_mib(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
