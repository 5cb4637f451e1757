"""What lies where in a source: which files are a volume, which its masks, which patient it is of.

A layout is found by itself or named. Nothing is read here but names, a CSV and the patient of a DICOM file.
"""

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from distseg.config import IGNORED_LABEL
from distseg.data.dicom import read_patient_id
from distseg.data.file_kinds import (
    case_of_picture,
    is_dicom,
    is_picture,
    is_volume,
    left_out_in_words,
    number_of_picture,
    series_files,
    volume_stem,
)  # fmt: skip
from distseg.data.label_names import (
    DATASET,
    KNOWN,
    as_label,
    in_words,
    names_in_dataset,
    names_of_segments,
    numbered,
    refuse_unnamed,
)  # fmt: skip
from distseg.errors import DistsegError

LUNG_VALUES = {1: 1, 2: 1}  # right and left become one label

ZENODO_IMAGES = "COVID-19-CT-Seg_20cases"
# Mask folder -> {value in the file: label}; later folders overwrite earlier ones.
ZENODO_SEPARATE = {"Lung_Mask": LUNG_VALUES, "Infection_Mask": {1: 2}}
ZENODO_JOINT = {"Lung_and_Infection_Mask": LUNG_VALUES | {3: 2}}

PAIRED_IMAGES, PAIRED_JOINT = "images", "labels"
CSV_NAME, STORE_JSON = "cases.csv", "store.json"  # a store may lie inside its source
SPLITS = ("train", "val", "test")
NOTHING = "none"  # in a cell: looked for, and nothing is there
LONGEST_ID = 240  # bytes; a digest stands behind it, and file systems take 255


@dataclass(frozen=True)
class MaskSource:
    files: tuple[Path, ...]
    """NIfTI or DICOM-SEG files, several of which are parts or readers; or the PNG slices in the order of the volume's files"""
    label_of_value: Mapping[int, int]
    """value 0 is always background"""
    label_of_segment: Mapping[str, int]
    """the same for a DICOM-SEG, by the name of the segment; "*": any"""
    apart_from: Mapping[int, str] = field(default_factory=dict)
    """labels that it may not overlap, since nobody has said which lies over which"""


BY_NAME = "the case's name"  # nobody said which cases are of one patient
BY_FILE = "what stands before the number of a PNG file"


@dataclass(frozen=True)
class CaseSource:
    id: str
    patient: str
    files: tuple[Path, ...]
    """one NIfTI file, the PNG slices from the lowest up, or the DICOM files of a series"""
    masks: tuple[MaskSource, ...]
    slice_index: int | None = None
    """only this slice of a NIfTI stack whose slices are of different patients"""
    is_annotated: bool = True
    """False: nobody has looked for anything; its pixels count nowhere"""


@dataclass(frozen=True)
class Source:
    """All that a folder or CSV holds."""

    root: Path
    layout: str
    labels: Mapping[str, int]
    cases: tuple[CaseSource, ...]
    split_of_patient: Mapping[str, str] = field(default_factory=dict)
    """train, val or test where the source says so"""
    notes: tuple[str, ...] = ()
    """what a user should know"""
    told_by: str = BY_NAME
    """what patients are told apart by"""


def find_source(
    src: Path,
    layout: str = "auto",
    labels: Mapping[str, int] | None = None,
    ignore: int | None = None,
    patients: str | None = None,
) -> Source:
    """The annotated volumes of a folder (or CSV file), sorted by name.

    Args:
        src: folder, or the .csv file itself.
        layout: one of `LAYOUTS`, or "auto".
        labels: names and numbers that label folders, columns and segments have (paired and csv); None: those of the data.
        ignore: value of their label maps that says "not annotated"; None: there is none, or dataset.json says it.
        patients: regular expression on a case's name, or else its file's path in `src`, whose first group (or whole match) is the patient; None: as the layout says.

    Raises:
        DistsegError: no such source, no known layout or several, a volume without a mask or a mask without a volume.
    """
    if not src.exists():
        raise DistsegError(f"source: got {src}; no such folder; check the path")
    fitting = [name for name, (fits, _) in LAYOUTS.items() if fits(src)]
    if layout == "auto" and len(fitting) != 1:
        seen = f"that fits {' and '.join(fitting)}; choose one with --layout" if fitting else "of no known layout"
        rules = "; ".join(f"{name}: {LAYOUT_RULES[name]}" for name in LAYOUTS)
        raise DistsegError(f"source: got {src} {seen}; {rules}")
    if layout != "auto" and layout not in fitting:
        raise DistsegError(f"source: got {src}, declared {layout}; it must hold {LAYOUT_RULES[layout]}")
    source = LAYOUTS[fitting[0] if layout == "auto" else layout][1](src, labels)
    if source.layout in ("zenodo", "medseg") and labels is not None:
        raise DistsegError(
            f"--labels: got {', '.join(labels)}; layout {source.layout} has its own; leave it out, or choose --layout"
        )
    _check_ids(source)
    if patients is not None:
        source = _with_patients(source, patients)
    _check_patients(source)
    return source if ignore is None else _ignoring(source, ignore)


