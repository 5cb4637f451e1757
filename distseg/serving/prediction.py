"""Volumes in, masks out: each volume read ahead, segmented, written, measured, and noted as done."""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distseg.bars import Bar, say
from distseg.data.file_kinds import PICTURES
from distseg.data.volume import Volume, hounsfield
from distseg.data.volume_files import read_volume, write_volume
from distseg.errors import DistsegError
from distseg.files import locked
from distseg.geometry import MM_BEYOND, field_mm
from distseg.regions import regions_by_width
from distseg.serving.description import ModelDescription
from distseg.serving.finished import TABLE, Finished, name_in
from distseg.serving.model import Model
from distseg.serving.work import MaskTask, Work
from distseg.tables import write_csv

LUNG = "lung"  # the region that affected shares are of
MOST_LABELS = 12  # values of what is a label map, not grey

Read = tuple[Volume, str]
"""a volume in HU, and where its intensities came from"""


@dataclass(frozen=True)
class Options:
    """What is written of each volume."""

    intensity: str = "auto"
    """of the volumes: auto, hu or grey"""
    format: str = "nifti"
    """of the masks, as `find_work` was told: their names say it"""
    probabilities: str | None = None
    """of each region: float32, or uint8 in steps of 1/255; None: not written"""
    overlay: bool = False
    """a picture of the most affected slices"""
    hu_offset: int | None = None
    """of the volumes; see `hounsfield`"""
    pixel_mm: tuple[float, float] | None = None
    """of volumes that do not say it: down and across"""


@dataclass(frozen=True)
class Predictor:
    """A model, and what it is to write."""

    model: Model
    options: Options
    batch_size: int

    def predict(self, work: Work) -> None:
        """Writes the masks of all volumes; in a folder, those that are done already are passed over.

        Raises:
            DistsegError: a volume failed (the others of its folder are done), or the output cannot be written, is full or
                in use.
        """
        with _output(work):
            if work.folder is None:
                for task, read in _read_ahead(work.tasks, self.options):
                    self._predict_volume(task, read, "1/1", task.mask.parent)
            else:
                with locked(work.folder / ".predict.lock", f"output: got {work.folder}"):
                    self._predict_folder(work.folder, work.tasks)

    def _predict_folder(self, folder: Path, tasks: Sequence[MaskTask]) -> None:
        identity = json.dumps([self.model.identity, asdict(self.options)])
        finished = Finished(folder, tasks, self._outputs(folder, tasks), hashlib.sha256(identity.encode()).hexdigest())
        table = folder / TABLE
        table.unlink(missing_ok=True)  # until it is of these masks
        missing = [task for task in tasks if task not in finished]
        if len(missing) < len(tasks):
            print(f"{folder}: {len(tasks) - len(missing)} of {len(tasks)} volumes are done already")
        failed = []
        for number, (task, read) in enumerate(_read_ahead(missing, self.options), start=1):
            count = f"{number}/{len(missing)}"
            finished.begin(task)
            try:
                files, row = self._predict_volume(task, read, count, folder)
                finished.add(task, files, row)
            except DistsegError as error:
                finished.withdraw(task)
                failed.append(task.name)
                say(f"{count} {task.name}: failed: {error}", sys.stderr)
        write_csv(table, finished.rows(tasks))
        if failed:
            raise DistsegError(
                f"predict: {len(tasks) - len(failed)} of {len(tasks)} volumes are done, {', '.join(failed)} failed; mend "
                "what failed and run the same command again"
            )

    def _outputs(self, folder: Path, tasks: Sequence[MaskTask]) -> list[list[str]]:
        """Names of each volume's files; refuses two of one name."""
        names = [
            [name_in(folder, path) for path in (*_beside(task, self.model, self.options), *task.masks)]
            for task in tasks
        ]
        task_of: dict[str, MaskTask] = {}
        for task, name in ((task, name) for task, own in zip(tasks, names, strict=True) for name in own):
            if (other := task_of.setdefault(name, task)) is not task:
                raise DistsegError(f"input: got {other.source} and {task.source}; both would write {name}; rename one")
        return names

    def _predict_volume(
        self, task: MaskTask, read: Future[Read], count: str, out: Path
    ) -> tuple[list[Path], dict[str, Any]]:
        """From voxels to files and a line about them; gives the files and the row of volumes.csv."""
        volume, origin = read.result()
        if task.mask.suffix == ".dcm":
            from distseg.data.dicom_seg import check_series  # slow to import, and few need it

            check_series(task.files)
        start = time.perf_counter()
        # Where there is no terminal, the line below is all that is seen, unless it lasts.
        with Bar(f"{count} {task.name}", len(volume.values_ZYX), "slice", brief=True) as bar:
            pixel_mm = volume.spacing_mm[1:] if volume.spacing_mm else self.options.pixel_mm
            mask_ZYX, probability_RZYX = self.model.segment(volume.values_ZYX, self.batch_size, bar.update, pixel_mm)
        files = _write(task, volume, mask_ZYX, probability_RZYX, self.model, self.options)
        found = measure(mask_ZYX, self.model.described.regions, volume.spacing_mm)
        elapsed_s = time.perf_counter() - start
        say(f"{count} {task.mask}: {volumes_in_words(found)}; intensity {origin}, {elapsed_s:.1f} s")
        for note in (*volume.notes, *notes_on_size(self.model.described, volume)):
            say(f"note: {note}")
        row = {"volume": task.name, "source": str(task.source), "mask": name_in(out, task.mask), "intensity": origin}
        return files, row | found


