"""The loss of the global batch: uneven ranks take the steps of one process, under each wrapper that shares the work."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from distseg.config import LossConfig
from distseg.kernels import region_bits
from distseg.losses import BceDiceLoss
from tests import warm

BITS = region_bits({"lung": (1, 2), "infection": (2,)})
LOSSES = {"batch": LossConfig(), "sample": LossConfig(dice_over="sample", absent_regions="skip")}
RANK_BATCHES = (1, 3)  # a rank with little and one with more
N_STEPS, ACCUMULATION, LR = 5, 2, 0.5
Backward = Callable[[torch.Tensor, bool], None]  # (loss, does a step follow?)


def micro_batches(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those of one step, of all ranks."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(ACCUMULATION):
        image = torch.randn(sum(RANK_BATCHES), 1, 6, 6, generator=generator).to(dtype)
        label = torch.randint(0, 3, (sum(RANK_BATCHES), 6, 6), generator=generator).to(torch.uint8)
        label[0].clamp_(max=1)  # the first rank sees no infection
        label[1, :2] = 255
        batches.append((image, label))
    return batches


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1)).to(dtype)


def train(model: nn.Module, loss: str, dtype: torch.dtype, own: slice, backward: Backward) -> list[float]:
    """Losses of the steps; a step's is the mean over its micro-batches."""
    criterion, losses = BceDiceLoss(BITS, LOSSES[loss]), []
    for _ in range(N_STEPS):
        values = []
        for number, (image, label) in enumerate(micro_batches(dtype), start=1):
            terms = criterion(model(image[own]), label[own])
            backward(terms.loss, number == ACCUMULATION)
            values.append(terms.loss.item())
        losses.append(sum(values) / len(values))
    return losses


def stepping(model: nn.Module) -> Backward:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def backward(loss: torch.Tensor, steps: bool) -> None:
        (loss / ACCUMULATION).backward()
        if steps:
            optimizer.step()
            optimizer.zero_grad()

    return backward


def in_one_process(loss: str, dtype: torch.dtype) -> tuple[list[float], torch.Tensor]:
    model = network(dtype)
    return train(model, loss, dtype, slice(None), stepping(model)), flat(model.parameters())


def flat(parameters: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def with_ddp(loss: str, dtype: torch.dtype, own: slice) -> tuple[list[float], torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(network(dtype))
    return train(model, loss, dtype, own, stepping(model)), flat(model.parameters())


def with_fsdp2(loss: str, dtype: torch.dtype, own: slice) -> tuple[list[float], torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model: Any = network(dtype)
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    losses = train(model, loss, dtype, own, stepping(model))
    return losses, flat([p.full_tensor() for p in model.parameters()])


def with_zero(stage: int) -> Callable[[str, torch.dtype, slice], tuple[list[float], torch.Tensor]]:
    def run(loss: str, dtype: torch.dtype, own: slice) -> tuple[list[float], torch.Tensor]:
        import deepspeed

        model = network(dtype)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LR),
            config={
                "train_micro_batch_size_per_gpu": 1,  # only its own bookkeeping
                "gradient_accumulation_steps": ACCUMULATION,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )

        def backward(value: torch.Tensor, steps: bool) -> None:
            engine.backward(value)
            engine.step()

        losses = train(engine, loss, dtype, own, backward)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return losses, flat(model.parameters())

    return run


WRAPPERS = {"ddp": with_ddp, "fsdp2": with_fsdp2} | {f"zero{stage}": with_zero(stage) for stage in (1, 2, 3)}


def dtype_of(wrapper: str) -> torch.dtype:
    return torch.float32 if wrapper.startswith("zero") else torch.float64


def check(folder: Path, wrapper: str, loss: str) -> None:
    dtype = dtype_of(wrapper)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    losses, weights = in_one_process(loss, dtype)
    for rank in range(2):
        rank_losses, rank_weights = torch.load(folder / f"{wrapper}-{loss}-{rank}.pt", weights_only=True)
        assert rank_losses == pytest.approx(losses, abs=tolerance)
        torch.testing.assert_close(rank_weights, weights, rtol=0, atol=tolerance)


@pytest.mark.dist
def test_ddp_and_fsdp2_take_the_steps_of_one_process(tmp_path: Path) -> None:
    warm.run_function(2, run_rank, tmp_path, ["ddp", "fsdp2"], get_free_port())
    for loss in LOSSES:
        check(tmp_path, "ddp", loss)
        check(tmp_path, "fsdp2", loss)


@pytest.mark.dist
@pytest.mark.slow(30)
def test_deepspeed_takes_the_steps_of_one_process(tmp_path: Path) -> None:
    warm.run_function(2, run_rank, tmp_path, ["zero1", "zero2", "zero3"], get_free_port(), timeout=500)
    for stage in (1, 2, 3):
        for loss in LOSSES:
            check(tmp_path, f"zero{stage}", loss)


def run_rank(rank: int, folder: Path, wrappers: list[str], port: int) -> None:
    """One of two ranks; writes its losses and weights."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"DS_ACCELERATOR": "cpu"})
    dist.init_process_group("gloo")
    own = slice(0, RANK_BATCHES[0]) if rank == 0 else slice(RANK_BATCHES[0], None)
    for wrapper in wrappers:
        for loss in LOSSES:
            torch.save(WRAPPERS[wrapper](loss, dtype_of(wrapper), own), folder / f"{wrapper}-{loss}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
