"""What the labels of a source are called: from the data where it has names, else from --labels. Nothing is guessed from a number."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distseg.config import IGNORED_LABEL
from distseg.data.file_kinds import is_picture, is_segmentation, is_volume
from distseg.errors import DistsegError

# Names that distseg knows, in the order in which they lie over each other: higher numbers overwrite lower ones.
KNOWN = {"background": 0, "lung": 1, "infection": 2, "ground_glass": 3, "consolidation": 4, "pleural_effusion": 5}
DATASET = "dataset.json"  # of nnU-Net and the Medical Segmentation Decathlon
IGNORE = "ignore"  # nnU-Net's name of pixels that nobody annotated
LOOKED_AT = 5  # mask files, for the values that an error names


def as_label(text: str) -> str:
    """A name as distseg writes it: lower case, words joined by `_`."""
    return re.sub(r"\W+", "_", text.strip().lower()).strip("_")


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Numbers for labels that have a name and no number: known ones keep theirs, others get the next free ones, by name."""
    names = set(names)
    numbers = {name: number for name, number in KNOWN.items() if number == 0 or name in names}
    free = iter(sorted(set(range(1, IGNORED_LABEL)) - set(numbers.values())))
    return numbers | {name: next(free) for name in sorted(names - numbers.keys())}


@dataclass(frozen=True)
class Names:
    """What the labels of a source are called."""

    labels: Mapping[str, int]
    """background too"""
    come_from: str
    ignore: int | None = None
    """the value that says "not annotated" """
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """unions of labels, where the data names such"""


def names_of_maps(src: Path, files: Sequence[Path], folders: Iterable[str] = (), options: str = "") -> Names:
    """Of label maps (and of label folders beside them), as the data has them: its `dataset.json`, or segments.

    Raises:
        DistsegError: nothing names the values.
    """
    if (named := names_in_dataset(src / DATASET)) is not None:
        return named
    if names := names_of_segments(files):
        return Names(numbered([*names, *map(as_label, folders)]), "names of segments")
    raise _unnamed(files, src, options)


def names_in_dataset(path: Path) -> Names | None:
    """Labels that a `dataset.json` names; None where there is no such file.

    Read are {"lung": 1} of nnU-Net v2, {"lung": [1, 2], "infection": 2} of its region-based training, and {"1": "lung"} of v1 and
    the Decathlon. A value of several regions is named after the narrowest.

    Raises:
        DistsegError: not readable, or two labels of one name or number.
    """
    if not path.is_file():
        return None
    try:
        labels: Any = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        pairs = [(str(v), int(k)) if str(k).isdecimal() else (str(k), v) for k, v in labels.items()]
        values_of = {name: tuple(map(int, v)) if isinstance(v, list) else (int(v),) for name, v in pairs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistsegError(
            f'{path}: got no readable labels ({error!r}); it must hold labels such as {{"lung": 1}}; mend it'
        ) from None
    found: dict[str, tuple[int, ...]] = {}
    for name, values in values_of.items():
        label = "background" if values == (0,) else as_label(name)
        if not label or label in found or values in found.values() or not values:
            got = values[0] if len(values) == 1 else list(values)
            raise DistsegError(f"{path}: got {name!r}={got} twice or without a name; each label has its own; mend it")
        found[label] = values
    found.pop("background", None)
    ignore = found.pop(IGNORE, (None,))[0]
    name_of = _names_of_values(found)
    labels = {"background": 0} | {name: value for value, name in sorted(name_of.items())}
    are_regions = any(len(values) > 1 for values in found.values())
    regions = {region: tuple(name_of[value] for value in values) for region, values in found.items()}
    return Names(labels, f"from {path.name}", ignore, regions if are_regions else {})


def _names_of_values(values_of: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """A name for each value: the narrowest region that it is in, with the value where that holds several such."""
    narrowest = {
        value: min(
            (name for name, own in values_of.items() if value in own), key=lambda name: (len(values_of[name]), name)
        )
        for values in values_of.values()
        for value in values
    }
    alone = Counter(narrowest.values())
    return {value: name if alone[name] == 1 else f"{name}_{value}" for value, name in narrowest.items()}


def names_of_segments(files: Sequence[Path]) -> list[str]:
    """The segments' names in DICOM-SEG files and segmentations of 3D Slicer; none where one is no such file."""
    names: dict[str, None] = {}
    for path in files:
        own = _segments(path)
        if not own:
            return []
        names |= dict.fromkeys(own)
    return list(names)


def _segments(path: Path) -> list[str]:
    if is_segmentation(path):
        from distseg.data.nrrd import segment_names

        return list(segment_names(path).values())
    if is_picture(path) or is_volume(path):
        return []
    import pydicom  # here: most sources have no SEG

    from distseg.data.volume import parsing

    with parsing("mask", path):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        return [as_label(str(one.SegmentLabel)) for one in header.get("SegmentSequence", ())]


def _unnamed(files: Sequence[Path], src: Path, options: str) -> DistsegError:
    """The error about label maps that nothing names: the values found, and the line to type."""
    from distseg.data.volume_files import read_label_map

    values: set[int] = set()
    for path in files[:LOOKED_AT]:
        values |= {int(value) for value in np.unique(read_label_map([path]).values_ZYX)}
    some = " in the first files" if len(files) > LOOKED_AT else ""
    example = ",".join(f"NAME_{value}={value}" for value in sorted(values - {0}) or [1])
    return DistsegError(
        f"labels: got label maps in {src} with values {sorted(values)}{some} and no names; a value's meaning is not guessed; say "
        f"distseg prepare {src} STORE {options}--labels {example}"
    )