def _beside(task: MaskTask, model: Model, options: Options) -> list[Path]:
    """What is written of a volume besides its mask: the probabilities of the regions in their order, the overlay."""
    kind = {**dict.fromkeys((".gz", ".nii", ".dcm"), ".nii.gz"), ".mhd": ".mha"}.get(task.mask.suffix, task.mask.suffix)
    kind = ".tif" if kind in PICTURES else kind  # which holds several slices, and float32
    endings = [f"_probability_{name}{kind}" for name in model.described.regions] if options.probabilities else []
    return [task.beside(ending) for ending in (*endings, *(["_overlay.png"] if options.overlay else []))]


def _write(
    task: MaskTask, volume: Volume, mask_ZYX: np.ndarray, probability_RZYX: np.ndarray, model: Model, options: Options
) -> list[Path]:
    """All files of a volume, the mask last; where it cannot be written, the others go again."""
    regions, beside = model.described.regions, _beside(task, model, options)
    with contextlib.ExitStack() as unless_whole:
        if options.probabilities is not None:
            for path, probability_ZYX in zip(beside, probability_RZYX, strict=False):  # the overlay is the last
                unless_whole.callback(path.unlink, missing_ok=True)
                _write_probability(path, probability_ZYX, volume, options.probabilities)
        if options.overlay:
            from distseg.serving.affected_slices import draw_affected_slices  # matplotlib: few need it

            unless_whole.callback(beside[-1].unlink, missing_ok=True)
            draw_affected_slices(beside[-1], volume.values_ZYX, mask_ZYX, regions, model.described.labels, task.name)
        if task.mask.suffix == ".dcm":
            from distseg.data.dicom_seg import write_segmentation

            by_width = {name: regions[name] for name in regions_by_width(regions)}
            write_segmentation(task.mask, mask_ZYX, task.files, by_width, model.described.weights_sha256)
        else:
            for path in task.masks[1:]:
                unless_whole.callback(path.unlink, missing_ok=True)
            write_volume(task.masks, mask_ZYX, volume, labels=model.described.labels)
        unless_whole.pop_all()
    return [*beside, *task.masks]


def _write_probability(path: Path, probability_ZYX: np.ndarray, volume: Volume, dtype: str) -> None:
    if dtype == "uint8":
        write_volume([path], np.rint(probability_ZYX * 255).astype(np.uint8), volume, scale=1 / 255)
    else:
        write_volume([path], probability_ZYX.astype(np.float32), volume)


def measure(
    mask_ZYX: np.ndarray, regions: Mapping[str, Sequence[int]], spacing_mm: tuple[float, float, float] | None
) -> dict[str, float | None]:
    """Volumes of the regions in ml and, of those inside the lung, in per cent of it.

    Args:
        mask_ZYX: uint8 labels.
        regions: region -> its labels.
        spacing_mm: z, y, x; None: not known.

    Returns:
        <region>_ml (None where there is no spacing) and <region>_percent_of_lung (None where there is no lung).
    """
    voxels_of_label = np.bincount(mask_ZYX.ravel(), minlength=256)
    voxels = {name: int(voxels_of_label[list(labels)].sum()) for name, labels in regions.items()}
    voxel_ml = None if spacing_mm is None else float(np.prod(spacing_mm)) / 1000
    found = {f"{name}_ml": None if voxel_ml is None else round(n * voxel_ml, 3) for name, n in voxels.items()}
    for name in regions:
        if name != LUNG and set(regions[name]) <= set(regions.get(LUNG, ())):
            share = round(100 * voxels[name] / voxels[LUNG], 3) if voxels[LUNG] else None
            found[f"{name}_percent_of_lung"] = share
    return found


