"""What a configuration may say: a frozen dataclass a section. How it is read and compared: `config_files`.

Types and ranges are checked when an object is made; what several keys say together, in `__post_init__`. The text under a key
is its reference: `distseg config KEY` and docs/configuration.md show it, with the default and the range.
World size, ZeRO stage and precision are not here: they belong to the launch (see `launch/`).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from distseg.errors import DistsegError
from distseg.rules import Rule, Section, checked

IGNORED_LABEL = 255  # pixels of this label count in no loss and in no metric
MAX_LABEL = 62  # of a region, which kernels read as a 64-bit mask over labels
AIR_HU = -1024.0  # what lies outside a slice
FLIP_PROBABILITY = 0.5

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=32)]
Range = Annotated[tuple[float, float], Rule(lambda pair: 0 < pair[0] <= pair[1], "a pair of numbers, 0 < low <= high")]
ShareRange = Annotated[
    tuple[float, float], Rule(lambda pair: 0 < pair[0] <= pair[1] <= 1, "a pair of numbers, 0 < low <= high <= 1")
]
Label = Annotated[
    int | str,
    Rule(lambda label: isinstance(label, str) or 1 <= label <= MAX_LABEL, "a label, by name or by number (1 to 62)"),
]
Window = Annotated[tuple[float, float], Rule(lambda pair: pair[0] < pair[1], "a pair of numbers, low < high")]
Decoder = Literal["unetplusplus", "unetplus", "deeplabv3", "deeplabv3plus"]


def _remedy(key: str) -> str:
    return f"see distseg config {key}"


def _section(prefix: str) -> Callable[[type[Section]], type[Section]]:
    return checked("config", prefix, _remedy)


def _refuse_unless(holds: bool, key: str, value: Any, rule: str) -> None:
    """For rules that a key's type cannot say."""
    if not holds:
        raise DistsegError(f"config {key}: got {value}; {rule}; {_remedy(key)}")


@_section("data.augment.")
@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied, anew in each epoch."""

    preset: Literal["none", "study", "strong"] = "study"
    """where values come from that are not given: nothing, the study's flip and affine, or all that is below; behind a command
    it replaces all that a file says of data.augment"""
    flip_probability: Share | None = None
    """left-right flip; null: 0.5, or 0 where a region has a side (left_lung, right_lung), which a flip would change"""
    affine_probability: Share = 0.7
    """one random rotation + scale + shear + shift, resampled once"""
    rotate_deg: NotNegative = 15.0
    """largest rotation either way, degrees"""
    scale: Range = (0.85, 1.2)
    """range of magnification, drawn log-uniformly"""
    shear: NotNegative = 0.05
    """largest shear either way, as a fraction"""
    shift: NotNegative = 0.05
    """largest translation either way, as a fraction of image_size"""
    focus_probability: Share = 0.0
    """a crop (data.fit: crop) lies around a random pixel of data.focus_region where the slice has one"""
    elastic_probability: Share = 0.0
    """one smooth random displacement of all pixels"""
    elastic_shift: NotNegative = 0.03
    """standard deviation of the displacement at its knots, as a fraction of image_size"""
    elastic_knots: Annotated[int, Field(ge=2)] = 6
    """knots along a side; the displacement is smooth between them"""
    low_resolution_probability: Share = 0.0
    """the image is sampled at a lower resolution and scaled back"""
    low_resolution: ShareRange = (0.5, 1.0)
    """range of the side that the image is sampled at, as a fraction of image_size, before it is scaled back"""
    blur_probability: Share = 0.0
    """Gaussian blur"""
    blur_sigma: Range = (0.5, 1.0)
    """range of the Gaussian's standard deviation, pixels"""
    noise_probability: Share = 0.0
    """white Gaussian noise"""
    noise_hu: NotNegative = 60.0
    """largest standard deviation of white Gaussian noise, HU"""
    contrast_probability: Share = 0.0
    """a change of contrast and brightness"""
    contrast: Range = (0.75, 1.25)
    """range of the factor around the middle of the window"""
    brightness: NotNegative = 0.1
    """largest shift either way (with the contrast), as a fraction of the window"""
    gamma_probability: Share = 0.0
    """the windowed image is raised to a random power"""
    gamma: Range = (0.7, 1.5)
    """range of the exponent of the windowed image, drawn log-uniformly"""
    cutout_probability: Share = 0.0
    """one random rectangle is hidden"""
    cutout: Share = 0.25
    """largest side of a rectangle that is set to 0 in the image (not in the labels), as a fraction of image_size"""

    @property
    def flips(self) -> float:
        """The probability of a flip; where it is left open and no store has settled it, that of regions without a side."""
        return FLIP_PROBABILITY if self.flip_probability is None else self.flip_probability


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


