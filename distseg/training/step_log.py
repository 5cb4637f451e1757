"""What is seen of a training run while it runs: progress bar, metrics.jsonl, trackers, the sample log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from distseg.data.pipeline import Batch
from distseg.errors import DistsegError
from distseg.losses import LossTerms
from distseg.metrics import none_if_undefined

if TYPE_CHECKING:
    from distseg.training.loop import Trainer


class StepLog:
    """Progress bar, metrics.jsonl, trackers and the sample log; one device synchronisation a flush."""

    def __init__(self, trainer: Trainer, total_steps: int):
        self.trainer = trainer
        self.main = trainer.accelerator.is_main_process
        self.bar = tqdm(
            total=total_steps,
            initial=trainer.progress.step,
            desc="train",
            unit="step",
            disable=not self.main,
            smoothing=0.1,
        )
        self._waiting: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._wait_s = 0.0
        self._since = time.perf_counter()

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it was waited for is logged, and its samples where data.log_samples says so."""
        start = time.perf_counter()
        batch = next(batches)
        self._wait_s += time.perf_counter() - start
        trainer = self.trainer
        if trainer.config.data.log_samples:
            ids = [trainer.train_slices[index].id for index in batch.plan.indices[: batch.plan.n_real]]
            trainer.folder.append_samples(trainer.accelerator.process_index, trainer.progress.step + 1, batch, ids)
        return batch

    def add(self, terms: Sequence[LossTerms], batch: Batch) -> None:
        """Notes a step; its figures stay on the device until the next flush."""
        row = {"step": self.trainer.progress.step, "epoch": batch.plan.epoch, "split": "train"}
        row["lr"] = self.trainer.strategy.optimizer.param_groups[0]["lr"]
        figures = torch.stack([torch.cat([t.loss.view(1), t.bce.view(1), t.dice_R]) for t in terms]).mean(dim=0)
        self._waiting.append((row, figures.detach()))
        self.bar.update()

    def flush(self) -> None:
        if not self._waiting:
            return
        figures = torch.stack([figures for _, figures in self._waiting]).tolist()  # waits for the device
        elapsed_s = time.perf_counter() - self._since
        speed = len(self._waiting) * self.trainer.plan.global_batch / elapsed_s
        rows = []
        for (row, _), (loss, bce, *dice) in zip(self._waiting, figures, strict=True):
            named = zip(self.trainer.config.regions, map(none_if_undefined, dice), strict=True)
            row |= {"loss": none_if_undefined(loss), "bce": none_if_undefined(bce), "dice": dict(named)}
            rows.append(row | {"slices_per_s": speed, "data_wait": self._wait_s / elapsed_s})
        self._waiting, self._wait_s, self._since = [], 0.0, time.perf_counter()
        self._write(rows)
        last_loss, _, *last_dice = figures[-1]
        if not math.isfinite(last_loss):  # before its weights are saved; all ranks have the same loss
            raise DistsegError(
                f"loss: got {last_loss} at step {rows[-1]['step']}; it must stay finite; lower optim.lr or set "
                "optim.max_grad_norm, and start again from the last checkpoint, which is from before"
            )
        shown = " ".join(f"{name} {dice:.3f}" for name, dice in zip(rows[-1]["dice"], last_dice, strict=True))
        self.bar.set_postfix_str(f"loss {last_loss:.4f}, Dice {shown}, {speed:.1f} slices/s", refresh=False)

    def add_validation(self, loss: float, dice: dict[str, float], mean_dice: float) -> None:
        progress = self.trainer.progress
        # The epoch that was validated: the plan's position may already be at the next one's start.
        epoch = progress.position.epoch - (progress.position.samples == 0)
        defined = {name: none_if_undefined(value) for name, value in dice.items()}
        row = {"step": progress.step, "epoch": epoch, "split": "val", "loss": none_if_undefined(loss), "dice": defined}
        self._write([row | {"mean_dice": none_if_undefined(mean_dice)}])
        if self.main:
            self.trainer.folder.write_score_list()
            shown = ", ".join(f"{name} {value:.4f}" for name, value in dice.items())
            self.bar.write(f"epoch {epoch}  step {progress.step}  val loss {loss:.4f}  Dice {shown}")
        self._since = time.perf_counter()  # validation is not training time

    def close(self) -> None:
        self.bar.close()

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        if not self.main:
            return
        self.trainer.folder.append_metrics(rows)
        for row in rows:
            split = row["split"]
            values = {f"{split}/{key}": row[key] for key in ("loss", "bce", "lr", "slices_per_s") if key in row}
            values |= {f"{split}/dice/{name}": value for name, value in row["dice"].items()}
            known = {name: value for name, value in values.items() if value is not None}
            self.trainer.accelerator.log(known, step=row["step"])