def notes_on_size(described: ModelDescription, volume: Volume) -> list[str]:
    """That the network sees the volume at another scale than training showed; models with a spacing_mm see all at one."""
    seen = (described.training or {}).get("seen") or {}
    if described.spacing_mm is not None or volume.spacing_mm is None:
        return []
    what, key, mm = (
        ("a field of view", "field_mm", field_mm(volume.values_ZYX.shape[1:], volume.spacing_mm[1:]))
        if described.image_size
        else ("pixels", "pixel_mm", max(volume.spacing_mm[1:]))
    )
    if key not in seen:
        return []
    low, high = seen[key]
    if low * (1 - MM_BEYOND) <= mm <= high * (1 + MM_BEYOND):
        return []
    return [
        f"{volume.path.name} has {what} of {mm:.3g} mm, training showed {low:.3g} to {high:.3g} mm; masks may be worse; train with "
        "data.spacing_mm for volumes of all sizes"
    ]


def volumes_in_words(found: Mapping[str, float | None]) -> str:
    """`lung 4210.3 ml, infection 312.2 ml (7.4 % of the lung)`."""
    parts = []
    for key, value in found.items():
        if key.endswith("_ml"):
            name = key.removesuffix("_ml")
            share = found.get(f"{name}_percent_of_lung")
            size = "of unknown size" if value is None else f"{value:.1f} ml"
            parts.append(f"{name} {size}" + ("" if share is None else f" ({share:.1f} % of the lung)"))
    return ", ".join(parts)


def _read_ahead(tasks: Sequence[MaskTask], options: Options) -> Iterator[tuple[MaskTask, Future[Read]]]:
    """The volumes in order; a thread reads the next one while the caller works on the present one."""
    with ThreadPoolExecutor(1) as pool:
        following = [pool.submit(_read, task, options) for task in tasks[:1]]
        for index, task in enumerate(tasks):
            volume = following.pop()
            volume.exception()  # read to the end: two volumes wait in memory, not three
            following += [pool.submit(_read, other, options) for other in tasks[index + 1 : index + 2]]
            yield task, volume


def _read(task: MaskTask, options: Options) -> Read:
    if not task.files:
        raise DistsegError(f"input: got {task.source} without a DICOM file; each folder holds a series; move it away")
    return in_hu(read_volume(task.files), options.intensity, options.hu_offset)


def in_hu(volume: Volume, intensity: str, hu_offset: int | None = None) -> Read:
    """The volume with int16 HU for values, and where they came from; see `hounsfield`."""
    hu_ZYX, origin = hounsfield(volume, intensity, hu_offset)
    if intensity == "auto" and origin.startswith("grey"):
        _check_no_label_map(volume)
    return replace(volume, values_ZYX=hu_ZYX), origin


def _check_no_label_map(volume: Volume) -> None:
    """Masks lie beside volumes in many sets, and few values from 0 to 255 would be taken for a grey CT. As in export/cpp/volume.cpp."""
    whole = volume.values_ZYX.astype(np.uint8)
    held = np.flatnonzero(np.bincount(whole.ravel()))
    if len(held) <= MOST_LABELS and (whole == volume.values_ZYX).all():
        raise DistsegError(
            f"volume {volume.path}: got only the values {held.tolist()}; a label map, by its look, and no CT; move it away, "
            "or say --intensity grey"
        )


@contextlib.contextmanager
def _output(work: Work) -> Iterator[None]:
    """What the operating system says of the output (a full disk, no permission) ends everything, in one line."""
    try:
        yield
    except OSError as error:
        where = work.folder or work.tasks[0].mask
        raise DistsegError(
            f"output: got {where}, which cannot be written ({error.strerror or error}); make room, or choose another"
        ) from None
