"""`distseg.open_store`: the cases of a store, its splits, and its slices as arrays."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distseg.data import store as stores
from distseg.data.store import Case, read_slice
from distseg.errors import DistsegError

SPLITS = ("train", "val", "test")


def open_store(root: str | os.PathLike[str]) -> "Store":
    """Opens what `distseg prepare` wrote; no slice is read yet.

    Args:
        root: folder of the store.

    Raises:
        DistsegError: no store there, one of another version, or damaged.

    Example:
        >>> import distseg
        >>> store = distseg.open_store("store")
        >>> store.labels
        {'background': 0, 'lung': 1, 'infection': 2}
        >>> [case.id for case in store.splits[0]["val"]]
        ['phantom_003']
        >>> hu, labels = store.read_case(store.cases[0])
        >>> hu.shape, hu.dtype, labels.dtype
        ((8, 64, 64), dtype('int16'), dtype('uint8'))
    """
    return Store(**vars(stores.open_store(Path(root))))


@dataclass(frozen=True)
class Store(stores.Store):
    """A store, with its splits and slices at hand.

    `cases` have id, patient, shape (slices, rows, columns), spacing_mm (z, y, x), label_voxels and more; `labels` is name ->
    number. `read_case(case)` gives HU (int16) and labels (uint8), both [Z, Y, X] in LPS.
    """

    @property
    def splits(self) -> tuple[Mapping[str, tuple[Case, ...]], ...]:
        """Of each fold, the cases of train, val and test; empty where a split has none."""
        return tuple({split: self._cases_in(split, fold) for split in SPLITS} for fold in range(len(self.folds.folds)))

    def _cases_in(self, split: str, fold: int) -> tuple[Case, ...]:
        try:
            return self.cases_of(split, fold)
        except DistsegError:  # none, which is a mistake only of whoever asks for this split alone
            return ()

    def read_slices(self, split: str, fold: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """HU (int16) and labels (uint8) of each slice of a split, both [Y, X], case by case from the feet to the head.

        Args:
            split: "train", "val" or "test".
            fold: whose train and val, from 0; the test patients are in none.

        Raises:
            DistsegError: no such fold or split, no case in it, or a damaged slice.
        """
        if split not in SPLITS:
            raise DistsegError(f"split: got {split!r}; it must be one of {', '.join(SPLITS)}; choose one")
        if fold not in range(len(self.folds.folds)):
            last = len(self.folds.folds) - 1
            raise DistsegError(f"fold: got {fold!r}; {self.root} has folds 0 to {last}; choose one of them")
        for files in self.slices_of_split(split, fold):
            yield read_slice(files.image), read_slice(files.label)
