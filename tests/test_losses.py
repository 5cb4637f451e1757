"""BCE + Dice: values of the loss and its variants, what empty regions and ignored pixels do, half precision."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from distseg.config import LossConfig
from distseg.config_files import load_config
from distseg.errors import DistsegError
from distseg.kernels import region_bits, region_targets
from distseg.losses import BceDiceLoss, build_loss

BITS = region_bits({"lung": (1, 2), "infection": (2,)})
VARIANTS = [
    LossConfig(),
    LossConfig(kernel="definition"),
    LossConfig(dice_over="sample"),
    LossConfig(false_positive_weight=0.3, false_negative_weight=0.7, focal_exponent=0.75),
    LossConfig(dice_over="sample", absent_regions="skip", focal_exponent=2, bce_weight=0.5),
]


def random_batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 6, 6, generator=generator).to(dtype)
    label = torch.randint(0, 3, (4, 6, 6), generator=generator).to(torch.uint8)
    label[0].clamp_(max=1)  # no infection
    label[1, :2] = 255
    label[3] = 255
    return logits, label


def written_out(config: LossConfig, logits: torch.Tensor, label: torch.Tensor, weights: tuple[float, ...]) -> float:
    """The loss from its docstring, one sample and region at a time."""
    x, truth = logits.double(), region_targets(label, BITS)
    groups = [range(len(label))] if config.dice_over == "batch" else [[b] for b in range(len(label))]
    losses, total = [], 0.0
    for r, weight in enumerate(weights):
        seen = label != 255
        bce = functional.binary_cross_entropy_with_logits(x[:, r][seen], truth[:, r][seen].double()).item()
        shortfalls = []
        for group in groups:
            inside = torch.cat([label[b].flatten() != 255 for b in group])
            p = torch.cat([x[b, r].flatten().sigmoid() for b in group])[inside]
            t = torch.cat([truth[b, r].flatten() for b in group])[inside].double()
            if len(t) == 0 or (config.absent_regions == "skip" and t.sum() == 0):
                continue
            tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
            wrong = 2 * config.false_positive_weight * fp + 2 * config.false_negative_weight * fn
            score = (2 * tp + config.smooth) / (2 * tp + wrong + config.smooth)
            shortfalls.append(((1 - score) ** config.focal_exponent).item())
        losses.append(config.bce_weight * bce + config.dice_weight * sum(shortfalls) / len(shortfalls))
        total += weight
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / total


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_every_variant_is_its_formula(config: LossConfig, weights: tuple[float, ...]) -> None:
    logits, label = random_batch()
    loss = BceDiceLoss(BITS, config, weights)(logits, label).loss
    assert loss.item() == pytest.approx(written_out(config, logits, label, weights), rel=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_gradients_of_variants_in_float64(config: LossConfig) -> None:
    logits, label = random_batch(torch.float64)
    exact = LossConfig(**{**vars(config), "kernel": "definition"})
    assert torch.autograd.gradcheck(lambda x: BceDiceLoss(BITS, exact)(x, label).loss, logits.requires_grad_())


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_gradients_of_kernel_and_definition_agree(config: LossConfig) -> None:
    logits, label = random_batch()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype, copy=True).requires_grad_()
        automatic = LossConfig(**{**vars(config), "kernel": "auto"})
        (BceDiceLoss(BITS, automatic)(x, label).loss * 3).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-7)


def test_a_perfect_prediction_has_almost_no_loss_and_the_opposite_almost_two_terms() -> None:
    label = torch.randint(0, 3, (2, 8, 8)).to(torch.uint8)
    truth = torch.stack([label > 0, label == 2], dim=1)
    perfect = BceDiceLoss(BITS)(torch.where(truth, 20.0, -20.0), label)
    wrong = BceDiceLoss(BITS)(torch.where(truth, -20.0, 20.0), label)
    assert perfect.loss < 1e-3 and perfect.dice_R.min() > 0.999
    assert wrong.bce == pytest.approx(20, rel=1e-3) and wrong.dice_R.max() < 0.05


@pytest.mark.parametrize(
    "config",
    [LossConfig(bce_weight=0), LossConfig(bce_weight=0, dice_over="sample"), LossConfig(absent_regions="skip")],
)
def test_a_false_positive_on_an_empty_region_has_a_gradient(config: LossConfig) -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    BceDiceLoss(BITS, config)(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).loss.backward()
    assert logits.grad is not None and bool((logits.grad > 0).all())


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_ignored_pixels_change_neither_loss_nor_gradient(config: LossConfig) -> None:
    logits, label = random_batch()
    changed = logits.clone()
    changed[1, :, :2] += 100
    changed[3] = torch.nan
    criterion = BceDiceLoss(BITS, config)
    logits.requires_grad_()
    assert criterion(logits, label).loss == criterion(changed, label).loss
    criterion(logits, label).loss.backward()
    assert logits.grad is not None and bool((logits.grad[1, :, :2] == 0).all())
    assert bool((logits.grad[3] == 0).all())


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_a_batch_of_ignored_pixels_has_no_loss_and_no_gradient(config: LossConfig) -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    terms = BceDiceLoss(BITS, config)(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0, abs=1e-5)
    assert logits.grad is not None and bool((logits.grad == 0).all())


def test_half_precision_loss_at_16x512x512_is_within_a_thousandth_of_float64() -> None:
    """Sums above 65,504 overflow in float16; the loss must not."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(16, 2, 512, 512, generator=generator) * 3).half()
    label = torch.randint(0, 3, (16, 512, 512), generator=generator).to(torch.uint8)
    logits.requires_grad_()
    loss = BceDiceLoss(BITS)(logits, label).loss
    loss.backward()
    with torch.no_grad():
        exact = BceDiceLoss(BITS)(logits.double(), label).loss
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_heads_are_averaged_and_the_last_is_reported() -> None:
    logits, label = random_batch()
    criterion = BceDiceLoss(BITS)
    first, last = criterion(logits, label), criterion(-logits, label)
    both = criterion.over_heads([logits, -logits], label)
    assert both.loss == pytest.approx((first.loss + last.loss) / 2)
    assert both.bce == last.bce and torch.equal(both.dice_R, last.dice_R)


def test_region_weights_go_by_name() -> None:
    criterion = build_loss(LossConfig(region_weights={"infection": 2.5}), ["lung", "infection"], BITS)
    assert criterion.weight_R.tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["loss.absent_regions=skip", "loss.bce_weight=0"], "loss.absent_regions: got skip; needs loss.bce_weight"),
        (["loss.false_positive_weight=0"], "loss.false_positive_weight: got 0"),
        (["loss.bce_weight=0", "loss.dice_weight=0"], "loss.dice_weight: got 0"),
        (
            ["loss.region_weights={liver: 2}", "regions={lung: [lung]}"],
            "loss.region_weights: got liver; must be one of the regions",
        ),
        (["loss.dice_over=pixel"], "loss.dice_over: got 'pixel'"),
        (["regions.lung=[63]"], "must be a label, by name or by number (1 to 62)"),
    ],
)
def test_settings_without_sense_are_refused(words: list[str], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match=re.escape(refusal)):
        load_config(None, words)