def _with_patients(source: Source, pattern: str) -> Source:
    """The source with each case's patient as a regular expression finds it in the case's name, or else in its file's path."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DistsegError(f"--patients: got {pattern}; not a regular expression ({error}); correct it") from None
    if source.split_of_patient:
        raise DistsegError(f"--patients: got {pattern}; {source.root} names its splits by patient; leave it out")
    found = {
        case.id: expression.search(case.id) or expression.search(os.path.relpath(case.files[0], source.root))
        for case in source.cases
    }
    if missing := [name for name, match in found.items() if not match or not match[min(1, expression.groups)]]:
        raise DistsegError(
            f"--patients: got {pattern}, which finds no patient in the name or path of case {missing[0]} ({len(missing)} so); each case has one; correct it"
        )
    cases = tuple(replace(case, patient=found[case.id][min(1, expression.groups)]) for case in source.cases)  # type: ignore[index]
    return replace(source, cases=cases, told_by=f"--patients {pattern}")


def _check_patients(source: Source) -> None:
    """Refuses two spellings of one patient, who would train and validate at once."""
    seen: dict[str, str] = {}
    for case in source.cases:
        key = " ".join(case.patient.split()).casefold()
        if (other := seen.setdefault(key, case.patient)) != case.patient:
            raise DistsegError(
                f"patients: got {other!r} and {case.patient!r}, one patient in two spellings; folds would part them; write them alike, "
                "or tell patients apart with --patients 'REGEX'"
            )


def _ignoring(source: Source, value: int) -> Source:
    """The source whose label maps may hold a value that counts in no loss and in no score."""
    if source.layout not in ("paired", "csv"):
        raise DistsegError(f"--ignore: got {value}; layout {source.layout} has no label maps of your own; leave it out")
    if value in source.labels.values():
        raise DistsegError(f"--ignore: got {value}; {value} is the number of a label; choose another value")

    def ignoring(mask: MaskSource) -> MaskSource:
        is_map = "*" not in mask.label_of_segment
        return replace(mask, label_of_value={**mask.label_of_value, value: IGNORED_LABEL}) if is_map else mask

    cases = (replace(case, masks=tuple(map(ignoring, case.masks))) for case in source.cases)
    return replace(source, cases=tuple(cases))


def patient_of(case_id: str) -> str:
    """`radiopaedia_<case>_...` are series of one patient; any other case is a patient of its own."""
    match = re.match(r"radiopaedia_\d+", case_id)
    return match.group() if match else case_id


# Zenodo 3757476


def _zenodo(src: Path, _: Mapping[str, int] | None) -> Source:
    left_out: list[Path] = []
    images = _niftis(src / ZENODO_IMAGES, left_out)
    if not images:
        raise DistsegError(
            f"source: got {src / ZENODO_IMAGES} without a .nii or .nii.gz file; at least one volume is needed"
        )
    folders = next((f for f in (ZENODO_SEPARATE, ZENODO_JOINT) if all((src / name).is_dir() for name in f)), None)
    if folders is None:
        needed = " and ".join(ZENODO_SEPARATE)
        raise DistsegError(f"source: got {src} without masks; it must hold {needed}, or {', '.join(ZENODO_JOINT)}")
    masks: dict[str, list[MaskSource]] = {case_id: [] for case_id in images}
    for name, label_of_value in folders.items():
        files = _niftis(src / name, left_out)
        _check_pairs(src / name, images, files)
        for case_id, path in files.items():
            masks[case_id].append(MaskSource((path,), label_of_value, {}))
    labels = {name: KNOWN[name] for name in ("background", "lung", "infection")}
    cases = (CaseSource(i, patient_of(i), (path,), tuple(masks[i])) for i, path in images.items())
    return Source(src, "zenodo", labels, tuple(cases), notes=_notes_on(left_out, src))


def _niftis(folder: Path, left_out: list[Path]) -> dict[str, Path]:
    """The NIfTI files of a folder by case; `left_out` gets what is none."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    left_out += [path for path in entries if not is_volume(path)]
    named = _by_case((volume_stem(path), (path,)) for path in entries if is_volume(path))
    return {case_id: files[0] for case_id, files in named.items()}


