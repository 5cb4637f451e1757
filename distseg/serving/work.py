"""What `distseg predict` has to do: which volumes its inputs hold, and where the mask of each goes."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distseg.data.file_kinds import (
    FIRST_CHANNEL,
    IN_WORDS,
    NIFTI,
    TIFF,
    case_of_picture,
    is_dicom,
    is_picture,
    is_segmentation,
    is_volume,
    left_out_in_words,
    number_of_picture,
    series_files,
    volume_stem,
    what_it_is,
    with_data_file,
)  # fmt: skip
from distseg.errors import DistsegError
from distseg.files import check_writable

MASK_FORMATS = ("nifti", "source", "dicom-seg")
OWN = (".mha", ".mhd", ".nrrd")  # formats of volumes besides NIfTI that masks are written in
UNSCALED = (*OWN, ".nhdr")  # cannot say what their values are to be multiplied with
KINDS = ("volumes (NIfTI, MetaImage, NRRD, TIFF of several pages)", "DICOM series", "slices (PNG, JPEG, TIFF)")
FEW = 4  # channels of one case; more files of one name are cases that are numbered


@dataclass(frozen=True)
class MaskTask:
    """One volume and the file of its mask."""

    files: tuple[Path, ...]
    """one that holds it whole, its slices as pictures, or the DICOM files of a series (none: its folder holds no such file)"""
    source: Path
    """the file, the first of the pictures, or the series' folder: what messages name"""
    mask: Path
    """of pictures: of the first"""
    name: str
    """in the folder of the masks, such as sub/case"""

    @property
    def masks(self) -> tuple[Path, ...]:
        """All files of the mask: one a picture, and the voxels of an .mhd."""
        if len(self.files) > 1 and is_picture(self.files[0]):
            endings = [".tif" if path.suffix.lower() in TIFF else ".png" for path in self.files]
            return tuple(
                self.mask.with_name(path.stem + ending) for path, ending in zip(self.files, endings, strict=True)
            )
        return (self.mask, self.mask.with_suffix(".raw")) if self.mask.suffix == ".mhd" else (self.mask,)

    def beside(self, ending: str) -> Path:
        """The mask's path with another ending, for what else is written of the volume."""
        return self.mask.with_name(_stem(self.mask) + ending)


@dataclass(frozen=True)
class Work:
    tasks: tuple[MaskTask, ...]
    folder: Path | None
    """that the masks of several volumes go to; None for a single volume"""
    notes: tuple[str, ...] = ()
    """what a user should know"""


@dataclass
class _Found:
    """Volumes of each of `KINDS` in one input, by the file or folder that messages name."""

    root: Path
    volumes: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    series: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    pictures: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)
    without: list[Path] = field(default_factory=list)
    """folders in which nothing is found"""


def find_work(sources: Sequence[Path], out: Path, file_format: str | None, probabilities: str | None = None) -> Work:
    """The volumes of inputs: files of volumes, DICOM series, slices, or folders of one of them, nested or not.

    Args:
        sources: files and folders.
        out: a mask's file or a folder for it; for several volumes, a folder.
        file_format: one of `MASK_FORMATS`; None: NIfTI, or what the name of `out` says; of pictures, pictures.
        probabilities: "float32", "uint8", or None: not written.

    Raises:
        DistsegError: nothing to read, several kinds of input in one folder, several channels, or `out` does not fit.
    """
    notes: list[str] = []
    volumes: dict[Path, tuple[Path, ...]] = {}
    root_of: dict[Path, Path] = {}
    for source in sources:
        _check_apart(source, out)
        found, left_out = _volumes(source)
        volumes |= found
        root_of |= {path: source for path in found if path != source}
        notes += [note] if (note := left_out_in_words(left_out, source)) else []
    check_writable(out)
    without_channel = _without_channel(volumes, root_of)
    if without_channel:
        notes.append(f"names: {FIRST_CHANNEL}, nnU-Net's first channel, is left off the names of the masks")
    stems = {path: _stem(path).removesuffix(FIRST_CHANNEL if path in without_channel else "") for path in volumes}
    if len(sources) == 1 and not root_of:
        ((volume, files),) = volumes.items()
        tasks: tuple[MaskTask, ...] = (_single_task(volume, files, out, stems[volume], file_format),)
        folder = None
    else:
        folder, inside = out, _folders(volumes, root_of, stems, sources)
        tasks = _tasks_in(volumes, inside, stems, out, file_format)
    if probabilities == "uint8" and (unscaled := [t for t in tasks if t.mask.name.endswith(UNSCALED)]):
        raise DistsegError(
            f"--probabilities: got uint8 for {unscaled[0].mask.name}; MetaImage and NRRD cannot say that a step is 1/255; use float32"
        )
    return Work(tasks, folder, tuple(notes))


