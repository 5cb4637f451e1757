"""The training loop: plain data-parallel steps on Accelerate, validated each epoch, resumable at any step.

A step is an optimizer step, an epoch one pass over the data. All randomness of a step (dropout) comes from a seed made of
(seed, rank, step), so a resumed run is the same run.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from distseg.config import IGNORED_LABEL, Config
from distseg.data.pipeline import Batch, SliceLoader, build_train_loader, build_val_loader
from distseg.data.plan import Plan, Position, repeats_for_share
from distseg.data.store import Slices, Store
from distseg.errors import DistsegError
from distseg.kernels import kernel_for, region_bits, region_targets, sum_over_ranks
from distseg.losses import BceDiceLoss, LossTerms, build_loss
from distseg.metrics import confusion_counts, mean_defined, scores_from_counts
from distseg.models import build_model
from distseg.models.network import check_input_shape
from distseg.models.norm import synchronise_batch_norm
from distseg.optim import learning_rate, set_learning_rate
from distseg.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from distseg.training.run_folder import RunFolder, save_best, start_from_run
from distseg.training.step_log import StepLog
from distseg.training.strategy import DataParallel, build_strategy


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
        if self.plan.steps_left(Position()) == 0:
            raise DistsegError(
                f"train.batch_size_per_rank: got {train.batch_size_per_rank}, a global batch of {self.plan.global_batch} for "
                f"{len(self.train_slices)} slices; with data.last_batch=drop an epoch needs one whole batch; lower it or use mask"
            )

    def describe(self) -> str:
        """One line for the user: data, model and step, before a long wait."""
        ranks, plan = self.accelerator, self.plan
        parameters = sum(p.numel() for p in self.strategy.bare.parameters())  # of shards too, their whole size
        kernel = kernel_for(ranks.device, wanted=self.config.loss.kernel)
        return (
            f"{self.config.model.decoder} on {self.config.model.encoder}, {parameters / 1e6:.1f} M parameters; "
            f"{len(self.train_slices)} slices train, {len(self.val_slices)} validate; {ranks.num_processes} rank(s) on "
            f"{ranks.device.type}, {self.strategy.name}, precision {ranks.mixed_precision}, loss kernel {kernel}, global batch {plan.global_batch}, "
            f"{plan.steps_left(Position())} steps an epoch"
        )

    def fit(self) -> None:
        """Trains to the last step of the configuration."""
        total_steps = self._total_steps()
        batches = iter(self._train_loader())
        log = StepLog(self, total_steps)
        first = self.progress.step
        while self.progress.step < total_steps:
            step = self.progress.step
            lr = learning_rate(self.config.optim, step, total_steps)
            set_learning_rate(self.strategy.optimizer, self.config.optim, lr, self.progress.position.epoch)
            torch.manual_seed(_step_seed(self.config.seed, self.accelerator.process_index, step))
            terms, batch = self._optimizer_step(batches, log)
            if step == first:
                self.strategy.check()
            self.progress = replace(self.progress, step=step + 1, position=batch.plan.position)
            log.add(terms, batch)
            self._after_step(
                log, epoch_ended=batch.plan.position.epoch > batch.plan.epoch, last=step + 1 == total_steps
            )
        log.close()

    def _optimizer_step(self, batches: Iterator[Batch], log: StepLog) -> tuple[list[LossTerms], Batch]:
        terms = []
        for _ in range(self.config.train.gradient_accumulation_steps):
            batch = log.timed_next(batches)
            with self.strategy.accumulating():
                logits = self.strategy.network(self._image(batch))
                terms.append(self.criterion.over_heads(logits, batch.label_BHW))
                self.strategy.backward(terms[-1].loss)
        return terms, batch

    def _after_step(self, log: StepLog, *, epoch_ended: bool, last: bool) -> None:
        every = self.config.checkpoint.every_steps
        step = self.progress.step
        validates = epoch_ended or last
        saves = validates or (every is not None and step % every == 0)
        if saves or step % self.config.train.log_every_steps == 0:
            log.flush()
        is_best = validates and self._validate(log)
        if saves:
            self._save(is_best)

    def _validate(self, log: StepLog) -> bool:
        """Whether the validation slices' mean Dice is the best so far."""
        loss, dice = self._score_val()
        score = mean_defined(list(dice.values()))
        log.add_validation(loss, dice, score)
        if math.isnan(score) or (self.progress.best_score is not None and score <= self.progress.best_score):
            return False
        self.progress = replace(self.progress, best_score=score, best_step=self.progress.step)
        return True

    @torch.no_grad()
    def _score_val(self) -> tuple[float, dict[str, float]]:
        """Loss and Dice of a region over all pixels of the validation slices, whatever the number of ranks."""
        self.strategy.bare.eval()
        device = self.accelerator.device
        totals = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(len(self.criterion.bits), 4, dtype=torch.int64, device=device)
        for _ in range(self.val_plan.steps_left(Position())):
            batch = next(self._val_batches)
            logits_BRHW = self.strategy.network(self._image(batch))
            totals = totals + self.criterion.totals(logits_BRHW, batch.label_BHW)
            truth_BRHW = region_targets(batch.label_BHW, self.criterion.bits)
            counts += confusion_counts(logits_BRHW >= 0, truth_BRHW, batch.label_BHW != IGNORED_LABEL)
        self.strategy.bare.train()
        loss = self.criterion.terms(sum_over_ranks(totals)).loss.item()
        rows = zip(self.config.regions, sum_over_ranks(counts).tolist(), strict=True)
        return loss, {name: scores_from_counts(row)["dice"] for name, row in rows}

    def _image(self, batch: Batch) -> torch.Tensor:
        order = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        return batch.image_BCHW.contiguous(memory_format=order)

    def _save(self, is_best: bool) -> None:
        weights, state = self.strategy.weights(), {"optimizer": self.strategy.optimizer_state()}
        if self.accelerator.is_main_process:
            if is_best:
                metadata = {"step": str(self.progress.step), "mean_dice": f"{self.progress.best_score:.6f}"}
                metadata["labels"] = json.dumps(dict(self.labels))
                save_best(self.folder.best_weights, weights, metadata)
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            keep = self.config.checkpoint.keep_last
            save_checkpoint(self.folder.checkpoints, self.progress, weights, state, keep)

    def _total_steps(self) -> int:
        """Steps done, those left of this epoch, and whole epochs after it (so also right on another number of ranks)."""
        position, train = self.progress.position, self.config.train
        whole_epochs = max(0, train.epochs - position.epoch - 1)
        left = self.plan.steps_left(position) if position.epoch < train.epochs else 0
        total = self.progress.step + left + whole_epochs * self.plan.steps_left(Position())
        return total if train.max_steps is None else min(total, train.max_steps)

    def _train_loader(self) -> SliceLoader:
        config, device, start = self.config, self.accelerator.device, self.progress.position
        labels = config.regions.get(config.data.focus_region, ())
        return build_train_loader(config.data, self.train_slices, self.plan, config.seed, device, start, labels)

    def _val_loader(self) -> SliceLoader:
        return build_val_loader(self.config.data, self.val_slices, self.val_plan, self.accelerator.device)


