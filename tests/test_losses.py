"""BCE + Dice: values, what empty regions and ignored pixels do, and the global batch over ranks."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distseg.kernels import region_bits
from distseg.losses import BceDiceLoss

BITS = region_bits({"lung": (1, 2), "infection": (2,)})
RANK_BATCHES = (1, 3)  # a rank with little and one with more


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(sum(RANK_BATCHES), 1, 6, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (sum(RANK_BATCHES), 6, 6), generator=generator).to(torch.uint8)
    label[0].clamp_(max=1)  # the first rank sees no infection
    label[1, :2] = 255
    return image, label


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 2, 1)).double()


def five_steps(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Losses and final weights of five steps of gradient descent."""
    criterion, optimizer = BceDiceLoss(BITS), torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        terms = criterion(model(image), label)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_perfect_prediction_has_almost_no_loss_and_the_opposite_almost_two_terms() -> None:
    label = torch.randint(0, 3, (2, 8, 8)).to(torch.uint8)
    truth = torch.stack([label > 0, label == 2], dim=1)
    perfect = BceDiceLoss(BITS)(torch.where(truth, 20.0, -20.0), label)
    wrong = BceDiceLoss(BITS)(torch.where(truth, -20.0, 20.0), label)
    assert perfect.loss < 1e-3 and perfect.dice_R.min() > 0.999
    assert wrong.bce == pytest.approx(20, rel=1e-3) and wrong.dice_R.max() < 0.05


def test_a_false_positive_on_an_empty_region_has_a_gradient() -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    BceDiceLoss(BITS, bce_weight=0)(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).loss.backward()
    assert logits.grad is not None and bool((logits.grad > 0).all())


def test_ignored_pixels_change_neither_loss_nor_gradient() -> None:
    image, label = batch()
    logits = torch.randn(4, 2, 6, 6, requires_grad=True)
    changed = logits.detach().clone()
    changed[1, :, :2] += 100
    criterion = BceDiceLoss(BITS)
    assert criterion(logits, label).loss == criterion(changed, label).loss
    criterion(logits, label).loss.backward()
    assert logits.grad is not None and bool((logits.grad[1, :, :2] == 0).all())


def test_a_batch_of_ignored_pixels_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    terms = BceDiceLoss(BITS)(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8))
    terms.loss.backward()
    assert terms.loss == 0 and logits.grad is not None and bool((logits.grad == 0).all())


@pytest.mark.dist
def test_two_uneven_ranks_take_the_same_five_steps_as_one_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses, weights = five_steps(network(), *batch())
    for rank in range(2):
        rank_losses, rank_weights = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert rank_losses == pytest.approx(losses, abs=1e-12)
        torch.testing.assert_close(rank_weights, weights, rtol=0, atol=1e-12)


def run_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(0, RANK_BATCHES[0]) if rank == 0 else slice(RANK_BATCHES[0], None)
    image, label = batch()
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = torch.nn.parallel.DistributedDataParallel
    torch.save(five_steps(wrap(network()), image[own], label[own]), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
