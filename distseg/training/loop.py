"""The training loop: plain data-parallel steps on Accelerate, validated each epoch, resumable at any step.

A step is an optimizer step, an epoch one pass over the data. All randomness of a step (dropout) comes from a seed made of
(seed, rank, step), so a resumed run is the same run.

Twice a step the host waits for the device: to learn whether a signal came (`Interruption.agreed`), and whether the
gradient is finite (`DataParallel.step`). The loss is read only every train.log_every_steps.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator

from distseg.config import IGNORED_LABEL, Config
from distseg.data.pipeline import Batch
from distseg.data.plan import Plan, Position
from distseg.errors import DistsegError, Stopped
from distseg.kernels import region_targets, sum_over_ranks
from distseg.losses import BceDiceLoss
from distseg.metrics import confusion_counts, mean_defined, scores_from_counts
from distseg.models.label_map import LabelMap
from distseg.optim import learning_rate, set_learning_rate
from distseg.ranks import on_main
from distseg.runs.checkpoint import Checkpoint, CheckpointWriter, prune_checkpoints, save_checkpoint
from distseg.runs.folder import RunFolder
from distseg.runs.progress import Progress
from distseg.runs.trained import save_best
from distseg.training.data_parallel import DataParallel
from distseg.training.ema import ExponentialMovingAverage
from distseg.training.interruption import Interrupted, Interruption
from distseg.training.step_log import StepLog
from distseg.training.step_profile import StepProfile
from distseg.training.watch import Watch


@dataclass
class Trainer:
    """What a run holds while it trains (`build_trainer` makes it); `fit` is the loop."""

    config: Config
    accelerator: Accelerator
    folder: RunFolder
    strategy: DataParallel
    criterion: BceDiceLoss
    ema: ExponentialMovingAverage | None
    train_batches: Iterator[Batch]
    """endless, from `progress.position` on"""
    val_batches: Iterator[Batch]
    """endless, from the first slice on"""
    val_plan: Plan
    progress: Progress
    total_steps: int
    """after which it ends, those done before included"""
    label_map: LabelMap
    """of the regions' probabilities"""
    writer: CheckpointWriter
    log: StepLog
    profile: StepProfile
    watch: Watch
    interruption: Interruption

    def __post_init__(self) -> None:
        self._statistics = self.strategy.statistics()
        self._statistics_before = [tensor.clone() for tensor in self._statistics]
        self._unchecked = True

    def fit(self) -> None:
        """Trains to the last step of the configuration, or to the end of patience.

        Raises:
            Stopped: a signal asked for it; the checkpoint is on the disk.
            DistsegError: gradients stay infinite, or the last checkpoint could not be written.
        """
        signum = None
        with self.watch, self.log:
            try:
                while self.progress.to_validate or not self._is_done():
                    self._validate() if self.progress.to_validate else self._train_step()
            except Interrupted as interrupted:
                signum = interrupted.signum
                self._save()
            self.profile.close()
            on_main(self.accelerator, self.writer.close)
            on_main(self.accelerator, self.log.finish)
        if signum is not None:
            text = on_main(self.accelerator, lambda: self.folder.mark_preempted(signum, self.progress.step))
            raise Stopped(text, signum)

    def _is_done(self) -> bool:
        patience = self.config.train.patience
        ran_out = patience is not None and self.progress.stale_validations >= patience
        return ran_out or self.progress.step >= self.total_steps

    def _train_step(self) -> None:
        """One optimizer step, and what is due after it.

        Raises:
            Interrupted: a signal came; the step is done.
        """
        step, optim = self.progress.step, self.config.optim
        lr = learning_rate(optim, step, self.total_steps)
        set_learning_rate(self.strategy.optimizer, optim, lr, self.progress.position.epoch)
        self._seed(_step_seed(self.config.seed, self.accelerator.process_index, step))
        self.profile.before(step + 1)
        torch._foreach_copy_(self._statistics_before, self._statistics)
        terms = []
        for _ in range(self.config.train.gradient_accumulation_steps):
            self.watch.begin("reading data")
            batch = self.log.timed_next(self.train_batches)
            self.watch.phase = "forward and backward pass"
            with self.strategy.accumulating():
                logits = self.strategy.network(self._image(batch))
                terms.append(self.criterion.over_heads(logits, batch.label_BHW))
                self.strategy.backward(terms[-1].loss)
        self.watch.phase = "optimizer step"
        signum = self.interruption.agreed()
        taken = self.strategy.step()
        self._after(step + 1, taken)
        self._advance(batch, taken)
        self.log.add(terms, batch, lr, taken)
        if (
            self.progress.to_validate
            or step % self.config.train.log_every_steps == self.config.train.log_every_steps - 1
        ):
            self.log.flush()
        self._check_skipped()
        if signum:
            raise Interrupted(signum)
        every = self.config.checkpoint.every_steps
        if every is not None and (step + 1) % every == 0 and not self.progress.to_validate:
            self._save()

    def _after(self, step: int, taken: bool) -> None:
        """What follows the weights: batch statistics, the check of the first step, the moving average, the profile."""
        if not taken:
            torch._foreach_copy_(self._statistics, self._statistics_before)  # a skipped step leaves nothing behind
        if self._unchecked:
            self.strategy.check()
            self._unchecked = False
        if self.ema is not None and taken:
            self.ema.update(step)
        self.profile.after(step)

    def _advance(self, batch: Batch, taken: bool) -> None:
        done, ended = self.progress, batch.plan.position.epoch > batch.plan.epoch
        self.progress = replace(
            done,
            step=done.step + 1,
            position=batch.plan.position,
            to_validate=ended or done.step + 1 == self.total_steps,
            score=None,
            skipped_steps=done.skipped_steps + (not taken),
            skipped_in_a_row=0 if taken else done.skipped_in_a_row + 1,
        )

    def _seed(self, seed: int) -> None:
        """As `torch.manual_seed`, without the half millisecond in which that formats a stack for devices that are not there."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _check_skipped(self) -> None:
        in_a_row, most = self.progress.skipped_in_a_row, self.config.train.max_skipped_steps
        if in_a_row >= most:
            raise DistsegError(
                f"loss: got {in_a_row} steps in a row, to step {self.progress.step}, whose loss or gradient is not finite; "
                f"at most {most - 1} are skipped; lower optim.lr, set optim.max_grad_norm, or launch with mixed_precision no "
                "or bf16, and start again from a checkpoint of before"
            )

    def _validate(self) -> None:
        """Scores, saves, and keeps the best weights.

        Raises:
            Interrupted: a signal came while it scored; the validation is still due.
        """
        self.watch.begin("validation")
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            loss, dice = self._score_val()
        score = mean_defined(list(dice.values()))
        known = None if math.isnan(score) else score
        best = self.progress.best_score
        is_best = known is not None and (best is None or known > best)
        self.progress = replace(
            self.progress,
            to_validate=False,
            score=known,
            best_score=known if is_best else best,
            best_step=self.progress.step if is_best else self.progress.best_step,
            stale_validations=0 if is_best else self.progress.stale_validations + 1,
        )
        self.log.add_validation(self.progress, loss, dice, score)
        self._save(is_best or self.config.train.select == "last")

    @torch.no_grad()
    def _score_val(self) -> tuple[float, dict[str, float]]:
        """Loss, and Dice of a region of the label map over all pixels of the validation slices, whatever the number of ranks."""
        self.strategy.bare.eval()
        device = self.accelerator.device
        totals = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(len(self.criterion.bits), 4, dtype=torch.int64, device=device)
        for _ in range(self.val_plan.steps_left(Position())):
            self.watch.begin("validation")
            batch = next(self.val_batches)
            logits_BRHW = self.strategy.network(self._image(batch))
            totals = totals + self.criterion.totals(logits_BRHW, batch.label_BHW)
            truth_BRHW = region_targets(batch.label_BHW, self.criterion.bits)
            # As scored and served: a region that another one beats or covers has not found its pixels.
            mask_BHW = self.label_map(torch.sigmoid(logits_BRHW.float()))[:, 0]
            found_BRHW = region_targets(mask_BHW, self.criterion.bits)
            counts += confusion_counts(found_BRHW, truth_BRHW, batch.label_BHW != IGNORED_LABEL)
            if signum := self.interruption.agreed():
                raise Interrupted(signum)
        self.strategy.bare.train()
        loss = self.criterion.terms(sum_over_ranks(totals)).loss.item()
        rows = zip(self.config.regions, sum_over_ranks(counts).tolist(), strict=True)
        return loss, {name: scores_from_counts(row)["dice"] for name, row in rows}

    def _image(self, batch: Batch) -> torch.Tensor:
        order = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        return batch.image_BCHW.contiguous(memory_format=order)

    def _save(self, is_model: bool = False) -> None:
        """Copies the state, on all ranks, and leaves it to the writer of rank 0; the log of its steps goes first."""
        self.log.flush()  # a resume from it logs only what comes after
        self.watch.begin("copying a checkpoint")
        start = time.perf_counter()
        self.writer.wait()  # so that at most one copy is in memory
        weights, state, ema = self.strategy.weights(), {"optimizer": self.strategy.optimizer_state()}, None
        if self.ema is not None:
            with self.ema.applied():
                ema = self.strategy.weights()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the copies
        checkpoint, folder, keep = Checkpoint(self.progress, weights, state, ema), self.folder, self.config.checkpoint
        best = ema if ema is not None else weights

        def write() -> None:
            if is_model:
                score = checkpoint.progress.score
                metadata = {
                    "step": str(checkpoint.progress.step),
                    "mean_dice": "-" if score is None else f"{score:.6f}",
                }
                metadata["labels"] = json.dumps(dict(self.config.labels))
                save_best(folder.best_weights, best, metadata)
            save_checkpoint(folder.checkpoints, checkpoint, folder.run_id())
            prune_checkpoints(folder.checkpoints, checkpoint.progress.step, keep.keep_last, keep.keep_best)

        if self.accelerator.is_main_process:
            self.writer.submit(write)
        self.log.add_stall(time.perf_counter() - start)


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
