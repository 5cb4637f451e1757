"""The segmentation network and how a config names one.

Shape letters: B images, C channels, R regions, H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distseg.errors import DistsegError
from distseg.models.deeplab import DeepLabV3Decoder, DeepLabV3PlusDecoder
from distseg.models.encoder import TimmEncoder
from distseg.models.unetplusplus import PAPER_WIDTHS, UnetPlusPlusDecoder

if TYPE_CHECKING:
    from distseg.config import ModelConfig

OUTPUT_STRIDES = {"unetplusplus": 32, "deeplabv3": 8, "deeplabv3plus": 16}


class SegmentationNetwork(nn.Module):
    """Normalisation, encoder, decoder and heads: an image in [0, 1] to one logit a pixel and region.

    Attributes:
        stride: What height and width must be multiples of.
        heads: One for each result of the decoder that is learned from, by its depth; the last one segments.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: UnetPlusPlusDecoder | DeepLabV3Decoder | DeepLabV3PlusDecoder,
        heads: Mapping[int, nn.Module],
        mean: Sequence[float],
        std: Sequence[float],
        stride: int,
    ) -> None:
        """Puts the parts together.

        Args:
            encoder: (B, C, H, W) to feature levels.
            decoder: Feature levels to the features of each depth from 1 on.
            heads: The decoder's features to logits, by depth; those of smaller size than the image are upsampled.
            mean: Mean of each channel of the images that the encoder is made for.
            std: Standard deviation likewise.
            stride: What height and width must be multiples of.
        """
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.heads = nn.ModuleDict({str(depth): head for depth, head in heads.items()})
        self.strides = decoder.strides
        self.stride = stride
        self.register_buffer("mean_C11", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std_C11", torch.tensor(std).view(-1, 1, 1))

    def forward(self, image_BCHW: Tensor) -> Tensor | list[Tensor]:
        """Segments a batch.

        Args:
            image_BCHW: Windowed to [0, 1], floating point; height and width multiples of `stride`.

        Returns:
            Logits (B, R, H, W); in training with several heads a list of them, shallowest first.

        Raises:
            DistsegError: For another size; not in a traced or scripted module, which has no such check.
        """
        if not torch.jit.is_tracing() and not torch.jit.is_scripting():
            check_input_shape(image_BCHW.shape[-2], image_BCHW.shape[-1], self.stride)
        results = self.decoder(self.encoder((image_BCHW - self.mean_C11) / self.std_C11))
        size = image_BCHW.shape[-2:]
        heads = [(int(depth) - 1, head) for depth, head in self.heads.items()]
        if self.training and len(heads) > 1:
            return [_upsampled(head(results[place]), self.strides[place], size) for place, head in heads]
        place, head = heads[-1]
        return _upsampled(head(results[place]), self.strides[place], size)


def _upsampled(logits_BRhw: Tensor, stride: int, size: torch.Size) -> Tensor:
    if stride == 1:
        return logits_BRhw
    # align_corners=False, unlike the reference's DeepLabs: then a pixel lies where it lies in every other resize.
    return F.interpolate(logits_BRhw, size=size, mode="bilinear", align_corners=False)


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


def build_model(
    model: "ModelConfig", in_channels: int, n_regions: int, depth: int | None = None
) -> SegmentationNetwork:
    """Builds the network that the `model` section of a config names.

    Args:
        model: What to build.
        in_channels: Channels of the image.
        n_regions: Logits a pixel.
        depth: Unet++ cut at this depth, 1 to 3, with the head that deep supervision trained there; None: all of it.

    Raises:
        DistsegError: For names that do not exist, weights that cannot be loaded or pairs that do not fit.
    """
    levels = 5 if depth is None else depth + 1
    stride = OUTPUT_STRIDES[model.decoder]
    of_encoder = "none" if model.recompute == "decoder" else model.recompute
    encoder = TimmEncoder(model.encoder, in_channels, model.encoder_weights, stride, levels, of_encoder)
    decoder = _build_decoder(model, encoder.channels, stride, whole=depth is None)
    channels = decoder.out_channels
    learned = range(1, len(channels) + 1) if model.deep_supervision and depth is None else [len(channels)]
    heads = {d: _head(channels[d - 1], n_regions, model.dropout) for d in learned}
    return SegmentationNetwork(encoder, decoder, heads, encoder.mean, encoder.std, max(encoder.reductions))


def _head(in_channels: int, n_regions: int, dropout: float) -> nn.Module:
    convolution = nn.Conv2d(in_channels, n_regions, kernel_size=1)
    return nn.Sequential(nn.Dropout2d(dropout), convolution) if dropout else convolution


def _build_decoder(
    model: "ModelConfig", encoder_channels: Sequence[int], output_stride: int, whole: bool
) -> UnetPlusPlusDecoder | DeepLabV3Decoder | DeepLabV3PlusDecoder:
    if model.decoder == "deeplabv3":
        return DeepLabV3Decoder(encoder_channels, output_stride)
    if model.decoder == "deeplabv3plus":
        return DeepLabV3PlusDecoder(encoder_channels, output_stride)
    widths: Sequence[int] | None = PAPER_WIDTHS
    if model.decoder_widths == "reference":
        widths = None
    elif model.decoder_widths != "paper":
        widths = model.decoder_widths
    if widths is not None:
        widths = widths[: len(encoder_channels)]
    recompute = model.recompute in ("decoder", "all")
    return UnetPlusPlusDecoder(encoder_channels, widths, model.attention == "scse", whole, recompute)
