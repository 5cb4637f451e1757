"""The DeepLabV3 and DeepLabV3+ decoders.

Both give features below the image's resolution (`stride`); the network makes logits of them and upsamples those.

Sources: Chen et al. 2017, https://arxiv.org/abs/1706.05587 (V3), and 2018, https://arxiv.org/abs/1802.02611 (V3+).
Without dropout: its random numbers would differ with the number of ranks, and so would the training.

Shape letters: B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distseg.errors import DistsegError
from distseg.models.recompute import convolved

ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # by output stride: section 4.1 of V3
LOW_LEVEL_CHANNELS = 48  # table 1 of V3+


class ConvBNReLU(nn.Sequential):
    """A convolution that keeps the size, batch norm and ReLU; separable: depthwise, then 1 x 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, rate: int = 1, separable: bool = False
    ) -> None:
        padding = rate * (kernel_size // 2)
        spatial: dict[str, Any] = {"kernel_size": kernel_size, "padding": padding, "dilation": rate, "bias": False}
        if separable:
            convolutions = [
                nn.Conv2d(in_channels, in_channels, groups=in_channels, **spatial),
                nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            ]
        else:
            convolutions = [nn.Conv2d(in_channels, out_channels, **spatial)]
        super().__init__(*convolutions, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class ImagePooling(nn.Module):
    """The image-level features of ASPP: the mean over all pixels, projected and given to every pixel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.project = ConvBNReLU(in_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Gives (B, out_channels, H, W), the same at every pixel.

        Raises:
            DistsegError: In training on a batch of one image: its mean is one value a channel, which has no variance.
        """
        try:
            pooled = self.project(x_BCHW.mean(dim=(2, 3), keepdim=True))
        except ValueError as error:
            raise DistsegError(
                "train.batch_size_per_rank: got a batch of 1 image; must be at least 2 to train DeepLab, whose image "
                "pooling is normalised over the batch; use a larger batch, or model.decoder=unetplusplus"
            ) from error
        return F.interpolate(pooled, size=x_BCHW.shape[-2:], mode="nearest")


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1 x 1, three atrous and an image-level branch, concatenated and projected."""

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int], separable: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvBNReLU(in_channels, out_channels, kernel_size=1),
                *(ConvBNReLU(in_channels, out_channels, kernel_size=3, rate=r, separable=separable) for r in rates),
                ImagePooling(in_channels, out_channels),
            ]
        )
        self.project = ConvBNReLU(len(self.branches) * out_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Gives (B, out_channels, H, W)."""
        return convolved(self.project, _join, *(branch(x_BCHW) for branch in self.branches))


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


def _upsample_and_join(low: Tensor, deep: Tensor) -> Tensor:
    return _join(low, F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False))


class DeepLabV3Decoder(nn.Module):
    """ASPP on the deepest encoder level and a 3 x 3 convolution.

    Attributes:
        out_channels, strides: Channels and stride of the result, lists of one.
    """

    def __init__(self, encoder_channels: Sequence[int], output_stride: int = 8, out_channels: int = 256) -> None:
        """Builds it for an encoder held at `output_stride`, 8 or 16."""
        super().__init__()
        self.out_channels, self.strides = [out_channels], [output_stride]
        self.aspp = ASPP(encoder_channels[-1], out_channels, ATROUS_RATES[output_stride])
        self.fuse = ConvBNReLU(out_channels, out_channels, kernel_size=3)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Takes the encoder's levels, gives one result: (B, C, H / output_stride, W / output_stride)."""
        return [self.fuse(self.aspp(features[-1]))]


class DeepLabV3PlusDecoder(nn.Module):
    """ASPP on the deepest encoder level, refined with the features of stride 4; its 3 x 3 convolutions are separable.

    Attributes:
        out_channels, strides: Channels and stride of the result, lists of one.
    """

    def __init__(self, encoder_channels: Sequence[int], output_stride: int = 16, out_channels: int = 256) -> None:
        """Builds it for an encoder held at `output_stride`, 8 or 16, whose second level is at stride 4."""
        super().__init__()
        self.out_channels, self.strides = [out_channels], [4]
        self.aspp = ASPP(encoder_channels[-1], out_channels, ATROUS_RATES[output_stride], separable=True)
        self.low_level = ConvBNReLU(encoder_channels[1], LOW_LEVEL_CHANNELS, kernel_size=1)
        self.fuse = nn.Sequential(  # two of them: table 2
            ConvBNReLU(LOW_LEVEL_CHANNELS + out_channels, out_channels, kernel_size=3, separable=True),
            ConvBNReLU(out_channels, out_channels, kernel_size=3, separable=True),
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Takes the encoder's levels, gives one result: (B, C, H / 4, W / 4)."""
        first, second = self.fuse
        x = convolved(first, _upsample_and_join, self.low_level(features[1]), self.aspp(features[-1]))
        return [second(x)]
