"""The segmentation network and how a config names one.

Shape letters: B images, C channels, R regions, H height, W width.
"""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distseg.errors import DistsegError
from distseg.models.deeplab import DeepLabV3Decoder, DeepLabV3PlusDecoder
from distseg.models.encoder import TimmEncoder
from distseg.models.unetplusplus import UnetPlusPlusDecoder

if TYPE_CHECKING:
    from distseg.config import ModelConfig

OUTPUT_STRIDES = {"unetplusplus": 32, "deeplabv3": 8, "deeplabv3plus": 16}


class SegmentationNetwork(nn.Module):
    """Normalisation, encoder, decoder and head: an image in [0, 1] to one logit a pixel and region.

    Attributes:
        stride: What height and width must be multiples of.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: UnetPlusPlusDecoder | DeepLabV3Decoder | DeepLabV3PlusDecoder,
        head: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        stride: int,
    ) -> None:
        """Puts the parts together.

        Args:
            encoder: (B, C, H, W) to feature levels.
            decoder: Feature levels to features; its `stride` is theirs, above 1 when the logits are to be upsampled.
            head: The decoder's features to logits.
            mean: Mean of each channel of the images that the encoder is made for.
            std: Standard deviation likewise.
            stride: What height and width must be multiples of.
        """
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.stride = stride
        self.upsamples = decoder.stride > 1
        self.register_buffer("mean_C11", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std_C11", torch.tensor(std).view(-1, 1, 1))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Segments a batch.

        Args:
            image_BCHW: Windowed to [0, 1], floating point; height and width multiples of `stride`.

        Returns:
            Logits (B, R, H, W).

        Raises:
            DistsegError: For another size; not in a traced or scripted module, which has no such check.
        """
        if not torch.jit.is_tracing() and not torch.jit.is_scripting():
            check_input_shape(image_BCHW.shape[-2], image_BCHW.shape[-1], self.stride)
        features = self.encoder((image_BCHW - self.mean_C11) / self.std_C11)
        logits = self.head(self.decoder(features))
        if self.upsamples:
            logits = F.interpolate(logits, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False)
        return logits


def check_input_shape(height: int, width: int, stride: int) -> None:
    """Refuses sizes that are no multiples of `stride`: features would not lie on the pixels they are made from.

    Raises:
        DistsegError: Naming the nearest sizes that do.
    """
    if height % stride or width % stride:
        raise DistsegError(
            f"image: got {height} x {width}; height and width must be multiples of {stride}; "
            f"use {_nearest(height, stride)} x {_nearest(width, stride)}"
        )


def _nearest(size: int, stride: int) -> str:
    below = size // stride * stride
    if below == size:
        return str(size)
    return f"{below} or {below + stride}" if below else str(stride)


def build_model(model: "ModelConfig", in_channels: int, n_regions: int) -> SegmentationNetwork:
    """Builds the network that the `model` section of a config names.

    Args:
        model: Its `encoder`, `decoder`, `encoder_weights` and, for Unet++, `decoder_widths` are read.
        in_channels: Channels of the image.
        n_regions: Logits a pixel.

    Raises:
        DistsegError: For names that do not exist, weights that cannot be loaded or pairs that do not fit.
    """
    if model.decoder not in OUTPUT_STRIDES:
        nearest = ", ".join(difflib.get_close_matches(model.decoder, OUTPUT_STRIDES, n=1)) or "unetplusplus"
        rule = f"must be one of {', '.join(OUTPUT_STRIDES)}"
        raise DistsegError(f"model.decoder: got {model.decoder!r}; {rule}; did you mean {nearest}?")
    stride = OUTPUT_STRIDES[model.decoder]
    encoder = TimmEncoder(model.encoder, in_channels, model.encoder_weights, output_stride=stride)
    decoder = _build_decoder(model, encoder.channels, stride)
    head = nn.Conv2d(decoder.out_channels, n_regions, kernel_size=1)
    return SegmentationNetwork(encoder, decoder, head, encoder.mean, encoder.std, stride)


def _build_decoder(
    model: "ModelConfig", encoder_channels: Sequence[int], output_stride: int
) -> UnetPlusPlusDecoder | DeepLabV3Decoder | DeepLabV3PlusDecoder:
    if model.decoder == "deeplabv3":
        return DeepLabV3Decoder(encoder_channels, output_stride)
    if model.decoder == "deeplabv3plus":
        return DeepLabV3PlusDecoder(encoder_channels, output_stride)
    if len(model.decoder_widths) != len(encoder_channels):
        rule = f"must be {len(encoder_channels)} numbers, one for each encoder level"
        raise DistsegError(f"model.decoder_widths: got {model.decoder_widths}; {rule}; use (32, 64, 128, 256, 512)")
    return UnetPlusPlusDecoder(encoder_channels, model.decoder_widths)
