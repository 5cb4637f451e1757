"""Source volumes into a store: read, checked, restored to HU, cut into slices, one process a volume."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pydantic
from tqdm import tqdm

from distseg.data.layouts import LABELS, CaseSource, MaskSource, find_cases
from distseg.data.nifti import read_nifti as read_volume
from distseg.data.splits import assign_folds, check_fold_count
from distseg.data.store import STORE_VERSION, Case, Store, open_store, slice_files, write_store_json
from distseg.data.volume import Volume, hounsfield
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, is_free, replace_folder, sha256_of, write_json

AFFINE_TOLERANCE_MM = 1e-3


def prepare_store(
    src: Path, root: Path, *, n_folds: int, n_test: int, seed: int, workers: int, intensity: str = "auto"
) -> Store:
    """Writes the store of a source folder; cases that are there already and unchanged are not read again.

    A store under its final name is always whole: a new one is built beside it under a hidden name (where an interrupted
    run left its finished cases), an existing one changes case by case and its store.json last.

    Args:
        src: source folder in a layout that `find_cases` knows.
        root: folder of the store.
        n_folds, n_test, seed: see `assign_folds`.
        workers: processes.
        intensity: see `hounsfield`.

    Raises:
        DistsegError: bad input (the line names the file), or `root` holds something else.
    """
    sources = find_cases(src)
    check_fold_count(len({source.patient for source in sources}), n_folds, n_test)
    if not (root / "store.json").is_file() and not is_free(root):
        raise DistsegError(f"store: got {root}, which holds something else; give a new folder or a store")
    with _locked(root):
        in_place = (root / "store.json").is_file()
        building = root if in_place else root.with_name(f".preparing-{root.name}")
        cases = _prepare_cases(sources, src, building, workers, intensity)
        folds = assign_folds(_burden_of_patient(cases), n_folds, n_test, seed)
        write_store_json(building, LABELS, cases, folds)
        if not in_place:
            replace_folder(building, root)
    return open_store(root)


def _prepare_cases(sources: Sequence[CaseSource], src: Path, root: Path, workers: int, intensity: str) -> list[Case]:
    prepare = functools.partial(prepare_case, src=src, root=root, intensity=intensity)
    cases: dict[str, Case] = {}
    with ProcessPoolExecutor(min(workers, len(sources))) as pool:
        futures = [pool.submit(prepare, source) for source in sources]
        try:
            for future in tqdm(as_completed(futures), "prepare", total=len(futures), unit="volume"):
                case = future.result()
                cases[case.id] = case
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [cases[source.id] for source in sources]


def prepare_case(source: CaseSource, src: Path, root: Path, intensity: str) -> Case:
    """Writes the slices of one case unless they are there already, from the same files; returns what they are."""
    digests = {str(path.relative_to(src)): sha256_of(path) for path in (source.image, *(m.path for m in source.masks))}
    folder = root / "slices" / source.id
    if (done := _read_done(folder)) and done.sha256 == digests:
        return done
    volume = read_volume(source.image)
    hu_ZYX, origin = hounsfield(volume, intensity)
    label_ZYX = read_labels(source.masks, volume)
    case = Case(
        id=source.id,
        patient=source.patient,
        source=str(source.image.relative_to(src)),
        sha256=digests,
        shape=hu_ZYX.shape,
        spacing_mm=volume.spacing_mm,
        intensity=origin,
        label_voxels={name: int(np.count_nonzero(label_ZYX == label)) for name, label in LABELS.items()},
    )
    with folder_written_aside(folder) as aside:
        for z in range(len(hu_ZYX)):
            files = slice_files(root, case.id, z, case.shape)
            np.save(aside / files.image.name, np.ascontiguousarray(hu_ZYX[z]))
            np.save(aside / files.label.name, np.ascontiguousarray(label_ZYX[z]))
        write_json(aside / "case.json", {"version": STORE_VERSION} | dataclasses.asdict(case))
    return case


def read_labels(masks: Sequence[MaskSource], volume: Volume) -> np.ndarray:
    """One uint8 label map [Z, Y, X] from mask files in order, later ones over earlier ones.

    Raises:
        DistsegError: a mask's shape or affine is not the volume's, or it holds a value that is not declared.
    """
    label_ZYX = np.zeros(volume.values_ZYX.shape, np.uint8)
    for source in masks:
        mask = read_volume(source.path)
        if mask.values_ZYX.shape != label_ZYX.shape:
            raise DistsegError(
                f"mask {source.path}: got shape {mask.values_ZYX.shape[::-1]}; it must be that of {volume.path}, "
                f"{label_ZYX.shape[::-1]}; redraw or resample the mask"
            )
        if not np.allclose(mask.affine, volume.affine, atol=AFFINE_TOLERANCE_MM):
            raise DistsegError(
                f"mask {source.path}: got another affine than {volume.path}; image and mask must lie on one grid; "
                "resample the mask or mend its header"
            )
        declared = {0, *source.label_of_value}
        if unknown := sorted(set(np.unique(mask.values_ZYX).tolist()) - declared):
            raise DistsegError(
                f"mask {source.path}: got value {unknown[0]:g}; declared are {sorted(declared)}; remove or remap the value"
            )
        for value, label in source.label_of_value.items():
            label_ZYX[mask.values_ZYX == value] = label
    return label_ZYX


def _burden_of_patient(cases: Sequence[Case]) -> dict[str, float]:
    """Infected share of the lung, the mean over a patient's volumes."""
    shares: dict[str, list[float]] = {}
    for case in cases:
        lung, infection = case.label_voxels["lung"], case.label_voxels["infection"]
        shares.setdefault(case.patient, []).append(infection / max(1, lung + infection))
    return {patient: float(np.mean(values)) for patient, values in shares.items()}


def _read_done(folder: Path) -> Case | None:
    try:
        values = json.loads((folder / "case.json").read_text())
        if values.pop("version") != STORE_VERSION:
            return None
        return pydantic.TypeAdapter(Case).validate_python(values)
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lets one `prepare` at a time write a store; the lock goes with the process that held it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = root.with_name(f".lock-{root.name}")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError("its holder removed it between our open and our lock")
        except BlockingIOError:
            raise DistsegError(
                f"store: got {root}, which another `distseg prepare` is writing; wait for it to end"
            ) from None
        try:
            yield
        finally:
            # Removed while still held: whoever opens the name next makes a new file.
            os.unlink(lock)
