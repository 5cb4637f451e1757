"""What each pair of encoder and decoder costs, from shapes alone: on torch's meta device nothing is stored or computed.

Shape letters: B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from distseg.config import ModelConfig
from distseg.models.network import build_model

GRID = (  # the study's encoders: those of its families that timm has ImageNet weights for
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"gernet_{size}" for size in "sml"),
    *("senet154", "seresnet50", "seresnext50_32x4d", "seresnext101_32x4d"),
    *("legacy_senet154", *(f"legacy_seresnet{depth}" for depth in (18, 34, 50, 101, 152))),
    *("legacy_seresnext50_32x4d", "legacy_seresnext101_32x4d"),
)
BATCH = 2  # slices that are measured together: DeepLab cannot train on one
N_REGIONS = 2


@dataclass(frozen=True)
class Cost:
    """One pair, in fp32; `gmacs` and `saved_mib` are a slice's."""

    encoder: str
    decoder: str
    parameters_m: float
    """10^6"""
    gmacs: float
    """10^9 multiply-accumulates of convolutions and matrix products in a forward pass"""
    saved_mib: float
    """activations kept for the gradient, parameters and buffers not among them"""
    output_stride: int
    """what height and width must be multiples of"""
    reductions: tuple[int, ...]
    """stride of each encoder level"""
    weights: tuple[str, ...]
    """tags of timm's pretrained weights: the encoder `NAME.TAG` has them"""


def pair_cost(model: ModelConfig, in_channels: int, size: int) -> Cost:
    """Measures the pair that a config's `model` section names, for slices of size x size pixels.

    Raises:
        DistsegError: For names that do not exist, pairs that do not fit or a size that is no multiple of the stride.
    """
    with torch.device("meta"):
        network = build_model(model, in_channels, N_REGIONS)
        image_BCHW = torch.empty(BATCH, in_channels, size, size)
    macs, saved_bytes = forward_cost(network, image_BCHW)
    encoder: Any = network.encoder
    return Cost(
        encoder=model.encoder,
        decoder=model.decoder,
        parameters_m=sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        gmacs=macs / BATCH / 1e9,
        saved_mib=saved_bytes / BATCH / 2**20,
        output_stride=network.stride,
        reductions=encoder.reductions,
        weights=pretrained_tags(model.encoder),
    )


def forward_cost(network: nn.Module, image_BCHW: Tensor) -> tuple[int, int]:
    """Multiply-accumulates of a forward pass, and the bytes that it keeps for the gradient; on any device.

    What there is once nothing but the graph holds it, whoever keeps it: autograd, or a function that computes it again.
    The image, parameters and buffers do not count.
    """
    with FlopCounterMode(display=False) as counter, _Storages() as storages:
        results = tree_leaves(network(image_BCHW))
    graph = [result.grad_fn for result in results]
    del results
    given = (image_BCHW, *network.parameters(), *network.buffers())
    others = storages.made.keys() - {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
    kept_bytes = sum(storages.made[storage] for storage in others if not storage.expired())
    del graph
    return counter.get_total_flops() // 2, kept_bytes


class _Storages(TorchDispatchMode):
    """Notes the bytes of every storage that operations write to, and holds none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = _batch_norm_shapes(func, *args) or func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return results


def _batch_norm_shapes(func: Any, *args: Any) -> tuple[Tensor, ...] | None:
    """What batch norm gives in training on the meta device: there torch works it out in Python, 8 ms each time."""
    if func is not torch.ops.aten.native_batch_norm.default:
        return None
    image, *_, training, _momentum, _eps = args
    if not (image.is_meta and training):
        return None
    return torch.empty_like(image), *(image.new_empty(image.shape[1]) for _ in range(2))


def pretrained_tags(encoder: str) -> tuple[str, ...]:
    """Tags of timm's weights for a model, whose name may have one itself; none: ()."""
    architecture = encoder.partition(".")[0]
    return tuple(name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*"))


def costs_as_text(costs: Sequence[Cost]) -> str:
    """A table with a line for each pair, its names to the left and its numbers to the right."""
    header = ("encoder", "decoder", "M parameters", "GMACs", "MiB saved", "stride", "reductions", "weights")
    rows = [header, *map(_cells, costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust)
    lines = (
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        cost.encoder,
        cost.decoder,
        f"{cost.parameters_m:.1f}",
        f"{cost.gmacs:.1f}",
        f"{cost.saved_mib:.0f}",
        str(cost.output_stride),
        " ".join(map(str, cost.reductions)),
        " ".join(cost.weights) or "none",
    )
