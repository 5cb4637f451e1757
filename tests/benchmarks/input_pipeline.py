"""The input pipeline against PyTorch data loaders: `python tests/benchmarks/input_pipeline.py [--quick] [--store STORE]`.

All read the same files and give the same kind of batch, with two threads (ours) or two workers (the peers); each lives in
a process of its own, and their turns alternate. Then: how long a training step waits for data, and memory over many epochs.
"""

import argparse
import contextlib
import gc
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from report import print_result, print_table, print_versions
from torch.utils.data import DataLoader, Dataset, RandomSampler

from distseg.config import AIR_HU, PRESETS, AugmentConfig, DataConfig
from distseg.data.augment import windowing
from distseg.data.plan import Plan
from distseg.data.store import SliceFiles, open_store
from distseg.packages import installed_version

WORKERS = 2
WARM_UP = 6  # batches: more than the peers' workers and DALI hold ready, so that none of them is timed
WINDOWS_HU = ((-1250.0, 250.0), (-160.0, 240.0), (-1000.0, -500.0))
JUDGED = "strong, 1 window"
TARGETS = {"albumentations": ">= 1.0", "monai": ">= 1.5", "data_wait": "< 0.02", "memory_growth_mib": "< 5"}
NOTES = """\
Peers resize, then flip and warp where drawn (two resamplings); ours is one. Scales are log-uniform in ours, else uniform.
One window of noise tile is ours; the peers draw fresh noise. Contrast: torchvision's is around the mean, and its brightness
a factor; batchgeneratorsv2's brightness is Gaussian, its spatial transform has no shear or shift and its elastic
deformation comes with a rotation. Elastic: a field through 6 x 6 knots (ours, torchvision with its functional `elastic`,
whose own random field takes 0.3 s), grid distortion with 5 x 5 cells (albumentations, MONAI: their elastic transforms take 6
to 30 times as long), blurred noise (batchgeneratorsv2). MONAI without metadata: lazy resampling, which needs it, took twice
as long. cpu: user and system time of the process and its workers. memory: what the process and its workers hold at most.
wait: share of steps that leave the CPU alone."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    image_size: int
    batch_size: int
    batches: int  # in a turn
    turns: int
    step_s: float
    steps: int
    epochs: int
    settings: tuple[tuple[str, int], ...]  # preset and number of windows; what needs more memory comes later


FULL = Size(image_size=512, batch_size=8, batches=25, turns=5, step_s=0.1, steps=40, epochs=200,
            settings=(("study", 1), ("strong", 1), ("study", 3), ("strong", 3)))  # fmt: skip
QUICK = Size(image_size=64, batch_size=4, batches=4, turns=1, step_s=0.01, steps=5, epochs=20,
             settings=(("strong", 1), ("study", 3)))  # fmt: skip


# ---- the contenders: iterators of image (B, C, S, S) float32 in [0, 1] and label (B, S, S) uint8

Images = Iterator[tuple[torch.Tensor, torch.Tensor]]
Change = Callable[[Any], Any]  # of an image in the library's own form


def open_distseg(data: DataConfig, batch_size: int, n_slices: int | None = None) -> Images:
    """This pipeline on the training slices (the first `n_slices`)."""
    from distseg.data.pipeline import build_train_loader

    torch.set_num_threads(data.num_threads)
    slices = open_store(Path(data.store)).slices_of_split("train", data.fold)
    plan = Plan(n_slices or len(slices), batch_size, seed=0)
    loader = build_train_loader(data, slices, plan, 0, torch.device("cpu"))
    return ((batch.image_BCHW, batch.label_BHW) for batch in loader)


def open_peer(peer: str, data: DataConfig, batch_size: int) -> Images:
    """A PyTorch loader of the same slices, changed by a peer's transforms."""
    slices = open_store(Path(data.store)).slices_of_split("train", data.fold)
    dataset = ChangedSlices(slices[:], PEERS[peer](data))
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = DataLoader(
        dataset, batch_size, sampler=endless, num_workers=WORKERS, worker_init_fn=single_thread,
        multiprocessing_context="fork",
    )  # fmt: skip
    return iter(loader)


def single_thread(_: int) -> None:
    """In a worker: no threads besides the workers."""
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


class ChangedSlices(Dataset):
    def __init__(self, files: Sequence[SliceFiles], change: Callable[[np.ndarray, np.ndarray], tuple]):
        """`change`: HU (int16) and labels (uint8) of a slice to its image (C, S, S) and labels (S, S)."""
        self.files, self.change = files, change

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.change(np.load(self.files[index].image), np.load(self.files[index].label))


