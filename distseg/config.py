"""The whole configuration of a run: frozen dataclasses, read from YAML, changed by `section.key=value`.

World size, ZeRO stage and precision are not here: they belong to the launch (see `launch/`).
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from distseg.errors import DistsegError
from distseg.shipped import as_typed, find_preset

IGNORED_LABEL = 255  # pixels of this label count in no loss and in no metric
MAX_LABEL = 62  # of a region, which kernels read as a 64-bit mask over labels
AIR_HU = -1024.0  # what lies outside a slice
# Keys that change how fast a run goes on and what it writes, not what comes out; those that end in a dot, whole sections.
PACE_KEYS = ("train.log_every_steps", "train.timeout_s", "train.trackers", "train.profile", "checkpoint.",
             "data.num_threads", "data.cache_dir", "data.log_samples")  # fmt: skip


@dataclass(frozen=True)
class AugmentConfig:
    preset: Literal["none", "study", "strong"] = "study"
    """where values come from that are not given: nothing, the study's flip and affine, or all that is below; behind a command
    it replaces all that a file says of data.augment"""
    flip_probability: float = 0.5
    """left-right flip"""
    affine_probability: float = 0.7
    """one random rotation + scale + shear + shift, resampled once"""
    rotate_deg: float = 15.0
    """largest rotation either way"""
    scale: tuple[float, float] = (0.85, 1.2)
    """range of magnification, drawn log-uniformly"""
    shear: float = 0.05
    """largest shear either way, as a fraction"""
    shift: float = 0.05
    """largest translation either way, as a fraction of image_size"""
    focus_probability: float = 0.0
    """a crop (data.fit: crop) lies around a random pixel of data.focus_region where the slice has one"""
    elastic_probability: float = 0.0
    elastic_shift: float = 0.03
    """standard deviation of the displacement at its knots, as a fraction of image_size"""
    elastic_knots: int = 6
    """a side; the displacement is smooth between them"""
    low_resolution_probability: float = 0.0
    low_resolution: tuple[float, float] = (0.5, 1.0)
    """range of the side that the image is sampled at, as a fraction of image_size, before it is scaled back"""
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    """range of the Gaussian's standard deviation, pixels"""
    noise_probability: float = 0.0
    noise_hu: float = 60.0
    """largest standard deviation of white Gaussian noise, HU"""
    contrast_probability: float = 0.0
    contrast: tuple[float, float] = (0.75, 1.25)
    """range of the factor around the middle of the window"""
    brightness: float = 0.1
    """largest shift either way (with the contrast), as a fraction of the window"""
    gamma_probability: float = 0.0
    gamma: tuple[float, float] = (0.7, 1.5)
    """range of the exponent of the windowed image, drawn log-uniformly"""
    cutout_probability: float = 0.0
    cutout: float = 0.25
    """largest side of a rectangle that is set to 0 in the image (not in the labels), as a fraction of image_size"""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            key, value = f"data.augment.{f.name}", getattr(self, f.name)
            if f.name.endswith("_probability"):
                _require(0 <= value <= 1, key, value, "must be in [0, 1]")
            elif isinstance(value, tuple):
                _require(0 < value[0] <= value[1], key, value, "must be 0 < low <= high")
            elif not isinstance(value, str):
                _require(value >= 0, key, value, "must be 0 or more")
        _require(self.low_resolution[1] <= 1, "data.augment.low_resolution", self.low_resolution, "must be at most 1")
        _require(self.cutout <= 1, "data.augment.cutout", self.cutout, "must be at most 1")
        _require(self.elastic_knots >= 2, "data.augment.elastic_knots", self.elastic_knots, "must be at least 2")