def _by_case(volumes: Iterable[tuple[str, tuple[Path, ...]]]) -> dict[str, tuple[Path, ...]]:
    """Files of each case; refuses two volumes of one name (x.nii beside x.nii.gz), of which one would be lost."""
    cases: dict[str, tuple[Path, ...]] = {}
    for name, files in volumes:
        case_id = unicodedata.normalize("NFC", name)  # a Mac writes ü as two characters
        if (other := cases.setdefault(case_id, files)) is not files:
            raise DistsegError(
                f"case: got {case_id} twice ({other[0]} and {files[0]}); ids are unique; rename one, or move it away"
            )
    return cases


# MedSeg / SIRM: single slices of many patients, stacked in one NIfTI file


def _medseg(src: Path, _: Mapping[str, int] | None) -> Source:
    import nibabel as nib

    image, mask = _stack(src, "tr_im"), _stack(src, "tr_mask")
    if image is None or mask is None:
        raise DistsegError(f"source: got {src} without tr_mask.nii.gz; the slices of tr_im need their masks")
    findings = {name: KNOWN[name] for name in ("ground_glass", "consolidation", "pleural_effusion")}
    masks = [MaskSource((mask,), dict(enumerate(findings.values(), start=1)), {})]
    labels = {"background": 0} | findings
    if lungs := _stack(src, "tr_lungmasks_updated"):
        masks.insert(0, MaskSource((lungs,), LUNG_VALUES, {}))
        labels = {"background": 0, "lung": 1} | findings
    try:
        n_slices = nib.load(image).shape[2]
    except Exception as error:
        raise DistsegError(f"volume {image}: not a readable stack of slices ({error}); download it again") from None
    ids = [f"medseg_{index:03d}" for index in range(n_slices)]
    cases = (CaseSource(name, name, (image,), tuple(masks), index) for index, name in enumerate(ids))
    notes = [
        "patients are not named in this set: each slice counts as one, so neighbours in a fold may be of one patient"
    ]
    if _stack(src, "val_im"):
        notes.append("val_im has no masks and is left out")
    return Source(src, "medseg", labels, tuple(cases), notes=tuple(notes))


def _stack(src: Path, stem: str) -> Path | None:
    return next((path for suffix in (".nii.gz", ".nii") if (path := src / f"{stem}{suffix}").is_file()), None)


# images/ and one folder a label, or labels/ with joint label maps: NIfTI, PNG slices or DICOM series


def _paired(src: Path, declared: Mapping[str, int] | None) -> Source:
    left_out: list[Path] = []
    images = _cases_in(src / PAIRED_IMAGES, left_out)
    if not images:
        raise DistsegError(
            f"source: got {src / PAIRED_IMAGES} without a volume; it must hold NIfTI files, PNG slices "
            "<case>_<number>.png, or a folder a case of PNG slices or of DICOM files"
            + "".join(f"; {note}" for note in _notes_on(left_out, src))
        )
    folders = sorted(
        f.name
        for f in src.iterdir()
        if f.is_dir() and f.name != PAIRED_IMAGES and f.name[0] != "." and not (f / STORE_JSON).is_file()
    )
    if not folders:
        raise DistsegError(
            f"source: got {src} without masks; it must hold a folder a label, such as lung/, or {PAIRED_JOINT}/"
        )
    found = {name: _cases_in(src / name, left_out) for name in folders}
    own, ignore = [name for name in folders if name != PAIRED_JOINT], None
    labels, origin = declared, "from --labels"
    if labels is None and PAIRED_JOINT in folders:
        maps = [path for files in found[PAIRED_JOINT].values() for path in files]
        labels, origin, ignore = _labels_of_maps(src, maps, own)
    elif labels is None:
        labels, origin = numbered(map(as_label, own)), "names of folders"
    for name in own:
        if as_label(name) not in labels:
            raise DistsegError(
                f"label folder: got {src / name}; labels are {dict(labels)}; rename it, or name it with --labels"
            )
    masks: dict[str, list[MaskSource]] = {case_id: [] for case_id in images}
    before: dict[int, str] = {}
    for name in sorted(folders, key=lambda name: labels.get(as_label(name), 0)):
        _check_pairs(
            src / name, {i: files[0] for i, files in images.items()}, {i: f[0] for i, f in found[name].items()}
        )
        label = as_label(name)
        apart = {} if declared is not None or label in KNOWN or name == PAIRED_JOINT else dict(before)
        for case_id, files in images.items():
            mask = _mask_source(
                PAIRED_JOINT if name == PAIRED_JOINT else label, labels, _in_order_of(files, found[name][case_id])
            )
            masks[case_id].append(replace(mask, apart_from=apart))
        if name != PAIRED_JOINT and label != "lung":  # all else lies in the lung
            before[labels[label]] = label
    held = labels if PAIRED_JOINT in folders else {n: v for n, v in labels.items() if n in map(as_label, own) or v == 0}
    told = {_patient(i, files) for i, files in images.items()}
    cases = tuple(CaseSource(i, _patient(i, files)[0], files, tuple(masks[i])) for i, files in images.items())
    notes = (in_words(held, origin), *_notes_on(left_out, src))
    how = " and ".join(sorted({how for _, how in told}))
    source = Source(src, "paired", held, cases, notes=notes, told_by=how)
    return source if ignore is None else _ignoring(source, ignore)


