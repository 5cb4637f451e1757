"""What `distseg predict` has to do: which volumes an input holds, and where the mask of each goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.data.file_kinds import (
    SUFFIXES,
    is_dicom,
    is_volume,
    left_out_in_words,
    series_files,
    volume_stem,
    what_it_is,
)  # fmt: skip
from distseg.errors import DistsegError
from distseg.files import check_writable

MASK_FORMATS = {"nifti": SUFFIXES, "dicom-seg": (".dcm",)}


@dataclass(frozen=True)
class MaskTask:
    """One volume and the file of its mask."""

    files: tuple[Path, ...]
    """one NIfTI file, or the DICOM files of a series (none: its folder holds no such file)"""
    source: Path
    """the file or the series' folder: what messages name"""
    mask: Path

    @property
    def name(self) -> str:
        return _stem(self.source)

    def beside(self, ending: str) -> Path:
        """The mask's path with another ending, for what else is written of the volume."""
        return self.mask.with_name(_stem(self.mask) + ending)


@dataclass(frozen=True)
class Work:
    tasks: tuple[MaskTask, ...]
    folder: Path | None
    """that the masks of a folder of volumes go to; None for a single volume"""
    notes: tuple[str, ...] = ()
    """what a user should know"""


def find_work(source: Path, out: Path, file_format: str) -> Work:
    """The volumes of an input: a NIfTI file, a DICOM series, or a folder of either.

    Args:
        source: NIfTI file, DICOM file, or folder of NIfTI files, of the files of one series or of the series' folders.
        out: a mask's file or a folder for it; for a folder of volumes, a folder.
        file_format: one of `MASK_FORMATS`.

    Raises:
        DistsegError: nothing to read, several kinds of input in one folder, or `out` does not fit.
    """
    volumes, is_folder, left_out = _volumes(source)
    if file_format == "dicom-seg" and any(is_volume(path) for path in volumes):
        raise DistsegError(
            f"--format: got dicom-seg for {next(iter(volumes))}; it references DICOM images, and NIfTI is none; use nifti"
        )
    _check_apart(source, out)
    check_writable(out)
    notes = (left_out_in_words(left_out, source),) if left_out else ()
    if is_folder:
        return Work(_tasks_in(volumes, out, file_format), out, notes)
    ((volume, files),) = volumes.items()
    mask = out / _mask_name(volume, file_format) if out.is_dir() else out
    if not mask.name.endswith(MASK_FORMATS[file_format]):
        endings = " or ".join(MASK_FORMATS[file_format])
        raise DistsegError(f"output: got {out}; a mask's name must end in {endings}; rename it, or give a folder")
    if mask.exists() and mask.samefile(volume):
        raise DistsegError(f"output: got {mask}, the volume itself; it would be lost; choose another")
    if mask.exists() and mask != out:
        raise DistsegError(f"output: got {out}, which holds {mask.name}; give the name of the file to replace it")
    return Work((MaskTask(files, volume, mask),), None, notes)


def _volumes(source: Path) -> tuple[dict[Path, tuple[Path, ...]], bool, Sequence[Path]]:
    """Volume (file, or folder of a series) -> its files; whether they are of a folder that may hold many; and what is left out."""
    if is_volume(source) or is_dicom(source):
        return {source: (source,)}, False, ()
    if not source.is_dir():
        what = what_it_is(source) or "neither NIfTI nor DICOM; convert it"
        raise DistsegError(
            f"input: got {source}; {what if source.exists() else 'no such file or folder; check the path'}"
        )
    entries = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    niftis: dict[Path, tuple[Path, ...]] = {path: (path,) for path in entries if is_volume(path)}
    slices, beside = series_files(source)
    folders = {path: series_files(path) for path in entries if path.is_dir()}
    series = (
        {path: files for path, (files, _) in folders.items()} if any(files for files, _ in folders.values()) else {}
    )
    kinds: dict[str, dict[Path, tuple[Path, ...]]] = {
        ".nii or .nii.gz files": niftis,
        "DICOM files of one series": {source: slices} if slices else {},
        "folders of DICOM series": series,
    }
    found = [kind for kind, volumes in kinds.items() if volumes]
    if len(found) != 1:
        held = " and ".join(found) or "no volume"
        raise DistsegError(f"input: got folder {source} with {held}; it must hold one of: {', '.join(kinds)}; sort it")
    volumes = kinds[found[0]]
    if slices:
        return volumes, False, beside
    left_out = [path for path in entries if path not in volumes]
    return volumes, True, [*left_out, *(path for one in series for path in folders[one][1] if folders[one][0])]


def _tasks_in(volumes: dict[Path, tuple[Path, ...]], out: Path, file_format: str) -> tuple[MaskTask, ...]:
    if out.is_file() or out.name.endswith(MASK_FORMATS[file_format]):
        raise DistsegError(f"output: got file {out} for a folder of volumes; it must be a folder")
    seen: dict[str, Path] = {}
    for path in volumes:
        if (other := seen.setdefault(_stem(path), path)) is not path:
            raise DistsegError(f"input: got {other.name} and {path.name}; their masks would have one name; rename one")
    return tuple(MaskTask(files, path, out / _mask_name(path, file_format)) for path, files in volumes.items())


def _mask_name(volume: Path, file_format: str) -> str:
    if is_volume(volume):
        return _stem(volume) + volume.name[len(_stem(volume)) :].lower()  # libraries write .NII.GZ under other names
    return _stem(volume) + (".dcm" if file_format == "dicom-seg" else ".nii.gz")


def _stem(volume: Path) -> str:
    if volume.is_dir():  # not what a link leads to: two may lead to folders of one name
        return volume.name if volume.name not in ("", "..") else volume.resolve().name
    stem = volume_stem(volume)
    return stem[: -len(".dcm")] if stem.lower().endswith(".dcm") else stem


def _check_apart(source: Path, out: Path) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DistsegError(f"output: got {out} inside {source}; masks would be taken for volumes; choose another")