_PROBABILITIES = [f.name for f in dataclasses.fields(AugmentConfig) if f.name.endswith("_probability")]
# "study" is what AugmentConfig says; "strong" has the strengths and roughly the probabilities of nnU-Net's 2D training.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "none": dict.fromkeys(_PROBABILITIES, 0.0),
    "study": {},
    "strong": {
        "affine_probability": 0.8, "rotate_deg": 30.0, "scale": (0.7, 1.4), "shear": 0.1, "shift": 0.1,
        "elastic_probability": 0.2, "low_resolution_probability": 0.15, "blur_probability": 0.15,
        "noise_probability": 0.15, "contrast_probability": 0.3, "gamma_probability": 0.2, "cutout_probability": 0.1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    store: str = "store"
    """folder written by `distseg prepare`"""
    cache_dir: str | None = None
    """folder on the node's own disk that the cases of a fold are copied to first, once a node, and checked"""
    fold: int = 0
    """the fold whose patients validate; all others but the test patients train"""
    leaky_slice_split: bool = False
    """deals slices instead of patients to training and validation: only to show how much such a score gains"""
    image_size: int = 256
    """side of the square images the network trains on, pixels"""
    fit: Literal["resize", "crop"] = "resize"
    """how a slice becomes an image: its longer side scaled to image_size, or a window of image_size at native scale"""
    windows_hu: tuple[tuple[float, float], ...] = ((-1250.0, 250.0),)
    """each maps HU to [0, 1], clipped outside, and makes a channel"""
    neighbours: int = 0
    """slices on each side that come as channels too (2.5D); labels are those of the middle one"""
    focus_region: str = "infection"
    """what focused crops and over-sampling look for"""
    focus_share: float | None = None
    """over-sampling: slices with the focus region are repeated until they are this share of an epoch's samples"""
    last_batch: Literal["mask", "drop"] = "mask"
    """an epoch's last, incomplete global batch: filled up with slices that count for nothing, or left out"""
    num_threads: int = 2
    """DALI threads a rank"""
    log_samples: bool = False
    """each rank writes RUN/samples/rank<r>.jsonl: what it was given, with digests"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def channels(self) -> int:
        """Of the network's input: for each window the slices from below to above."""
        return len(self.windows_hu) * (2 * self.neighbours + 1)

    def __post_init__(self) -> None:
        _require(len(self.windows_hu) > 0, "data.windows_hu", "[]", "at least one window is needed")
        for window in self.windows_hu:
            _require(window[0] < window[1], "data.windows_hu", window, "must be low < high")
        _require(self.neighbours >= 0, "data.neighbours", self.neighbours, "must be 0 or more")
        _require(self.image_size >= 32, "data.image_size", self.image_size, "must be at least 32")
        _require(self.num_threads >= 1, "data.num_threads", self.num_threads, "must be at least 1")
        _require(self.fold >= 0, "data.fold", self.fold, "must be 0 or more")
        _require(
            self.focus_share is None or 0 < self.focus_share < 1,
            "data.focus_share",
            self.focus_share,
            "must be in (0, 1)",
        )
        focused = self.augment.focus_probability > 0
        _require(
            not focused or self.fit == "crop", "data.augment.focus_probability", self.augment.focus_probability,
            "only a crop can lie around something; set data.fit=crop",
        )  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    encoder: str = "densenet161"
    """any timm model that gives features at strides 2, 4, 8, 16, 32"""
    decoder: Literal["unetplusplus", "unetplus", "deeplabv3", "deeplabv3plus"] = "unetplusplus"
    """unetplus is the predecessor's name of unetplusplus"""
    encoder_weights: str | None = None
    """None, "imagenet" (timm's pretrained weights) or a file: .safetensors, .pth"""
    decoder_widths: Literal["paper", "reference"] | tuple[int, int, int, int, int] = "paper"
    """channels of the Unet++ nodes at strides 2 to 32: the paper's 32, 64, 128, 256, 512, those of
    segmentation_models_pytorch (as wide as the encoder's levels), or your own"""
    deep_supervision: bool = False
    """Unet++: a head at each of the four depths, the loss their mean; `distseg export --depth` can then cut the network"""
    attention: Literal["none", "scse"] = "none"
    """Unet++: concurrent spatial and channel squeeze and excitation after each node"""
    dropout: float = 0.0
    """of whole channels, before the head"""
    recompute: Literal["none", "cheap", "decoder", "all"] = "none"
    """computed again for the gradient instead of kept: inside encoder stages all but the results of convolutions (cheap: 3 to
    16 % slower), all inside Unet++ nodes (decoder: 20 %), or all inside both (all: 15 to 30 %)"""
    channels_last: bool = True
    """memory order of images and weights; on CPUs 3 to 25 % faster for every family, grouped convolutions too"""
    compile: bool = False
    """torch.compile"""
    start_from: str | None = None
    """run whose best weights training starts from; a head of other regions starts afresh"""
    norm: Literal["sync_batch", "batch"] = "sync_batch"
    """batch statistics of the global batch (N ranks equal one), or of each rank alone"""

    def __post_init__(self) -> None:
        if self.decoder == "unetplus":
            object.__setattr__(self, "decoder", "unetplusplus")  # frozen, and nobody has seen it yet
        widths = self.decoder_widths
        rule = "each of the five must be at least 1"
        _require(isinstance(widths, str) or min(widths) >= 1, "model.decoder_widths", widths, rule)
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        only_unetplusplus = self.deep_supervision or self.attention != "none"
        _require(
            not only_unetplusplus or self.decoder == "unetplusplus", "model.decoder", self.decoder,
            "deep_supervision and attention are Unet++'s; choose it, or leave them out",
        )  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    bce_weight: float = 1.0
    dice_weight: float = 1.0
    smooth: float = 1.0
    """added to numerator and denominator of Dice, pixels"""
    dice_over: Literal["batch", "sample"] = "batch"
    """Dice of all pixels of the global batch, or the mean of its samples' Dice"""
    absent_regions: Literal["penalise", "skip"] = "penalise"
    """a region without a true pixel: Dice falls with each false positive, or leaves it to BCE"""
    region_weights: Mapping[str, float] = field(default_factory=dict)
    """weight of a region in BCE and Dice; 1 for those not named"""
    false_positive_weight: float = 0.5
    false_negative_weight: float = 0.5
    """with 0.5 each Dice, else the Tversky index: 0.3 and 0.7 favour sensitivity"""
    focal_exponent: float = 1.0
    """(1 - Dice) to this power"""
    kernel: Literal["auto", "definition", "fused"] = "auto"
    """what computes the sums; auto: fused (Triton on CUDA, blocks in cache on CPUs) where there is one"""

    def __post_init__(self) -> None:
        _require(self.smooth > 0, "loss.smooth", self.smooth, "must be above 0 so that an empty region has a gradient")
        for name in ("bce_weight", "dice_weight"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "must be at least 0")
        for name in ("false_positive_weight", "false_negative_weight", "focal_exponent"):
            _require(getattr(self, name) > 0, f"loss.{name}", getattr(self, name), "must be above 0")
        _require(self.bce_weight + self.dice_weight > 0, "loss.dice_weight", 0.0, "must be above 0 without BCE")
        rule = "needs loss.bce_weight above 0: false positives on absent regions would have no gradient"
        _require(self.absent_regions == "penalise" or self.bce_weight > 0, "loss.absent_regions", "skip", rule)
        for name, weight in self.region_weights.items():
            _require(weight > 0, f"loss.region_weights.{name}", weight, "must be above 0")


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd has Nesterov momentum"""
    lr: float = 1e-4
    momentum: float = 0.99
    """of sgd; nnU-Net's"""
    weight_decay: float = 0.0
    """spares biases and norms"""
    encoder_lr_factor: float = 1.0
    """the encoder's learning rate is this times lr"""
    layer_decay: float = 1.0
    """each encoder level learns at this times the rate of the next deeper one"""
    frozen_encoder_epochs: int = 0
    """the encoder's weights stand still for so many epochs (its batch statistics go on)"""
    schedule: Literal["constant", "cosine", "poly"] = "constant"
    """after the warm-up: hold lr, or fall to 0 at the last step, along half a cosine or as (1 - t)^0.9"""
    warmup_steps: int = 0
    """optimizer steps in which lr rises linearly from 0"""
    max_grad_norm: float | None = None
    """gradients are scaled down to this global L2 norm; None: not clipped"""
    ema_decay: float | None = None
    """exponential moving average of the weights, which is then what is validated, scored and exported; 0.999 is common"""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "must be above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be in [0, 1)")
        _require(self.encoder_lr_factor >= 0, "optim.encoder_lr_factor", self.encoder_lr_factor, "must be 0 or more")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "must be in (0, 1]")
        clip, decay = self.max_grad_norm, self.ema_decay
        _require(clip is None or clip > 0, "optim.max_grad_norm", clip, "must be above 0, or null for no clipping")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be 0 or more")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must be 0 or more")
        _require(decay is None or 0 < decay < 1, "optim.ema_decay", decay, "must be in (0, 1)")
        frozen = self.frozen_encoder_epochs
        _require(frozen >= 0, "optim.frozen_encoder_epochs", frozen, "must be 0 or more")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    max_steps: int | None = None
    """stop after this many optimizer steps whatever the epochs say"""
    batch_size_per_rank: int = 2
    """slices in one forward pass of one rank"""
    gradient_accumulation_steps: int = 1
    """forward passes a rank before each optimizer step; the step's loss is the mean over them"""
    log_every_steps: int = 10
    """metrics go to the disk this often; every step is logged all the same"""
    select: Literal["best", "last"] = "best"
    """whose weights become the run's model: those of the highest mean validation Dice, or the last ones, so that the score of
    the validation patients (cross-validation) is not that of weights chosen by it"""
    patience: int | None = None
    """early stopping: validations in a row without a better mean Dice that end the run; None: it never ends early"""
    max_skipped_steps: int = 10
    """so many steps in a row, skipped because a gradient is not finite, end the run"""
    timeout_s: float = 600.0
    """a rank that waits so long for another ends the job; shortly before, each writes its stack to RUN/stacks/"""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """what metrics go to besides metrics.jsonl"""
    profile: str | None = None
    """steps:FIRST-LAST, which torch's profiler watches on rank 0: RUN/profile/ gets a trace, the terminal a table"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size_per_rank", "gradient_accumulation_steps", "log_every_steps"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        for name in ("max_steps", "patience", "max_skipped_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}", value, "must be at least 1")
        _require(self.timeout_s > 0, "train.timeout_s", self.timeout_s, "must be above 0 seconds")
        rule = "must be steps:FIRST-LAST, such as steps:10-20"
        _require(self.profile is None or self.profiled_steps is not None, "train.profile", self.profile, rule)

    @property
    def profiled_steps(self) -> range | None:
        """Optimizer steps, counted from 1."""
        found = re.fullmatch(r"steps:(\d+)-(\d+)", self.profile or "")
        steps = range(int(found[1]), int(found[2]) + 1) if found else None
        return steps if steps and steps.start >= 1 else None


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = None
    """besides one at the end of each epoch"""
    keep_last: int = 2
    keep_best: int = 0
    """checkpoints of the highest validation scores, besides the last ones; best/weights.safetensors is kept anyway"""

    def __post_init__(self) -> None:
        every = self.every_steps
        _require(every is None or every >= 1, "checkpoint.every_steps", every, "must be at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be 0 or more")


@dataclass(frozen=True)
class EvaluateConfig:
    threshold: float = 0.5
    """a pixel is in a region where its probability is at least this"""
    empty_masks: Literal["exclude", "one", "zero"] = "exclude"
    """score of a case whose truth and prediction are both empty: left out of the mean (and counted), 1 or 0"""
    bootstrap_resamples: int = 2000
    """patient resamples behind the 95% interval"""
    batch_size: int = 4
    """slices in one forward pass"""
    tta: bool = False
    """test-time augmentation: the mean probability over the image's four flips, at each size of tta_scales"""
    tta_scales: tuple[float, ...] = (1.0,)
    """multiples of the size that the network works at"""
    window: int | None = None
    """larger images are seen through half overlapping windows of this side, pixels; None: whole"""

    def __post_init__(self) -> None:
        _require(0 < self.threshold < 1, "evaluate.threshold", self.threshold, "must be in (0, 1)")
        for name in ("bootstrap_resamples", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "must be at least 1")
        scales, window = self.tta_scales, self.window
        in_range = len(scales) > 0 and all(0.1 <= scale <= 10 for scale in scales)
        _require(in_range, "evaluate.tta_scales", scales, "must name sizes from 0.1 to 10")
        _require(window is None or window >= 32, "evaluate.window", window, "must be at least 32")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"lung": (1, 2), "infection": (2,)})
    """region -> the labels it is the union of; the network gives one logit each"""
    seed: int = 0
    output_dir: str = "run"

    def __post_init__(self) -> None:
        _require(len(self.regions) > 0, "regions", "{}", "at least one region is needed")
        for name, labels in self.regions.items():
            in_range = len(labels) > 0 and all(1 <= label <= MAX_LABEL for label in labels)
            _require(in_range, f"regions.{name}", list(labels), f"must name labels from 1 to {MAX_LABEL}")
        known = f"must be one of the regions ({', '.join(self.regions)})"
        for name in self.loss.region_weights:
            _require(name in self.regions, "loss.region_weights", name, known)
        if self.data.focus_share is not None or self.data.augment.focus_probability > 0:
            _require(self.data.focus_region in self.regions, "data.focus_region", self.data.focus_region, known)
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as YAML and JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads YAML (None: the defaults), then applies `section.key=value` overrides in order.

    Args:
        path: a file, or the name of a shipped configuration, such as covid_ct.
        overrides: as on the command line.

    Raises:
        DistsegError: the file is missing or is not a YAML mapping, a key is unknown, a value is of the wrong type or range.
    """
    what = "config file"
    values = read_yaml(find_preset(path, what), what, "yaml_configs/quickstart.yaml") if path else {}
    changes = [read_override(override) for override in overrides]
    if any(key == "data.augment.preset" for key, _ in changes) and isinstance(values.get("data"), dict):
        values["data"].pop("augment", None)  # a written configuration has every value: none would be left to the preset
    for key, value in changes:
        _set_dotted(values, key, value)
    _check_keys(values, Config, "")
    _apply_preset(values)
    try:
        config = pydantic.TypeAdapter(Config).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DistsegError(f"config {key}: got {first['input']!r}; {first['msg']}; see --print-config") from None
    for key, value in flat(config.to_dict()).items():
        numbers = [number for number in _leaves(value) if isinstance(number, float)]
        _require(all(map(math.isfinite, numbers)), key, value, "must be finite")
    return config


def _leaves(value: Any) -> Iterator[Any]:
    """What nested lists hold."""
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`.

    Raises:
        DistsegError: the value is not YAML.
    """
    key, _, text = override.partition("=")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise DistsegError(
            f"override: got {override}; its value must be YAML; a bracket or quote may be open"
        ) from None


