"""Puts a run together: slices, network, strategy, and what an earlier start of it left."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from distseg.config import Config
from distseg.data.pipeline import build_train_loader, build_val_loader
from distseg.data.plan import Plan, Position, repeats_for_share
from distseg.data.store import Store
from distseg.errors import DistsegError
from distseg.kernels import kernel_for, region_bits
from distseg.losses import build_loss
from distseg.models.label_map import LabelMap
from distseg.models.network import build_model, check_input_shape
from distseg.models.norm import synchronise_batch_norm
from distseg.ranks import on_main
from distseg.regions import in_words
from distseg.runs.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint, newest_checkpoint
from distseg.runs.folder import RunFolder
from distseg.runs.progress import Progress
from distseg.runs.trained import start_from_run
from distseg.runs.training_slices import TrainingSlices, training_slices
from distseg.training.data_parallel import DataParallel
from distseg.training.ema import ExponentialMovingAverage
from distseg.training.fsdp2 import FullyShard
from distseg.training.interruption import Interruption
from distseg.training.loop import Trainer
from distseg.training.step_log import StepLog
from distseg.training.step_profile import StepProfile
from distseg.training.watch import Watch
from distseg.training.zero import Zero


def build_trainer(
    config: Config,
    accelerator: Accelerator,
    folder: RunFolder,
    store: Store,
    *,
    interruption: Interruption,
    sharing: str = "ddp",
    resume: bool = False,
) -> Trainer:
    """Everything a run needs, on its device and shared by its ranks. Nothing is written yet.

    Args:
        config, accelerator, folder, store: of the run; the configuration is settled with the store.
        interruption: what tells it to stop.
        sharing: from `strategy_of_launch`.
        resume: go on from the newest complete checkpoint; from the start where there is none.

    Raises:
        DistsegError: the store's labels, fold or slices do not do for the configuration.
    """
    slices = training_slices(config, store)
    plan, val_plan = build_plans(config, slices, accelerator)
    network = _build_network(config, accelerator)
    saved = _newest(accelerator, folder, network) if resume else None
    if saved is not None:
        network.load_state_dict(saved.weights)  # before it is sharded
    strategy = build_strategy(sharing, accelerator, config, network)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ExponentialMovingAverage(strategy.averaged, config.optim.ema_decay)
    if saved is not None:
        _take_up(saved, strategy, ema)
    progress = saved.progress if saved else Progress()
    device, total_steps = accelerator.device, total_steps_of(config, plan, progress)
    region_labels = config.region_labels
    focus_labels = region_labels.get(config.data.focus_region or "", ())
    return Trainer(
        config=config,
        accelerator=accelerator,
        folder=folder,
        strategy=strategy,
        criterion=build_loss(config.loss, list(config.regions), region_bits(region_labels)).to(device),
        ema=ema,
        train_batches=iter(
            build_train_loader(config.data, slices.train, plan, config.seed, device, progress.position, focus_labels)
        ),
        val_batches=iter(build_val_loader(config.data, slices.val, val_plan, device)),
        val_plan=val_plan,
        label_map=LabelMap(region_labels, config.evaluate.threshold).to(device),
        progress=progress,
        total_steps=total_steps,
        writer=CheckpointWriter(),
        log=StepLog(
            accelerator,
            folder,
            regions=list(config.regions),
            progress=progress,
            total_steps=total_steps,
            global_batch=plan.global_batch,
            samples_of=slices.train if config.data.log_samples else None,
        ),
        profile=StepProfile(
            folder.root / "profile", config.train.profiled_steps if accelerator.is_main_process else None
        ),
        watch=Watch(folder.stacks, accelerator.process_index, config.train.timeout_s),
        interruption=interruption,
    )


def build_strategy(kind: str, accelerator: Accelerator, config: Config, network: nn.Module) -> DataParallel:
    """The strategy that the launch asked for, around a network whose weights are loaded."""
    return {"ddp": DataParallel, "fsdp": FullyShard, "deepspeed": Zero}[kind](accelerator, config, network)


def build_plans(config: Config, slices: TrainingSlices, accelerator: Accelerator) -> tuple[Plan, Plan]:
    """What this rank trains on, and what it validates on.

    Raises:
        DistsegError: an epoch has not one step.
    """
    train, rank, world_size = config.train, accelerator.process_index, accelerator.num_processes
    n_train, n_focused = len(slices.train), len(slices.focused)
    plan = Plan(
        n_train,
        batch_size_per_rank=train.batch_size_per_rank,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        accumulation=train.gradient_accumulation_steps,
        last_batch=config.data.last_batch,
        repeated=slices.focused,
        n_repeats=repeats_for_share(n_train, n_focused, config.data.focus_share),
    )
    if plan.steps_left(Position()) == 0:
        raise DistsegError(
            f"train.batch_size_per_rank: got {train.batch_size_per_rank}, a global batch of {plan.global_batch} for "
            f"{n_train} slices; with data.last_batch=drop an epoch needs one whole batch; lower it or use mask"
        )
    val_plan = Plan(len(slices.val), batch_size_per_rank=train.batch_size_per_rank, rank=rank, world_size=world_size)
    return plan, val_plan


def total_steps_of(config: Config, plan: Plan, progress: Progress) -> int:
    """Steps done, those left of this epoch, and whole epochs after it (so also right on another number of ranks)."""
    position, train = progress.position, config.train
    whole_epochs = max(0, train.epochs - position.epoch - 1)
    left = plan.steps_left(position) if position.epoch < train.epochs else 0
    total = progress.step + left + whole_epochs * plan.steps_left(Position())
    return total if train.max_steps is None else min(total, train.max_steps)


def describe_training(trainer: Trainer, slices: TrainingSlices) -> str:
    """Two lines for the user before a long wait: data, model and step, and what is learned."""
    config, ranks = trainer.config, trainer.accelerator
    plan, _ = build_plans(config, slices, ranks)
    parameters = trainer.strategy.count_parameters()
    kernel = kernel_for(ranks.device, wanted=config.loss.kernel)
    return (
        f"{config.model.decoder} on {config.model.encoder}, {parameters / 1e6:.1f} M parameters; "
        f"{len(slices.train)} slices train, {len(slices.val)} validate; {ranks.num_processes} rank(s) on "
        f"{ranks.device.type}, {trainer.strategy.name}, precision {ranks.mixed_precision}, loss kernel {kernel}, "
        f"global batch {plan.global_batch}, {plan.steps_left(Position())} steps an epoch\n"
        f"regions: {in_words(config.region_labels, config.labels)}{'' if config.data.augment.flips else '; images are not flipped'}"
    )


def _take_up(saved: Checkpoint, strategy: DataParallel, ema: ExponentialMovingAverage | None) -> None:
    """What a checkpoint holds beside weights and progress."""
    strategy.load_optimizer_state(saved.state["optimizer"])
    if strategy.accelerator.scaler is not None and "scaler" in saved.state:
        strategy.accelerator.scaler.load_state_dict(saved.state["scaler"])
    if ema is not None and saved.ema is not None:
        ema.average = strategy.averaged_from(saved.ema)


def _build_network(config: Config, accelerator: Accelerator) -> nn.Module:
    torch.manual_seed(config.seed)  # the same first weights on every rank
    network = build_model(config.model, in_channels=config.data.channels, n_regions=len(config.regions))
    if config.model.start_from is not None:
        start_from_run(network, Path(config.model.start_from), config.regions)
    if config.model.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.model.compile:
        network.compile()
    check_input_shape(config.data.image_size, config.data.image_size, network.stride)
    if config.model.norm == "sync_batch" and accelerator.num_processes > 1:
        return synchronise_batch_norm(network, accelerator.device.type)
    return network


def _newest(accelerator: Accelerator, folder: RunFolder, network: nn.Module) -> Checkpoint | None:
    """What rank 0 finds to go on from, on every rank: they might not see a shared disk alike."""
    found = on_main(accelerator, lambda: newest_checkpoint(folder.checkpoints, network.state_dict(), folder.run_id()))
    if found is None:
        return None
    checkpoint = load_checkpoint(found[0])
    if foreign := checkpoint.state["optimizer"].keys() - dict(network.named_parameters()).keys():
        raise DistsegError(
            f"checkpoint: got {found[0]} with optimizer state of {min(foreign)!r}, which is no parameter; it is of an "
            f"earlier distseg; finish the run with that one, or start another with model.start_from={folder.root}"
        )
    return checkpoint
