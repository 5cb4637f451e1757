"""Batch norm over ranks: two CPU processes against one with the images of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from distseg.errors import DistsegError
from distseg.models.encoder import TimmEncoder
from distseg.models.norm import SyncBatchNorm2d, synchronise_batch_norm
from tests import warm

BATCHES = (3, 1)  # images of each rank


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.Conv2d(6, 5, 3),
        BatchNormAct2d(5, eps=1e-3, act_layer=nn.SiLU),
        nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model.double()  # a bias before a norm has no gradient but rounding: in float32 that reaches 3e-5


def make_images() -> tuple[Tensor, Tensor]:
    """Images of unlike content for the two ranks, one after the other, and what their logits are weighted with."""
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(sum(BATCHES), 2, 9, 8, generator=generator, dtype=torch.float64)
    image_BCHW[: BATCHES[0]] = image_BCHW[: BATCHES[0]] * 3 + 5
    return image_BCHW, torch.randn(sum(BATCHES), 4, 5, 4, generator=generator, dtype=torch.float64)


def two_steps(model: nn.Module, image_BCHW: Tensor, weight_BRHW: Tensor) -> dict[str, Any]:
    """Two forward passes in training, the backward of the second, and one pass in eval."""
    image_BCHW = image_BCHW.clone().requires_grad_()
    model.train()(image_BCHW + 1)
    output = model(image_BCHW)
    (output * weight_BRHW).sum().backward()
    return {
        "output": output.detach(),
        "input_grad": image_BCHW.grad,
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "state": model.state_dict(),
        "eval": model.eval()(image_BCHW).detach(),
    }


def far_from_zero() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) + 1000


def run_rank(rank: int, folder: Path) -> None:
    """One of two ranks: computes on its own images, writes what it found."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        own = slice(0, BATCHES[0]) if rank == 0 else slice(BATCHES[0], None)
        image_BCHW, weight_BRHW = make_images()
        found = two_steps(synchronise_batch_norm(make_model(), "cpu"), image_BCHW[own], weight_BRHW[own])
        found["far"] = SyncBatchNorm2d(3)(far_from_zero()[2 * rank : 2 * rank + 2]).detach()
        half = image_BCHW[own].bfloat16().requires_grad_()
        half_output = SyncBatchNorm2d(2)(half)
        half_output.float().square().sum().backward()
        found["half"] = [half_output.detach(), half.grad]
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_match_one_process_with_the_images_of_both(tmp_path: Path) -> None:
    warm.run_function(2, run_rank, tmp_path)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    expected = two_steps(make_model(), *make_images())

    def assert_close(actual: Any, wanted: Any) -> None:
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)

    for key in ("output", "input_grad", "eval"):
        assert_close(torch.cat([of_rank[key] for of_rank in found]), expected[key])
    for name, wanted in expected["grads"].items():
        assert_close(found[0]["grads"][name] + found[1]["grads"][name], wanted)
    for of_rank in found:
        assert_close(of_rank["state"], dict(expected["state"]))
    assert all(torch.equal(found[0]["state"][k], v) for k, v in found[1]["state"].items()), "ranks drifted apart"

    far = nn.BatchNorm2d(3).double()(far_from_zero().double()).float()
    torch.testing.assert_close(torch.cat([of_rank["far"] for of_rank in found]), far, rtol=0, atol=1e-3)
    assert all(tensor.dtype == torch.bfloat16 for of_rank in found for tensor in of_rank["half"])


def test_one_process_without_a_group_is_plain_batch_norm() -> None:
    plain = two_steps(make_model(), *make_images())
    synchronised = two_steps(synchronise_batch_norm(make_model(), "cpu"), *make_images())
    for key in ("output", "input_grad", "eval"):
        assert torch.equal(plain[key], synchronised[key])
    assert all(torch.equal(value, synchronised["state"][key]) for key, value in plain["state"].items())


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_batch_norm_is_swapped_and_names_and_values_stay(device_type: str) -> None:
    model = TimmEncoder("tf_efficientnet_lite0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model = synchronise_batch_norm(model, device_type)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    kinds = (SyncBatchNorm2d,) if device_type == "cpu" else (nn.SyncBatchNorm,)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, kinds) for norm in norms)


def test_another_device_is_refused() -> None:
    with pytest.raises(DistsegError, match="device: got 'xpu'"):
        synchronise_batch_norm(nn.BatchNorm2d(2), "xpu")