def config_as_yaml(config: Config) -> str:
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """A mapping from a file, {} from an empty one.

    Args:
        path: of the file.
        what: it is, for errors.
        example: a shipped file that is right.

    Raises:
        DistsegError: the file is not a YAML mapping.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DistsegError(f"{what}: got {path}; it must be YAML; {error}") from None
    if not isinstance(values, dict | None):
        raise DistsegError(
            f"{what}: got {path} holding a {type(values).__name__}; it must hold `key: value` lines; see {as_typed(example)}"
        )
    return values or {}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would keep the last of two equal keys and lose the other's section without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1 and key != "<<"}):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a configuration (`Config.to_dict`) says, by dotted keys; of regions their order too, which is the logits'."""
    return flat(config) | {"regions": list(config["regions"])}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two mappings of dotted keys differ: key -> (value here, value there), None where it is not."""
    keys = dict.fromkeys((*one, *other))
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise DistsegError(f"config override: got {key}; {section!r} is a value, not a section; use --print-config")
    values[last] = value


def _apply_preset(values: dict[str, Any]) -> None:
    """Puts the values of data.augment.preset under those that are given; a wrong name is left to the validation."""
    data = values.get("data")
    augment = data.get("augment") if isinstance(data, dict) else None
    if isinstance(augment, dict) and augment.get("preset") in PRESETS:
        values["data"]["augment"] = {**PRESETS[augment["preset"]], **augment}


def _check_keys(values: Mapping[str, Any], schema: type, prefix: str) -> None:
    """Refuses keys that the dataclass does not have, naming the nearest one of the whole configuration."""
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(f"{prefix}{key}", list(_all_keys(Config, "")), n=1, cutoff=0.0)
            raise DistsegError(f"config key: got {prefix}{key}; no such key; did you mean {near[0]}?")
        section = fields[key]
        if isinstance(section, type) and dataclasses.is_dataclass(section) and isinstance(value, Mapping):
            _check_keys(value, section, f"{prefix}{key}.")


def _all_keys(schema: type, prefix: str) -> list[str]:
    """Dotted names of all values, sections left out."""
    keys = []
    for f in dataclasses.fields(schema):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            keys += _all_keys(f.type, f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise DistsegError(f"config {key}: got {value}; {rule}; see --print-config")
