"""Is the file the model? It is read and run by a process without distseg, and compared with the eager model.

Shape letters: N slices, C channels, H height, W width, R regions.
"""

import copy
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distseg.bars import counted
from distseg.config import AIR_HU, Config
from distseg.data.store import Case, split_slices, store_of_run
from distseg.errors import DistsegError
from distseg.models.segmenter import HuSegmenter, SpacedSegmenter
from distseg.scoring.cases import pooled_dice
from distseg.scoring.segmenting import SegmentedCase, inference_device, with_neighbours
from distseg.serving import standalone
from distseg.serving.description import ModelDescription

# Batch, height, width: batch 1 and 3, odd, smaller than the stride, not square. A trace is made at another shape.
CHECKED_SHAPES = ((1, 512, 512), (3, 256, 256), (1, 63, 101), (3, 37, 224), (2, 17, 9), (1, 1, 1))
CHECKED_BATCHES = (1, 2, 3, 4, 5, 8)  # of a file that takes one height and width
BELOW_AIR_HU = (-2048, -3024, -32768)  # what scanners and converters fill the corners with
SAMPLE = 64  # slices of the validation split: minutes on a CPU, at 512 x 512
COMPARED = 8  # cases of which the file is run on a slice


Given = tuple[torch.Tensor, ...]
"""HU, and sizes of pixels where the model takes them"""


@dataclass(frozen=True)
class Accepted:
    """How far a file may be from the eager model."""

    probability: float
    mask_share: float
    """of a mask's pixels, rounded up: a pixel at its threshold may go either way"""


EXACT = Accepted(1e-5, 0.0)
# A compiler sums in another order; bfloat16 and float16 have 8 and 11 bits for it.
COMPILED = {"float32": Accepted(1e-3, 1e-3), "float16": Accepted(1e-2, 5e-3), "bfloat16": Accepted(5e-2, 1e-2)}

COMPUTED_EXACTLY = "report this model"
COMPUTED_OTHERWISE = "--precision float32 comes closer; --format torchscript without --frozen is exact"


class Differs(DistsegError):
    """A file that is not what the eager model is."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found = found
        super().__init__(f"export: the file {found}; nothing was written; {remedy}")


@dataclass(frozen=True)
class Sample:
    """Some slices of a case of the validation split, as a segmenter takes them."""

    case: Case
    z: np.ndarray
    hu_NCHW: torch.Tensor
    truth_NHW: np.ndarray


def read_samples(config: Config) -> list[Sample]:
    """Slices spread evenly over the validation split; none where the store is no longer there."""
    root = Path(config.data.store)
    if not (root / "store.json").is_file():
        return []
    store = store_of_run(config)
    slices = split_slices(config, store, "val")
    step = -(-len(slices) // SAMPLE)
    samples, before = [], 0  # slices of the cases before
    for case, z in slices.by_case():
        kept = z[(step // 2 - before) % step :: step]
        before += len(z)
        if len(kept):
            hu_ZYX, truth_ZYX = store.read_case(case)
            hu_NCHW = torch.from_numpy(with_neighbours(hu_ZYX, kept, 2 * config.data.neighbours + 1))
            samples.append(Sample(case, kept, hu_NCHW, truth_ZYX[kept]))
    return samples


@torch.inference_mode()
def dice_of_samples(segmenter: HuSegmenter, samples: Sequence[Sample], config: Config) -> dict[str, float | None]:
    """Dice of each region over all pixels of the samples; None where it is undefined."""
    device = inference_device()
    segmenter = copy.deepcopy(segmenter).to(device)

    def segmented() -> Iterator[SegmentedCase]:
        for sample in counted(samples, "measure Dice", len(samples), "volume"):
            sizes = pixel_mm_of(segmenter, sample.case, len(sample.hu_NCHW))
            batches = (one.to(device).split(config.evaluate.batch_size) for one in (sample.hu_NCHW, *sizes))
            parts = [segmenter(*part)[0] for part in zip(*batches, strict=True)]
            mask_ZYX = torch.cat(parts)[:, 0].cpu().numpy()
            middle = sample.hu_NCHW[:, segmenter.n_slices // 2].numpy()
            yield SegmentedCase(sample.case, sample.z, middle, sample.truth_NHW, mask_ZYX)

    return pooled_dice(segmented(), config.region_labels)


def verify(
    segmenter: HuSegmenter, path: Path, described: ModelDescription, exact: bool, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Compares a file with the eager model, on random slices of several shapes and on real ones.

    Args:
        segmenter: the eager model.
        path, described: the file.
        exact: whether it runs the eager model's kernels.
        samples: real slices; none: random ones alone.

    Returns:
        What model.json says about it.

    Raises:
        Differs: by more than is accepted.
        DistsegError: the file does not run.
    """
    assert described.input is not None and described.precision is not None
    accepted = EXACT if exact else COMPILED[described.precision["weights"]]
    size = [length for length in described.input.shape[2:] if isinstance(length, int)]
    inputs = [*_random_slices(segmenter, size), *_real_slices(segmenter, samples, size)]
    device = torch.device("cpu" if described.device in (None, "any") else described.device)
    answers = _run_without_distseg(path, [given for _, given in inputs], device)
    eager = copy.deepcopy(segmenter).to(device)
    checks = []
    for (origin, given), answer in zip(inputs, answers, strict=True):
        differences = _differences(answer, eager, [one.to(device) for one in given])
        check = {"slices": origin, "shape": list(given[0].shape)} | differences
        if len(given) > 1:
            check["pixel_mm"] = np.round(given[1].numpy().astype(float), 4).tolist()
        _require(check, accepted, COMPUTED_EXACTLY if exact else COMPUTED_OTHERWISE)
        checks.append(check)
    return {"accepted": dataclasses.asdict(accepted), "loaded_without_distseg": True, "checks": checks}


