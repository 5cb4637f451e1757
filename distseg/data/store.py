"""The store: every case as one .npy a slice (int16 HU, uint8 labels) beside a store.json that says what it is.

store/store.json
store/slices/<case>/0000.image.npy  0000.label.npy  ...  case.json
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from distseg.data.splits import Folds
from distseg.errors import DistsegError
from distseg.files import write_json

STORE_VERSION = 1


@dataclass(frozen=True)
class Case:
    id: str
    patient: str
    source: str
    """image file, relative to the source folder"""
    sha256: Mapping[str, str]
    """of the image and mask files, by their name relative to the source folder"""
    shape: tuple[int, int, int]
    """slices, rows, columns"""
    spacing_mm: tuple[float, float, float]
    """z, y, x"""
    intensity: str
    """"hu", or the window that the source's grey values were mapped back from"""
    label_voxels: Mapping[str, int]
    """voxels of each label"""


@dataclass(frozen=True)
class SliceFiles:
    """One slice of the store: what a sample is before it is read."""

    id: str
    image: Path
    label: Path
    shape: tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Store:
    root: Path
    labels: Mapping[str, int]
    cases: tuple[Case, ...]
    folds: Folds

    def patients(self, split: str, fold: int) -> tuple[str, ...]:
        """Patients of `train`, `val` or `test` in a fold.

        Raises:
            DistsegError: no such fold, or no patient in the split.
        """
        folds = self.folds.folds
        if fold >= len(folds):
            raise DistsegError(
                f"data.fold: got {fold}; {self.root} has folds 0 to {len(folds) - 1}; choose one of them"
            )
        train = tuple(patient for k, members in enumerate(folds) if k != fold for patient in members)
        patients = {"train": train, "val": folds[fold], "test": self.folds.test}[split]
        if not patients:
            raise DistsegError(
                f"split {split}: got no patient in {self.root}; it needs at least one; run `distseg prepare` again with "
                f"{'--test-patients N' if split == 'test' else 'other --folds'}"
            )
        return patients

    def cases_of(self, split: str, fold: int) -> tuple[Case, ...]:
        """Cases of the split's patients, in the store's order."""
        patients = set(self.patients(split, fold))
        return tuple(case for case in self.cases if case.patient in patients)

    def slices_of(self, cases: Sequence[Case]) -> list[SliceFiles]:
        """All slices of the cases, in order."""
        return [slice_files(self.root, case.id, z, case.shape) for case in cases for z in range(case.shape[0])]

    def read_case(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """HU (int16) and labels (uint8) of a case, both [Z, Y, X]."""
        files = self.slices_of([case])
        return np.stack([_read_slice(f.image) for f in files]), np.stack([_read_slice(f.label) for f in files])


def slice_files(root: Path, case_id: str, z: int, shape: tuple[int, int, int]) -> SliceFiles:
    folder = root / "slices" / case_id
    return SliceFiles(
        f"{case_id}/{z:04d}", folder / f"{z:04d}.image.npy", folder / f"{z:04d}.label.npy", (shape[1], shape[2])
    )


def open_store(root: Path) -> Store:
    """Reads and checks store.json.

    Raises:
        DistsegError: no store there, one of another version, or a damaged store.json.
    """
    values = _read_json(root / "store.json")
    if values.get("version") != STORE_VERSION:
        raise DistsegError(
            f"store {root}: got version {values.get('version')}; this distseg reads {STORE_VERSION}; "
            "run `distseg prepare` again"
        )
    try:
        cases = pydantic.TypeAdapter(tuple[Case, ...]).validate_python(values["cases"])
        folds = pydantic.TypeAdapter(Folds).validate_python(values["folds"])
        labels = pydantic.TypeAdapter(dict[str, int]).validate_python(values["labels"])
    except (KeyError, pydantic.ValidationError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else error.errors()[0]["msg"]
        raise DistsegError(f"store {root}: damaged store.json ({detail}); run `distseg prepare` again") from None
    return Store(root, labels, cases, folds)


def write_store_json(root: Path, labels: Mapping[str, int], cases: Sequence[Case], folds: Folds) -> None:
    write_json(
        root / "store.json",
        {
            "version": STORE_VERSION,
            "labels": dict(labels),
            "cases": [dataclasses.asdict(case) for case in cases],
            "folds": dataclasses.asdict(folds),
        },
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DistsegError(
            f"store: got {path.parent} without store.json; it must be a folder that `distseg prepare` wrote"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DistsegError(f"store: damaged {path} ({error}); run `distseg prepare` again") from None
    if not isinstance(values, dict):
        raise DistsegError(f"store: damaged {path} (not an object); run `distseg prepare` again")
    return values


def _read_slice(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DistsegError(f"store: damaged slice {path} ({error}); run `distseg prepare` again") from None
