"""What a scoring is told, and whether it can be done: found before torch is imported."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distseg.config import Config
from distseg.data.file_kinds import (
    FIRST_CHANNEL,
    case_of_picture,
    is_picture,
    is_volume,
    number_of_picture,
    volume_stem,
)  # fmt: skip
from distseg.data.store import Case, Slices, Store, open_store, split_slices, with_labels
from distseg.errors import DistsegError
from distseg.runs.folder import RunFolder, check_members, open_run
from distseg.scoring.postprocessing import RULES, RegionRule, read_rules

EVALUATED = "eval"  # folder in that of masks or a run


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

    files: Mapping[str, tuple[Path, ...]]
    """of each case, by its id: one file, or its slices as pictures"""
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
    """Finds the masks of a split's cases: MASKS/<case>.nii.gz, or of another format, or in folders as `predict` fills them.

    Args:
        masks: folder of the masks.
        split, store: whose cases.
        config: its regions, fold and `evaluate` section.

    Raises:
        DistsegError: no such store or split, or a case without a mask or with several.
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
    """Of each case the mask of its name; or else the one that lies as its volume lay in the source; or in a folder of its name."""
    found = _masks_below(folder)
    masks: dict[str, tuple[Path, ...]] = {}
    for case in cases:
        places = _places(case)
        ways = (
            [name for name in found if name.name == case.id],
            [name for name in found if any(place[-len(name.parts) :] == name.parts for place in places)],
            [name for name in found if case.id in name.parent.parts],
        )
        several = next((way for way in ways if way), [])
        if len(several) > 1:
            raise DistsegError(
                f"masks: got {found[several[0]][0]} and {found[several[1]][0]} for case {case.id}; each has one; move the other away"
            )
        if several:
            masks[case.id] = found[several[0]]
    if missing := [case.id for case in cases if case.id not in masks]:
        segs = " (a DICOM-SEG does not say which slices of the volume it lacks)" if any(folder.rglob("*.dcm")) else ""
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DistsegError(
            f"masks: got {folder} without {len(missing)} of {len(cases)} cases ({some}); each needs CASE.nii.gz, .mha, .nrrd or .png, in "
            f"any folder below{segs}; predict them, or choose another --split or data.fold"
        )
    return masks


def _places(case: Case) -> list[tuple[str, ...]]:
    """Where a case's volume lay in the source, without its suffix; of a series, its folder."""
    name, and_more, _ = case.source.partition(" and ")
    own = PurePosixPath(_composed(name))
    place = own.with_name(volume_stem(Path(own.name)).removesuffix(FIRST_CHANNEL))
    return [place.parts, own.parent.parts] if and_more else [place.parts]


def _masks_below(folder: Path) -> dict[PurePosixPath, tuple[Path, ...]]:
    """Volumes and stacks of slices in a folder and below, by their path in it without a suffix; not those of earlier scores."""
    paths = [path for path in sorted(folder.rglob("*")) if folder / EVALUATED not in path.parents]
    found: dict[PurePosixPath, tuple[Path, ...]] = {}
    for path in paths:
        inside = PurePosixPath(_composed(path.parent.relative_to(folder).as_posix()))
        if is_volume(path):
            name = inside / _composed(volume_stem(path))
            if name in found:
                raise DistsegError(
                    f"masks: got {found[name][0]} and {path}, both of {name}; each case has one; move the other away"
                )
            found[name] = (path,)
    slices: dict[PurePosixPath, list[Path]] = {}
    for path in paths:
        if is_picture(path):
            inside = PurePosixPath(_composed(path.parent.relative_to(folder).as_posix()))
            slices.setdefault(inside / _composed(case_of_picture(path)), []).append(path)
    stacks = {name: tuple(sorted(files, key=number_of_picture)) for name, files in slices.items()}
    return stacks | found  # pictures beside volumes are previews


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
