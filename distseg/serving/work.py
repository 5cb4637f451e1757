"""What `distseg predict` has to do: which volumes its inputs hold, and where the mask of each goes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distseg.data.file_kinds import (
    NIFTI,
    PICTURE,
    SEGMENTS,
    SUFFIXES,
    entries_of,
    is_dicom,
    is_picture,
    is_volume,
    left_out_in_words,
    series_files,
    volume_stem,
    what_it_is,
)
from distseg.errors import DistsegError
from distseg.files import check_writable

SEG, PAGES = ".dcm", ".tif"
SOURCE = ".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", PICTURE, PAGES, SEG  # endings of masks in their volumes' formats
MASK_FORMATS = {"nifti": NIFTI, "dicom-seg": (SEG,), "source": (SEGMENTS, *SOURCE)}
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's names of images


@dataclass(frozen=True)
class MaskTask:
    """One volume and the file of its mask."""

    files: tuple[Path, ...]
    """one file of the whole volume or of a slice, or the DICOM files of a series"""
    source: Path
    """the file or the series' folder: what messages name"""
    mask: Path
    name: str
    """of the volume, with the folders that it lies in below its input"""

    def beside(self, ending: str) -> Path:
        """The mask's path with another ending, for what else is written of the volume."""
        own = next(suffix for suffix in MASK_FORMATS["source"] if self.mask.name.endswith(suffix))
        return self.mask.with_name(self.mask.name[: -len(own)] + ending)


@dataclass(frozen=True)
class Work:
    tasks: tuple[MaskTask, ...]
    folder: Path | None
    """that the masks of several volumes go to; None for a single volume"""
    notes: tuple[str, ...] = ()
    """what a user should know"""


@dataclass(frozen=True)
class Found:
    """A volume of an input."""

    source: Path
    files: tuple[Path, ...]
    name: str
    """see `MaskTask`"""


def find_work(sources: Sequence[Path], out: Path, file_format: str | None) -> Work:
    """The volumes of inputs: files of volumes or slices, DICOM series, or folders of them, however deep.

    Args:
        sources: the inputs.
        out: a mask's file or a folder for it; for several volumes, a folder.
        file_format: one of `MASK_FORMATS`; None: as a mask's name says, and NIfTI in folders (PNG and TIFF of pictures).

    Raises:
        DistsegError: nothing to read, volumes of several channels, or `out` does not fit.
    """
    found: list[Found] = []
    notes: list[str] = []
    for source in sources:
        volumes, left_out = _volumes(source)
        found += volumes
        notes += [left_out_in_words(left_out, source)] if left_out else []
        _check_apart(source, out)
    found = _without_channel(found)
    if file_format == "dicom-seg" and (other := next((one for one in found if not _is_series(one)), None)):
        raise DistsegError(
            f"--format: got dicom-seg for {other.source}; it references DICOM images, and this is none; use nifti or source"
        )
    check_writable(out)
    if len(sources) > 1 or found[0].source != sources[0]:
        return Work(_tasks_in(found, out, file_format), out, tuple(notes))
    (volume,) = found
    mask = out / _mask_name(volume, file_format) if out.is_dir() else out
    endings = MASK_FORMATS[file_format or "source"]
    if not mask.name.endswith(endings) or _is_seg(mask) and not _is_series(volume):
        raise DistsegError(
            f"output: got {out}; a mask's name must end in {' or '.join(_endings_of(volume, endings))}; rename it, or give a folder"
        )
    if is_picture(volume.source) != mask.name.endswith((PICTURE, PAGES)):
        raise DistsegError(
            f"output: got {mask} for {volume.source}; the mask of a picture is {PICTURE} or {PAGES}, and of a volume it is none; rename it"
        )
    if mask.exists() and mask.samefile(volume.source):
        raise DistsegError(f"output: got {mask}, the volume itself; it would be lost; choose another")
    if mask.exists() and mask != out:
        raise DistsegError(f"output: got {out}, which holds {mask.name}; give the name of the file to replace it")
    return Work((MaskTask(volume.files, volume.source, mask, volume.name),), None, tuple(notes))


def _volumes(source: Path) -> tuple[list[Found], list[Path]]:
    """What an input holds, and what of it is left out."""
    if is_volume(source) or is_dicom(source) or is_picture(source):
        return [Found(source, (source,), _stem(source))], []
    if not source.is_dir():
        what = what_it_is(source) or "neither a volume, DICOM nor a picture; convert it"
        raise DistsegError(
            f"input: got {source}; {what if source.exists() else 'no such file or folder; check the path'}"
        )
    volumes, pictures, left_out = _below(source, "", set())
    if not volumes and not pictures:
        said = f"; {left_out_in_words(left_out, source)}" if left_out else ""
        raise DistsegError(
            f"input: got folder {source} with no volume; it must hold files of volumes ({', '.join(SUFFIXES)}), DICOM series, or "
            f"pictures of slices{said}"
        )
    if volumes:  # pictures beside them are previews
        return volumes, sorted([*left_out, *(one.source for one in pictures)])
    return pictures, left_out


