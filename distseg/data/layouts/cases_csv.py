"""A CSV that names everything: a row a volume."""

import csv
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from distseg.data.file_kinds import left_out_in_words
from distseg.data.label_names import KNOWN, Names, names_of_maps
from distseg.data.layouts.source import (
    SPLITS,
    CaseSource,
    MaskSource,
    Source,
    files_of_folder,
    ignoring,
    in_order_of,
    label_map,
    mask_of_label,
)
from distseg.data.layouts.tree import Tree, parted
from distseg.errors import DistsegError

CSV_NAME = "cases.csv"
NOTHING = "none"  # in a cell: looked for, and nothing is there
COLUMNS = ("id", "image", "mask", "patient", "split", "fold")  # besides those that labels name
RULE = f"{CSV_NAME} (or a .csv file) with columns image, patient, mask"


def fits(tree: Tree) -> bool:
    return tree.root.suffix == ".csv" and tree.root.is_file() or (tree.root / CSV_NAME).is_file()


def read(tree: Tree, declared: Mapping[str, int] | None) -> Source:
    """The rows of a CSV file, or of the one in a folder.

    Raises:
        DistsegError: columns or cells that do not fit; the line names them.
    """
    path = tree.root / CSV_NAME if tree.root.is_dir() else tree.root
    columns, rows = _read_rows(path)
    names = _names(path, columns, rows, declared)
    label_columns = [name for name in columns if name in names.labels]
    _check_columns(path, columns, names, label_columns)
    mask_columns = [name for name in ("mask", *sorted(label_columns, key=names.labels.__getitem__)) if name in columns]
    cases: list[CaseSource] = []
    left_out: list[Path] = []
    split_of_patient: dict[str, str] = {}
    fold_of_patient: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        where = f"csv {path} line {number}"
        files = _files_at(path.parent, row["image"], where, left_out)
        masks = [
            _mask(name, names.labels, files, _files_in(path.parent, row[name], where, left_out))
            for name in mask_columns
            if _is_marked(row[name])
        ]
        is_annotated = any(row[name] for name in mask_columns)
        case_id = unicodedata.normalize("NFC", row.get("id") or parted(Path(row["image"]).name)[0])
        patient = unicodedata.normalize("NFC", row["patient"]) or case_id
        cases.append(CaseSource(case_id, patient, files, tuple(masks), is_annotated=is_annotated))
        _note(split_of_patient, patient, _split(row, where), "split", where)
        _note(fold_of_patient, patient, _fold(row, where), "fold", where)
    held = (
        names.labels if "mask" in columns else {n: v for n, v in names.labels.items() if n in label_columns or v == 0}
    )
    splits = (
        _in_all_or_none(path, split_of_patient, "split")
        if "fold" not in columns
        else _of_folds(path, split_of_patient, fold_of_patient)
    )
    source = Source(
        path.parent, "csv", held, tuple(cases), splits,
        {patient: int(fold) for patient, fold in fold_of_patient.items() if fold},
        splits_from=f"the column {'fold' if 'fold' in columns else 'split'}",
        notes=tuple(_notes_on_cells(rows, mask_columns)), told_by="the column patient", names_from=names.come_from,
        left_out=tuple(filter(None, [left_out_in_words(left_out, path.parent)])), regions=names.regions,
    )  # fmt: skip
    return source if names.ignore is None else ignoring(source, names.ignore)


def _names(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]], declared: Mapping[str, int] | None
) -> Names:
    if declared is not None:
        return Names(declared, "from --labels")
    if "mask" not in columns:
        return Names(KNOWN, "names of columns")
    cells = [row["mask"] for row in rows if _is_marked(row["mask"])]
    maps = [file for cell in cells for file in _files_in(path.parent, cell, str(path), [])]
    return names_of_maps(path.parent, maps, [name for name in columns if name in KNOWN])


def _check_columns(path: Path, columns: Sequence[str], names: Names, label_columns: Sequence[str]) -> None:
    if unknown := [name for name in columns if name not in {*COLUMNS, *names.labels}]:
        raise DistsegError(
            f"csv {path}: got column {unknown[0]!r}; columns are {', '.join(COLUMNS)} and label names "
            f"({', '.join(names.labels)}); rename it, or name your labels with --labels"
        )
    if len(set(columns)) < len(columns):
        raise DistsegError(
            f"csv {path}: got columns {', '.join(columns)}; each may be there once; rename or remove one"
        )
    if not {"image", "patient"} <= set(columns) or not ({"mask"} & set(columns) or label_columns):
        raise DistsegError(f"csv {path}: got columns {', '.join(columns)}; image, patient and a mask are needed")


def _mask(name: str, labels: Mapping[str, int], images: Sequence[Path], files: Sequence[Path]) -> MaskSource:
    files = in_order_of(images, files) if len(images) > 1 else files
    return label_map(labels, files) if name == "mask" else mask_of_label(name, labels, files)


def _split(row: Mapping[str, str], where: str) -> str:
    split = row.get("split") or ""
    if split not in ("", *SPLITS):
        raise DistsegError(f"{where}: got split {split!r}; it must be one of {', '.join(SPLITS)}; mend it")
    return split


def _fold(row: Mapping[str, str], where: str) -> str:
    fold = row.get("fold") or ""
    if fold and not fold.isdecimal():
        raise DistsegError(
            f"{where}: got fold {fold!r}; it must be the number of the fold that it validates in; mend it"
        )
    return fold


def _note(value_of_patient: dict[str, str], patient: str, value: str, what: str, where: str) -> None:
    if (other := value_of_patient.setdefault(patient, value)) != value:
        raise DistsegError(
            f"{where}: got patient {patient} in {f'fold {value}' if what == 'fold' and value else value or f'no {what}'}, above in "
            f"{other or f'no {what}'}; a patient belongs to one; mend it"
        )


def _in_all_or_none(path: Path, value_of_patient: Mapping[str, str], what: str) -> dict[str, str]:
    if "" not in value_of_patient.values():
        return dict(value_of_patient)
    if any(value_of_patient.values()):
        raise DistsegError(f"csv {path}: got rows with a {what} and rows without; name it in all rows or in none")
    return {}


def _of_folds(path: Path, split_of_patient: Mapping[str, str], fold_of_patient: Mapping[str, str]) -> dict[str, str]:
    """Who is in test and who trains, where folds are named: a patient in test has none."""
    for patient, fold in fold_of_patient.items():
        if bool(fold) == (split_of_patient[patient] == "test") or split_of_patient[patient] == "val":
            raise DistsegError(
                f"csv {path}: got patient {patient} with fold {fold or 'none'} and split {split_of_patient[patient] or 'none'}; each "
                "has a fold, or is of split test; mend it"
            )
    numbers = sorted({int(fold) for fold in fold_of_patient.values() if fold})
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise DistsegError(
            f"csv {path}: got folds {', '.join(map(str, numbers))}; they count from 0, two at least; number them anew"
        )
    return {patient: split_of_patient[patient] or "train" for patient in fold_of_patient}


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


def _files_at(base: Path, name: str, where: str, left_out: list[Path]) -> tuple[Path, ...]:
    path = base / name
    files = files_of_folder(path, left_out) if path.is_dir() else (path,) if path.is_file() else ()
    if not name or not files:
        raise DistsegError(
            f"{where}: got {name!r}; it must be a file, or a folder of DICOM files or pictures; mend the path"
        )
    return files


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
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
