"""Source volumes into a store: read, checked, restored to HU, cut into slices, one worker a volume."""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pydantic

from distseg.bars import counted
from distseg.cluster import cluster_executor
from distseg.config import IGNORED_LABEL
from distseg.data.file_kinds import is_picture, with_data_file
from distseg.data.layouts.finding import Asked, find_source, notes_on_source, source_in_words
from distseg.data.layouts.source import BY_FILE, BY_NAME, CaseSource, Source, relative_name
from distseg.data.masks import Readers, read_image, read_labels
from distseg.data.splits import Folds, assign_folds, check_fold_count, given_folds, ma2021_folds
from distseg.data.store import (
    CASE_JSON,
    FOREGROUND,
    STORE_VERSION,
    Case,
    Store,
    open_store,
    problems_of_case,
    write_store_json,
)
from distseg.data.volume import hounsfield
from distseg.errors import DistsegError
from distseg.files import beside, folder_written_aside, is_free, locked, replace_folder, sha256_of, write_json

PR_SET_PDEATHSIG = 1  # of prctl(2)
IMAGE_ENDING = ".image.npy"
POSITIONS_PER_SLICE = 8  # of each label: enough for crops that differ, little to keep


@dataclass(frozen=True)
class FoldRule:
    """How patients become folds; see `splits`. A source that names its splits overrides it."""

    n_folds: int = 5
    n_test: int = 0
    seed: int = 0
    method: str = "stratified"
    """or "ma2021" (the benchmark's own)"""
    holdout: float | None = None
    """one fold with this share of the patients, whatever n_folds says"""


@dataclass(frozen=True)
class Reading:
    """What every worker needs to know to read a case."""

    src: Path
    root: Path
    """of the store being built"""
    labels: Mapping[str, int]
    intensity: str
    hu_offset: int | None
    pixel_mm: tuple[float, float] | None
    readers: Readers


def prepare_store(
    src: Path,
    root: Path,
    rule: FoldRule = FoldRule(),
    *,
    asked: Asked = Asked(),  # noqa: B008 (frozen)
    readers: Readers = "union",
    intensity: str = "auto",
    hu_offset: int | None = None,
    pixel_mm: tuple[float, float] | None = None,
    workers: int = 1,
    cluster: str | None = None,
) -> tuple[Store, tuple[str, ...]]:
    """Writes the store of a source folder; cases that are there already and unchanged are not read again.

    A store under its final name is always whole: a new one is built beside it under a hidden name (where an interrupted
    run left its finished cases); an existing one gains folders for new and changed cases, then another store.json, and
    loses what that one does not name.

    Args:
        src, asked: see `find_source`.
        readers: see `read_labels`.
        root: folder of the store.
        rule: of the folds.
        intensity, hu_offset: see `hounsfield`.
        pixel_mm: of volumes that do not say it: down and across.
        workers: processes on this machine.
        cluster: address of a dask scheduler whose workers see `src` and `root` under the same paths; None: this machine.

    Returns:
        The store, and notes that a user should read.

    Raises:
        DistsegError: bad input (the line names the file), or `root` holds something else.
    """
    source = find_source(src.resolve(), asked)
    _check_folds(source, rule)
    if not (root / "store.json").is_file() and not is_free(root):
        raise DistsegError(f"store: got {root}, which holds something else; give a new folder or a store")
    root = root.resolve()
    with locked(beside(root, ".lock"), f"store: got {root}"):
        in_place = (root / "store.json").is_file()
        building = root if in_place else beside(root, ".preparing")
        with _executor(cluster, min(workers, len(source.cases))) as executor:
            cases, notes = _prepare_cases(
                source, Reading(source.root, building, source.labels, intensity, hu_offset, pixel_mm, readers), executor
            )
        notes += _notes_on_images(source, building, cases)
        folds = _folds(source, cases, rule)
        write_store_json(Store(building, source.layout, source.labels, tuple(cases), folds, source.regions))
        _remove_unnamed(building, cases)
        if not in_place:
            replace_folder(building, root)
    notes += [*_notes_on_masks(source, readers), *_notes_on_labels(cases), *_notes_on_folds(source, rule)]
    taken = source_in_words(source, _each_patient_has(cases))
    return open_store(root), (taken, *notes_on_source(source), *notes)


