"""A run's best model as a folder that needs no run: one file, verified, described, and what serves it.

model/  model.pt | model.pt2 | model.onnx (metadata inside)  model.json (the same, and the verification's figures)
        model_repository/  model_repository_python/ (Triton's, of model.pt)
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distseg import __version__
from distseg.bars import counted
from distseg.config import Config
from distseg.data.store import split_slices, store_of_run
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, sha256_of, write_json
from distseg.models.segmenter import HuSegmenter, at_pixel_size
from distseg.models.table import forward_cost
from distseg.regions import exclusive, write_order
from distseg.runs.folder import RunFolder, best_metadata
from distseg.runs.trained import load_best, load_ensemble
from distseg.scoring.cases import pooled_dice
from distseg.scoring.postprocessing import RegionRule
from distseg.scoring.segmenting import inference_device, segment_cases
from distseg.serving.description import DESCRIPTION, Input, ModelDescription, Output
from distseg.serving.formats import FORMATS, Format
from distseg.serving.repository import write_repositories
from distseg.serving.to_export import DEFAULT, MAX_DEPTH, ExportOptions, RunToExport, run_to_export
from distseg.serving.verification import Differs, Sample, dice_of_samples, read_samples, verify
from distseg.serving.writers import PRECISIONS, WRITERS, in_precision, networks_of


def export_run(run: Path, out: Path, options: ExportOptions = DEFAULT, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the verified model of a run to `out`; on any failure `out` stays as it was.

    Args:
        run: folder of the run.
        out: folder to write.
        options: what the file is to be.
        overrides: `evaluate.key=value` over the run's config.

    Returns:
        What is in model.json.

    Raises:
        DistsegError: what `run_to_export` refuses, a precision that costs too much Dice, or a file that does not agree with
            the eager model.
    """
    return write_export(run_to_export(run, out, options, overrides))


def write_export(wanted: RunToExport) -> dict[str, Any]:
    """Writes the verified model of a run that was looked at; see `export_run`."""
    config, options, format = wanted.config, wanted.options, wanted.format
    whole = load_ensemble(wanted.members, options.depth)
    _settle_slices(whole, wanted.rules, config)
    if options.pixel_mm is not None:
        whole = at_pixel_size(whole, options.pixel_mm)
    samples, device = read_samples(config), inference_device()
    segmenter, precision = _in_chosen_precision(whole, format, options, samples, config)
    described = replace(
        describe_model(
            config, whole, wanted.folder, *(() if format.any_size else (options.size, options.pixel_mm or ()))
        ),
        format=options.format,
        frozen=options.frozen,
        device=device.type if options.format == "pt2" else "any",
        precision=precision,
        ensemble=[str(path) for path in options.ensemble],
        postprocessing=wanted.rules,  # of whole volumes: `distseg predict` does it
    )
    if config.model.deep_supervision:
        named = {"encoder": config.model.encoder, "decoder": config.model.decoder}
        model = named | {"depth": options.depth or MAX_DEPTH}
        described = replace(described, model=model, depths=measure_depths(wanted.folder, config))
    try:
        return _publish(wanted.out, segmenter, described, options, samples).as_dict()
    except Differs as error:
        if options.precision != "auto" or precision["weights"] == "float32":
            raise
        because = f"the file in {precision['weights']} {error.found}"
    described = replace(described, precision={"weights": "float32", "because": because})
    return _publish(wanted.out, whole, described, options, samples).as_dict()


def _publish(
    out: Path, segmenter: HuSegmenter, described: ModelDescription, options: ExportOptions, samples: Sequence[Sample]
) -> ModelDescription:
    """Writes and verifies the file and what lies beside it; gives what is in model.json.

    Raises:
        Differs: from the eager model.
    """
    format = FORMATS[options.format]
    with folder_written_aside(out) as aside:
        path = aside / format.file
        WRITERS[options.format](segmenter, path, described, inference_device())
        verification = verify(segmenter, path, described, format.exact and not options.frozen, samples)
        described = replace(described, verification=verification, sha256=sha256_of(path))
        write_json(aside / DESCRIPTION, described.as_dict())
        if options.format == "torchscript":
            write_repositories(aside, described)
    return described


def _settle_slices(segmenter: HuSegmenter, rules: Mapping[str, RegionRule] | None, config: Config) -> None:
    """Puts into the segmenter what post-processing does to each slice alone."""
    names = list(config.regions)
    for name, rule in (rules or {}).items():
        segmenter.label_map.thresholds[names.index(name)] = rule.threshold
        segmenter.label_map.outer[names.index(name)] = names.index(rule.inside) if rule.inside else -1


