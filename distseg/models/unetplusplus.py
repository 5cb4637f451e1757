"""The Unet++ decoder: a triangle of nodes between the encoder's levels and the image's own resolution.

Node X[i][j] is at level i (stride 2 ** (i + 1)) and column j:

    X[i][0] = encoder level i, projected to widths[i] channels (paper), or as it is (reference)
    X[i][j] = conv(concat(upsample(X[i + 1][j - 1]), X[i][j - 1], ..., X[i][0]))

Source: Zhou et al. 2018, https://arxiv.org/abs/1807.10165, equation 1. Unlike there one more block goes from stride 2 to the
image's resolution, because timm's encoders have no level at stride 1. Two kinds of widths:

- paper: nodes of 32 to 512 channels as in the paper; the encoder's levels (DenseNet's have up to 2208 channels) are projected.
- reference: those of segmentation_models_pytorch, whose weights fit: nodes as wide as the encoder's level, but for the
  outermost of each level.

Shape letters: B images, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distseg.models.recompute import convolved, recomputed

PAPER_WIDTHS = (32, 64, 128, 256, 512)
REFERENCE_OUTER_WIDTHS = (32, 64, 128, 256)  # of X[i][depth - i]
FINAL_WIDTH = 16
SQUEEZE = 16  # of scSE's channel gate: section 3 of the paper has 2, its later uses and the reference 16


class ConvBlock(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch norm and ReLU; then, if asked for, scSE."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool = False) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        if attention:
            layers.append(SCSE(out_channels))
        super().__init__(*layers)


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation: x * (gate of its channel + gate of its pixel).

    Source: Roy et al. 2018, https://arxiv.org/abs/1803.02579.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(1, channels // SQUEEZE)
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels, kernel_size=1),
            nn.Sigmoid(),
        )
        self.pixel = nn.Sequential(nn.Conv2d(channels, 1, kernel_size=1), nn.Sigmoid())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Keeps the shape (B, C, H, W)."""
        return x_BCHW * self.channel(x_BCHW) + x_BCHW * self.pixel(x_BCHW)


class Projection(nn.Sequential):
    """A 1 x 1 convolution with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UnetPlusPlusDecoder(nn.Module):
    """Unet++ over encoder levels at strides 2, 4, 8, ...

    Attributes:
        out_channels, strides: Channels and stride of the result of each depth, from depth 1 on.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        widths: Sequence[int] | None = PAPER_WIDTHS,
        attention: bool = False,
        whole: bool = True,
        recompute: bool = False,
    ) -> None:
        """Builds the nodes.

        Args:
            encoder_channels: Channels of each encoder level, finest first; one more than the depth.
            widths: Channels of the nodes of each level, as many as there are levels; None: the reference's.
            attention: scSE after each node.
            whole: False for a decoder cut at a lower depth than it was trained at: without the block to stride 1, and in
                the reference's widths without narrow outer nodes.
            recompute: Forget the activations inside nodes and compute them again for the gradient.

        Raises:
            ValueError: If `widths` and `encoder_channels` differ in length.
        """
        super().__init__()
        levels = len(encoder_channels)
        self.depth = levels - 1
        self.recompute = recompute
        if widths is None:
            self.projections = nn.ModuleList(nn.Identity() for _ in encoder_channels)
        else:
            pairs = zip(encoder_channels, widths, strict=True)
            self.projections = nn.ModuleList(Projection(channels, width) for channels, width in pairs)

        def width(i: int, j: int) -> int:
            if widths is not None:
                return widths[i]
            return REFERENCE_OUTER_WIDTHS[i] if whole and j and i + j == self.depth else encoder_channels[i]

        self.columns = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(width(i + 1, j - 1) + sum(width(i, k) for k in range(j)), width(i, j), attention)
                for i in range(levels - j)
            )
            for j in range(1, levels)
        )
        self.out_channels = [width(0, j) for j in range(1, levels)]
        self.strides = [2] * self.depth
        self.final: ConvBlock | None = None
        if whole:
            self.final = ConvBlock(self.out_channels[-1], FINAL_WIDTH, attention)
            self.out_channels[-1], self.strides[-1] = FINAL_WIDTH, 1

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Decodes.

        Args:
            features: Encoder levels; level i is (B, encoder_channels[i], H / 2 ** (i + 1), W / 2 ** (i + 1)).

        Returns:
            The result of each depth from 1 on: (B, C, H / 2, W / 2), the last of a whole decoder (B, C, H, W).
        """
        rows = [[projection(features[i])] for i, projection in enumerate(self.projections)]
        for column in self.columns:
            for i, node in enumerate(column.children()):
                # Row i + 1 still ends in the column before: its node of this column comes after this one.
                rows[i].append(self._node(node, rows[i + 1][-1], rows[i][::-1]))
        results = rows[0][1:]
        if self.final is not None:
            results[-1] = self._node(self.final, results[-1], [])
        return results

    def _node(self, node: nn.Module, below: Tensor, beside: list[Tensor]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(_whole_node, node, below, *beside)
        return convolved(node, _join, below, *beside)


def _whole_node(node: nn.Module, below: Tensor, *beside: Tensor) -> Tensor:
    return node(_join(below, *beside))


def _join(below: Tensor, *beside: Tensor) -> Tensor:
    return torch.cat([upsample(below), *beside], dim=1)


def upsample(x_BCHW: Tensor) -> Tensor:
    """Repeats each pixel 2 x 2: (B, C, 2 H, 2 W)."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
