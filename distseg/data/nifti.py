"""NIfTI volumes in and masks out. Files may have any of the 48 axis orders; masks go back to theirs."""

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener
from nibabel.orientations import io_orientation

from distseg.data.volume import Volume, as_stored, check_voxel_count, in_lps, parsing
from distseg.errors import DistsegError
from distseg.files import written_aside

# Header fields that say where voxels lie; a header made anew from an affine would round them.
GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
NOT_MM = {1: "metres", 3: "micrometres"}  # codes of xyzt_units; besides 2, mm, some writers leave anything there
NOWHERE = (
    "its header does not say where it lies (qform and sform codes are 0), and programs disagree on left and right then; taken as "
    "nibabel does: x grows to the left"
)
KINDS = (nib.Nifti1Image, nib.Nifti2Image)  # a file says which by the length of its header
CODES = range(6)  # of qform and sform
DEFLATE_RATIO = 1032  # no gzip file unpacks to more than this many times its size


def read_nifti(path: Path) -> Volume:
    """Reads a three-dimensional NIfTI file; further axes of length 1 are dropped.

    Raises:
        DistsegError: no such file, not NIfTI, truncated, not three-dimensional, too large, without a usable affine or
            with values that are not finite.
    """
    image = _open(path)
    values = _voxels(image, path)
    volume = in_lps(path, values.reshape(values.shape[:3]), image.affine)
    notes = () if image.header["qform_code"] or image.header["sform_code"] else (f"{path.name}: {NOWHERE}",)
    return replace(volume, header=image.header, notes=notes)


def write_nifti(path: Path, values_ZYX: np.ndarray, volume: Volume, scale: float = 1.0) -> None:
    """Writes a mask, or a map of probabilities, where its volume lies.

    The shape, the axis order and the geometry are those of the volume's file: of NIfTI field by field, of another format as float32.

    Args:
        path: ends in .nii.gz or .nii.
        values_ZYX: uint8 or float32.
        volume: as it was read.
        scale: what readers multiply the values with.
    """
    affine = volume.stored_affine
    assert affine is not None  # pictures lie nowhere
    header = nib.Nifti1Header()
    if isinstance(volume.header, nib.Nifti1Header):
        header = type(volume.header)()
        for name in GEOMETRY:
            header[name] = volume.header[name]
    header.set_data_dtype(values_ZYX.dtype)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(as_stored(values_ZYX, affine), affine, header)
    image.header.set_slope_inter(scale, 0)
    with written_aside(path) as aside:
        nib.save(image, aside)


def write_labels(path: Path, labels_ZYX: np.ndarray, spacing_mm: tuple[float, float, float] | None) -> None:
    """Writes a uint8 label map as `read_nifti` gives it back; its place in the scanner is not kept.

    Args:
        path, labels_ZYX: what goes where.
        spacing_mm: z, y, x; None: voxels of 1 mm, for the format has no word for not knowing.
    """
    z_mm, y_mm, x_mm = spacing_mm or (1.0, 1.0, 1.0)
    image = nib.Nifti1Image(labels_ZYX.T.astype(np.uint8), np.diag([-x_mm, -y_mm, z_mm, 1.0]))
    with written_aside(path) as aside:
        nib.save(image, aside)


def _open(path: Path) -> nib.Nifti1Image:
    """The header, checked as far as it goes: no voxel is read yet."""
    if not path.is_file():
        raise DistsegError(f"volume: got {path}; no such file; check the path")
    with parsing("volume", path):
        image = _load(path)
        shape, affine = tuple(int(n) for n in image.shape), np.asarray(image.affine)
        axes = io_orientation(affine) if np.isfinite(affine).all() else np.full(1, np.nan)
    if len(shape) < 3 or 0 in shape or any(n > 1 for n in shape[3:]):
        raise DistsegError(
            f"volume {path}: got shape {shape}; it must be three-dimensional and not empty; take one volume out of it"
        )
    check_voxel_count(path, shape)
    if unit := NOT_MM.get(int(image.header["xyzt_units"]) & 7):  # millilitres would be wrong a billion times
        raise DistsegError(f"volume {path}: got voxel sizes in {unit}; CT's are in mm; mend the header (xyzt_units)")
    if 0 <= image.dataobj.offset < nib.Nifti1Header.sizeof_hdr:
        raise DistsegError(
            f"volume {path}: truncated or damaged (its voxels would begin inside the header, vox_offset "
            f"{image.dataobj.offset}); copy or download it again"
        )
    claimed = int(np.prod(shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    if claimed > path.stat().st_size * (DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1):
        raise DistsegError(
            f"volume {path}: truncated or damaged (the header claims {claimed} bytes of voxels, more than the file can "
            "hold); copy or download it again"
        )
    if np.isnan(axes).any() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DistsegError(f"volume {path}: got affine {affine.tolist()}; it must be invertible; mend the header")
    return image


def _load(path: Path) -> nib.Nifti1Image:
    """By its own name: nib.load would look for a.nii when asked for a.Nii."""
    with ImageOpener(str(path)) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    lengths = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    for kind in KINDS:
        if kind.header_class.sizeof_hdr in lengths:
            _check_stored(kind.header_class(start[: kind.header_class.sizeof_hdr], check=False), path)
            return kind.from_file_map({"image": FileHolder(str(path))})
    raise DistsegError(f"volume {path}: damaged or not readable (no header of NIfTI); copy or download it again")


def _check_stored(header: nib.Nifti1Header, path: Path) -> None:
    """Refuses what nibabel would mend without a word, and other programs in other ways."""
    if header["magic"] == header.pair_magic:
        raise DistsegError(f"volume {path}: got a header without voxels; both must be one file; convert it")
    for name in ("qform_code", "sform_code"):
        if int(header[name]) not in CODES:
            raise DistsegError(f"volume {path}: got {name} {header[name]}; it must be 0 to 5; mend the header")
    sign, sizes = header["pixdim"][0], header["pixdim"][1:4]
    if not np.isfinite(sizes).all() or 0 in sizes or sign < 0 and sign != -1:
        raise DistsegError(
            f"volume {path}: got pixdim {header['pixdim'][:4].tolist()}; its first number must be 1 or -1, the sizes of voxels finite "
            "and not 0; mend the header"
        )


def _voxels(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    with parsing("volume", path):
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                values = np.asanyarray(type(image).from_stream(stream).dataobj)
                while stream.read(2**20):  # to the end, where gzip compares its checksum: nibabel stops before it
                    pass
        else:
            values = np.asanyarray(image.dataobj)
    if values.dtype.kind not in "iuf":
        raise DistsegError(f"volume {path}: got voxels of type {values.dtype}; they must be real numbers; convert it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DistsegError(f"volume {path}: holds NaN or infinite values; HU are finite; mend or leave out the volume")
    return values
