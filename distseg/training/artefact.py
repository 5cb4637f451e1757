"""The exported model: traced, verified against eager, described, and read back.

    model/  model.pt (TorchScript, metadata inside)  model.json (the same metadata, verification figures, sha256)

The network is traced, the segmenter around it scripted: a traced segmenter would bake one input's padding in.
"""

import contextlib
import copy
import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distseg import __version__
from distseg.config import Config
from distseg.data.store import open_store
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, is_free, sha256_of, write_json
from distseg.models import SegmentationNetwork
from distseg.models.serving import HuSegmenter, write_order
from distseg.training.inference import Segmenter, inference_device, segment_cases, split_slices
from distseg.training.postprocessing import RegionRule, read_rules, rules_as_dict
from distseg.training.run_folder import RunFolder, best_metadata, load_best, open_run
from distseg.training.scoring import pooled_dice

MAX_DEPTH = 4  # of Unet++ on five encoder levels
METADATA = "distseg.json"  # name of the metadata inside model.pt
# Batch, height, width: batch 1 and 3, odd, smaller than the stride, not square. The trace is made at another shape.
CHECKED_SHAPES = ((1, 512, 512), (3, 256, 256), (1, 63, 101), (3, 37, 224), (2, 17, 9), (1, 1, 1))
TOLERANCE = 1e-5  # probability; eager and file run the same kernels and mostly agree to the bit


def export_run(run: Path, out: Path, depth: int | None = None) -> dict[str, Any]:
    """Writes the verified model of a run to `out`; on any failure `out` stays as it was.

    Args:
        run: folder of the run.
        out: folder to write.
        depth: of a Unet++ trained with deep supervision: cut at this depth, 1 to 3; None: all of it.

    Returns:
        What is in model.json.

    Raises:
        DistsegError: no finished run, `out` holds something else, or the file does not agree with the eager model.
    """
    folder, config = open_run(run)
    if not (out / "model.json").is_file() and not is_free(out):
        raise DistsegError(f"output: got {out}, which holds something else; give a new folder or an earlier export")
    if depth is not None and not (config.model.deep_supervision and 1 <= depth < MAX_DEPTH):
        raise DistsegError(
            f"--depth: got {depth}; only a Unet++ trained with model.deep_supervision has heads at depths 1 to "
            f"{MAX_DEPTH - 1}; leave it out, or train so"
        )
    network, segmenter = load_best(folder, config, depth)
    described = describe(config, network, segmenter, best_metadata(folder))
    rules = read_rules(run)  # of whole volumes: not in the file, applied by `distseg predict`
    described["postprocessing"] = rules_as_dict(rules)
    if config.model.deep_supervision:
        described["model"]["depth"] = depth or MAX_DEPTH
        described["depths"] = describe_depths(folder, config)
    with folder_written_aside(out) as aside:
        write_torchscript(segmenter, aside / "model.pt", described)
        described["verification"] = verify(segmenter, aside / "model.pt")
        described["sha256"] = sha256_of(aside / "model.pt")
        write_json(aside / "model.json", described)
    return described


def describe(config: Config, network: nn.Module, segmenter: HuSegmenter, best: dict[str, str]) -> dict[str, Any]:
    """What a user of the file has to know, and where it came from."""
    region_of_index = list(config.regions)
    return {
        "distseg": __version__,
        "torch": torch.__version__,
        "input": {"name": "HU", "dtype": "int16", "shape": ["N", segmenter.n_slices, "H", "W"], "unit": "Hounsfield"},
        "outputs": [
            {"name": "MASK", "dtype": "uint8", "shape": ["N", 1, "H", "W"]},
            {"name": "PROB", "dtype": "float32", "shape": ["N", len(config.regions), "H", "W"]},
        ],
        "labels": json.loads(best.pop("labels")),
        "regions": {name: list(labels) for name, labels in config.regions.items()},
        "written_labels": {region_of_index[index]: label for index, label in write_order(config.regions)},
        "windows_hu": [list(window) for window in config.data.windows_hu],
        "image_size": segmenter.image_size,
        "stride": segmenter.stride,
        "threshold": segmenter.threshold,
        "test_time_augmentation": config.evaluate.tta,
        "model": {"encoder": config.model.encoder, "decoder": config.model.decoder},
        "weights_sha256": digest_of_weights(network),
        "training": {"config_sha256": config.digest(), "best": best},
    }


def describe_depths(folder: RunFolder, config: Config) -> list[dict[str, Any]]:
    """What a deeply supervised Unet++ costs and scores when it is cut at each depth.

    Returns:
        For depths 1 to 4: parameters, GMACs of one slice at the training size, and the Dice of each region over all voxels of
        the validation split; None where the store is no longer there.
    """
    store = Path(config.data.store)
    opened = open_store(store) if (store / "store.json").is_file() else None
    rows: list[dict[str, Any]] = []
    for depth in range(1, MAX_DEPTH + 1):
        network, segmenter = load_best(folder, config, depth if depth < MAX_DEPTH else None)
        image = torch.zeros(1, config.data.channels, config.data.image_size, config.data.image_size)
        with FlopCounterMode(display=False) as counted, torch.inference_mode():
            network(image)
        row: dict[str, Any] = {"depth": depth, "parameters": sum(p.numel() for p in network.parameters())}
        row["gmacs"] = round(counted.get_total_flops() / 2e9, 3)
        row["dice"] = None
        if opened is not None:
            device, slices = inference_device(), split_slices(config, opened, "val")
            row["dice"] = pooled_dice(
                segment_cases(segmenter.to(device), opened, slices, config, device), config.regions
            )
        rows.append(row)
    return rows


