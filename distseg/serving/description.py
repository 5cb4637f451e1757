"""What a model says of itself: model.json, the same text inside the file and in Triton's configuration."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from distseg.errors import DistsegError
from distseg.scoring.postprocessing import RegionRule

DESCRIPTION = "model.json"  # beside the file


@dataclass(frozen=True)
class Input:
    """int16 HU; a length that may be any is a letter."""

    name: str = "HU"
    dtype: str = "int16"
    shape: Sequence[int | str] = ()
    unit: str = "Hounsfield"


@dataclass(frozen=True)
class Output:
    name: str
    dtype: str
    shape: Sequence[int | str]


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Only the first three are needed to read a model's masks; what is None is not said."""

    labels: Mapping[str, int]
    """of the store, background too"""
    regions: Mapping[str, Sequence[int]]
    """region -> its labels, in the order of the probabilities"""
    weights_sha256: str
    postprocessing: Mapping[str, RegionRule] | None = None
    """rules of whole volumes; None, which is said: masks as the segmenter gives them"""
    distseg: str | None = None
    """version; `torch` too"""
    torch: str | None = None
    input: Input | None = None
    outputs: Sequence[Output] | None = None
    written_labels: Mapping[str, int] | None = None
    """the label that each region is written as, wide regions first"""
    exclusive: Sequence[Sequence[str]] | None = None
    """pairs of regions that share no label: of both in a pixel only the more probable one is written"""
    windows_hu: Sequence[Sequence[float]] | None = None
    image_size: int | None = None
    spacing_mm: float | None = None
    """of a pixel that the network sees; then the input PIXEL_MM, float32 (N, 2), says what the slices have, down and across"""
    pixel_mm: Sequence[float] | None = None
    """what the slices of a file with a spacing_mm have, where it is told no sizes: down, across"""
    stride: int | None = None
    thresholds: Mapping[str, float] | None = None
    inside: Mapping[str, str] | None = None
    """region -> the one that it is cut to"""
    test_time_augmentation: bool | None = None
    model: Mapping[str, Any] | None = None
    """encoder, decoder, depth"""
    training: Mapping[str, Any] | None = None
    """config_sha256, and what is known of the best weights"""
    format: str | None = None
    frozen: bool | None = None
    device: str | None = None
    """what the file is compiled for; "any" """
    precision: Mapping[str, Any] | None = None
    """of the weights; what it costs, or why it is no lower"""
    ensemble: Sequence[str] | None = None
    depths: Sequence[Mapping[str, Any]] | None = None
    """what each depth of a deeply supervised network costs and scores"""
    verification: Mapping[str, Any] | None = None
    """how far the file was from the eager model; not inside the file"""
    sha256: str | None = None
    """of the file; not inside it"""

    @property
    def takes_pixel_mm(self) -> bool:
        return self.spacing_mm is not None and self.pixel_mm is None

    def as_json(self) -> str:
        said = dataclasses.asdict(self)
        return json.dumps(
            {name: value for name, value in said.items() if value is not None or name == "postprocessing"}
        )

    def as_dict(self) -> dict[str, Any]:
        """What JSON makes of it."""
        return json.loads(self.as_json())


def read_description(source: Path | str, metadata: object) -> ModelDescription:
    """A description from what was read at `source`.

    Raises:
        DistsegError: something that is needed is missing, or something is of another kind.
    """
    try:
        return pydantic.TypeAdapter(ModelDescription).validate_python(metadata)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "metadata"
        raise DistsegError(f"model: got {source} with damaged {where} ({first['msg']}); export it again") from None