def _labels_of_maps(src: Path, files: Sequence[Path], folders: Sequence[str]) -> tuple[dict[str, int], str, int | None]:
    """Names and numbers of label maps (and of label folders beside them), where they came from, and the value to ignore.

    Raises:
        DistsegError: nothing names the values.
    """
    if (named := names_in_dataset(src)) is not None:
        return named[0], f"from {DATASET}", named[1]
    if names := names_of_segments(files):
        return numbered([*names, *map(as_label, folders)]), "names of segments", None
    raise refuse_unnamed(files, src)


def _notes_on(left_out: Sequence[Path], src: Path) -> tuple[str, ...]:
    return (note,) if (note := left_out_in_words(left_out, src)) else ()


def _cases_in(folder: Path, left_out: list[Path]) -> dict[str, tuple[Path, ...]]:
    """The files of each case of a folder: one file, the PNG slices in the order of their numbers, or a DICOM series.

    Args:
        folder: to look into.
        left_out: gets what is none of these.
    """
    volumes: list[tuple[str, tuple[Path, ...]]] = []
    slices: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and (files := _files_of_folder(path, left_out)):
            volumes.append((path.name, files))
        elif is_volume(path):
            volumes.append((volume_stem(path), (path,)))
        elif is_picture(path):
            slices.setdefault(case_of_picture(path), []).append(path)
        elif is_dicom(path):
            volumes.append((path.name.removesuffix(".dcm"), (path,)))
        else:
            left_out.append(path)
    volumes += [(case_id, tuple(sorted(files, key=number_of_picture))) for case_id, files in slices.items()]
    return _by_case(volumes)


def _files_of_folder(folder: Path, left_out: list[Path]) -> tuple[Path, ...]:
    """PNG slices in the order of their numbers, or a DICOM series; `left_out` gets what lies beside either."""
    pngs = tuple(sorted((path for path in folder.iterdir() if is_picture(path)), key=number_of_picture))
    files, beside = series_files(folder)
    if files or not pngs:
        left_out += beside if files else ()
        return files
    left_out += [path for path in beside if path not in pngs]
    return pngs


def _in_order_of(images: Sequence[Path], masks: Sequence[Path]) -> tuple[Path, ...]:
    """PNG masks in the order of the image files, by stem; a mask in one file is as it is."""
    if not is_picture(masks[0]):
        return tuple(masks)
    by_stem = {unicodedata.normalize("NFC", path.stem): path for path in masks}
    stems = {unicodedata.normalize("NFC", path.stem): path for path in images}
    if missing := [path for stem, path in stems.items() if stem not in by_stem]:
        raise DistsegError(
            f"mask: got none for slice {missing[0]} ({len(missing)} without); {masks[0].parent} must hold "
            f"{missing[0].stem}.png; add the mask or move the slice away"
        )
    if orphans := sorted(by_stem.keys() - stems.keys()):
        raise DistsegError(
            f"mask: got {by_stem[orphans[0]]} without a slice ({len(orphans)} so); every mask needs a slice of the same "
            "name; add the slice or move the mask away"
        )
    return tuple(by_stem[stem] for stem in stems)


