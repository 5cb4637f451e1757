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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator

from distseg.config import IGNORED_LABEL, Config
from distseg.data.pipeline import Batch, SliceLoader, build_train_loader, build_val_loader
from distseg.data.plan import Plan, Position, repeats_for_share
from distseg.data.store import Slices
from distseg.errors import DistsegError, Stopped
from distseg.kernels import kernel_for, region_targets, sum_over_ranks
from distseg.losses import BceDiceLoss, LossTerms
from distseg.metrics import confusion_counts, mean_defined, scores_from_counts
from distseg.optim import learning_rate, set_learning_rate
from distseg.ranks import on_main
from distseg.runs.checkpoint import Checkpoint, CheckpointWriter, Progress, prune_checkpoints, save_checkpoint
from distseg.runs.folder import RunFolder
from distseg.runs.trained import save_best
from distseg.training.ema import ExponentialMovingAverage
from distseg.training.interruption import Interruption
from distseg.training.step_log import StepLog
from distseg.training.step_profile import StepProfile
from distseg.training.strategy import DataParallel
from distseg.training.watch import Watch


@dataclass
class Trainer:
    """What a run holds while it trains; `fit` is the loop."""

    config: Config
    accelerator: Accelerator
    folder: RunFolder
    strategy: DataParallel
    criterion: BceDiceLoss
    train_slices: Slices
    val_slices: Slices
    focused: np.ndarray
    """training slices that hold data.focus_region"""
    labels: Mapping[str, int]
    """of the store"""
    interruption: Interruption
    ema: ExponentialMovingAverage | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        train, ranks = self.config.train, self.accelerator
        shape = {"batch_size_per_rank": train.batch_size_per_rank, "rank": ranks.process_index}
        shape["world_size"] = ranks.num_processes
        self.plan = Plan(
            len(self.train_slices),
            repeated=self.focused,
            n_repeats=repeats_for_share(len(self.train_slices), len(self.focused), self.config.data.focus_share),
            seed=self.config.seed,
            accumulation=train.gradient_accumulation_steps,
            last_batch=self.config.data.last_batch,
            **shape,
        )
        self.val_plan = Plan(len(self.val_slices), **shape)
        self._val_batches = iter(self._val_loader())
        self.writer = CheckpointWriter()
        self.statistics = self.strategy.statistics()
        self._statistics_before = [tensor.clone() for tensor in self.statistics]
        if self.plan.steps_left(Position()) == 0:
            raise DistsegError(
                f"train.batch_size_per_rank: got {train.batch_size_per_rank}, a global batch of {self.plan.global_batch} for "
                f"{len(self.train_slices)} slices; with data.last_batch=drop an epoch needs one whole batch; lower it or use mask"
            )

    def describe(self) -> str:
        """One line for the user: data, model and step, before a long wait."""
        ranks, plan = self.accelerator, self.plan
        parameters = self.strategy.count_parameters()
        kernel = kernel_for(ranks.device, wanted=self.config.loss.kernel)
        return (
            f"{self.config.model.decoder} on {self.config.model.encoder}, {parameters / 1e6:.1f} M parameters; "
            f"{len(self.train_slices)} slices train, {len(self.val_slices)} validate; {ranks.num_processes} rank(s) on "
            f"{ranks.device.type}, {self.strategy.name}, precision {ranks.mixed_precision}, loss kernel {kernel}, "
            f"global batch {plan.global_batch}, {plan.steps_left(Position())} steps an epoch"
        )

    def fit(self) -> None:
        """Trains to the last step of the configuration, or to the end of patience.

        Raises:
            Stopped: a signal asked for it; the checkpoint is on the disk.
            DistsegError: gradients stay infinite, or the last checkpoint could not be written.
        """
        self.total_steps = self._total_steps()
        batches = iter(self._train_loader())
        self.profile = StepProfile(self.folder.root / "profile", self._profiled_steps())
        self._unchecked = True
        self.watch = Watch(self.folder.stacks, self.accelerator.process_index, self.config.train.timeout_s)
        with contextlib.closing(self.watch), contextlib.closing(StepLog(self, self.total_steps)) as log:
            signum = 0
            while not signum and (self.progress.to_validate or not self._is_done()):
                signum = self._validate(log) if self.progress.to_validate else self._train_step(batches, log)
            if signum:
                self._save(log)
            self.profile.close()
            on_main(self.accelerator, self.writer.close)
            on_main(self.accelerator, log.finish)
        if signum:
            text = on_main(self.accelerator, lambda: self.folder.mark_preempted(signum, self.progress.step))
            raise Stopped(text, signum)

    def _is_done(self) -> bool:
        patience = self.config.train.patience
        ran_out = patience is not None and self.progress.stale_validations >= patience
        return ran_out or self.progress.step >= self.total_steps

    def _train_step(self, batches: Iterator[Batch], log: StepLog) -> int:
        """One optimizer step and what is due after it; gives the signal that asks to stop, if any."""
        step, optim = self.progress.step, self.config.optim
        lr = learning_rate(optim, step, self.total_steps)
        set_learning_rate(self.strategy.optimizer, optim, lr, self.progress.position.epoch)
        self._seed(_step_seed(self.config.seed, self.accelerator.process_index, step))
        self.profile.before(step + 1)
        terms, batch = self._forward_backward(batches, log)
        self.watch.phase = "optimizer step"
        signum = self.interruption.agreed()
        taken = self.strategy.step()
        if not taken:
            torch._foreach_copy_(self.statistics, self._statistics_before)  # a skipped step leaves nothing behind
        if self._unchecked:
            self.strategy.check()
            self._unchecked = False
        if self.ema is not None and taken:
            self.ema.update(step + 1)
        self.profile.after(step + 1)
        ends = batch.plan.position.epoch > batch.plan.epoch or step + 1 == self.total_steps
        self.progress = replace(
            self.progress,
            step=step + 1,
            position=batch.plan.position,
            to_validate=ends,
            score=None,
            skipped_steps=self.progress.skipped_steps + (not taken),
            skipped_in_a_row=0 if taken else self.progress.skipped_in_a_row + 1,
        )
        log.add(terms, batch, lr, taken)
        if ends or step % self.config.train.log_every_steps == self.config.train.log_every_steps - 1:
            log.flush()
        self._check_skipped()
        every = self.config.checkpoint.every_steps
        if every is not None and (step + 1) % every == 0 and not ends and not signum:
            self._save(log)
        return signum

    def _forward_backward(self, batches: Iterator[Batch], log: StepLog) -> tuple[list[LossTerms], Batch]:
        torch._foreach_copy_(self._statistics_before, self.statistics)
        terms = []
        for _ in range(self.config.train.gradient_accumulation_steps):
            self.watch.begin("reading data")
            batch = log.timed_next(batches)
            self.watch.phase = "forward and backward pass"
            with self.strategy.accumulating():
                logits = self.strategy.network(self._image(batch))
                terms.append(self.criterion.over_heads(logits, batch.label_BHW))
                self.strategy.backward(terms[-1].loss)
        return terms, batch

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

    def _validate(self, log: StepLog) -> int:
        """Scores, saves, and keeps the best weights; or gives the signal that came while it scored, and did nothing."""
        self.watch.begin("validation")
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            scored = self._score_val()
        if isinstance(scored, int):
            return scored
        loss, dice = scored
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
        log.add_validation(loss, dice, score)
        self._save(log, is_best or self.config.train.select == "last")
        return 0

    @torch.no_grad()
    def _score_val(self) -> tuple[float, dict[str, float]] | int:
        """Loss and Dice of a region over all pixels of the validation slices, whatever the number of ranks; or a signal."""
        self.strategy.bare.eval()
        device = self.accelerator.device
        totals = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(len(self.criterion.bits), 4, dtype=torch.int64, device=device)
        for _ in range(self.val_plan.steps_left(Position())):
            self.watch.begin("validation")
            batch = next(self._val_batches)
            logits_BRHW = self.strategy.network(self._image(batch))
            totals = totals + self.criterion.totals(logits_BRHW, batch.label_BHW)
            truth_BRHW = region_targets(batch.label_BHW, self.criterion.bits)
            counts += confusion_counts(logits_BRHW >= 0, truth_BRHW, batch.label_BHW != IGNORED_LABEL)
            if signum := self.interruption.agreed():
                return signum
        self.strategy.bare.train()
        loss = self.criterion.terms(sum_over_ranks(totals)).loss.item()
        rows = zip(self.config.regions, sum_over_ranks(counts).tolist(), strict=True)
        return loss, {name: scores_from_counts(row)["dice"] for name, row in rows}

    def _image(self, batch: Batch) -> torch.Tensor:
        order = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        return batch.image_BCHW.contiguous(memory_format=order)

    def _save(self, log: StepLog, is_model: bool = False) -> None:
        """Copies the state, on all ranks, and leaves it to the writer of rank 0; the log of its steps goes first."""
        log.flush()  # a resume from it logs only what comes after
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
                metadata["labels"] = json.dumps(dict(self.labels))
                save_best(folder.best_weights, best, metadata)
            save_checkpoint(folder.checkpoints, checkpoint, folder.run_id())
            prune_checkpoints(folder.checkpoints, checkpoint.progress.step, keep.keep_last, keep.keep_best)

        if self.accelerator.is_main_process:
            self.writer.submit(write)
        log.add_stall(time.perf_counter() - start)

    def _total_steps(self) -> int:
        """Steps done, those left of this epoch, and whole epochs after it (so also right on another number of ranks)."""
        position, train = self.progress.position, self.config.train
        whole_epochs = max(0, train.epochs - position.epoch - 1)
        left = self.plan.steps_left(position) if position.epoch < train.epochs else 0
        total = self.progress.step + left + whole_epochs * self.plan.steps_left(Position())
        return total if train.max_steps is None else min(total, train.max_steps)

    def _profiled_steps(self) -> range | None:
        return self.config.train.profiled_steps if self.accelerator.is_main_process else None

    def _train_loader(self) -> SliceLoader:
        config, device, start = self.config, self.accelerator.device, self.progress.position
        labels = config.regions.get(config.data.focus_region, ())
        return build_train_loader(config.data, self.train_slices, self.plan, config.seed, device, start, labels)

    def _val_loader(self) -> SliceLoader:
        return build_val_loader(self.config.data, self.val_slices, self.val_plan, self.accelerator.device)


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