def albumentations_change(data: DataConfig) -> Callable[[np.ndarray, np.ndarray], tuple]:
    import albumentations as A
    import cv2

    a, size = data.augment, data.image_size
    unit = 4096.0  # HU that become [0, 1], as float images must be

    def compose(*transforms: Any) -> Any:
        possible = [t for t in transforms if t.p > 0]
        return A.Compose(possible, is_check_shapes=False) if possible else lambda **given: given

    spatial = compose(
        A.Resize(size, size),
        A.HorizontalFlip(p=a.flips),
        A.Affine(
            a.scale, (-a.shift, a.shift), rotate=(-a.rotate_deg, a.rotate_deg), shear=(-_degrees(a), _degrees(a)),
            fill=AIR_HU, p=a.affine_probability,
        ),
        A.GridDistortion(a.elastic_knots - 1, p=a.elastic_probability),
    )  # fmt: skip
    linear = {"downscale": cv2.INTER_LINEAR, "upscale": cv2.INTER_LINEAR}
    degrade = compose(
        A.Downscale((a.low_resolution[0], 0.99), linear, p=a.low_resolution_probability),
        A.GaussianBlur(0, a.blur_sigma, p=a.blur_probability),
        A.GaussNoise((0, a.noise_hu / unit), p=a.noise_probability),
    )
    contrast = compose(
        A.RandomBrightnessContrast(a.brightness, (a.contrast[0] - 1, a.contrast[1] - 1), p=a.contrast_probability)
    )
    tone = compose(
        A.RandomGamma((100 * a.gamma[0], 100 * a.gamma[1]), p=a.gamma_probability),
        A.CoarseDropout((1, 1), (0.01, a.cutout), (0.01, a.cutout), p=a.cutout_probability),
    )
    gains, offsets = windowing(data.windows_hu, None).T
    gains, offsets = gains * unit, offsets + gains * AIR_HU

    def windowed(image: np.ndarray) -> np.ndarray:
        channels = [image * gain for gain in gains]
        for channel, offset in zip(channels, offsets, strict=True):
            channel += offset
        return cv2.merge(channels) if len(channels) > 1 else channels[0]

    def change(hu: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        moved = spatial(image=hu, mask=label)  # int16: 2.4 times faster than float32
        image = moved["image"].astype(np.float32)
        image -= AIR_HU
        image /= unit
        image = windowed(degrade(image=image)["image"])
        image = contrast(image=image)["image"]
        image = tone(image=np.clip(image, 0, 1, out=image))["image"]
        channels = np.stack(cv2.split(image)) if image.ndim == 3 else image[None]
        return torch.from_numpy(channels), torch.from_numpy(moved["mask"])

    return change


def torch_change(data: DataConfig, spatial: Callable, degrade: Change, contrast: Change, tone: Change) -> Callable:
    """The order of a change that the peers on torch share.

    Args:
        data: its windows.
        spatial: image (1, H, W) float32 in HU above air, so that zeros are air, and label (1, H, W), to (1, S, S) both.
        degrade: of such an image: resolution, blur, noise.
        contrast: of the windowed image (C, S, S), not clipped yet.
        tone: of the image in [0, 1].
    """
    gain, offset = torch.from_numpy(windowing(data.windows_hu, None)).T[:, :, None, None]
    offset = offset + gain * AIR_HU

    def change(hu: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        above_air = torch.from_numpy(hu)[None].float().sub_(AIR_HU)
        image, moved_label = spatial(above_air, torch.from_numpy(label)[None])
        image = torch.addcmul(offset, degrade(image), gain)
        return tone(contrast(image).clamp_(0, 1)), moved_label[0].to(torch.uint8)

    return change


def torchvision_change(data: DataConfig) -> Callable:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    a, size = data.augment, data.image_size

    class Elastic(v2.Transform):
        def make_params(self, flat_inputs: list) -> dict:
            knots = 2 * a.elastic_shift * torch.randn(1, 2, a.elastic_knots, a.elastic_knots)
            field = torch.nn.functional.interpolate(knots, (size, size), mode="bicubic", align_corners=True)
            return {"displacement": field.permute(0, 2, 3, 1)}

        def transform(self, inpt: Any, params: dict) -> Any:
            return F.elastic(inpt, **params)

    def low_resolution(image: torch.Tensor) -> torch.Tensor:
        side = round(size * random.uniform(*a.low_resolution))
        return F.resize(F.resize(image, [side, side], antialias=False), [size, size], antialias=False)

    def compose(*chances: tuple[float, Any]) -> Change:
        possible = [v2.RandomApply([transform], p) for p, transform in chances if p > 0]
        return v2.Compose(possible) if possible else v2.Identity()

    shear = (-_degrees(a), _degrees(a), -_degrees(a), _degrees(a))
    affine = v2.RandomAffine(a.rotate_deg, (a.shift, a.shift), a.scale, shear, v2.InterpolationMode.BILINEAR)
    moved = compose(
        (1.0, v2.Resize((size, size), antialias=False)),
        (a.flips, v2.RandomHorizontalFlip(1.0)),
        (a.affine_probability, affine),
        (a.elastic_probability, Elastic()),
    )

    def spatial(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = moved(tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    degrade = compose(
        (a.low_resolution_probability, v2.Lambda(low_resolution)),
        (a.blur_probability, v2.GaussianBlur(5, a.blur_sigma)),
        (a.noise_probability, v2.GaussianNoise(sigma=a.noise_hu / 2, clip=False)),
    )
    contrast = compose((a.contrast_probability, v2.ColorJitter(a.brightness, a.contrast)))
    tone = compose(
        (a.gamma_probability, v2.Lambda(lambda image: F.adjust_gamma(image, random.uniform(*a.gamma)))),
        (a.cutout_probability, v2.RandomErasing(1.0, (0.001, a.cutout**2))),
    )
    return torch_change(data, spatial, degrade, contrast, tone)


def monai_change(data: DataConfig) -> Callable:
    import monai
    import monai.transforms as M

    monai.data.set_track_meta(False)
    a, size, both = data.augment, data.image_size, ("image", "label")
    nearest_label = {"mode": ("bilinear", "nearest"), "padding_mode": "zeros"}

    def compose(*transforms: Any) -> Change:
        return M.Compose([t for t in transforms if t.prob > 0])

    moved = M.Compose(
        [
            M.Resized(both, (size, size), mode=("bilinear", "nearest")),
            compose(
                M.RandFlipd(both, a.flips, spatial_axis=1),
                M.RandAffined(
                    both, None, a.affine_probability, math.radians(a.rotate_deg), (a.shear, a.shear),
                    (a.shift * size,) * 2, ((a.scale[0] - 1, a.scale[1] - 1),) * 2, **nearest_label,
                ),
                M.RandGridDistortiond(both, a.elastic_knots - 1, a.elastic_probability, (-0.3, 0.3), **nearest_label),
            ),
        ]
    )  # fmt: skip

    def spatial(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = moved({"image": image, "label": label.float()})
        return result["image"], result["label"]

    degrade = compose(
        M.RandSimulateLowResolution(
            a.low_resolution_probability, upsample_mode="bilinear", zoom_range=a.low_resolution
        ),
        M.RandGaussianSmooth(a.blur_sigma, a.blur_sigma, prob=a.blur_probability),
        M.RandGaussianNoise(a.noise_probability, std=a.noise_hu),
    )
    contrast = compose(
        M.RandScaleIntensity((a.contrast[0] - 1, a.contrast[1] - 1), a.contrast_probability),
        M.RandShiftIntensity(a.brightness, prob=a.contrast_probability),
    )
    tone = compose(
        M.RandAdjustContrast(a.gamma_probability, a.gamma),
        M.RandCoarseDropout(1, 1, fill_value=0, max_spatial_size=int(a.cutout * size), prob=a.cutout_probability),
    )
    return torch_change(data, spatial, degrade, contrast, tone)


def batchgenerators_change(data: DataConfig) -> Callable:
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.blank_rectangle import BlankRectangleTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    a, size = data.augment, data.image_size
    radians = math.radians(a.rotate_deg)
    largest = a.elastic_shift * size

    def of_image(*chances: tuple[float, Any]) -> Change:
        chain = ComposeTransforms([RandomTransform(transform, p) for p, transform in chances if p > 0])
        return lambda image: chain(image=image)["image"]

    warp = SpatialTransform(
        (size, size), 0, False, p_rotation=1, rotation=(-radians, radians), p_scaling=1,
        scaling=(1 / a.scale[1], 1 / a.scale[0]), p_synchronize_scaling_across_axes=1, mode_seg="nearest",
        p_elastic_deform=a.elastic_probability / a.affine_probability, elastic_deform_scale=0.1,
        elastic_deform_magnitude=(largest, 3 * largest),
    )  # fmt: skip
    flip = MirrorTransform((1,))  # half of the time
    moved = ComposeTransforms([flip, RandomTransform(warp, a.affine_probability)])

    def spatial(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if image.shape[-2:] != (size, size):
            image = torch.nn.functional.interpolate(image[None], (size, size), mode="bilinear")[0]
            label = torch.nn.functional.interpolate(label[None], (size, size))[0]
        result = moved(image=image, segmentation=label)
        return result["image"], result["segmentation"]

    degrade = of_image(
        (a.low_resolution_probability, SimulateLowResolutionTransform(a.low_resolution, True, True, None)),
        (a.blur_probability, GaussianBlurTransform(a.blur_sigma, True, True)),
        (a.noise_probability, GaussianNoiseTransform((0, a.noise_hu), synchronize_channels=True)),
    )
    brightness = BrightnessAdditiveTransform(0, a.brightness / 2)
    linear = ComposeTransforms([ContrastTransform(a.contrast, False, True), brightness])
    contrast = of_image((a.contrast_probability, linear))
    rectangle = ((1, max(2, int(a.cutout * size))),) * 2
    tone = of_image(
        (a.gamma_probability, GammaTransform(a.gamma, 0, True, 1, 0)),
        (a.cutout_probability, BlankRectangleTransform(rectangle, 0, 1)),
    )
    return torch_change(data, spatial, degrade, contrast, tone)


def _degrees(augment: AugmentConfig) -> float:
    return math.degrees(math.atan(augment.shear))


PEERS: dict[str, Callable[[DataConfig], Callable]] = {  # by the name of the package
    "albumentations": albumentations_change,
    "monai": monai_change,
    "torchvision": torchvision_change,
    "batchgeneratorsv2": batchgenerators_change,
}


# ---- what runs in a contender's process

_batches: Images = iter(())


@dataclass(frozen=True)
class Turn:
    slices_per_s: float
    cpu_ms_per_slice: float


def open_contender(name: str, data: DataConfig, batch_size: int) -> None:
    """Replaces what this process measures, and checks a batch of it.

    Raises:
        ValueError: the batch is not of the agreed form.
    """
    global _batches
    _batches = iter(())
    gc.collect()  # ends the workers of the one before
    torch.manual_seed(0)
    random.seed(0)
    _batches = open_distseg(data, batch_size) if name == "distseg" else open_peer(name, data, batch_size)
    image, label = next(_batches)
    size = data.image_size
    found = (
        tuple(image.shape),
        image.dtype,
        tuple(label.shape),
        label.dtype,
        bool((image >= 0).all() & (image <= 1).all()),
    )
    wanted = ((batch_size, data.channels, size, size), torch.float32, (batch_size, size, size), torch.uint8, True)
    if found != wanted:
        raise ValueError(f"{name}: got a batch {found}; must be {wanted}")


def take_turn(size: Size) -> Turn:
    """Times batches from a state in which none is ready, and waits until nothing works for later ones."""
    _skip(WARM_UP)
    cpu_s, start = _cpu_s(), time.perf_counter()
    _skip(size.batches)
    elapsed_s, cpu_s = time.perf_counter() - start, _cpu_s() - cpu_s
    _settle()
    n_slices = size.batches * size.batch_size
    return Turn(n_slices / elapsed_s, 1e3 * cpu_s / n_slices)


def peak_memory_mib(size: Size) -> float:
    """Largest resident memory of this process and what its workers hold besides, between batches."""
    peak = 0
    for _ in range(size.batches):
        next(_batches)
        workers = psutil.Process().children()
        peak = max(peak, psutil.Process().memory_info().rss + sum(w.memory_full_info().uss for w in workers))
    _settle()
    return peak / 2**20


def wait_share(size: Size) -> float:
    """Share of the time that steps which leave the CPU alone spend waiting for their batch."""
    waited_s = 0.0
    _skip(WARM_UP)
    _settle()
    start = time.perf_counter()
    for _ in range(size.steps):
        asked = time.perf_counter()
        next(_batches)
        waited_s += time.perf_counter() - asked
        time.sleep(size.step_s)
    total_s = time.perf_counter() - start
    _settle()
    return waited_s / total_s


def memory_curve_mib(data: DataConfig, size: Size, points: int = 20) -> list[float]:
    """Resident memory of this process while it goes through the first 24 slices many times."""
    batches = open_distseg(data, 8, n_slices=24)
    curve = []
    for _ in range(points):
        for _ in itertools.islice(batches, size.epochs // points * 3):
            pass
        curve.append(psutil.Process().memory_info().rss / 2**20)
    return curve


def _skip(count: int) -> None:
    for _ in itertools.islice(_batches, count):
        pass


def _cpu_s() -> float:
    tree = [psutil.Process(), *psutil.Process().children()]
    return sum(times.user + times.system for times in (process.cpu_times() for process in tree))


def _settle() -> None:
    before = -1.0
    while (now := _cpu_s()) - before > 0.01:
        before = now
        time.sleep(0.05)


# ---- the measurement


@dataclass(frozen=True)
class Measured:
    """One contender in one setting."""

    turns: list[Turn]
    wait: float
    memory_mib: float

    @property
    def slices_per_s(self) -> float:
        return statistics.median(turn.slices_per_s for turn in self.turns)

    @property
    def cpu_ms_per_slice(self) -> float:
        return statistics.median(turn.cpu_ms_per_slice for turn in self.turns)

    def times_as_fast_as(self, other: "Measured") -> float:
        """Median over turns that lie side by side: what else the machine does slows both alike."""
        pairs = zip(self.turns, other.turns, strict=True)
        return statistics.median(mine.slices_per_s / theirs.slices_per_s for mine, theirs in pairs)


def main() -> int:
    args = parse_arguments()
    size = QUICK if args.quick else FULL
    print_versions(["torch", "nvidia-dali-cuda130", *PEERS, "opencv-python-headless", "numpy"])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = args.store or phantom_store(folder / "store", size.image_size, n_slices=16)
        small_store = phantom_store(folder / "small", 64, n_slices=8)
        ratios = measure_contenders(store, size)
        curve = process().submit(memory_curve_mib, setting(small_store, "strong", 1, 64), size).result()
    print(f"\nmemory over {size.epochs} epochs of 24 slices of 64 x 64, MiB: {' '.join(f'{mib:.1f}' for mib in curve)}")
    ratios["memory_growth_mib"] = curve[-1] - curve[len(curve) // 2 - 1]  # of the last half
    print_result("input_pipeline", ratios, TARGETS)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it works, not how fast it is")
    parser.add_argument("--store", type=Path, help="a store of `distseg prepare` (default: one of the phantom)")
    return parser.parse_args()


def phantom_store(root: Path, size: int, n_slices: int) -> Path:
    """A store of six phantoms: five train, one validates."""
    from distseg.data.preparing import FoldRule, prepare_store
    from distseg.phantoms.case import write_phantom

    write_phantom(root / "source", cases=6, seed=0, size=size, n_slices=n_slices)
    prepare_store(root / "source", root / "store", FoldRule(n_folds=6), workers=WORKERS)
    return root / "store"


def setting(store: Path, preset: str, n_windows: int, image_size: int) -> DataConfig:
    augment = AugmentConfig(preset, **PRESETS[preset])
    windows = WINDOWS_HU[:n_windows]
    return DataConfig(str(store), image_size=image_size, windows_hu=windows, num_threads=WORKERS, augment=augment)


def process() -> ProcessPoolExecutor:
    """A process with torch imported, forked from one that has done nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return ProcessPoolExecutor(1, context)


def measure_contenders(store: Path, size: Size) -> dict[str, float]:
    """Prints the table, and gives ours over each peer and our wait."""
    names = ["distseg", *(peer for peer in PEERS if installed_version(peer))]
    processes = {name: process() for name in names}
    ratios, rows = {}, []
    for preset, n_windows in size.settings:
        label = f"{preset}, {n_windows} window{'s' if n_windows > 1 else ''}"
        measured = measure_setting(processes, setting(store, preset, n_windows, size.image_size), size)
        ours = measured["distseg"]
        ratios[_key("data_wait", label)] = ours.wait
        for name, theirs in measured.items():
            ratio = ours.times_as_fast_as(theirs)
            rows.append(
                [label, name, theirs.slices_per_s, theirs.cpu_ms_per_slice, theirs.wait, theirs.memory_mib, ratio]
            )
            if name != "distseg":
                ratios[_key(name, label)] = ratio
        rows += [[label, peer, "not installed", *[""] * 4] for peer in PEERS if peer not in names]
    for pool in processes.values():
        pool.shutdown()
    print_table(["setting", "pipeline", "slices/s", "cpu ms/slice", "wait", "memory MiB", "ours/theirs"], rows)
    print(NOTES)
    return ratios


def _key(name: str, label: str) -> str:
    return name if label == JUDGED else f"{name}, {label}"


def measure_setting(processes: dict[str, ProcessPoolExecutor], data: DataConfig, size: Size) -> dict[str, Measured]:
    """All contenders by turns, then what waits and memory are."""
    opened = [pool.submit(open_contender, name, data, size.batch_size) for name, pool in processes.items()]
    for future in opened:
        future.result()
    turns: dict[str, list[Turn]] = {name: [] for name in processes}
    for _, (name, pool) in itertools.product(range(size.turns), processes.items()):
        turns[name].append(pool.submit(take_turn, size).result())
    return {
        name: Measured(turns[name], pool.submit(wait_share, size).result(), pool.submit(peak_memory_mib, size).result())
        for name, pool in processes.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