def _mask_source(name: str, labels: Mapping[str, int], files: Iterable[Path]) -> MaskSource:
    """A mask of one label (0 and 1, or 0 and 255; left and right lung may be 1 and 2), or a map of all labels."""
    if name in labels:
        label = labels[name]
        return MaskSource(tuple(files), {1: label, 255: label} | ({2: label} if name == "lung" else {}), {"*": label})
    numbers = {number: number for number in labels.values() if number}
    return MaskSource(tuple(files), numbers, {n: v for n, v in labels.items() if v})


def _patient(case_id: str, files: Sequence[Path]) -> tuple[str, str]:
    """A case's patient, and what says so."""
    dicom = not is_volume(files[0]) and not is_picture(files[0])
    if dicom and (patient := read_patient_id(files[0])):
        return patient, "DICOM PatientID"
    if len(files) == 1 and is_picture(files[0]) and (match := re.fullmatch(r"(.+?)[-_. ]\d+", case_id)):
        return match[1], BY_FILE  # p1-0001: slices of one patient stay together
    return patient_of(case_id), BY_NAME


# A CSV that names everything


def _csv(src: Path, declared: Mapping[str, int] | None) -> Source:
    path = src / CSV_NAME if src.is_dir() else src
    columns, rows = _read_csv(path)
    labels, origin, ignore = declared or KNOWN, "from --labels" if declared else "names of columns", None
    if declared is None and "mask" in columns:
        maps = [
            file
            for row in rows
            if _is_marked(row["mask"])
            for file in _files_in(path.parent, row["mask"], str(path), [])
        ]
        labels, origin, ignore = _labels_of_maps(path.parent, maps, [name for name in columns if name in KNOWN])
    label_columns = [name for name in columns if name in labels]
    if unknown := [name for name in columns if name not in {"id", "image", "mask", "patient", "split", *labels}]:
        raise DistsegError(
            f"csv {path}: got column {unknown[0]!r}; columns are id, image, mask, patient, split and label names "
            f"({', '.join(labels)}); rename it, or name your labels with --labels"
        )
    if len(set(columns)) < len(columns):
        raise DistsegError(
            f"csv {path}: got columns {', '.join(columns)}; each may be there once; rename or remove one"
        )
    if not {"image", "patient"} <= set(columns) or not ({"mask"} & set(columns) or label_columns):
        raise DistsegError(f"csv {path}: got columns {', '.join(columns)}; image, patient and a mask are needed")
    cases: list[CaseSource] = []
    left_out: list[Path] = []
    split_of_patient: dict[str, str] = {}
    mask_columns = [name for name in ("mask", *sorted(label_columns, key=labels.__getitem__)) if name in columns]
    for number, row in enumerate(rows, start=2):
        where = f"csv {path} line {number}"
        files = _files_at(path.parent, row["image"], where, left_out)
        masks = [
            _mask_source(name, labels, _in_order_of(files, _files_in(path.parent, row[name], where, left_out)))
            if len(files) > 1
            else _mask_source(name, labels, _files_in(path.parent, row[name], where, left_out))
            for name in mask_columns
            if _is_marked(row[name])
        ]
        is_annotated = any(row[name] for name in mask_columns)
        case_id = row.get("id") or volume_stem(Path(row["image"]))
        case_id = unicodedata.normalize("NFC", case_id)
        patient = unicodedata.normalize("NFC", row["patient"]) or case_id
        cases.append(CaseSource(case_id, patient, files, tuple(masks), is_annotated=is_annotated))
        _note_split(split_of_patient, cases[-1].patient, row.get("split") or "", where)
    if "" in split_of_patient.values():
        if set(split_of_patient.values()) != {""}:
            raise DistsegError(f"csv {path}: got rows with a split and rows without; name it in all rows or in none")
        split_of_patient = {}
    held = labels if "mask" in columns else {n: v for n, v in labels.items() if n in label_columns or v == 0}
    notes = (in_words(held, origin), *_notes_on_cells(rows, mask_columns), *_notes_on(left_out, path.parent))
    source = Source(path.parent, "csv", held, tuple(cases), split_of_patient, notes, "the column patient")
    return source if ignore is None else _ignoring(source, ignore)


def _is_marked(cell: str) -> bool:
    return cell not in ("", NOTHING)