def _notes_on_images(source: Source, root: Path, cases: Sequence[Case]) -> list[str]:
    """One image under two patients would train and validate at once: refused of patients that somebody named, else noted."""
    seen: dict[str, Case] = {}
    twice: list[str] = []
    notes: list[str] = []
    for case in cases:
        other = seen.setdefault(_digest_of_image(root, case), case)
        if other.patient != case.patient:
            twice.append(f"{other.patient!r} ({other.source}) and {case.patient!r} ({case.source})")
        elif other is not case:
            notes.append(f"patient {case.patient}: {other.source} and {case.source} are one image, which counts twice")
    if not twice:
        return notes
    what = f"one image under two, {twice[0]}, equal voxel by voxel ({len(twice)} so)"
    if source.told_by not in (BY_NAME, BY_FILE):
        raise DistsegError(f"patients: got {what}; folds would part them; remove one")
    return [
        *notes,
        f"patients: {what}; folds may part them; remove one, or tell patients apart with --patients 'REGEX'",
    ]


def _digest_of_image(root: Path, case: Case) -> str:
    """Of a case's HU, whatever kind of file they came from."""
    files = json.loads((root / case.folder / CASE_JSON).read_text())["files"]
    return hashlib.sha256("".join(d for name, d in files.items() if name.endswith(IMAGE_ENDING)).encode()).hexdigest()


def _notes_on_masks(source: Source, readers: Readers) -> Iterator[str]:
    several = sum(any(len(mask.files) > 1 and not is_picture(mask.files[0]) for mask in c.masks) for c in source.cases)
    if several:
        yield f"{several} volumes have a mask of several files: taken is their {readers} (--readers union, majority or first)"


def _notes_on_labels(cases: Sequence[Case]) -> Iterator[str]:
    held = {name: sum(case.label_voxels[name] > 0 for case in cases) for name in cases[0].label_voxels}
    told = ", ".join(f"{name} {n}" for name, n in held.items() if name != "background")
    yield f"volumes that hold a label, of {len(cases)}: {told}; in the others nothing is there"


def _each_patient_has(cases: Sequence[Case]) -> str:
    slices = Counter[str]()
    for case in cases:
        slices[case.patient] += case.shape[0]
    n_cases = Counter(case.patient for case in cases).values()
    return f"{_range(n_cases, 'volume')} and {_range(slices.values(), 'slice')}"


def _range(counts: Collection[int], what: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} {what}{'' if high == 1 else 's'}"


def _notes_on_folds(source: Source, rule: FoldRule) -> Iterator[str]:
    if rule.method == "ma2021":
        yield "the folds ma2021 part two patients: compare with published figures only"
        return
    named = source.split_of_patient.values()
    if named and rule.n_test:
        yield "the source names its splits: --test-patients counts for nothing"
    if ("val" in named or source.fold_of_patient) and (rule.n_folds, rule.holdout) != (FoldRule.n_folds, None):
        yield "the source names its validation patients: --folds and --holdout count for nothing"


@contextlib.contextmanager
def _executor(cluster: str | None, workers: int) -> Iterator[Executor]:
    if cluster is None:
        # Forked, so that they are this process's own children and end with it.
        with ProcessPoolExecutor(workers, get_context("fork"), _end_with, (os.getpid(),)) as pool:
            yield pool
        return
    with cluster_executor(cluster, "--cluster", "volume") as executor:
        yield executor