def _single_task(volume: Path, files: tuple[Path, ...], out: Path, stem: str, file_format: str | None) -> MaskTask:
    endings = _endings(volume, files, file_format)
    mask = out / f"{stem}{endings[0]}" if out.is_dir() else out
    if not mask.name.endswith(endings):
        raise DistsegError(
            f"output: got {out}; a mask's name must end in {' or '.join(endings)}; rename it, or give a folder"
        )
    own = [path for path in with_data_file(volume) if path.exists()]
    written = [path for path in MaskTask(files, volume, mask, stem).masks if path.exists()]
    if lost := [path for path in written if any(path.samefile(other) for other in own)]:
        raise DistsegError(f"output: got {lost[0]}, the volume itself; it would be lost; choose another")
    if mask.exists() and mask != out:
        raise DistsegError(f"output: got {out}, which holds {mask.name}; give the name of the file to replace it")
    return MaskTask(files, volume, mask, stem)


def _tasks_in(
    volumes: Mapping[Path, tuple[Path, ...]],
    inside: Mapping[Path, Path],
    stems: Mapping[Path, str],
    out: Path,
    file_format: str | None,
) -> tuple[MaskTask, ...]:
    """A task a volume, in the folders that the volumes lie in."""
    if out.is_file() or not out.is_dir() and out.name.endswith((*NIFTI, *OWN, ".dcm", ".png")):
        raise DistsegError(f"output: got file {out} for a folder of volumes; it must be a folder")
    tasks: dict[str, MaskTask] = {}
    for path, files in volumes.items():
        stem = case_of_picture(path) if len(files) > 1 and is_picture(path) else stems[path]
        ending = _endings(path, files, file_format)[0]
        name = (inside[path] / stem).as_posix()
        task = MaskTask(files, path, out / inside[path] / f"{stems[path]}{ending}", name)
        if (other := tasks.setdefault(name, task)) is not task:
            raise DistsegError(f"input: got {other.source} and {path}; their masks would have one name; rename one")
    return tuple(tasks.values())


def _folders(
    volumes: Mapping[Path, tuple[Path, ...]],
    root_of: Mapping[Path, Path],
    stems: Mapping[Path, str],
    sources: Sequence[Path],
) -> dict[Path, Path]:
    """Below the folder of masks, those that the volumes lie in: seen from their input, or, where two of several inputs would have
    masks of one name, from the folder that all inputs lie in.
    """
    inside = {path: path.parent.relative_to(root_of[path]) if path in root_of else Path() for path in volumes}
    if len(sources) > 1 and len({inside[path] / stems[path] for path in volumes}) < len(volumes):
        shared = os.path.commonpath([source.absolute().parent for source in sources])
        return {path: path.absolute().parent.relative_to(shared) for path in volumes}
    return inside


def _endings(volume: Path, files: Sequence[Path], file_format: str | None) -> tuple[str, ...]:
    """What the name of a volume's mask may end in; the first is taken where it has no name."""
    own = volume.name[len(_stem(volume)) :].lower()  # libraries write .NII.GZ under other names
    is_one_file = bool(files) and is_volume(files[0])
    pictured = bool(files) and (is_picture(files[0]) or is_one_file and own in TIFF)
    if file_format == "dicom-seg" and (is_one_file or pictured):
        raise DistsegError(
            f"--format: got dicom-seg for {volume}; it references DICOM images, and this is none; use source"
        )
    if pictured:
        if file_format == "nifti":
            raise DistsegError(f"--format: got nifti for {volume}; pictures do not say where they lie; use source")
        return TIFF if own in TIFF else (".png",)
    if not is_one_file:
        return {None: (".nii.gz", ".nii", *OWN, ".dcm"), "nifti": (".nii.gz", ".nii")}.get(file_format, (".dcm",))
    own = ".nrrd" if own == ".nhdr" else own
    if file_format == "source":
        return (own,)
    niftis = tuple(dict.fromkeys((own, *NIFTI))) if own in NIFTI else NIFTI
    return niftis if file_format == "nifti" else (*niftis, *OWN)


