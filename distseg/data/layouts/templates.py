"""Sets that a pattern of names describes: those that circulate, and a user's own (`--images`, `--masks`)."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distseg.data.file_kinds import left_out_in_words
from distseg.data.label_names import KNOWN, Names, as_label, names_of_maps, numbered
from distseg.data.layouts.source import (
    OF_THE_SET,
    SPLITS,
    CaseSource,
    MaskSource,
    Source,
    by_case,
    check_images,
    check_pairs,
    ignoring,
    in_order_of,
    kept_apart,
    label_map,
    mask_of_label,
    patient_of_files,
)
from distseg.data.layouts.tree import Pattern, Tree, are_slices, gathered
from distseg.errors import DistsegError

Files = dict[str, tuple[Path, ...]]  # of each case

LUNG = {1: "lung", 2: "lung"}  # right and left become one label
INFECTION = {1: "infection"}
FINDINGS = {1: "ground_glass", 2: "consolidation", 3: "pleural_effusion"}
META = "meta.csv"  # of TotalSegmentator


def covid_case(name: str) -> str:
    """One name for what the copies of Zenodo 3757476 call `coronacases_org_001` and `coronacases_001`."""
    name = re.sub(r"^(coronacases|radiopaedia)_org_(covid-19-pneumonia-)?", r"\1_", name)
    return name.removesuffix("-dcm")


@dataclass(frozen=True)
class Template:
    """A set that circulates."""

    images: str
    masks: tuple[Mapping[str, Mapping[int, str]], ...]
    """alternatives, of which the first is taken whose files are there: pattern -> the label of each value; none: `{label}` names it"""
    case: str = ".+"
    """regular expression that the cases' names must have, where the pattern alone would fit others' data"""
    id: str = "{}"
    """of a case, from what `{case}` stands for"""
    renamed: Callable[[str], str] = str
    """makes the names of a case in several folders one"""
    is_partly_annotated: bool = False
    """volumes without a mask are left out; otherwise they are a mistake"""

    def fits(self, tree: Tree) -> bool:
        return bool(self.chosen(tree)) and any(
            re.fullmatch(self.case, c) for c, _, _ in Pattern(self.images).matches(tree)
        )

    def chosen(self, tree: Tree) -> Mapping[str, Mapping[int, str]]:
        """The alternative whose files are there; none: {}."""
        return next((masks for masks in self.masks if all(Pattern(text).fits(tree) for text in masks)), {})

    def rule(self) -> str:
        return f"{self.images} with {', or '.join(' and '.join(masks) for masks in self.masks)}"


TEMPLATES = {
    "zenodo": Template(
        "COVID-19-CT-Seg_20cases/{case}",
        (
            {"Lung_Mask/{case}": LUNG, "Infection_Mask/{case}": INFECTION},
            {"Lung_and_Infection_Mask/{case}": LUNG | {3: "infection"}},
        ),
        renamed=covid_case,
    ),
    "kaggle": Template(
        "ct_scans/{case}",
        (
            {"lung_mask/{case}": LUNG, "infection_mask/{case}": INFECTION},
            {"lung_and_infection_mask/{case}": LUNG | {3: "infection"}},
        ),
        renamed=covid_case,
    ),
    "medseg9": Template(
        "rp_im/{case}", ({"rp_lung_msk/{case}": LUNG, "rp_msk/{case}": FINDINGS}, {"rp_msk/{case}": FINDINGS})
    ),
    "covid-19-20": Template(
        "**/{case}_ct", ({"**/{case}_seg": INFECTION},), case="volume-covid19-.+", is_partly_annotated=True
    ),
    "mosmed": Template(
        "**/CT-*/{case}", ({"**/masks/{case}_mask": INFECTION},), case=r"study_\d+", is_partly_annotated=True
    ),
    "lits": Template(
        "**/volume-{case}", ({"**/segmentation-{case}": {1: "liver", 2: "tumor"}},), case=r"\d+", id="volume-{}",
        is_partly_annotated=True,
    ),
    "kits": Template(
        "**/{case}/imaging", ({"**/{case}/segmentation": {1: "kidney", 2: "tumor", 3: "cyst"}},), case=r"case_\d+",
        is_partly_annotated=True,
    ),
    "totalsegmentator": Template("{case}/ct", ({"{case}/segmentations/{label}": {}},), case=r"s\d{4,}"),
}  # fmt: skip


def read_set(layout: str, tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """A set that circulates, by the name of its template.

    Args:
        layout: one of `TEMPLATES`.
        tree: of the set.
        declared: of labels that files are named after those to take, and their numbers; None: all.

    Raises:
        DistsegError: a volume without a mask, a mask without a volume, or labels for a set that has its own.
    """
    template = TEMPLATES[layout]
    found = _Found(tree, template.images, template.renamed, template.case)
    masks: dict[str, list[MaskSource]] = {case: [] for case in found.images}
    chosen = template.chosen(tree)
    labels, come_from = _labels(chosen), OF_THE_SET
    for text, name_of_value in chosen.items():
        pattern = Pattern(text)
        if pattern.has_label:
            of_cases, labels = _masks_by_file(found, pattern, declared)
            come_from = "names of files; higher numbers lie over lower ones"
        else:
            files = found.masks(pattern)[""]
            value = {number: labels[name] for number, name in name_of_value.items()}
            of_cases = {case: (MaskSource(paths, value, {}),) for case, paths in files.items()}
        _check(template, tree, text, found.images, of_cases)
        for case, sources in of_cases.items():
            masks[case] += sources
    if declared is not None and not any(Pattern(text).has_label for text in chosen):
        raise DistsegError(
            f"--labels: got {', '.join(declared)}; layout {layout} has its own; leave it out, or choose --layout"
        )
    alternatives = [Pattern(text) for masks_of in template.masks for text in masks_of]
    found.used.update(path for pattern in alternatives for _, _, path in pattern.matches(tree))
    found.used.add(tree.root / META)
    source = found.source(layout, Names(labels, come_from), masks, template.id)
    return _with_meta(source) if layout == "totalsegmentator" else source


def _labels(masks: Mapping[str, Mapping[int, str]]) -> dict[str, int]:
    """Numbers of a set's labels: distseg's own where it knows one, else those of the files."""
    number_of = {name: value for values in masks.values() for value, name in values.items()}
    return numbered(number_of) if number_of.keys() & KNOWN.keys() else {"background": 0} | number_of


def _check(
    template: Template,
    tree: Tree,
    text: str,
    images: Mapping[str, tuple[Path, ...]],
    of_cases: Mapping[str, tuple[MaskSource, ...]],
) -> None:
    files = {case: sources[0].files for case, sources in of_cases.items()}
    if template.is_partly_annotated:
        check_images(images, files)
    else:
        check_pairs(tree.root / text.partition("{")[0].rstrip("/"), images, files)


def read_template(tree: Tree, images: str, masks: str, declared: Mapping[str, int] | None) -> Source:
    """A set of one's own.

    Args:
        tree: of the set.
        images, masks: patterns; `{label}` in that of masks stands for the label of a file.
        declared: labels and their numbers; None: those that the data names.

    Raises:
        DistsegError: nothing fits a pattern, a mask without a volume, or label maps that nothing names.
    """
    pattern = Pattern(masks, "--masks")
    found = _Found(tree, images)
    if not found.images:
        raise DistsegError(f"--images: got {images!r}, which no file in {tree.root} fits; {_seen(tree)}; correct it")
    if not pattern.fits(tree):
        raise DistsegError(f"--masks: got {masks!r}, which no file in {tree.root} fits; {_seen(tree)}; correct it")
    if pattern.has_label:
        of_cases, labels = _masks_by_file(found, pattern, declared)
        names = Names(labels, "from --labels" if declared else "names of files")
        if not declared:
            of_cases = {case: kept_apart(sources, labels) for case, sources in of_cases.items()}
    else:
        files = found.masks(pattern).get("", {})
        every = [path for paths in files.values() for path in paths]
        options = f"--images {images!r} --masks {masks!r} "
        names = Names(declared, "from --labels") if declared else names_of_maps(tree.root, every, options=options)
        of_cases = {
            case: (label_map(names.labels, in_order_of(found.images.get(case, paths), paths)),)
            for case, paths in files.items()
        }
    check_images(found.images, {case: sources[0].files for case, sources in of_cases.items()})
    source = found.source("template", names, of_cases)
    return source if names.ignore is None else ignoring(source, names.ignore)


def _seen(tree: Tree) -> str:
    return f"seen: {', '.join(tree.shapes()) or 'no file'}"


class _Found:
    """What patterns find in a tree."""

    def __init__(self, tree: Tree, images: str, renamed: Callable[[str], str] = str, case: str = ".+") -> None:
        self.tree, self.renamed, self.case = tree, renamed, case
        self.used: set[Path] = set()
        self.beside: list[Path] = []
        self.notes: list[str] = []
        paths: dict[str, list[Path]] = {}
        for name, _, path in Pattern(images, "--images").matches(tree):
            if re.fullmatch(case, name):
                paths.setdefault(renamed(name), []).append(path)
        volumes = [(name, own) for name, all_paths in paths.items() for own in self._volumes(all_paths)]
        self.images = by_case(sorted(volumes))

    def _volumes(self, paths: Sequence[Path]) -> list[tuple[Path, ...]]:
        """One volume, or several that by_case refuses."""
        if len(paths) > 1 and not are_slices(paths):
            return [self._files([path]) for path in paths]
        files = self._files(paths)
        return [files] if files else []

    def _files(self, paths: Sequence[Path]) -> tuple[Path, ...]:
        files = gathered(paths, self.beside)
        self.used.update(files)
        return files

    def masks(self, pattern: Pattern) -> dict[str, Files]:
        """Files of each case by label, "" where the pattern names none; files of volumes are no masks."""
        paths: dict[str, dict[str, list[Path]]] = {}
        images = {path for files in self.images.values() for path in (*files, files[0].parent)}
        for name, label, path in pattern.matches(self.tree):
            case = self.renamed(name)
            if path not in images and re.fullmatch(self.case, name):
                paths.setdefault(label, {}).setdefault(case, []).append(path)
        found = {label: {case: self._files(own) for case, own in of.items()} for label, of in paths.items()}
        return {label: {case: files for case, files in of.items() if files} for label, of in found.items()}

    def source(self, layout: str, names: Names, masks: Mapping[str, Sequence[MaskSource]], id_of: str = "{}") -> Source:
        cases, told = [], set()
        for name, files in self.images.items():
            if masks.get(name):
                patient, how = patient_of_files(id_of.format(name), files)
                told.add(how)
                cases.append(CaseSource(id_of.format(name), patient, files, tuple(masks[name])))
        without = [self.images[name][0] for name in self.images if not masks.get(name)]
        gone = {path for name in self.images if not masks.get(name) for path in self.images[name]}
        left_out = (
            [f"{len(without)} volumes without a mask ({without[0].relative_to(self.tree.root)}, ...)"]
            if without
            else []
        )
        others = [name.path for name in self.tree.files if name.path not in self.used and name.path not in gone]
        left_out += filter(None, [left_out_in_words(others, self.tree.root)])
        return Source(
            self.tree.root, layout, names.labels, tuple(cases), told_by=" and ".join(sorted(told)), names_from=names.come_from,
            regions=names.regions, notes=tuple(self.notes), left_out=tuple(left_out),
        )  # fmt: skip


def _masks_by_file(
    found: _Found, pattern: Pattern, declared: Mapping[str, int] | None
) -> tuple[dict[str, tuple[MaskSource, ...]], dict[str, int]]:
    """Masks of each case from a file a label, and the labels; higher numbers lie over lower ones."""
    files = found.masks(pattern)
    labels = numbered(map(as_label, files)) if declared is None else dict(declared)
    if missing := sorted(labels.keys() - {"background"} - set(map(as_label, files))):
        raise DistsegError(f"--labels: got {missing[0]}; files name {', '.join(sorted(files))}; choose from them")
    taken = sorted((name for name in files if as_label(name) in labels), key=lambda name: labels[as_label(name)])
    cases = sorted({case for name in taken for case in files[name]})
    of_cases = {
        case: tuple(
            mask_of_label(name, labels, in_order_of(found.images.get(case, ()), files[name][case]))
            for name in taken
            if case in files[name]
        )
        for case in cases
    }
    for name in taken:
        if lacking := len(of_cases.keys() - files[name].keys()):
            found.notes.append(
                f"{name}: {lacking} of {len(of_cases)} volumes have no such mask: taken as nothing there"
            )
    if others := [name for name in files if name not in taken]:
        found.notes.append(
            f"{len(others)} labels that --labels does not name are not taken: {', '.join(sorted(others)[:5])}, ..."
        )
    return of_cases, labels


def _with_meta(source: Source) -> Source:
    """TotalSegmentator with the splits of its meta.csv."""
    path = source.root / META
    if not path.is_file():
        return source
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    splits = {row.get("image_id", ""): (row.get("split") or "").strip() for row in rows}
    named = {case.patient: splits.get(case.id, "") for case in source.cases}
    if unknown := [split for split in named.values() if split not in SPLITS]:
        if not any(named.values()):
            return source
        raise DistsegError(
            f"{path}: got split {unknown[0]!r} for a case; it must be one of {', '.join(SPLITS)}; mend it, or move the file away"
        )
    return replace(source, split_of_patient=named, splits_from=META)