def build_trainer(
    config: Config,
    accelerator: Accelerator,
    folder: RunFolder,
    store: Store,
    *,
    sharing: str = "ddp",
    resume: bool = False,
) -> Trainer:
    """Everything a run needs, on its device and shared by its ranks.

    Args:
        config, accelerator, folder, store: of the run.
        sharing: from `strategy_of_launch`.
        resume: go on from the newest complete checkpoint; from the start where there is none.

    Raises:
        DistsegError: the store's labels, fold or slices do not do for the configuration.
    """
    _check_labels(config, store)
    leaky_seed = config.seed if config.data.leaky_slice_split else None
    train, val = (store.slices_of_split(split, config.data.fold, leaky_seed) for split in ("train", "val"))
    held = {name: train.holding(_label_names(store, labels)) for name, labels in config.regions.items()}
    if nowhere := [name for name, found in held.items() if not len(found)]:
        raise DistsegError(
            f"regions.{nowhere[0]}: got no training slice of {store.root}, fold {config.data.fold}, that holds it; the "
            "network could not learn it; leave the region out or choose another data.fold"
        )
    focused = held.get(config.data.focus_region, np.empty(0, np.int64))
    torch.manual_seed(config.seed)  # the same first weights on every rank
    network = build_model(config.model, in_channels=config.data.channels, n_regions=len(config.regions))
    if config.model.start_from is not None:
        start_from_run(network, Path(config.model.start_from))
    if config.model.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.model.compile:
        network.compile()
    check_input_shape(config.data.image_size, config.data.image_size, network.stride)
    if config.model.norm == "sync_batch" and accelerator.num_processes > 1:
        synchronised = synchronise_batch_norm(network, accelerator.device.type)
    else:
        synchronised = network
    found = newest_checkpoint(folder.checkpoints) if resume else None
    progress = Progress()
    saved: dict[str, Any] = {}
    if found is not None:
        weights, saved = load_checkpoint(found[0])
        progress = found[1]
        if foreign := saved["optimizer"].keys() - dict(synchronised.named_parameters()).keys():
            raise DistsegError(
                f"checkpoint: got {found[0]} with optimizer state of {min(foreign)!r}, which is no parameter; it is of an "
                f"earlier distseg; finish the run with that one, or start another with model.start_from={folder.root}"
            )
        synchronised.load_state_dict(weights)  # before it is sharded
    strategy = build_strategy(sharing, accelerator, config, synchronised)
    strategy.load_optimizer_state(saved.get("optimizer", {}))
    if accelerator.scaler is not None and "scaler" in saved:
        accelerator.scaler.load_state_dict(saved["scaler"])
    criterion = build_loss(config.loss, list(config.regions), region_bits(config.regions)).to(accelerator.device)
    return Trainer(config, accelerator, folder, strategy, criterion, train, val, focused, store.labels, progress)


def _check_labels(config: Config, store: Store) -> None:
    known = set(store.labels.values())
    for name, labels in config.regions.items():
        if unknown := sorted(set(labels) - known):
            raise DistsegError(
                f"regions.{name}: got label {unknown[0]}; {store.root} has {dict(store.labels)}; choose from them"
            )


def _label_names(store: Store, labels: Sequence[int]) -> list[str]:
    return [name for name, number in store.labels.items() if number in labels]


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
