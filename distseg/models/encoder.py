"""The encoder: any timm network that gives five feature levels at strides 2, 4, 8, 16 and 32, or the first of them.

Shape letters: B images, C channels, H height, W width.
"""

import difflib
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import FeatureListNet, adapt_input_conv, is_model, is_model_in_modules, load_state_dict
from torch import Tensor, nn
from torch.nn import functional

from distseg.errors import DistsegError
from distseg.models.recompute import recomputed

# timm families without output_stride whose children come in the order of use, so that `_dilate` can do it.
DILATED_HERE = ("densenet", "senet")


class TimmEncoder(nn.Module):
    """Feature levels of an image, finest first.

    Attributes:
        channels: Channels of each level.
        reductions: Stride of each level; none is above `output_stride`.
        mean, std: Of timm's training images, in [0, 1]: their average for one channel, in turn for more than three.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        weights: str | None = None,
        output_stride: int = 32,
        levels: int = 5,
        recompute: Literal["none", "cheap", "all"] = "none",
    ) -> None:
        """Builds the network and loads its weights.

        Args:
            name: timm model, with or without a pretrained tag: `densenet161`, `seresnet50.a1_in1k`.
            in_channels: Channels of the image; the first convolution of loaded weights is adapted to it.
            weights: None: random; `imagenet`: timm's; or a .safetensors, .pth or .pt state dict of the timm model.
            output_stride: Stride of the deepest level, 8, 16 or 32.
            levels: How many of the five; what comes after them is left out.
            recompute: What is forgotten inside stages and computed again for the gradient; cheap: all but the results of
                convolutions.

        Raises:
            DistsegError: If timm has no such model, it has not the five levels, or the weights cannot be loaded.
        """
        super().__init__()
        self.network = network = _feature_network(name, in_channels, output_stride, levels)
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.reductions = _strides(output_stride)[:levels]
        self.recompute = recompute
        self.name = name
        if recompute != "none":
            self._require_row("model.recompute", "use decoder or none")
        known = network.pretrained_cfg
        self.mean, self.std = _one_a_channel(known["mean"], in_channels), _one_a_channel(known["std"], in_channels)
        hub = known.get("hf_hub_id")
        source = (
            f"https://huggingface.co/{hub}/resolve/main/model.safetensors" if hub else known.get("url") or "another"
        )
        if weights == "imagenet":
            _load_imagenet(network, name, in_channels, source)
        elif weights is not None:
            _load_file(network, Path(weights), source)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """Gives one tensor a level; level i is (B, channels[i], H / reductions[i], W / reductions[i])."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.network(image_BCHW)
        found = [image_BCHW]
        for stage in self._stages():
            found.append(recomputed(_run, stage, found[-1], keep_convolutions=self.recompute == "cheap"))
        return found[1:]

    def _stages(self) -> Iterator[nn.Sequential]:
        """The parts between two levels: inside them an activation may change one before it in place."""
        parts: list[nn.Module] = []
        for name, part in self.network.items():
            parts.append(part)
            if name in self.network.return_layers:
                yield nn.Sequential(*parts)
                parts = []

    def level_of_parameters(self) -> dict[str, int]:
        """The feature level, 0 the finest, that each parameter is first needed for.

        Raises:
            DistsegError: timm does not give this encoder as a row of stages.
        """
        self._require_row("optim.layer_decay", "use 1")
        level_of: dict[str, int] = {}
        level = 0
        for name, stage in self.network.named_children():
            level_of |= {f"network.{name}.{inner}": level for inner, _ in stage.named_parameters()}
            level += name in self.network.return_layers
        return level_of

    def _require_row(self, key: str, remedy: str) -> None:
        if not isinstance(self.network, FeatureListNet):
            raise DistsegError(f"{key}: got encoder {self.name!r}, which is not a row of stages in timm; {remedy}")


def _run(stage: nn.Module, x_BCHW: Tensor) -> Tensor:
    return stage(x_BCHW)


def _strides(output_stride: int) -> tuple[int, ...]:
    return tuple(min(stride, output_stride) for stride in (2, 4, 8, 16, 32))


def _one_a_channel(values: tuple[float, ...], in_channels: int) -> tuple[float, ...]:
    return (sum(values) / len(values),) if in_channels == 1 else tuple(islice(cycle(values), in_channels))


def _feature_network(name: str, in_channels: int, output_stride: int, levels: int) -> Any:
    if not is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0))
        raise DistsegError(f"model.encoder: got {name!r}; must be a timm model; the nearest names are {nearest}")
    stride_of_timm = 32 if is_model_in_modules(name, DILATED_HERE) else output_stride
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(range(levels)), "in_chans": in_channels}
    if stride_of_timm < 32:  # unknown to families that have no such choice
        options["output_stride"] = stride_of_timm
    try:
        network: Any = timm.create_model(name, **options)
        found = str(tuple(network.feature_info.reduction()))
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        found = f"{type(error).__name__} from timm: {error}"
    if found != str(_strides(stride_of_timm)[:levels]):
        raise DistsegError(
            f"model.encoder: got {name!r} with {found}; must give five feature levels at strides "
            f"{_strides(output_stride)}; choose another, such as densenet161, seresnet50 or gernet_s"
        )
    if stride_of_timm != output_stride:
        _dilate(network, output_stride)
    for module in network.modules():
        if type(module) is nn.Conv2d and _breaks_onednn(module):  # a subclass computes something else
            module.__class__ = SampledConv2d
    return network