def _notes_on_cells(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    """What empty cells are taken for."""
    without = [row for row in rows if not any(row[name] for name in columns)]
    notes = [
        f"{name}: {n} of {len(rows)} cells are empty: taken as nothing there (write {NOTHING} to say so)"
        for name in columns
        if (n := sum(not row[name] for row in rows) - len(without)) > 0
    ]
    if without:
        notes.append(
            f"{len(without)} of {len(rows)} volumes have no mask at all: not annotated, they count in no loss and in no score"
        )
    return notes


def _files_in(base: Path, cell: str, where: str, left_out: list[Path]) -> tuple[Path, ...]:
    """The files of a cell, which may name several, parted by `;`; `left_out` gets what lies beside them in a folder."""
    return tuple(file for name in cell.split(";") for file in _files_at(base, name.strip(), where, left_out))


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DistsegError(f"csv {path}: not readable ({error}); save it as UTF-8 with commas") from None
    if not rows:
        raise DistsegError(f"csv {path}: got no row; the first line names the columns, each other line is a volume")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DistsegError(
                f"csv {path} line {number}: got another number of values than there are columns; mend it"
            )
    return list(reader.fieldnames or []), [{name: value.strip() for name, value in row.items()} for row in rows]


def _files_at(base: Path, name: str, where: str, left_out: list[Path]) -> tuple[Path, ...]:
    path = base / name
    files = _files_of_folder(path, left_out) if path.is_dir() else (path,) if path.is_file() else ()
    if not name or not files:
        raise DistsegError(
            f"{where}: got {name!r}; it must be a file, or a folder of DICOM or PNG files; mend the path"
        )
    return files


def _note_split(split_of_patient: dict[str, str], patient: str, split: str, where: str) -> None:
    if split not in ("", *SPLITS):
        raise DistsegError(f"{where}: got split {split!r}; it must be one of {', '.join(SPLITS)}; mend it")
    if (other := split_of_patient.setdefault(patient, split)) != split:
        raise DistsegError(
            f"{where}: got patient {patient} in {split or 'no split'}, above in {other or 'no split'}; a patient belongs to "
            "one; mend it"
        )


def _check_pairs(folder: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> None:
    if missing := sorted(images.keys() - masks.keys()):
        raise DistsegError(
            f"mask: got none for volume {images[missing[0]]} ({len(missing)} without); every volume needs "
            f"{folder}/{missing[0]}...; add the mask or move the volume away"
        )
    if orphans := sorted(masks.keys() - images.keys()):
        raise DistsegError(
            f"mask: got {masks[orphans[0]]} without a volume ({len(orphans)} so); every mask needs a volume of the "
            "same name; add the volume or move the mask away"
        )


def _check_ids(source: Source) -> None:
    seen: dict[str, CaseSource] = {}
    for case in source.cases:
        length = len(os.fsencode(case.id))
        if not re.fullmatch(r"[^/\0]+", case.id) or case.id.startswith(".") or length > LONGEST_ID:
            raise DistsegError(
                f"case: got id {case.id!r} ({case.files[0]}), {length} bytes long; it must do as a folder's name, at most {LONGEST_ID} "
                "bytes; rename it"
            )
        if case.id in seen:
            raise DistsegError(
                f"case: got {case.id} twice ({seen[case.id].files[0]} and {case.files[0]}); ids are unique; rename one"
            )
        seen[case.id] = case


# Name -> whether a source has it, and how it is read.
LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Mapping[str, int] | None], Source]]] = {
    "zenodo": (lambda src: (src / ZENODO_IMAGES).is_dir(), _zenodo),
    "medseg": (lambda src: _stack(src, "tr_im") is not None, _medseg),
    "paired": (lambda src: (src / PAIRED_IMAGES).is_dir(), _paired),
    "csv": (lambda src: src.suffix == ".csv" and src.is_file() or (src / CSV_NAME).is_file(), _csv),
}
LAYOUT_RULES = {
    "zenodo": f"{ZENODO_IMAGES}/ with {' and '.join(ZENODO_SEPARATE)}, or {', '.join(ZENODO_JOINT)}",
    "medseg": "tr_im.nii.gz with tr_mask.nii.gz",
    "paired": f"{PAIRED_IMAGES}/ with a folder a label, or {PAIRED_JOINT}/",
    "csv": f"{CSV_NAME} (or a .csv file) with columns image, patient, mask",
}


def relative_name(files: Sequence[Path], root: Path) -> str:
    """How store.json names the files of a volume or a mask: the file, or the folder and the first of its files."""
    name = os.path.relpath(files[0], root)
    return name if len(files) == 1 else f"{name} and {len(files) - 1} more"
