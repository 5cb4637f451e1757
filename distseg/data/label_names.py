"""What the labels of a source are called: from the data where it has names, else from --labels. Nothing is guessed from a number."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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


def names_in_dataset(src: Path) -> tuple[dict[str, int], int | None] | None:
    """Labels that `dataset.json` names, and the value that it calls "ignore"; None where there is no such file.

    Both kinds are read: {"lung": 1} of nnU-Net v2, and {"1": "lung"} of v1 and the Decathlon.

    Raises:
        DistsegError: not readable, a label that is a list of others, or two of one name or number.
    """
    path = src / DATASET
    if not path.is_file():
        return None
    try:
        labels: Any = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        pairs = [(str(v), int(k)) if str(k).isdecimal() else (str(k), v) for k, v in labels.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistsegError(
            f'{path}: got no readable labels ({error!r}); it must hold labels such as {{"lung": 1}}; mend it'
        ) from None
    if regions := [name for name, value in pairs if not isinstance(value, int)]:
        raise DistsegError(
            f"{path}: got label {regions[0]!r} of several values; regions are not read; name the values with --labels NAME=1,..."
        )
    found: dict[str, int] = {}
    for name, value in pairs:
        label = "background" if value == 0 else as_label(name)
        if not label or label in found or value in found.values():
            raise DistsegError(f"{path}: got {name!r}={value} twice or without a name; each label has its own; mend it")
        found[label] = value
    ignore = found.pop(IGNORE, None)
    return {"background": 0} | found, ignore


def names_of_segments(files: Sequence[Path]) -> list[str]:
    """The segments' names in DICOM-SEG files and 3D Slicer's .seg.nrrd; none where a file has no such names."""
    import pydicom  # here: most sources have no SEG

    from distseg.data.nrrd import segment_names
    from distseg.data.volume import parsing

    names: dict[str, None] = {}
    for path in files:
        if is_segmentation(path) and (segments := segment_names(path)):
            names |= dict.fromkeys(segments.values())
            continue
        if is_volume(path) or is_picture(path):
            return []
        with parsing("mask", path):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            names |= dict.fromkeys(as_label(str(one.SegmentLabel)) for one in header.get("SegmentSequence", ()))
    return list(names)


def refuse_unnamed(files: Sequence[Path], src: Path) -> DistsegError:
    """The error about label maps that nothing names: the values found, and the line to type."""
    from distseg.data.volume_files import read_label_map

    values: set[int] = set()
    for path in files[:LOOKED_AT]:
        values |= {int(value) for value in np.unique(read_label_map([path]).values_ZYX)}
    some = " in the first files" if len(files) > LOOKED_AT else ""
    example = ",".join(f"NAME_{value}={value}" for value in sorted(values - {0}) or [1])
    return DistsegError(
        f"labels: got label maps in {src} with values {sorted(values)}{some} and no names; a value's meaning is not guessed; say "
        f"distseg prepare {src} STORE --labels {example}"
    )


def in_words(labels: Mapping[str, int], origin: str) -> str:
    """`labels: lung=1, nodule=2 (names of folders)`."""
    return f"labels: {', '.join(f'{name}={n}' for name, n in labels.items() if n)} ({origin})"