@_section("data.")
@dataclass(frozen=True)
class DataConfig:
    """What slices are trained and validated on, and how a slice becomes the network's input."""

    store: str = "store"
    """folder written by `distseg prepare`"""
    cache_dir: str | None = None
    """folder on the node's own disk that the cases of a fold are copied to first, once a node, and checked"""
    fold: CountOrZero = 0
    """the fold whose patients validate; all others but the test patients train"""
    leaky_slice_split: bool = False
    """deals slices instead of patients to training and validation: only to show how much such a score gains"""
    image_size: Side = 256
    """side of the square images the network trains on, pixels"""
    fit: Literal["resize", "crop"] = "resize"
    """how a slice becomes an image: its longer side scaled to image_size, or a window of image_size at native scale, or at
    spacing_mm"""
    spacing_mm: Positive | None = None
    """mm that a pixel of the image has, whatever the slice's have; so a lesion has one size to the network in any field of view"""
    windows_hu: Annotated[tuple[Window, ...], Field(min_length=1)] = ((-1250.0, 250.0),)
    """each maps HU to [0, 1], clipped outside, and makes a channel"""
    neighbours: CountOrZero = 0
    """slices on each side that come as channels too (2.5D); labels are those of the middle one"""
    focus_region: str | None = None
    """what focused crops and over-sampling look for; null: the region with the fewest voxels in the store"""
    focus_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """over-sampling: slices with the focus region are repeated until they are this share of an epoch's samples"""
    last_batch: Literal["mask", "drop"] = "mask"
    """an epoch's last, incomplete global batch: filled up with slices that count for nothing, or left out"""
    num_threads: Count = 2
    """DALI threads a rank"""
    log_samples: bool = False
    """each rank writes RUN/samples/rank<r>.jsonl: what it was given, with digests"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def focuses(self) -> bool:
        """Whether anything looks for focus_region."""
        return self.focus_share is not None or self.augment.focus_probability > 0

    @property
    def channels(self) -> int:
        """Of the network's input: for each window the slices from below to above."""
        return len(self.windows_hu) * (2 * self.neighbours + 1)

    def __post_init__(self) -> None:
        focused = self.augment.focus_probability > 0
        _refuse_unless(
            not focused or self.fit == "crop", "data.augment.focus_probability", self.augment.focus_probability,
            "only a crop can lie around something; set data.fit=crop",
        )  # fmt: skip
        _refuse_unless(
            self.spacing_mm is None or self.fit == "crop", "data.spacing_mm", self.spacing_mm,
            "images of one pixel size are windows of the slice; set data.fit=crop",
        )  # fmt: skip


