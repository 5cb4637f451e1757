"""Which slices a run learns from: found before torch is imported, and by every rank alike."""

from dataclasses import dataclass

import numpy as np

from distseg.config import Config
from distseg.data.store import Slices, Store, split_slices
from distseg.errors import DistsegError
from distseg.runs.folder import SplitCases


@dataclass(frozen=True)
class TrainingSlices:
    train: Slices
    val: Slices
    focused: np.ndarray
    """indices of the training slices with data.focus_region"""

    @property
    def cases(self) -> SplitCases:
        splits = {"train": self.train, "val": self.val}
        return {name: {case.folder: case.patient for case in split.cases} for name, split in splits.items()}


def training_slices(config: Config, store: Store) -> TrainingSlices:
    """The slices of a configuration that is settled with the store.

    Raises:
        DistsegError: the store's labels, fold or slices do not do for it.
    """
    train, val = (split_slices(config, store, split) for split in ("train", "val"))
    held = {name: train.holding([*map(str, labels)]) for name, labels in config.regions.items()}
    if nowhere := [name for name, found in held.items() if not len(found)]:
        raise DistsegError(
            f"regions.{nowhere[0]}: got no training slice of {store.root}, fold {config.data.fold}, that holds it; the "
            "network could not learn it; leave the region out or choose another data.fold"
        )
    return TrainingSlices(train, val, held.get(config.data.focus_region or "", np.empty(0, np.int64)))
