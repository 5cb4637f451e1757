"""Chooses each region's post-processing on the validation cases of a run, and on nothing else."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distseg.bars import counted
from distseg.config import Config
from distseg.data.store import open_store, split_slices, with_labels
from distseg.files import write_json
from distseg.metrics import mean_defined, none_if_undefined, scores_from_counts
from distseg.regions import regions_by_width
from distseg.runs.folder import best_metadata, open_run
from distseg.runs.trained import load_best
from distseg.scoring.cases import counts_of_case
from distseg.scoring.postprocessing import RULES, RegionRule, rules_as_dict
from distseg.scoring.segmenting import Rules, SegmentedCase, inference_device, label_map, segment_cases

# (threshold, seed threshold): plain ones, and hysteresis around the usual one.
THRESHOLDS = ((0.3, None), (0.4, None), (0.5, None), (0.6, None), (0.7, None), (0.3, 0.6), (0.5, 0.7), (0.5, 0.9))
COMPONENTS = (None, 1, 2)  # two lungs are one component or two
LEAST_GAIN = 0.001  # of Dice; less is not worth another rule


def tune_run(run: Path, store: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes RUN/postprocessing.json: for each region the rule with the highest mean Dice over the validation cases.

    Regions are settled one after the other, wide ones first, so that those whose labels are a part of them may lie inside what was
    settled. What counts is the label map, into which narrower regions are written over wider ones. Where all rules together are no
    better than plain thresholds, those are kept.

    Args:
        run: folder of the run.
        store: another place of the store; None: as in the run's config.
        overrides: `evaluate.key=value` over the run's config.

    Returns:
        What is in the file: the rules, and each region's Dice without and with them, as `distseg evaluate` scores it.
    """
    folder, config = open_run(run, overrides)
    opened, device = open_store(store or Path(config.data.store)), inference_device()
    config = with_labels(config, opened.labels, str(opened.root))
    slices = split_slices(config, opened, "val")
    segmenter = load_best(folder, config)[1].to(device)

    def mean_dice(candidates: Sequence[Rules], regions: Sequence[str], what: str) -> np.ndarray:
        """Of each candidate and region, [K, R], over the cases."""
        segmented = segment_cases(segmenter, opened, slices, config, device)
        seen = counted(segmented, f"tune {what}", len(slices.cases), "volume")
        dice_CKR = np.array([_dice(case, candidates, config, regions) for case in seen])
        return np.array(
            [[mean_defined(of_cases) for of_cases in of_rules.T.tolist()] for of_rules in dice_CKR.swapaxes(0, 1)]
        )

    labels = config.region_labels
    by_width = regions_by_width(labels)
    plain = {region: RegionRule(config.evaluate.threshold) for region in by_width}
    rules = dict(plain)
    for index, region in enumerate(by_width):
        own = set(labels[region])
        wider = [
            other for other in by_width[:index] if own < set(labels[other])
        ]  # only what is a part of it lies inside
        others = [rule for rule in _candidates(wider) if rule != plain[region]]
        candidates = [rules | {region: rule} for rule in (plain[region], *others)]
        means_K = mean_dice(candidates, [region], region)[:, 0]
        best = int(np.nanargmax(means_K)) if np.isfinite(means_K).any() else 0
        if means_K[best] >= means_K[0] + LEAST_GAIN:
            rules = candidates[best]
    dice_2R = mean_dice([plain, rules], by_width, "all")
    before, after = (mean_defined(of_regions.tolist()) for of_regions in dice_2R)
    if not after >= before:
        rules, dice_2R = plain, dice_2R[[0, 0]]
    found = {
        "split": "val",
        "fold": config.data.fold,
        "n_cases": len(slices.cases),
        "n_cases_with": {
            region: sum(any(case.slices_with.get(str(name)) for name in names) for case in slices.cases)
            for region, names in config.regions.items()
        },
        "model": best_metadata(folder),
        "dice": {
            region: {"plain": none_if_undefined(before), "chosen": none_if_undefined(after)}
            for region, (before, after) in zip(by_width, dice_2R.T.tolist(), strict=True)
        },
        "rules": rules_as_dict(rules),
    }
    write_json(run / RULES, found)
    return found


def _dice(segmented: SegmentedCase, candidates: Sequence[Rules], config: Config, regions: Sequence[str]) -> np.ndarray:
    """Of some regions of a case under each candidate, [K, R], as `distseg evaluate` scores it; NaN where it is undefined."""
    assert segmented.probability_RZYX is not None
    wanted = {region: config.region_labels[region] for region in regions}
    dice_KR = []
    for rules in candidates:
        mask_ZYX = label_map(rules, segmented.probability_RZYX, config.region_labels)
        counts_R4 = counts_of_case(replace(segmented, mask_ZYX=mask_ZYX), wanted)
        dice_KR.append([scores_from_counts(counts, config.evaluate.empty_masks)["dice"] for counts in counts_R4])
    return np.array(dice_KR)


def _candidates(wider: list[str]) -> Iterator[RegionRule]:
    for (threshold, seed), components, inside in itertools.product(THRESHOLDS, COMPONENTS, (None, *wider)):
        yield RegionRule(threshold, seed, components, inside)