def _below(folder: Path, prefix: str, seen: set[Path]) -> tuple[list[Found], list[Found], list[Path]]:
    """Volumes, pictures and other files of a folder and those inside it."""
    if folder.resolve() in seen:  # a link to a folder above
        return [], [], [folder]
    seen = seen | {folder.resolve()}
    slices, beside = series_files(folder)
    entries = entries_of(folder)
    files = [path for path in entries if is_volume(path) and not path.name.lower().endswith(SEGMENTS)]
    if slices and files:
        raise DistsegError(
            f"input: got folder {folder} with files of volumes and DICOM files of one series; it must hold one of them; sort it"
        )
    if slices:
        return [Found(folder, slices, prefix.rstrip("/") or _stem(folder))], [], list(beside)
    volumes = [Found(path, (path,), prefix + _stem(path)) for path in files]
    pictures = [Found(path, (path,), prefix + _stem(path)) for path in entries if is_picture(path)]
    left_out = [path for path in entries if not (path.is_dir() or path in files or is_picture(path))]
    for path in entries:
        if path.is_dir():
            inner, inner_pictures, inner_left = _below(path, f"{prefix}{path.name}/", seen)
            volumes += inner
            pictures += inner_pictures
            left_out += inner_left if inner or inner_pictures else [path]
    return volumes, pictures, left_out


def _without_channel(found: Sequence[Found]) -> list[Found]:
    """Names without nnU-Net's `_0000`, where all end so.

    Raises:
        DistsegError: every volume is there as the same several channels.
    """
    parts = [CHANNEL.fullmatch(one.name) for one in found]
    if any(part is None or _is_series(one) for part, one in zip(parts, found, strict=True)):
        return list(found)
    channels: dict[str, set[str]] = {}
    for part in filter(None, parts):
        channels.setdefault(part[1], set()).add(part[2])
    kinds = {frozenset(own) for own in channels.values()}
    if kinds == {frozenset({"0000"})}:
        return [replace(one, name=one.name[: -len("_0000")]) for one in found]
    (kind, *others) = kinds
    if not others and "0000" in kind and len(kind) > 1 and len(channels) > 1 and not is_picture(found[0].source):
        raise DistsegError(
            f"input: got {found[0].source} and others as channels {', '.join(sorted(kind))}; the model takes one image a volume; give those that "
            "end in _0000 alone"
        )
    return list(found)


def _tasks_in(found: Sequence[Found], out: Path, file_format: str | None) -> tuple[MaskTask, ...]:
    if out.is_file() or out.name.endswith(MASK_FORMATS["source"]):
        raise DistsegError(f"output: got file {out} for several volumes; it must be a folder")
    seen: dict[str, Found] = {}
    tasks = []
    for one in found:
        if (other := seen.setdefault(one.name, one)) is not one:
            raise DistsegError(
                f"input: got {other.source} and {one.source}; their masks would have one name; rename one"
            )
        tasks.append(
            MaskTask(one.files, one.source, (out / one.name).with_name(_mask_name(one, file_format)), one.name)
        )
    return tuple(tasks)


def _mask_name(volume: Found, file_format: str | None) -> str:
    name, source = Path(volume.name).name, volume.source
    own = source.name[len(volume_stem(source)) :].lower() if is_volume(source) else ""
    if is_picture(source):
        return name + (PAGES if source.suffix.lower() in (PAGES, ".tiff") else PICTURE)
    if file_format == "dicom-seg" or file_format == "source" and not own:
        return name + SEG
    if own in NIFTI:
        return name + own  # libraries write .NII.GZ under other names
    if file_format == "source":
        return name + (own if own in SOURCE else ".nrrd")
    return name + ".nii.gz"


def _endings_of(volume: Found, endings: Sequence[str]) -> list[str]:
    return [
        ending
        for ending in endings
        if (ending in (PICTURE, PAGES)) == is_picture(volume.source) and (ending != SEG or _is_series(volume))
    ]


def _is_seg(mask: Path) -> bool:
    return mask.name.endswith(SEG)


def _is_series(volume: Found) -> bool:
    return not is_volume(volume.source) and not is_picture(volume.source)


def _stem(volume: Path) -> str:
    if volume.is_dir():  # not what a link leads to: two may lead to folders of one name
        return volume.name if volume.name not in ("", "..") else volume.resolve().name
    if is_picture(volume):
        return volume.stem
    stem = volume_stem(volume)
    return stem[: -len(SEG)] if stem.lower().endswith(SEG) else stem


def _check_apart(source: Path, out: Path) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DistsegError(f"output: got {out} inside {source}; masks would be taken for volumes; choose another")
