"""The definition of the region sums against float64 written out, and its gradient."""

import pytest
import torch

from distseg.kernels import bce_dice, region_bits, region_targets

REGIONS = {"lung": (1, 2), "infection": (2,)}
BITS = region_bits(REGIONS)


def test_bits_and_targets_are_unions_of_labels() -> None:
    assert BITS == (0b110, 0b100)
    label = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    assert region_targets(label, BITS).int().tolist() == [[[[0, 1], [1, 0]], [[0, 0], [1, 0]]]]
    with pytest.raises(ValueError, match="at most 62"):
        region_bits({"x": (63,)})


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 41, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_those_of_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    logits = (torch.randn(batch, 2, height, width, generator=generator) * 4).to(dtype)
    label = torch.randint(0, 4, shape, generator=generator).to(torch.uint8)
    label[label == 3] = 255
    x = logits.double()
    p, valid = 1 / (1 + torch.exp(-x)), (label != 255).unsqueeze(1).double()
    t = torch.stack([(label == 1) | (label == 2), label == 2], dim=1).double()
    bce = -(t * torch.log(p) + (1 - t) * torch.log1p(-p))
    expected = [(q * valid).sum((2, 3)) for q in (p, t, p * t, bce, torch.ones_like(p))]
    sums = bce_dice.region_sums(logits, label, BITS)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), torch.stack(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_gradient_of_the_definition_in_float64() -> None:
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 1, 2, 255] * 6, dtype=torch.uint8).view(2, 3, 4)
    weights = torch.randn(2, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (bce_dice.region_sums(x, label, BITS) * weights).sum(), logits)