@_section("model.")
@dataclass(frozen=True)
class ModelConfig:
    """The network: an encoder from timm and a decoder."""

    encoder: str = "densenet161"
    """any timm model that gives features at strides 2, 4, 8, 16, 32"""
    decoder: Decoder = "unetplusplus"
    """unetplus is the predecessor's name of unetplusplus"""
    encoder_weights: str | None = None
    """null, imagenet (timm's pretrained weights) or a file: .safetensors, .pth"""
    decoder_widths: Literal["paper", "reference"] | tuple[Count, Count, Count, Count, Count] = "paper"
    """channels of the Unet++ nodes at strides 2 to 32: the paper's 32, 64, 128, 256, 512, those of
    segmentation_models_pytorch (as wide as the encoder's levels), or your own"""
    deep_supervision: bool = False
    """Unet++: a head at each of the four depths, the loss their mean; `--depth` of the export can then cut the network"""
    attention: Literal["none", "scse"] = "none"
    """Unet++: concurrent spatial and channel squeeze and excitation after each node"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """probability of dropping a whole channel before the head"""
    recompute: Literal["none", "cheap", "decoder", "all"] = "none"
    """computed again for the gradient instead of kept: inside encoder stages all but the results of convolutions (cheap: 3 to
    16 % slower), all inside Unet++ nodes (decoder: 20 %), or all inside both (all: 15 to 30 %)"""
    channels_last: bool = True
    """memory order of images and weights; on CPUs 3 to 25 % faster for every family, grouped convolutions too"""
    compile: bool = False
    """the network is compiled by torch.compile"""
    start_from: str | None = None
    """run whose best weights training starts from; a head of other regions starts afresh"""
    norm: Literal["sync_batch", "batch"] = "sync_batch"
    """batch statistics of the global batch (N ranks equal one), or of each rank alone"""

    def __post_init__(self) -> None:
        if self.decoder == "unetplus":
            object.__setattr__(self, "decoder", "unetplusplus")  # frozen, and nobody has seen it yet
        only_unetplusplus = self.deep_supervision or self.attention != "none"
        _refuse_unless(
            not only_unetplusplus or self.decoder == "unetplusplus", "model.decoder", self.decoder,
            "deep_supervision and attention are Unet++'s; choose it, or leave them out",
        )  # fmt: skip


@_section("loss.")
@dataclass(frozen=True)
class LossConfig:
    """The loss: binary cross-entropy (BCE) and soft Dice of each region, over the global batch."""

    bce_weight: NotNegative = 1.0
    """factor of the cross-entropy"""
    dice_weight: NotNegative = 1.0
    """factor of the Dice loss"""
    smooth: Positive = 1.0
    """added to numerator and denominator of Dice, pixels; so an empty region has a gradient"""
    dice_over: Literal["batch", "sample"] = "batch"
    """Dice of all pixels of the global batch, or the mean of its samples' Dice"""
    absent_regions: Literal["penalise", "skip"] = "penalise"
    """a region without a true pixel: Dice falls with each false positive, or leaves it to BCE"""
    region_weights: Mapping[str, Positive] = field(default_factory=dict)
    """weight of a region in BCE and Dice; 1 for those not named"""
    false_positive_weight: Positive = 0.5
    """weight of false positives in the denominator of Dice"""
    false_negative_weight: Positive = 0.5
    """weight of false negatives there; with 0.5 each Dice, else the Tversky index: 0.3 and 0.7 favour sensitivity"""
    focal_exponent: Positive = 1.0
    """(1 - Dice) to this power"""
    kernel: Literal["auto", "definition", "fused"] = "auto"
    """what computes the sums; auto: fused (Triton on CUDA, blocks in cache on CPUs) where there is one"""

    def __post_init__(self) -> None:
        _refuse_unless(self.bce_weight + self.dice_weight > 0, "loss.dice_weight", 0.0, "must be above 0 without BCE")
        rule = "needs loss.bce_weight above 0: false positives on absent regions would have no gradient"
        _refuse_unless(self.absent_regions == "penalise" or self.bce_weight > 0, "loss.absent_regions", "skip", rule)


@_section("optim.")
@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """the algorithm; sgd has Nesterov momentum"""
    lr: Positive = 1e-4
    """learning rate, after the warm-up"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """of sgd; nnU-Net's"""
    weight_decay: NotNegative = 0.0
    """how much weights are pulled to 0; spares biases and norms"""
    encoder_lr_factor: NotNegative = 1.0
    """the encoder's learning rate is this times lr"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """each encoder level learns at this times the rate of the next deeper one"""
    frozen_encoder_epochs: CountOrZero = 0
    """the encoder's weights stand still for so many epochs (its batch statistics go on)"""
    schedule: Literal["constant", "cosine", "poly"] = "constant"
    """after the warm-up: hold lr, or fall to 0 at the last step, along half a cosine or as (1 - t)^0.9"""
    warmup_steps: CountOrZero = 0
    """optimizer steps in which lr rises linearly from 0"""
    max_grad_norm: Positive | None = None
    """gradients are scaled down to this global L2 norm; null: no clipping"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """exponential moving average of the weights, which is then what is validated, scored and exported; 0.999 is common"""


@_section("train.")
@dataclass(frozen=True)
class TrainConfig:
    """How long a run trains, and what it logs."""

    epochs: Count = 100
    """passes over the training slices"""
    max_steps: Count | None = None
    """stop after this many optimizer steps whatever the epochs say"""
    batch_size_per_rank: Count = 2
    """slices in one forward pass of one rank"""
    gradient_accumulation_steps: Count = 1
    """forward passes a rank before each optimizer step; the step's loss is the mean over them"""
    log_every_steps: Count = 10
    """metrics go to the disk this often; every step is logged all the same"""
    select: Literal["best", "last"] = "best"
    """whose weights become the run's model: those of the highest mean validation Dice, or the last ones, so that the score of
    the validation patients (cross-validation) is not that of weights chosen by it"""
    patience: Count | None = None
    """early stopping: validations in a row without a better mean Dice that end the run; null: it never ends early"""
    max_skipped_steps: Count = 10
    """so many steps in a row, skipped because a gradient is not finite, end the run"""
    timeout_s: Positive = 600.0
    """a rank that waits so long for another ends the job, seconds; shortly before, each writes its stack to RUN/stacks/"""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """what metrics go to besides metrics.jsonl"""
    profile: str | None = None
    """steps:FIRST-LAST, which torch's profiler watches on rank 0: RUN/profile/ gets a trace, the terminal a table"""

    def __post_init__(self) -> None:
        rule = "must be steps:FIRST-LAST, such as steps:10-20"
        _refuse_unless(self.profile is None or self.profiled_steps is not None, "train.profile", self.profile, rule)

    @property
    def profiled_steps(self) -> range | None:
        """Optimizer steps, counted from 1."""
        found = re.fullmatch(r"steps:(\d+)-(\d+)", self.profile or "")
        steps = range(int(found[1]), int(found[2]) + 1) if found else None
        return steps if steps and steps.start >= 1 else None


