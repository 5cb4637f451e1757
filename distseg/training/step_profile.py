"""torch's profiler around a few steps of rank 0 (`train.profile=steps:10-20`)."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TABLE_ROWS = 15


class StepProfile:
    """Watches optimizer steps `steps` (counted from 1) if told to; RUN/profile/ gets a trace for chrome://tracing."""

    def __init__(self, folder: Path, steps: range | None) -> None:
        self.folder, self.steps = folder, steps
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        if self.steps and step == self.steps.start:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        if self._profile is not None and self.steps and step == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what there is, also where the run ended before the last of the steps."""
        if self._profile is None:
            return
        watched, self._profile = self._profile, None
        watched.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        watched.export_chrome_trace(str(trace))
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(f"{trace}\n{watched.key_averages().table(sort_by=key, row_limit=TABLE_ROWS)}", flush=True)