def _end_with(parent: int) -> None:
    """Has Linux end this worker with its parent, however that ends: it would wait for work for ever, and hold the store's lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the line above
        os._exit(1)


def _prepare_cases(source: Source, reading: Reading, executor: Executor) -> tuple[list[Case], list[str]]:
    futures = [executor.submit(prepare_case, case, reading) for case in source.cases]
    cases: dict[str, Case] = {}
    notes: dict[str, tuple[str, ...]] = {}
    try:
        for future in counted(as_completed(futures), "prepare", len(futures), "volume"):
            case, said = future.result()
            cases[case.id], notes[case.id] = case, said
    except BrokenProcessPool:
        raise DistsegError(
            "prepare: a worker process was killed (out of memory?); finished volumes are kept; run it again with fewer "
            "--workers"
        ) from None
    finally:
        for future in futures:
            future.cancel()
    return [cases[case.id] for case in source.cases], [note for case in source.cases for note in notes[case.id]]


def prepare_case(source: CaseSource, reading: Reading) -> tuple[Case, tuple[str, ...]]:
    """Writes the slices of one case unless they are there already, made from the same files; what they are, and notes on them."""
    digests = {relative_name(files, reading.src): _sha256_of_files(files) for files in _files_of(source)}
    made_from = [STORE_VERSION, digests, source.slice_index, source.patient, dict(reading.labels), reading.intensity]
    made_from += [] if reading.hu_offset is None else [f"hu_offset {reading.hu_offset}"]
    made_from += [["pixels", *reading.pixel_mm]] if reading.pixel_mm else []
    made_from += [reading.readers] if any(len(mask.files) > 1 for mask in source.masks) else []
    made_from += [] if source.is_annotated else ["not annotated"]
    made_from += [[dict(mask.label_of_value), dict(mask.label_of_segment)] for mask in source.masks]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = Path("slices") / digest[:2] / f"{source.id}-{digest[:12]}"
    if (done := _read_done(reading.root / folder)) and not problems_of_case(reading.root, done):
        return done, ()
    volume = read_image(source)
    hu_ZYX, origin = hounsfield(volume, reading.intensity, reading.hu_offset)
    label_ZYX = read_labels(source, volume, reading.readers)
    case = Case(
        id=source.id,
        patient=source.patient,
        source=relative_name(source.files, reading.src),
        sha256=digests,
        folder=str(folder),
        shape=hu_ZYX.shape,
        spacing_mm=volume.spacing_mm,
        pixel_mm=None if volume.spacing_mm else reading.pixel_mm,
        intensity=origin,
        hu_range=(int(hu_ZYX.min()), int(hu_ZYX.max())),
        label_voxels={name: int(np.count_nonzero(label_ZYX == label)) for name, label in reading.labels.items()},
        slices_with={name: _runs((label_ZYX == label).any(axis=(1, 2))) for name, label in reading.labels.items()},
    )
    try:
        _write_case(reading.root / folder, case, hu_ZYX, label_ZYX)
    except OSError as error:
        raise DistsegError(
            f"store: cannot write {reading.root / folder} ({error}); free some space; finished volumes are kept, run it again"
        ) from None
    return case, volume.notes


def _write_case(folder: Path, case: Case, hu_ZYX: np.ndarray, label_ZYX: np.ndarray) -> None:
    with folder_written_aside(folder) as aside:
        for z, (hu_YX, label_YX) in enumerate(zip(hu_ZYX, label_ZYX, strict=True)):
            # C order: DALI cannot read Fortran order on every device.
            np.save(aside / f"{z:04d}{IMAGE_ENDING}", np.ascontiguousarray(hu_YX))
            np.save(aside / f"{z:04d}.label.npy", np.ascontiguousarray(label_YX))
        np.save(aside / FOREGROUND, foreground_positions(label_ZYX))
        files = {path.name: sha256_of(path) for path in sorted(aside.glob("*.npy"))}
        write_json(aside / CASE_JSON, {"case": dataclasses.asdict(case), "files": files})


def foreground_positions(label_ZYX: np.ndarray) -> np.ndarray:
    """A few pixels of each label in each slice, drawn at random but always the same: where crops may be centred.

    Returns:
        uint16 (n, 4): z, label, y, x; sorted by slice.
    """
    rng = np.random.default_rng(0)
    rows = [np.empty((0, 4), np.uint16)]
    for z, label_YX in enumerate(label_ZYX):
        for label in np.setdiff1d(label_YX, (0, IGNORED_LABEL)):
            pixels = np.argwhere(label_YX == label)
            drawn = pixels[rng.choice(len(pixels), min(POSITIONS_PER_SLICE, len(pixels)), replace=False)]
            rows.append(np.column_stack([np.full((len(drawn), 2), (z, label)), drawn]).astype(np.uint16))
    return np.concatenate(rows)


def _runs(held: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs [first, end) of True."""
    edges = np.flatnonzero(np.diff(held.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _files_of(source: CaseSource) -> list[Sequence[Path]]:
    return [source.files, *(mask.files for mask in source.masks)]


def _sha256_of_files(files: Sequence[Path]) -> str:
    """Of one file its own digest, of several the digest of their names and digests; voxels that lie beside a header count."""
    files = [part for path in files for part in with_data_file(path)]
    try:
        if len(files) == 1:
            return sha256_of(files[0])
        lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
    except OSError as error:
        raise DistsegError(
            f"source {error.filename}: not readable ({error.strerror}); mend it, or move it away"
        ) from None
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def _check_folds(source: Source, rule: FoldRule) -> None:
    """Finds out before any volume is read that the folds cannot be made."""
    if rule.method == "ma2021":
        ma2021_folds({case.id: case.patient for case in source.cases})
        return
    named = list(source.split_of_patient.values())
    if source.fold_of_patient:
        return
    if not named:
        check_fold_count(len({case.patient for case in source.cases}), rule.n_folds, rule.n_test)
    elif "train" not in named:
        raise DistsegError(f"source: got {source.root} without a patient in split train; someone has to train; mend it")
    elif "val" not in named:
        check_fold_count(named.count("train"), rule.n_folds, 0)


def _folds(source: Source, cases: Sequence[Case], rule: FoldRule) -> Folds:
    burden = _burden_of_patient(cases)
    if rule.method == "ma2021":
        return ma2021_folds({case.id: case.patient for case in source.cases})
    if source.split_of_patient or source.fold_of_patient:
        return given_folds(
            source.split_of_patient, burden, rule.n_folds, rule.seed, rule.holdout, source.fold_of_patient
        )
    return assign_folds(burden, rule.n_folds, rule.n_test, rule.seed, rule.holdout)


def _burden_of_patient(cases: Sequence[Case]) -> dict[str, float]:
    """Share of the lung (of the volume where no lung is marked) that has a finding, the mean over a patient's volumes."""
    shares: dict[str, list[float]] = {}
    for case in cases:
        found = sum(n for name, n in case.label_voxels.items() if name not in ("background", "lung"))
        lung = case.label_voxels.get("lung", 0)
        whole = lung + found if lung else sum(case.label_voxels.values())
        shares.setdefault(case.patient, []).append(found / max(1, whole))
    return {patient: float(np.mean(values)) for patient, values in shares.items()}


def _read_done(folder: Path) -> Case | None:
    """The case of a folder that is there: folders get their name when they are whole, and it tells what they hold."""
    try:
        return pydantic.TypeAdapter(Case).validate_python(json.loads((folder / CASE_JSON).read_text())["case"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_unnamed(root: Path, cases: Sequence[Case]) -> None:
    """Removes folders of earlier versions of a case, and what interrupted workers left."""
    named = {root / case.folder for case in cases}
    for folder in (root / "slices").glob("*/*"):
        if folder not in named:
            shutil.rmtree(folder)