@_section("checkpoint.")
@dataclass(frozen=True)
class CheckpointConfig:
    """Which states of a run are kept on the disk."""

    every_steps: Count | None = None
    """optimizer steps between checkpoints, besides one at the end of each epoch; null: those alone"""
    keep_last: Count = 2
    """newest checkpoints that are kept"""
    keep_best: CountOrZero = 0
    """checkpoints of the highest validation scores, besides the last ones; best/weights.safetensors is kept anyway"""


@_section("evaluate.")
@dataclass(frozen=True)
class EvaluateConfig:
    """How a trained run is scored."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """a pixel is in a region where its probability is at least this"""
    empty_masks: Literal["exclude", "one", "zero"] = "exclude"
    """score of a case whose truth and prediction are both empty: left out of the mean (and counted), 1 or 0"""
    bootstrap_resamples: Count = 2000
    """patient resamples behind the 95% interval"""
    batch_size: Count = 4
    """slices in one forward pass"""
    tta: bool = False
    """test-time augmentation: the mean probability over the image and, where training flipped images, its mirror image, at each
    size of tta_scales"""
    tta_scales: Annotated[tuple[Annotated[float, Field(ge=0.1, le=10)], ...], Field(min_length=1)] = (1.0,)
    """multiples of the size that the network works at, as far as training scaled images (data.augment.scale)"""
    window: Side | None = None
    """larger images are seen through half overlapping windows of this side, pixels; null: whole"""


@_section("")
@dataclass(frozen=True)
class Config:
    """Keys at the top of the file, beside the sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    regions: Mapping[str, Annotated[tuple[Label, ...], Field(min_length=1)]] = field(default_factory=dict)
    """region -> names of the labels that it is the union of; the network gives one logit each. {}: the store's own, one a label,
    the lung with its infection"""
    labels: Mapping[str, CountOrZero] = field(default_factory=dict)
    """label -> its number in masks; taken from the store, and written into the run's configuration"""
    planned: tuple[str, ...] = ()
    """keys whose values `distseg plan` chose; the report of a run names them"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of all that is random: first weights, order of the slices, augmentation, dropout, patient resamples"""
    output_dir: str = "run"
    """folder of the run"""

    def __post_init__(self) -> None:
        if not self.regions:
            return  # the store's own, which nobody knows yet
        known = f"must be one of the regions ({', '.join(self.regions)})"
        for name in self.loss.region_weights:
            _refuse_unless(name in self.regions, "loss.region_weights", name, known)
        focus = self.data.focus_region
        _refuse_unless(not self.data.focuses or focus in (None, *self.regions), "data.focus_region", focus, known)

    @property
    def region_labels(self) -> dict[str, tuple[int, ...]]:
        """Region -> the numbers of its labels.

        Raises:
            DistsegError: regions that name labels, before a store has told their numbers (see `distseg.data.store.settled`).
        """
        try:
            return {
                region: tuple(label if isinstance(label, int) else self.labels[label] for label in labels)
                for region, labels in self.regions.items()
            }
        except KeyError as error:
            raise DistsegError(
                f"regions: got label {error}; labels are {dict(self.labels)}; choose from them"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as YAML and JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))
