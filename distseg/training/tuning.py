"""Chooses each region's post-processing on the validation cases of a run, and on nothing else."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distseg.config import IGNORED_LABEL, Config
from distseg.data.store import open_store
from distseg.files import write_json
from distseg.metrics import mean_defined, none_if_undefined, scores_from_counts
from distseg.training.inference import Rules, SegmentedCase, inference_device, segment_cases, split_slices
from distseg.training.postprocessing import RULES, RegionRule, regions_by_width, rules_as_dict, settled_masks
from distseg.training.run_folder import load_best, open_run

# (threshold, seed threshold): plain ones, and hysteresis around the usual one.
THRESHOLDS = ((0.3, None), (0.4, None), (0.5, None), (0.6, None), (0.7, None), (0.3, 0.6), (0.5, 0.7), (0.5, 0.9))
COMPONENTS = (None, 1, 2)  # two lungs are one component or two
LEAST_GAIN = 0.001  # of Dice; less is not worth another rule


def tune_run(run: Path, store: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes RUN/postprocessing.json: for each region the rule with the highest mean Dice over the validation cases.

    Regions are settled one after the other, wide ones first, so that narrower ones may lie inside what was settled.

    Args:
        run: folder of the run.
        store: another place of the store; None: as in the run's config.
        overrides: `evaluate.key=value` over the run's config.

    Returns:
        What is in the file: the rules, and each region's Dice without and with its rule.
    """
    folder, config = open_run(run, overrides)
    opened, device = open_store(store or Path(config.data.store)), inference_device()
    slices = split_slices(config, opened, "val")
    segmenter = load_best(folder, config)[1].to(device)
    rules: dict[str, RegionRule] = {}
    dice: dict[str, dict[str, float | None]] = {}
    for region in regions_by_width(config.regions):
        plain = RegionRule(config.evaluate.threshold)
        candidates = [plain, *(rule for rule in _candidates(list(rules)) if rule != plain)]
        segmented = segment_cases(segmenter, opened, slices, config, device)
        seen = tqdm(segmented, f"tune {region}", total=len(slices.cases), unit="volume")
        dice_CK = np.array([_dice_of_rules(case, config, region, candidates, rules) for case in seen])
        means_K = [mean_defined(of_rule.tolist()) for of_rule in dice_CK.T]
        best = max(range(len(candidates)), key=lambda k: -math.inf if math.isnan(means_K[k]) else means_K[k])
        chosen = best if means_K[best] >= means_K[0] + LEAST_GAIN else 0
        rules[region] = candidates[chosen]
        dice[region] = {"plain": none_if_undefined(means_K[0]), "chosen": none_if_undefined(means_K[chosen])}
    found = {
        "split": "val",
        "fold": config.data.fold,
        "n_cases": len(slices.cases),
        "dice": dice,
        "rules": rules_as_dict(rules),
    }
    write_json(run / RULES, found)
    return found


def _dice_of_rules(
    segmented: SegmentedCase, config: Config, region: str, candidates: Sequence[RegionRule], settled: Rules
) -> list[float]:
    """Dice of a case under each candidate; NaN where it is undefined."""
    assert segmented.probability_RZYX is not None
    of_region = dict(zip(config.regions, segmented.probability_RZYX, strict=True))
    outer = settled_masks(settled, of_region)
    truth_ZYX = np.isin(segmented.truth_ZYX, config.regions[region])
    valid_ZYX = segmented.truth_ZYX != IGNORED_LABEL
    scores = []
    for rule in candidates:
        mask_ZYX = rule.mask(of_region[region], outer[rule.inside] if rule.inside else None) & valid_ZYX
        tp, predicted, true = ((mask_ZYX & truth_ZYX).sum(), mask_ZYX.sum(), truth_ZYX.sum())
        counts = (tp, predicted - tp, true - tp, 0)
        scores.append(scores_from_counts(counts, config.evaluate.empty_masks)["dice"])
    return scores


def _candidates(wider: list[str]) -> Iterator[RegionRule]:
    for (threshold, seed), components, inside in itertools.product(THRESHOLDS, COMPONENTS, (None, *wider)):
        yield RegionRule(threshold, seed, components, inside)
