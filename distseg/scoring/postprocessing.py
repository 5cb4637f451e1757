"""From the region probabilities of a volume to masks: hysteresis, largest components, one region inside another.

Which rule a region gets is chosen on validation cases only (tuning.py) and recorded in RUN/postprocessing.json.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from distseg.errors import DistsegError
from distseg.runs.folder import RunFolder, best_metadata

RULES = "postprocessing.json"  # in a run's folder

NEIGHBOURS = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected


@dataclass(frozen=True)
class RegionRule:
    """How one region's mask follows from its probability."""

    threshold: float = 0.5
    """a voxel is in the region where its probability is at least this"""
    seed_threshold: float | None = None
    """hysteresis: only components with a voxel of at least this probability stay"""
    components: int | None = None
    """only so many components stay, the largest"""
    inside: str | None = None
    """only what lies in this region stays"""

    def mask(self, probability_ZYX: np.ndarray, outer_ZYX: np.ndarray | None = None) -> np.ndarray:
        """The region's mask.

        Args:
            probability_ZYX: in [0, 1].
            outer_ZYX: bool, where the mask may lie; None: in the whole volume.

        Returns:
            bool, of the same shape; all False where nothing reaches the threshold.
        """
        mask_ZYX = probability_ZYX >= self.threshold
        if outer_ZYX is not None:
            mask_ZYX &= outer_ZYX
        if self.seed_threshold is None and self.components is None or not mask_ZYX.any():
            return mask_ZYX
        from scipy.ndimage import find_objects  # here and below: most masks are made without it

        (box,) = find_objects(mask_ZYX.astype(np.uint8))  # a lesion is far smaller than its volume
        kept_ZYX = np.zeros_like(mask_ZYX)
        kept_ZYX[box] = self._kept_components(mask_ZYX[box], probability_ZYX[box])
        return kept_ZYX

    def _kept_components(self, mask_ZYX: np.ndarray, probability_ZYX: np.ndarray) -> np.ndarray:
        from scipy.ndimage import label

        number_ZYX, count = label(mask_ZYX, NEIGHBOURS)
        sizes = np.bincount(number_ZYX.ravel(), minlength=count + 1)
        keeps = np.ones(count + 1, bool)
        keeps[0] = False
        if self.seed_threshold is not None:
            seeded = np.bincount(number_ZYX[probability_ZYX >= self.seed_threshold], minlength=count + 1)
            keeps &= seeded > 0
        if self.components is not None:
            smaller = np.argsort(-np.where(keeps, sizes, 0), kind="stable")[self.components :]
            keeps[smaller] = False
        return keeps[number_ZYX]


def rules_as_dict(rules: Mapping[str, RegionRule] | None) -> dict[str, dict[str, Any]] | None:
    """As JSON can hold them."""
    return None if rules is None else {name: dataclasses.asdict(rule) for name, rule in rules.items()}


def read_rules(run: Path) -> dict[str, RegionRule] | None:
    """The rules that were chosen for a run; None where none were.

    Raises:
        DistsegError: a damaged file, or one of weights that are no longer the best.
    """
    path = run / RULES
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        rules = pydantic.TypeAdapter(dict[str, RegionRule]).validate_python(found["rules"])
        chosen_for = found.get("model")
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DistsegError(
            f"post-processing: got {path}, damaged ({reason}); run `distseg evaluate --tune` again"
        ) from None
    if chosen_for is not None and chosen_for != best_metadata(RunFolder(run)):
        raise DistsegError(
            f"post-processing: got {path}, chosen for the weights of step {chosen_for.get('step')}; training has found better ones "
            "since; run `distseg evaluate --tune` again, or remove the file"
        )
    return rules
