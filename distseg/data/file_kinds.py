"""Which kind of file a path names. Nothing is imported for it: a wrong path is told of before any reader is there."""

from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")
DICOM_MAGIC, DICOM_MAGIC_AT = b"DICM", 128  # DICOM PS3.10: after a preamble of this many bytes


def is_nifti(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def nifti_stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def is_dicom(path: Path) -> bool:
    """A DICOM file of any name; DICOMDIR, which only lists others, is none."""
    if not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        file.seek(DICOM_MAGIC_AT)
        return file.read(len(DICOM_MAGIC)) == DICOM_MAGIC


def is_png(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".png" and not path.name.startswith(".")
