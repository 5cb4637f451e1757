"""Puts a run together: slices, network, strategy, and what an earlier start of it left."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from distseg.config import Config
from distseg.data.store import Store
from distseg.errors import DistsegError
from distseg.kernels import region_bits
from distseg.losses import build_loss
from distseg.models.network import build_model, check_input_shape
from distseg.models.norm import synchronise_batch_norm
from distseg.ranks import on_main
from distseg.runs.checkpoint import Checkpoint, Progress, load_checkpoint, newest_checkpoint
from distseg.runs.folder import RunFolder
from distseg.runs.trained import start_from_run
from distseg.runs.training_slices import training_slices
from distseg.training.ema import ExponentialMovingAverage
from distseg.training.interruption import Interruption
from distseg.training.loop import Trainer
from distseg.training.strategy import build_strategy


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
    """Everything a run needs, on its device and shared by its ranks.

    Args:
        config, accelerator, folder, store: of the run.
        interruption: what tells it to stop.
        sharing: from `strategy_of_launch`.
        resume: go on from the newest complete checkpoint; from the start where there is none.

    Raises:
        DistsegError: the store's labels, fold or slices do not do for the configuration.
    """
    slices = training_slices(config, store)
    network = _build_network(config, accelerator)
    saved = _newest(accelerator, folder, network) if resume else None
    if saved is not None:
        network.load_state_dict(saved.weights)  # before it is sharded
    strategy = build_strategy(sharing, accelerator, config, network)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ExponentialMovingAverage(strategy.averaged, config.optim.ema_decay)
    if saved is not None:
        strategy.load_optimizer_state(saved.state["optimizer"])
        if accelerator.scaler is not None and "scaler" in saved.state:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
        if ema is not None and saved.ema is not None:
            ema.average = strategy.averaged_from(saved.ema)
    criterion = build_loss(config.loss, list(config.regions), region_bits(config.regions)).to(accelerator.device)
    progress = saved.progress if saved else Progress()
    return Trainer(
        config,
        accelerator,
        folder,
        strategy,
        criterion,
        slices.train,
        slices.val,
        slices.focused,
        store.labels,
        interruption,
        ema,
        progress,
    )


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
