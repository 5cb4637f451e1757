"""MedSeg / SIRM: single slices of many patients, stacked in one file."""

from collections.abc import Mapping
from pathlib import Path

from distseg.data.file_kinds import NIFTI
from distseg.data.label_names import KNOWN
from distseg.data.layouts.source import CaseSource, MaskSource, Source
from distseg.data.layouts.tree import Tree
from distseg.data.volume_files import read_volume
from distseg.errors import DistsegError

LUNG_VALUES = {1: 1, 2: 1}  # right and left become one label
RULE = "tr_im.nii.gz with tr_mask.nii.gz"


def fits(tree: Tree) -> bool:
    return _stack(tree.root, "tr_im") is not None


def read(tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """A case a slice.

    Raises:
        DistsegError: no masks, or a stack that cannot be read.
    """
    image, mask = _stack(tree.root, "tr_im"), _stack(tree.root, "tr_mask")
    if image is None or mask is None:
        raise DistsegError(f"source: got {tree.root} without tr_mask.nii.gz; the slices of tr_im need their masks")
    if declared is not None:
        raise DistsegError(
            f"--labels: got {', '.join(declared)}; layout medseg has its own; leave it out, or choose --layout"
        )
    findings = {name: KNOWN[name] for name in ("ground_glass", "consolidation", "pleural_effusion")}
    masks = [MaskSource((mask,), dict(enumerate(findings.values(), start=1)), {})]
    labels = {"background": 0} | findings
    if lungs := _stack(tree.root, "tr_lungmasks_updated"):
        masks.insert(0, MaskSource((lungs,), LUNG_VALUES, {}))
        labels = {"background": 0, "lung": 1} | findings
    ids = [f"medseg_{index:03d}" for index in range(len(read_volume([image]).values_ZYX))]
    cases = (CaseSource(name, name, (image,), tuple(masks), index) for index, name in enumerate(ids))
    note = "patients are not named in this set: each slice counts as one, so neighbours in a fold may be of one patient"
    left_out = ("val_im, which has no masks",) if _stack(tree.root, "val_im") else ()
    return Source(tree.root, "medseg", labels, tuple(cases), notes=(note,), left_out=left_out)


def _stack(src: Path, stem: str) -> Path | None:
    return next((path for suffix in NIFTI if (path := src / f"{stem}{suffix}").is_file()), None)