def _breaks_onednn(conv: nn.Conv2d) -> bool:
    """oneDNN writes past its workspace in the weights' gradient of such convolutions, channels last (oneDNN issue 6035)."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding == (0, 0)
        and conv.in_channels // conv.groups < 16
    )


class SampledConv2d(nn.Conv2d):
    """A strided 1 x 1 convolution that drops the pixels between first: the same function and the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)), for a padding of 0."""
        rows, columns = self.stride
        x_BCHW = input[..., ::rows, ::columns]
        return functional.conv2d(x_BCHW, self.weight, self.bias, groups=self.groups)


def _dilate(network: nn.Module, output_stride: int) -> None:
    """Makes strides past `output_stride` 1 and spreads the kernels after them (Chen et al. 2017, section 3.1).

    Every second (fourth) pixel of the result is what the network gave before, but for SE's averages over the image.
    """
    stride, dilation = 1, 1
    for stage in network.children():
        before = dilation
        if any(getattr(module, "stride", 1) in (2, (2, 2)) for module in stage.modules()):
            stride, dilation = (stride * 2, dilation) if stride < output_stride else (stride, dilation * 2)
        if dilation > 1:
            _dilate_stage(stage, before, dilation)


def _dilate_stage(stage: nn.Module, before: int, after: int) -> None:
    for name, module in list(stage.named_modules()):
        if isinstance(module, nn.AvgPool2d):
            stage.set_submodule(name, SpreadAverage(before))
        elif isinstance(module, nn.Conv2d):
            # A convolution that gives up its stride still reads the grid from before it.
            spread = before if module.stride == (2, 2) else after
            module.stride, module.dilation = (1, 1), (spread, spread)
            module.padding = (int(module.padding[0]) * spread, int(module.padding[1]) * spread)


class SpreadAverage(nn.Module):
    """`AvgPool2d(2, 2)` a trous: 2 x 2 pixels `spacing` apart, at stride 1; the far edge is its own neighbour."""

    def __init__(self, spacing: int) -> None:
        super().__init__()
        self.spacing = spacing

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Keeps the shape (B, C, H, W)."""
        x, step = x_BCHW, self.spacing
        x = (x + torch.cat((x[..., step:, :], x[..., -step:, :]), dim=-2)) / 2
        return (x + torch.cat((x[..., step:], x[..., -step:]), dim=-1)) / 2


def _load_imagenet(network: nn.Module, name: str, in_channels: int, source: str) -> None:
    try:
        info: Any = network.feature_info
        indices = tuple(range(len(info.channels())))
        trained = timm.create_model(
            name, pretrained=True, features_only=True, in_chans=in_channels, out_indices=indices
        )
    except Exception as error:  # those of the hub's client, urllib and timm share no other base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DistsegError(
            f"model.encoder_weights: got imagenet for {name}, but {reason}; must be within reach of the network; "
            f"fetch {source} elsewhere and set model.encoder_weights=path.safetensors"
        ) from error
    network.load_state_dict(trained.state_dict())


def _load_file(network: nn.Module, path: Path, source: str) -> None:
    def refusal(what: str) -> DistsegError:
        rule = "must be a .safetensors, .pth or .pt state dict of this encoder in timm"
        return DistsegError(f"model.encoder_weights: got {path}, {what}; {rule}; fetch {source}")

    if not path.is_file():
        raise refusal("no such file")
    try:
        found = load_state_dict(str(path)).items()
        # features_only joins the outer levels of timm's names by "_" (features_conv0 for features.conv0).
        loaded = {key.replace(".", "_"): tensor for key, tensor in found if isinstance(tensor, Tensor)}
    except Exception as error:  # which one depends on the bytes of the broken file
        raise refusal(f"which cannot be read ({type(error).__name__})") from error
    state = network.state_dict()
    matched = {key: loaded[flat] for key in state if (flat := key.replace(".", "_")) in loaded}
    stem = next(key for key, tensor in state.items() if tensor.ndim == 4)
    if stem in matched and matched[stem].ndim == 4:
        matched[stem] = adapt_input_conv(state[stem].shape[1], matched[stem], base_chans=matched[stem].shape[1])
    fits = {key: tensor for key, tensor in matched.items() if tensor.shape == state[key].shape}
    wrong = [key for key in state if key not in fits and not key.endswith("num_batches_tracked")]  # old files lack it
    if wrong:
        raise refusal(f"which lacks {len(wrong)} of {len(state)} tensors or has them in another shape ({wrong[0]} ...)")
    network.load_state_dict(fits, strict=False)