def write_torchscript(segmenter: HuSegmenter, path: Path, metadata: dict[str, Any]) -> None:
    """Traces the network, or each of an ensemble's, scripts the segmenter around it and saves both as one file."""
    side = 2 * segmenter.stride
    image_BCHW = torch.zeros(1, len(segmenter.low_hu) * segmenter.n_slices, side, side)
    scriptable = copy.deepcopy(segmenter)
    networks = [(name, part) for name, part in scriptable.named_modules() if isinstance(part, SegmentationNetwork)]
    with _torchscript(), torch.inference_mode():
        for name, network in networks:
            scriptable.set_submodule(name, torch.jit.trace(network, image_BCHW, check_trace=False))
        torch.jit.script(scriptable).save(str(path), _extra_files={METADATA: json.dumps(metadata)})


def verify(segmenter: HuSegmenter, path: Path) -> dict[str, Any]:
    """Compares the file, loaded by a Python process that cannot import distseg, with the eager model.

    Raises:
        DistsegError: a mask differs or a probability is off by more than `TOLERANCE`.
    """
    inputs = [
        _test_slices(n, segmenter.n_slices, height, width, seed)
        for seed, (n, height, width) in enumerate(CHECKED_SHAPES)
    ]
    inputs_file, outputs_file = path.with_name("inputs.pt"), path.with_name("outputs.pt")
    try:
        torch.save(inputs, inputs_file)
        _run_without_distseg(path, inputs_file, outputs_file)
        outputs = torch.load(outputs_file, weights_only=True)
    finally:
        inputs_file.unlink(missing_ok=True)
        outputs_file.unlink(missing_ok=True)
    checks = []
    for hu_BCHW, (mask, probability) in zip(inputs, outputs, strict=True):
        with torch.inference_mode():
            eager_mask, eager_probability = segmenter(hu_BCHW)
        shape = list(hu_BCHW.shape)
        difference = float((probability - eager_probability).abs().max())
        pixels = int((mask != eager_mask).sum())
        checks.append({"shape": shape, "max_probability_difference": difference, "differing_mask_pixels": pixels})
        if not difference <= TOLERANCE or pixels:  # written so that NaN fails too
            raise DistsegError(
                f"export: the file differs from the eager model at shape {shape} by "
                f"{difference:g} in probability and {pixels} mask pixels; "
                f"at most {TOLERANCE:g} and 0 are accepted; nothing was written; report this model"
            )
    return {"tolerance": TOLERANCE, "loaded_without_distseg": True, "checks": checks}


def load_segmenter(source: Path, device: torch.device) -> Segmenter:
    """The segmenter of a run folder, of an export folder or of a model.pt.

    Raises:
        DistsegError: none of the three, or damaged.
    """
    if (source / "config.yaml").is_file():
        return load_best(*open_run(source))[1].to(device)
    path = source / "model.pt" if source.is_dir() else source
    if not path.is_file():
        raise DistsegError(
            f"model: got {source}; it must be a run folder, an export folder or a model.pt; check the path"
        )
    extra = {METADATA: ""}
    try:
        with _torchscript():
            model = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DistsegError(f"model {path}: not a readable TorchScript file ({reason}); export it again") from None
    if not extra[METADATA]:
        raise DistsegError(
            f"model {path}: got a TorchScript file without {METADATA}; it must come from `distseg export`"
        )
    return model.eval()


def load_rules(source: Path) -> tuple[dict[str, RegionRule], dict[str, Sequence[int]]] | None:
    """Post-processing of a run or an export folder, with the regions that it is of; None where none was chosen."""
    if (source / "config.yaml").is_file():
        rules = read_rules(source)
        return None if rules is None else (rules, dict(open_run(source)[1].regions))
    beside = (source if source.is_dir() else source.parent) / "model.json"
    described = json.loads(beside.read_text()) if beside.is_file() else {}
    if described.get("postprocessing") is None:
        return None
    return {name: RegionRule(**rule) for name, rule in described["postprocessing"].items()}, described["regions"]


def digest_of_weights(network: nn.Module) -> str:
    """SHA-256 over names and values of the state dict (the bytes of a .pt change with its file name)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _torchscript() -> Iterator[None]:
    """torch 2.14 calls TorchScript deprecated; it is what C++ and Triton's pytorch backend load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _test_slices(batch: int, n_slices: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth random HU over the whole range that a scanner gives, so that the network has edges to see."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(-1024, 1500, (batch, n_slices, 8, 8)).astype(np.float32)
    smooth = nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
    noise = torch.from_numpy(generator.normal(0, 30, smooth.shape))
    return (smooth + noise).clamp(-32768, 32767).to(torch.int16)


def _run_without_distseg(model: Path, inputs: Path, outputs: Path) -> None:
    """Runs the file as a service would: a bare torch process, isolated from this package."""
    script = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["distseg"] = None  # any import of it raises
import torch
torch.set_num_threads(int(sys.argv[4]))
model = torch.jit.load(sys.argv[1])
with torch.inference_mode():
    torch.save([model(hu) for hu in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
"""
    # As many threads as here: the order of a sum, and so its last bit, depends on them.
    words = [sys.executable, "-I", "-c", script, str(model), str(inputs), str(outputs), str(torch.get_num_threads())]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistsegError(
            f"export: the file does not run outside distseg ({last}); nothing was written; report this model"
        )
