"""The Unet++ decoder: a triangle of nodes between the encoder's levels and the image's own resolution.

Node X[i][j] is at level i (stride 2 ** (i + 1)) and column j:

    X[i][0] = encoder level i, projected to widths[i] channels
    X[i][j] = conv(concat(X[i][0], ..., X[i][j - 1], upsample(X[i + 1][j - 1])))

Source: Zhou et al. 2018, https://arxiv.org/abs/1807.10165, equation 1. Unlike there, the encoder's levels are projected
first (DenseNet's have up to 2208 channels) and one more block goes from stride 2 to the image's resolution, because
timm's encoders have no level at stride 1.

Shape letters: B images, C channels, H height, W width.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Projection(nn.Sequential):
    """A 1 x 1 convolution with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UnetPlusPlusDecoder(nn.Module):
    """Unet++ over encoder levels at strides 2, 4, 8, ...; gives features at the image's resolution.

    Attributes:
        out_channels: Channels of the result.
        stride: Stride of the result, 1.
    """

    stride = 1

    def __init__(
        self,
        encoder_channels: Sequence[int],
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        final_width: int = 16,
    ) -> None:
        """Builds the nodes.

        Args:
            encoder_channels: Channels of each encoder level, finest first.
            widths: Channels of the nodes of each level, as many as there are levels.
            final_width: Channels of the result.

        Raises:
            ValueError: If `widths` and `encoder_channels` differ in length.
        """
        super().__init__()
        self.out_channels = final_width
        self.projections = nn.ModuleList(
            Projection(channels, width) for channels, width in zip(encoder_channels, widths, strict=True)
        )
        steps = list(itertools.pairwise(widths))
        self.columns = nn.ModuleList(
            nn.ModuleList(ConvBlock(j * width + below, width) for width, below in steps[: len(widths) - j])
            for j in range(1, len(widths))
        )
        self.final = ConvBlock(widths[0], final_width)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Decodes.

        Args:
            features: Encoder levels; level i is (B, encoder_channels[i], H / 2 ** (i + 1), W / 2 ** (i + 1)).

        Returns:
            (B, out_channels, H, W).
        """
        rows = [[projection(features[i])] for i, projection in enumerate(self.projections)]
        for column in self.columns:
            for i, node in enumerate(column.children()):
                # Row i + 1 still ends in the column before: its node of this column comes after this one.
                rows[i].append(node(torch.cat(rows[i] + [upsample(rows[i + 1][-1])], dim=1)))
        return self.final(upsample(rows[0][-1]))


def upsample(x_BCHW: Tensor) -> Tensor:
    """Repeats each pixel 2 x 2: (B, C, 2 H, 2 W)."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
