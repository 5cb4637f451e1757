"""Networks made of networks: an ensemble, several views of an image (test-time augmentation), windows sliding over it, and
one that computes in fewer bits.

Each takes and gives what a network does, image (B, C, H, W) in [0, 1] to logits (B, R, H, W), so that scores, `distseg predict`
and the exported file can hold it. Scriptable, around networks that are scripted or traced; without a check of H and W.

Shape letters: B images, C channels, R regions, H height, W width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.errors import DistsegError
from distseg.models.network import SegmentationNetwork

if TYPE_CHECKING:
    from distseg.config import AugmentConfig, EvaluateConfig

EPSILON = 1e-6  # of a mean probability, so that its logit is finite
SIGMA = 0.25  # of a window's Gaussian weight, as a fraction of its side: a border counts for a seventh of the middle


class Ensemble(nn.Module):
    """The logit of the networks' mean probability."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Gives logits (B, R, H, W)."""
        total = torch.zeros(1, device=image_BCHW.device)
        for network in self.networks:
            total = total + torch.sigmoid(network(image_BCHW).float())
        return _logit(total / len(self.networks))


class AveragedViews(nn.Module):
    """The logit of a network's mean probability over an image and its mirror image, at several sizes."""

    flips: list[list[int]]
    scales: list[float]

    def __init__(
        self, network: nn.Module, stride: int, scales: Sequence[float] = (1.0,), mirrored: bool = True
    ) -> None:
        """Wraps a network.

        Args:
            network: In eval mode.
            stride: What its height and width must be multiples of.
            scales: Sizes at which the image is looked at, as multiples of its own.
            mirrored: Whether the left-right mirror image counts too.
        """
        super().__init__()
        self.network = network
        self.stride = stride
        self.flips = [[], [3]] if mirrored else [[]]
        self.scales = [float(scale) for scale in scales]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Gives logits (B, R, H, W)."""
        height, width = image_BCHW.shape[2], image_BCHW.shape[3]
        total = torch.zeros(1, device=image_BCHW.device)
        for scale in self.scales:
            view_BChw = _resized(image_BCHW, self._multiple(height * scale), self._multiple(width * scale))
            for dims in self.flips:
                logits_BRhw = self.network(view_BChw.flip(dims)).flip(dims).float()
                total = total + torch.sigmoid(_resized(logits_BRhw, height, width))
        return _logit(total / (len(self.scales) * len(self.flips)))

    def _multiple(self, size: float) -> int:
        """The nearest size that the network takes."""
        return max(1, int(size / self.stride + 0.5)) * self.stride


class SlidingWindow(nn.Module):
    """A network that looks at large images through windows, half overlapping, whose middles count most."""

    def __init__(self, network: nn.Module, side: int) -> None:
        """Wraps a network.

        Args:
            network: In eval mode.
            side: Of the square windows; a multiple of the network's stride.
        """
        super().__init__()
        self.network = network
        self.side = side

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Gives logits (B, R, H, W); those of the network itself where the image fits into a window."""
        height, width = image_BCHW.shape[2], image_BCHW.shape[3]
        h, w = min(self.side, height), min(self.side, width)
        if h == height and w == width:
            return self.network(image_BCHW)
        weight_hw = _gaussian(h, image_BCHW.device)[:, None] * _gaussian(w, image_BCHW.device)[None, :]
        total_BRHW = torch.zeros(1, 1, height, width, device=image_BCHW.device)
        weight_HW = torch.zeros(height, width, device=image_BCHW.device)
        for top in _starts(height, h):
            for left in _starts(width, w):
                logits_BRhw = self.network(image_BCHW[:, :, top : top + h, left : left + w]).float()
                around = [left, width - left - w, top, height - top - h]
                total_BRHW = total_BRHW + F.pad(logits_BRhw * weight_hw, around)
                weight_HW = weight_HW + F.pad(weight_hw, around)
        return total_BRHW / weight_HW


class ReducedPrecision(nn.Module):
    """A network whose convolutions compute in bfloat16 or float16; image, statistics of its norms and logits are float32."""

    like: Tensor

    def __init__(self, network: SegmentationNetwork, dtype: torch.dtype) -> None:
        """Wraps a network, whose weights are changed.

        Args:
            network: In eval mode.
            dtype: torch.bfloat16 or torch.float16.
        """
        super().__init__()
        self.network = network
        for part in network.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(dtype)
        network.mean_C11, network.std_C11 = network.mean_C11.to(dtype), network.std_C11.to(dtype)
        self.register_buffer("like", torch.zeros((), dtype=dtype))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Gives logits (B, R, H, W)."""
        return self.network(image_BCHW.to(self.like.dtype)).float()


def build_views(
    networks: Sequence[nn.Module], settings: "EvaluateConfig", trained: "Sequence[AugmentConfig]", stride: int
) -> nn.Module:
    """The networks, one or several, as one that looks at an image as the `evaluate` section says.

    Args:
        networks: In eval mode.
        settings: The section.
        trained: How each network's training varied images: what it has not seen is not averaged.
        stride: What height and width must be multiples of.

    Raises:
        DistsegError: A window that the stride does not divide, or views of images that training did not show.
    """
    if settings.window is not None:
        if settings.window % stride:
            raise DistsegError(
                f"evaluate.window: got {settings.window}; must be a multiple of the network's stride, {stride}; choose another"
            )
        networks = [SlidingWindow(network, settings.window) for network in networks]
    if settings.tta:
        for augment in trained:
            _check_views(settings, augment)
        networks = [
            AveragedViews(network, stride, settings.tta_scales, augment.flips > 0)
            for network, augment in zip(networks, trained, strict=True)
        ]
    return networks[0] if len(networks) == 1 else Ensemble(networks)


def _check_views(settings: "EvaluateConfig", augment: "AugmentConfig") -> None:
    low, high = augment.scale if augment.affine_probability > 0 else (1.0, 1.0)
    if unseen := [scale for scale in settings.tta_scales if not min(low, 1) <= scale <= max(high, 1)]:
        raise DistsegError(
            f"evaluate.tta_scales: got {unseen[0]:g}; training showed scales from {min(low, 1):g} to {max(high, 1):g} "
            "(data.augment.scale), and others make masks worse; choose from them"
        )
    if not augment.flips and set(settings.tta_scales) == {1.0}:
        raise DistsegError(
            "evaluate.tta: got true; training did not flip images, so there is nothing to average over; leave it out, or give "
            "evaluate.tta_scales"
        )


def _resized(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    if x_BCHW.shape[2] == height and x_BCHW.shape[3] == width:
        return x_BCHW
    return F.interpolate(x_BCHW, size=[height, width], mode="bilinear", align_corners=False)


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin that overlap by half or more and end where the image ends."""
    last = length - side
    steps = (2 * last + side - 1) // side
    return [last * i // max(1, steps) for i in range(steps + 1)]


# Constants are default values below: scripted functions see no globals.


def _logit(probability_BRHW: Tensor, epsilon: float = EPSILON) -> Tensor:
    return torch.logit(probability_BRHW, epsilon)


def _gaussian(side: int, device: torch.device, sigma: float = SIGMA) -> Tensor:
    places = torch.arange(side, device=device) - (side - 1) / 2
    return torch.exp(-0.5 * (places / (side * sigma)) ** 2)