def _differences(
    answer: tuple[torch.Tensor, torch.Tensor], eager: HuSegmenter, given: Sequence[torch.Tensor]
) -> dict[str, float]:
    mask, probability = answer
    with torch.inference_mode():
        eager_mask, eager_probability = (output.cpu() for output in eager(*given))
    return {
        "max_probability_difference": float((probability - eager_probability).abs().max()),
        "differing_mask_pixels": int((mask != eager_mask).sum()),
    }


def _require(check: Mapping[str, Any], accepted: Accepted, remedy: str) -> None:
    difference, pixels = check["max_probability_difference"], check["differing_mask_pixels"]
    n, _, height, width = check["shape"]
    allowed = int(np.ceil(accepted.mask_share * n * height * width))
    if not difference <= accepted.probability or pixels > allowed:  # written so that NaN fails too
        raise Differs(
            f"differs from the eager model at shape {check['shape']} by {difference:g} in probability and {pixels} mask pixels; at "
            f"most {accepted.probability:g} and {allowed} are accepted",
            remedy,
        )


def _run_without_distseg(
    model: Path, inputs: Sequence[Given], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs the file as a service would: in a process of its own that cannot import this package."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_file, outputs_file = Path(folder, "inputs.pt"), Path(folder, "outputs.pt")
        torch.save(list(inputs), inputs_file)
        # As many threads as here: the order of a sum, and so its last bit, depends on them.
        words = [model, inputs_file, outputs_file, device.type, torch.get_num_threads()]
        command = [sys.executable, "-I", standalone.__file__, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DistsegError(
                f"export: the file does not run outside distseg ({last}); nothing was written; report this model"
            )
        return torch.load(outputs_file, weights_only=True)


def pixel_mm_of(segmenter: HuSegmenter, case: Case, n: int) -> tuple[torch.Tensor, ...]:
    """Sizes of a case's pixels for so many slices, where the segmenter takes them."""
    if not isinstance(segmenter, SpacedSegmenter):
        return ()
    return (torch.tensor([case.pixel_size_mm] * n, dtype=torch.float32),)


def _random_slices(segmenter: HuSegmenter, size: Sequence[int]) -> Iterator[tuple[str, Given]]:
    """Smooth random HU over the whole range that a scanner gives, so that the network has edges to see, padded below air."""
    shapes = [(batch, *size) for batch in CHECKED_BATCHES] if size else CHECKED_SHAPES
    for seed, (batch, height, width) in enumerate(shapes):
        generator = np.random.default_rng(seed)
        coarse = generator.uniform(-1024, 1500, (batch, segmenter.n_slices, 8, 8)).astype(np.float32)
        smooth = nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
        noise = torch.from_numpy(generator.normal(0, 30, smooth.shape))
        hu_NCHW = (smooth + noise).clamp(-32768, 32767).to(torch.int16)
        hu_NCHW[..., : height // 4, :] = BELOW_AIR_HU[seed % len(BELOW_AIR_HU)]
        if not isinstance(segmenter, SpacedSegmenter):
            yield "random", (hu_NCHW,)
        else:  # several sizes in a batch, some of them alike
            factors = generator.choice([0.5, 0.8, 1.3], (batch, 2))
            yield "random", (hu_NCHW, torch.from_numpy(segmenter.spacing_mm * factors).float())


def _real_slices(segmenter: HuSegmenter, samples: Sequence[Sample], size: Sequence[int]) -> Iterator[tuple[str, Given]]:
    """The middle one of those of each case, up to `COMPARED` cases; cut or filled with air to `size`."""
    for sample in samples[:COMPARED]:
        middle = len(sample.z) // 2
        hu_1CHW = sample.hu_NCHW[middle : middle + 1]
        if size:
            missing = [length - got for length, got in zip(size, hu_1CHW.shape[2:], strict=True)]
            hu_1CHW = nn.functional.pad(hu_1CHW, [0, missing[1], 0, missing[0]], value=AIR_HU)
        yield f"{sample.case.id}/{sample.z[middle]}", (hu_1CHW, *pixel_mm_of(segmenter, sample.case, 1))
