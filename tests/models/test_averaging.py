"""Ensembles, views and windows take and give what a network does."""

import pytest
import torch
from torch import Tensor, nn

from distseg.config import AugmentConfig, EvaluateConfig
from distseg.errors import DistsegError
from distseg.models.averaging import AveragedViews, Ensemble, SlidingWindow, build_views


class Positions(nn.Module):
    """Logits that depend on where a pixel is, so that a flip that is not undone shows."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.cumsum(dim=2) - 0.3 * image_BCHW.cumsum(dim=3)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 1, 96, 64, generator=torch.Generator().manual_seed(0)) - 0.4


def test_an_ensemble_is_the_mean_probability(image: Tensor) -> None:
    first, second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
    expected = (torch.sigmoid(first(image)) + torch.sigmoid(second(image))) / 2
    torch.testing.assert_close(torch.sigmoid(Ensemble([first, second])(image)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(Ensemble([first])(image), first(image), rtol=0, atol=1e-5)


def test_a_flip_is_undone_and_averaged(image: Tensor) -> None:
    network = Positions()
    views = [torch.sigmoid(network(image.flip(dims)).flip(dims)) for dims in ([], [3])]
    found = torch.sigmoid(AveragedViews(network, 32)(image))
    torch.testing.assert_close(found, sum(views) / 2, rtol=0, atol=2e-6)
    turned = torch.sigmoid(AveragedViews(network, 32)(image.flip([3])).flip([3]))
    torch.testing.assert_close(turned, found, rtol=0, atol=2e-6)


def test_scaled_views_stay_multiples_of_the_stride_and_come_back(image: Tensor) -> None:
    seen = []

    class Watched(Positions):
        def forward(self, image_BCHW: Tensor) -> Tensor:
            seen.append(tuple(image_BCHW.shape[-2:]))
            return super().forward(image_BCHW)

    assert AveragedViews(Watched(), 32, (0.75, 1.0, 1.3))(image).shape == image.shape
    assert set(seen) == {(64, 64), (96, 64), (128, 96)}  # 72 x 48 and 124.8 x 83.2 rounded to 32


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (200, 130), (64, 300)])
def test_windows_cover_every_pixel_and_agree_where_a_network_sees_no_border(size: tuple[int, int]) -> None:
    pixelwise = nn.Conv2d(1, 2, 1)
    image = torch.rand(1, 1, *size)
    torch.testing.assert_close(SlidingWindow(pixelwise, 64)(image), pixelwise(image), rtol=0, atol=1e-5)


def test_a_border_s_error_counts_less_through_half_overlapping_windows() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(network.weight)
    image = torch.ones(1, 1, 64, 192)
    inner = SlidingWindow(network, 64)(image)[0, 0, 2:-2, 2:-2]
    assert (
        9 - inner.min()
    ) < 1.0  # 3 of 9 neighbours are missing at a window's border; the window beside sees them all


def test_what_is_wrapped_scripts_and_gives_the_same_bits_at_other_sizes(image: Tensor) -> None:
    network = nn.Conv2d(1, 2, 3, padding=1).eval()
    settings, trained = EvaluateConfig(tta=True, tta_scales=(1.0, 1.2), window=64), [AugmentConfig()] * 2
    with torch.inference_mode():
        traced = torch.jit.trace(network, image[:1])
        scripted = torch.jit.script(build_views([traced, traced], settings, trained, 32))
        for shape in ((2, 1, 96, 64), (1, 1, 32, 160)):
            other = torch.rand(shape)
            assert torch.equal(scripted(other), build_views([network, network], settings, trained, 32)(other))


def test_a_window_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(DistsegError, match="evaluate.window: got 80; must be a multiple of the network's stride, 32"):
        build_views([nn.Identity()], EvaluateConfig(window=80), [AugmentConfig()], 32)
    network = nn.Identity()
    assert build_views([network], EvaluateConfig(), [AugmentConfig()], 32) is network


def test_only_views_that_training_showed_are_averaged(image: Tensor) -> None:
    network, tta = Positions(), EvaluateConfig(tta=True, tta_scales=(1.0, 1.1))
    straight = AugmentConfig(flip_probability=0)
    found = build_views([network], tta, [straight], 32)(image)
    assert torch.equal(found, AveragedViews(network, 32, (1.0, 1.1), mirrored=False)(image))
    with pytest.raises(DistsegError, match="evaluate.tta: got true; training did not flip images"):
        build_views([network], EvaluateConfig(tta=True), [straight], 32)
    for scales, augment in (((1.0, 1.3), AugmentConfig()), ((1.1,), AugmentConfig(affine_probability=0))):
        with pytest.raises(DistsegError, match=f"evaluate.tta_scales: got {scales[-1]}; training showed scales from"):
            build_views([network], EvaluateConfig(tta=True, tta_scales=scales), [augment], 32)
