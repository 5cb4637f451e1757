"""What a scoring is told, and whether it can be done: found before torch is imported."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.config import Config
from distseg.data.file_kinds import is_picture, is_volume, number_of, volume_stem
from distseg.data.store import Case, Slices, Store, open_store, split_slices, with_labels
from distseg.errors import DistsegError
from distseg.runs.folder import RunFolder, check_members, open_run
from distseg.scoring.postprocessing import RULES, RegionRule, read_rules


@dataclass(frozen=True)
class RunToScore:
    """A finished run, and the slices of a split that it has not seen."""

    members: Sequence[tuple[RunFolder, Config]]
    """the run, and those that its probabilities are averaged with"""
    split: str
    store: Store
    slices: Slices
    rules: Mapping[str, RegionRule] | None
    """of post-processing; None: masks as the model gives them"""

    @property
    def folder(self) -> RunFolder:
        return self.members[0][0]

    @property
    def config(self) -> Config:
        return self.members[0][1]


@dataclass(frozen=True)
class MasksToScore:
    """Masks that something else made, one for each case of a split."""

    files: Mapping[str, Sequence[Path]]
    """of each case, by its id"""
    folder: Path
    config: Config
    split: str
    store: Store
    slices: Slices


def run_to_score(
    run: Path,
    split: str,
    store: Path | None = None,
    overrides: Sequence[str] = (),
    ensemble: Sequence[Path] = (),
    raw: bool = False,
) -> RunToScore:
    """Looks at all that the scoring of a run can be wrong in before it is begun.

    Args:
        run: folder of the run.
        split: "val" (the fold it was validated on) or "test".
        store: another place of the store; None: as in the run's config.
        overrides: `evaluate.key=value` over the run's config.
        ensemble: other runs, whose probabilities are averaged with this one's.
        raw: leave out RUN/postprocessing.json, where there is one.

    Raises:
        DistsegError: no finished run, no case in the split, or a member of the ensemble that does not fit or has seen the
            split's patients.
    """
    folder, config = open_run(run, overrides)
    opened = open_store(store or Path(config.data.store))
    config = with_labels(config, opened.labels, str(opened.root))  # masks are written in the numbers of the truth
    slices = split_slices(config, opened, split)
    rules = None if raw else read_rules(run)
    if rules is not None and any(word.startswith("evaluate.threshold=") for word in overrides):
        raise DistsegError(
            f"override: got evaluate.threshold; {run / RULES} has the regions' own; leave it out, or give --raw"
        )
    members = [(folder, config), *(open_run(other) for other in ensemble)]
    _check_unseen(members, opened, slices.cases, split)
    check_members(members)
    return RunToScore(members, split, opened, slices, rules)


def masks_to_score(masks: Path, split: str, store: Path, config: Config) -> MasksToScore:
    """Finds the masks of a split's cases: MASKS/<case>.nii.gz or .nii.

    Args:
        masks: folder of the masks.
        split, store: whose cases.
        config: its regions, fold and `evaluate` section.

    Raises:
        DistsegError: no such store or split, or a case without a mask.
    """
    opened = open_store(store)
    config = with_labels(config, opened.labels, str(opened.root))
    slices = split_slices(config, opened, split)
    return MasksToScore(_mask_files(masks, slices.cases), masks, config, split, opened, slices)


def _check_unseen(members: Sequence[tuple[RunFolder, Config]], store: Store, cases: Sequence[Case], split: str) -> None:
    """Refuses runs that were trained on a patient, as they have noted it themselves: a store's folds may be dealt anew."""
    for number, (folder, config) in enumerate(members):
        if number == 0 and config.data.leaky_slice_split:
            continue  # that is what it is for; the summary says so
        trained = folder.patients("train") or {case.patient for case in split_slices(config, store, "train").cases}
        if seen := sorted(set(trained) & {case.patient for case in cases}):
            name, remedy = ("--ensemble", "use --split test") if number else ("run", "use the store it was trained on")
            raise DistsegError(
                f"{name}: got {folder.root}, which was trained on {len(seen)} of the patients of split {split} ({seen[0]}); "
                f"its score would be no score; {remedy}"
            )


def _mask_files(folder: Path, cases: Sequence[Case]) -> dict[str, tuple[Path, ...]]:
    """The mask of each case, of any format and in folders however deep: a file, or pictures of its slices.

    Raises:
        DistsegError: a case without a mask, or with two.
    """
    ids = {case.id for case in cases}
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if is_volume(path) or is_picture(path)):
        if path.is_relative_to(folder / "eval"):  # that evaluate writes into the folder
            continue
        name = unicodedata.normalize("NFC", path.stem if is_picture(path) else volume_stem(path))
        numbered = re.sub(r"_\d+$", "", name)
        found.setdefault(numbered if is_picture(path) and name not in ids else name, []).append(path)
    if missing := [case.id for case in cases if case.id not in found]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DistsegError(
            f"masks: got {folder} without {len(missing)} of {len(cases)} cases ({some}); each needs CASE.nii.gz, or .mha, .nrrd and the like; "
            "predict them, or choose another --split or data.fold"
        )
    for case in cases:
        if len(files := found[case.id]) > 1 and not all(map(is_picture, files)):
            raise DistsegError(
                f"masks: got {files[0]} and {files[1]} for case {case.id}; it has one mask; move the other away"
            )
    return {case.id: tuple(sorted(found[case.id], key=number_of)) for case in cases}