def _in_chosen_precision(
    whole: HuSegmenter, format: Format, options: ExportOptions, samples: Sequence[Sample], config: Config
) -> tuple[HuSegmenter, dict[str, Any]]:
    """The segmenter to be written, and what model.json says of its precision.

    Raises:
        DistsegError: a precision was asked for whose cost is too high, or cannot be measured.
    """
    asked = options.precision
    wanted = "bfloat16" if asked == "auto" and "bfloat16" in format.precisions else asked
    if wanted not in PRECISIONS:
        return whole, {"weights": "float32"}
    if not samples:
        problem = f"{config.data.store} is gone, so its cost in Dice cannot be measured"
    else:
        reduced = in_precision(whole, wanted)
        before, after = (dice_of_samples(one, samples, config) for one in (whole, reduced))
        changes = {name: _change_of_dice(before[name], after[name]) for name in before}
        measured = {"dice": before, "dice_change": changes, "slices": sum(len(sample.z) for sample in samples)}
        sizes = {name: abs(change) for name, change in changes.items() if change is not None}
        worst = max(sizes, key=sizes.__getitem__, default=None)
        if worst is None:
            problem = "no region has a Dice on the validation slices: none is there, and none is found"
        elif sizes[worst] <= options.dice_tolerance:
            return reduced, {"weights": wanted, "tolerance": options.dice_tolerance} | measured
        else:
            problem = (
                f"{wanted} changes the Dice of {worst} by {changes[worst]:+.4f}, more than {options.dice_tolerance:g}"
            )
    if asked == "auto":
        return whole, {"weights": "float32", "because": problem}
    raise DistsegError(f"--precision: got {asked}; {problem}; take float32, or another --dice-tolerance")


def _change_of_dice(before: float | None, after: float | None) -> float | None:
    """None: undefined in both, since the region is nowhere; in one of them alone, all of it has changed."""
    if before is None and after is None:
        return None
    return 1.0 if before is None or after is None else after - before


def describe_model(
    config: Config, segmenter: HuSegmenter, folder: RunFolder, size: Sequence[int] = (), pixel_mm: Sequence[float] = ()
) -> ModelDescription:
    """What a user of the model has to know, and where it came from.

    Args:
        config, segmenter, folder: of the run.
        size: height and width of the slices that it takes; none: any.
        pixel_mm: what a file that is told no sizes takes them for; none: it is told.
    """
    names, best, label_map = list(config.regions), best_metadata(folder), segmenter.label_map
    best.pop("labels", None)
    return ModelDescription(
        distseg=__version__,
        torch=torch.__version__,
        input=Input(shape=["N", segmenter.n_slices, *(size or ("H", "W"))]),
        outputs=[
            Output("MASK", "uint8", ["N", 1, "H", "W"]),
            Output("PROB", "float32", ["N", len(names), "H", "W"]),
        ],
        labels=dict(config.labels),
        regions={name: list(labels) for name, labels in config.region_labels.items()},
        written_labels={names[index]: label for index, label in write_order(config.region_labels)},
        exclusive=[[names[one], names[other]] for one, other in exclusive(config.region_labels)],
        windows_hu=[list(window) for window in config.data.windows_hu],
        image_size=segmenter.image_size,
        spacing_mm=config.data.spacing_mm,
        pixel_mm=list(pixel_mm) if config.data.spacing_mm and pixel_mm else None,
        stride=segmenter.stride,
        thresholds=dict(zip(names, label_map.thresholds, strict=True)),
        inside={name: names[outer] for name, outer in zip(names, label_map.outer, strict=True) if outer >= 0},
        test_time_augmentation=config.evaluate.tta,
        model={"encoder": config.model.encoder, "decoder": config.model.decoder},
        weights_sha256=digest_of_weights(segmenter),
        training={"config_sha256": sha256_of(folder.config), "best": best}
        | ({"seen": seen} if (seen := folder.seen()) else {}),
    )


def digest_of_weights(segmenter: HuSegmenter) -> str:
    """SHA-256 over names and values of its networks' weights (the bytes of a file change with its name)."""
    digest = hashlib.sha256()
    for network in networks_of(segmenter).values():
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_depths(folder: RunFolder, config: Config) -> list[dict[str, Any]]:
    """What a deeply supervised Unet++ costs and scores when it is cut at each depth.

    Returns:
        For depths 1 to 4: parameters, GMACs of one slice at the training size, and the Dice of each region over all voxels of
        the validation split; None where the store is no longer there.
    """
    store = Path(config.data.store)
    opened = store_of_run(config) if (store / "store.json").is_file() else None
    rows: list[dict[str, Any]] = []
    for depth in range(1, MAX_DEPTH + 1):
        network, segmenter = load_best(folder, config, depth if depth < MAX_DEPTH else None)
        image = torch.zeros(1, config.data.channels, config.data.image_size, config.data.image_size)
        row: dict[str, Any] = {"depth": depth, "parameters": sum(p.numel() for p in network.parameters())}
        row["gmacs"] = round(forward_cost(network, image)[0] / 1e9, 3)
        row["dice"] = None
        if opened is not None:
            device, slices = inference_device(), split_slices(config, opened, "val")
            segmented = segment_cases(segmenter.to(device), opened, slices, config, device)
            seen = counted(segmented, f"depth {depth} of {MAX_DEPTH}", len(slices.cases), "volume")
            row["dice"] = pooled_dice(seen, config.region_labels)
        rows.append(row)
    return rows
