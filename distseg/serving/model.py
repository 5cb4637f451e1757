"""A model that segments volumes, wherever it is: a run's best weights, an exported file, a server."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distseg.errors import DistsegError
from distseg.runs.folder import open_run
from distseg.scoring.postprocessing import read_rules
from distseg.scoring.segmenting import Segmenter, label_map, segment_volume
from distseg.serving import standalone
from distseg.serving.description import DESCRIPTION, ModelDescription, read_description
from distseg.serving.source import exported_file, is_run

SAME_MM = 0.01  # how far, relatively, a pixel may be from what a file was made for
# What a check of the file or its packing adds to the description: the masks are the same with and without.
NOT_IDENTITY = ("verification", "sha256")


@dataclass(frozen=True)
class Model:
    segmenter: Segmenter
    device: torch.device
    """where the segmenter takes its slices"""
    described: ModelDescription
    identity: str
    """SHA-256 of all that its masks follow from"""

    def segment(
        self,
        hu_ZYX: np.ndarray,
        batch_size: int,
        progress: Callable[[int], object] | None = None,
        pixel_mm: tuple[float, float] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels of a volume, post-processed where rules were chosen, and probabilities.

        Args:
            hu_ZYX: int16 HU.
            batch_size: slices in one forward pass.
            progress: is told how many slices each pass has done.
            pixel_mm: of the slices, down and across; None: not known.

        Returns:
            uint8 labels [Z, Y, X] and float32 probabilities [R, Z, Y, X].

        Raises:
            DistsegError: the batch does not fit the GPU's memory, the server fails, or the model needs sizes of pixels that are
                not known.
        """
        sizes = self._sizes(pixel_mm)
        try:
            mask_ZYX, probability_RZYX = segment_volume(
                self.segmenter, hu_ZYX, self.device, batch_size, progress, sizes
            )
        except torch.OutOfMemoryError:
            raise DistsegError(
                f"--batch-size: got {batch_size} slices of {hu_ZYX.shape[1:]}; they do not fit the GPU; give fewer"
            ) from None
        except ValueError as error:  # the file takes slices of another size
            raise DistsegError(str(error)) from None
        rules = self.described.postprocessing
        if rules is not None:
            mask_ZYX = label_map(rules, probability_RZYX, self.described.regions)
        return mask_ZYX, probability_RZYX

    def _sizes(self, pixel_mm: tuple[float, float] | None) -> tuple[float, float] | None:
        """Those that the segmenter is to be told."""
        described = self.described
        if described.spacing_mm is None:
            return None
        if pixel_mm is None:
            raise DistsegError(
                f"input: got slices without the sizes of their pixels; this model sees pixels of {described.spacing_mm:g} mm; say "
                "--pixel-mm Y X (spacing_mm in Python)"
            )
        if described.pixel_mm is None:
            return pixel_mm
        if not np.allclose(pixel_mm, described.pixel_mm, rtol=SAME_MM):
            raise DistsegError(
                f"input: got pixels of {pixel_mm[0]:g} x {pixel_mm[1]:g} mm; this file is for those of {described.pixel_mm[0]:g} x "
                f"{described.pixel_mm[1]:g} mm; export it with --pixel-mm for yours, or as TorchScript for any"
            )
        return None


def open_model(source: Path, device: torch.device) -> Model:
    """The model of a run folder, of an export folder or of an exported file.

    Raises:
        DistsegError: none of the three, or damaged.
        ModuleNotFoundError: what it is read with is not installed.
    """
    if is_run(source):
        return _open_run(source, device)
    path = exported_file(source)
    try:
        segmenter = standalone.load(path, device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DistsegError(f"model {path}: not readable ({reason}); export it again") from None
    beside = path.with_name(DESCRIPTION)
    model = _model(path, segmenter, device, segmenter.metadata)
    if (
        beside.is_file()
        and read_description(beside, _read_json(beside)).weights_sha256 != model.described.weights_sha256
    ):
        raise DistsegError(f"model: got {beside}, which describes another file than {path.name}; export it again")
    return model


def open_server(url: str, probabilities: bool = True) -> Model:
    """The model that a Triton server runs.

    Args:
        url: grpc://host:port or http://host:port.
        probabilities: whether they are wanted; without, volumes have them of no region, unless rules need them.

    Raises:
        DistsegError: no such server, or its model is none of distseg's.
    """
    from distseg.serving.client import RemoteSegmenter  # a file or a run needs no client

    remote = RemoteSegmenter(url)
    model = _model(url, remote, torch.device("cpu"), remote.metadata)
    remote.probabilities = probabilities or model.described.postprocessing is not None
    return model


def _open_run(run: Path, device: torch.device) -> Model:
    from distseg.runs.trained import load_best  # these build the network: an exported file needs neither them nor timm
    from distseg.serving.exporting import describe_model

    folder, config = open_run(run)
    _, segmenter = load_best(folder, config)
    described = replace(describe_model(config, segmenter, folder), postprocessing=read_rules(run))
    return _model(run, segmenter.to(device), device, described.as_dict())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DistsegError(f"model: got {path}, damaged ({error}); export it again") from None


def _model(source: Path | str, segmenter: Segmenter, device: torch.device, metadata: dict[str, Any]) -> Model:
    described = read_description(source, metadata)
    telling = {key: value for key, value in metadata.items() if key not in NOT_IDENTITY}
    identity = hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()
    return Model(segmenter, device, described, identity)
