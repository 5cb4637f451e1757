"""What is seen of a training run while it runs: progress bar or lines, metrics.jsonl, trackers, the sample log."""

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from distseg.data.pipeline import Batch
from distseg.data.store import Slices
from distseg.errors import DistsegError
from distseg.losses import LossTerms
from distseg.metrics import none_if_undefined
from distseg.runs.folder import RunFolder
from distseg.runs.progress import Progress
from distseg.tables import append_rows
from distseg.training.trackers import Trackers

logger = logging.getLogger(__name__)


class StepLog:
    """Progress bar (lines where there is no terminal), metrics.jsonl, trackers, samples; one device synchronisation a flush.

    It counts steps as they are added. Nothing is shown or written before it is entered.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        regions: Sequence[str],
        progress: Progress,
        total_steps: int,
        global_batch: int,
        samples_of: Slices | None = None,
    ):
        """
        Args:
            accelerator, folder: of the run.
            regions: names, in the order of the loss's Dice.
            progress: where the run stands.
            total_steps: where it will end.
            global_batch: slices of an optimizer step.
            samples_of: the training slices, to note which were given (`data.log_samples`); None: they are not noted.
        """
        self.accelerator, self.folder = accelerator, folder
        self.regions, self.global_batch, self._samples_of = tuple(regions), global_batch, samples_of
        self.main = accelerator.is_main_process
        self._step = self._first_step = progress.step
        self._skipped, self._total_steps = progress.skipped_steps, total_steps
        self._waiting: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._data_wait_s = self._stall_s = 0.0

    def __enter__(self) -> "StepLog":
        self.trackers = Trackers(self.accelerator, self.folder, self._step)
        self.bar = tqdm(
            total=self._total_steps,
            initial=self._step,
            desc="train",
            unit="step",
            # A bar in a log file is one endless line, into which other ranks print: None is "only on a terminal".
            disable=None if self.main else True,
            smoothing=0.1,
        )
        self._plain = self.main and self.bar.disable
        self._start = self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it was waited for is logged, and its samples where data.log_samples says so."""
        start = time.perf_counter()
        batch = next(batches)
        self._data_wait_s += time.perf_counter() - start
        if self._samples_of is not None:
            ids = [self._samples_of[index].id for index in batch.plan.indices[: batch.plan.n_real]]
            append_samples(self.folder.samples(self.accelerator.process_index), self._step + 1, batch, ids)
        return batch

    def add_stall(self, seconds: float) -> None:
        """Notes how long a checkpoint held the loop."""
        self._stall_s += seconds

    def add(self, terms: Sequence[LossTerms], batch: Batch, lr: float, taken: bool) -> None:
        """Notes a step, the next one; its figures stay on the device until the next flush."""
        self._step += 1
        self._skipped += not taken
        row = {"step": self._step, "epoch": batch.plan.epoch, "split": "train", "lr": lr}
        figures = torch.stack([torch.cat([t.loss.view(1), t.bce.view(1), t.dice_R]) for t in terms]).mean(dim=0)
        self._waiting.append((row if taken else row | {"skipped": True}, figures.detach()))
        self.bar.update()

    def flush(self) -> None:
        if not self._waiting:
            return
        figures = torch.stack([figures for _, figures in self._waiting]).tolist()  # waits for the device
        elapsed_s = time.perf_counter() - self._since
        speed = len(self._waiting) * self.global_batch / elapsed_s
        shares = {"data_wait": self._data_wait_s / elapsed_s, "checkpoint_wait": self._stall_s / elapsed_s}
        rows = []
        for (row, _), (loss, bce, *dice) in zip(self._waiting, figures, strict=True):
            named = zip(self.regions, map(none_if_undefined, dice), strict=True)
            row |= {"loss": none_if_undefined(loss), "bce": none_if_undefined(bce), "dice": dict(named)}
            rows.append(row | {"slices_per_s": speed} | shares)
        self._waiting, self._data_wait_s, self._stall_s, self._since = [], 0.0, 0.0, time.perf_counter()
        self._write(rows)
        last_loss, _, *last_dice = figures[-1]
        shown = " ".join(f"{name} {dice:.3f}" for name, dice in zip(self.regions, last_dice, strict=True))
        shown += f", {speed:.1f} slices/s, data wait {shares['data_wait']:.0%}{self._memory()}"
        if self._skipped:
            shown += f", {self._skipped} skipped"
        shown = f"loss {last_loss:.4f}, Dice {shown}"
        self.bar.set_postfix_str(shown, refresh=False)
        if self._plain:
            print(f"step {rows[-1]['step']}/{self._total_steps}  {shown}, {self._time_left()} left", file=sys.stderr)

    def add_validation(self, progress: Progress, loss: float, dice: dict[str, float], mean_dice: float) -> None:
        # The epoch that was validated: the plan's position may already be at the next one's start.
        epoch = progress.position.epoch - (progress.position.samples == 0)
        defined = {name: none_if_undefined(value) for name, value in dice.items()}
        row = {"step": progress.step, "epoch": epoch, "split": "val", "loss": none_if_undefined(loss), "dice": defined}
        self._write([row | {"mean_dice": none_if_undefined(mean_dice)}])
        if self.main:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in dice.items())
            self.bar.write(f"epoch {epoch}  step {progress.step}  val loss {loss:.4f}  Dice {shown}")
        self._since = time.perf_counter()  # validation is not training time

    def finish(self) -> None:
        """Writes what a full disk kept from being written.

        Raises:
            DistsegError: it still cannot be.
        """
        self._write([])
        if self._unwritten:
            raise DistsegError(
                f"metrics: got {len(self._unwritten)} lines that could not be written to {self.folder.metrics}; "
                "all must be; make room and start again with --resume"
            )

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self.main:
            return
        self.trackers.log(rows)
        self._unwritten += rows
        try:
            self.folder.append_metrics(self._unwritten)
            validated = any(row["split"] == "val" for row in self._unwritten)
            self._unwritten = []
            if validated:
                self.folder.write_score_list()
        except OSError as error:
            logger.warning("metrics: not written (%s); kept in memory, training goes on", error)

    def _time_left(self) -> str:
        """At the pace since the start, validation and checkpoints included."""
        pace_s = (time.perf_counter() - self._start) / (self._step - self._first_step)
        return str(timedelta(seconds=round(pace_s * (self._total_steps - self._step))))

    def _memory(self) -> str:
        device = self.accelerator.device
        return f", GPU {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""


def append_samples(path: Path, step: int, batch: Batch, ids: list[str]) -> None:
    """One line a sample that counts: where it was used and a digest of the image and label it was."""
    images, labels = batch.image_BCHW.cpu().numpy(), batch.label_BHW.cpu().numpy()
    append_rows(
        path,
        (
            {
                "epoch": batch.plan.epoch,
                "step": step,
                "sample": name,
                "sha256": hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest(),
            }
            for name, image, label in zip(ids, images, labels, strict=False)
        ),
    )