def _volumes(source: Path) -> tuple[dict[Path, tuple[Path, ...]], Sequence[Path]]:
    """Volume (file, or folder of a series) -> its files; and what is left out. A series is its folder itself."""
    if is_volume(source) or is_picture(source) or is_dicom(source):
        with_data_file(source)  # which refuses voxels that lie elsewhere
        return {source: (source,)}, ()
    if not source.is_dir():
        what = what_it_is(source) or f"no {IN_WORDS}; convert it"
        raise DistsegError(
            f"input: got {source}; {what if source.exists() else 'no such file or folder; check the path'}"
        )
    found = _Found(source)
    _look_into(source, found, {source.resolve()})
    kinds = dict(zip(KINDS, (found.volumes, found.series, found.pictures), strict=True))
    held = [kind for kind, volumes in kinds.items() if volumes]
    if len(held) > 1 and held[-1] == KINDS[-1]:  # previews, screenshots
        held.pop()
        found.left_out += [path for files in found.pictures.values() for path in files]
    if len(held) != 1:
        raise DistsegError(
            f"input: got folder {source} with {' and '.join(held) or 'no volume'}; it must hold one of: {', '.join(KINDS)}; sort it"
        )
    volumes = kinds[held[0]]
    if held[0] == KINDS[1] and set(volumes) != {source}:
        volumes |= dict.fromkeys(found.without, ())  # an empty folder among series is a series that was lost
    else:
        found.left_out += found.without
    return volumes, sorted(found.left_out)


def _look_into(folder: Path, found: _Found, parents: set[Path]) -> bool:
    """Collects what a folder and those inside it hold; says whether that is anything."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    slices, beside = series_files(folder)
    if slices:
        found.series[folder] = slices
    pictures: dict[str, list[Path]] = {}
    held = bool(slices)
    without = []
    for path in entries if not slices else beside:
        if path.is_dir():
            if path.resolve() in parents:  # a link to where it lies
                found.left_out.append(path)
            elif _look_into(path, found, parents | {path.resolve()}):
                held = True
            else:
                without.append(path)
        elif is_volume(path) and not is_segmentation(path):
            found.volumes[path] = (path,)
        elif is_picture(path) and not slices:
            pictures.setdefault(case_of_picture(path), []).append(path)
        else:
            found.left_out.append(path)
    for files in pictures.values():
        files.sort(key=number_of_picture)
        found.pictures[files[0]] = tuple(files)
    held = held or bool(pictures) or any(path.parent == folder for path in found.volumes)
    if held:
        found.without += without
    else:
        found.left_out = [path for path in found.left_out if folder not in path.parents]  # the folder's name says it
    return held


def _without_channel(volumes: Mapping[Path, tuple[Path, ...]], root_of: Mapping[Path, Path]) -> set[Path]:
    """Volumes of folders in which every name ends in nnU-Net's _0000.

    Raises:
        DistsegError: a folder holds second channels.
    """
    stems_in: dict[Path, dict[Path, str]] = {}
    for volume, files in volumes.items():
        if files and not volume.is_dir():
            stems_in.setdefault(volume.parent, {}).update({path: volume_stem(path) for path in files})
    found = set[Path]()
    for folder, stems in stems_in.items():
        if all(stem.endswith(FIRST_CHANNEL) and stem != FIRST_CHANNEL for stem in stems.values()):
            found |= set(stems)
        elif all(path in root_of and is_volume(path) for path in stems):
            _check_channels(folder, stems)
    return found


def _check_channels(folder: Path, stems: Mapping[Path, str]) -> None:
    parts = [re.fullmatch(r"(.+)_(\d{4})", stem) for stem in stems.values()]
    names = {(part[1], part[2]) for part in parts if part}
    cases = {case for case, _ in names}
    several = sorted(case for case in cases if {(case, "0000"), (case, "0001")} <= names)
    if all(parts) and several and (len(cases) > 1 or len(names) <= FEW):
        raise DistsegError(
            f"input: got {several[0]}_0000 and {several[0]}_0001 in {folder}, by nnU-Net's names two channels of one case; the model "
            f"takes CT alone; give the CTs by name: distseg predict MODEL {folder}/*_0000.* OUT"
        )


def _stem(volume: Path) -> str:
    if volume.is_dir():  # not what a link leads to: two may lead to folders of one name
        return volume.name if volume.name not in ("", "..") else volume.resolve().name
    stem = volume_stem(volume)
    return stem[: -len(".dcm")] if stem.lower().endswith(".dcm") else stem


def _check_apart(source: Path, out: Path) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DistsegError(f"output: got {out} inside {source}; masks would be taken for volumes; choose another")
