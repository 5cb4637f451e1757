"""Volumes in any axis order, broken files, and masks that go back to where the volume lay."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.nifti import read_nifti, write_on_grid
from distseg.data.volume import hounsfield
from distseg.errors import DistsegError


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRA", "PIL", "ALS"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_any_axis_order_reads_as_one_and_its_mask_goes_back(axes: str, suffix: str, tmp_path: Path) -> None:
    lps_ZYX = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5), dtype=np.int16)
    lps = nib.Nifti1Image(lps_ZYX.T, np.diag([-1.0, -2.0, 3.0, 1]))
    turned = lps.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(lps.affine), nib.orientations.axcodes2ornt(axes))
    )
    nib.save(turned, tmp_path / f"v{suffix}")
    volume = read_nifti(tmp_path / f"v{suffix}")
    assert np.array_equal(volume.values_ZYX, lps_ZYX) and volume.spacing_mm == (3, 2, 1)
    write_on_grid(tmp_path / "m.nii.gz", (lps_ZYX > 0).astype(np.uint8), volume)
    mask = nib.load(tmp_path / "m.nii.gz")
    assert np.array_equal(mask.affine, turned.affine) and mask.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(turned.dataobj) > 0)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0), (0, 0)], ids=str)
def test_a_mask_has_its_volume_s_geometry_to_the_bit(
    kind: type[nib.Nifti1Image], codes: tuple[int, int], tmp_path: Path
) -> None:
    turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.3) @ np.diag([0.7, 0.71, 2.5])
    source = kind(np.zeros((4, 5, 6), np.int16), nib.affines.from_matvec(turn, [1.1, -2.3, 3.7]))
    source.header.set_qform(source.affine, codes[0])
    source.header.set_sform(source.affine, codes[1])
    source.header["descrip"], source.header["cal_max"] = b"a patient's name", 400
    source = kind(source.dataobj, None, source.header)
    nib.save(source, tmp_path / "v.nii.gz")
    volume = read_nifti(tmp_path / "v.nii.gz")
    probability_ZYX = np.random.default_rng(0).integers(0, 256, volume.values_ZYX.shape, np.uint8)
    write_on_grid(tmp_path / "p.nii.gz", probability_ZYX, volume, scale=1 / 255)
    header, written = nib.load(tmp_path / "v.nii.gz").header, nib.load(tmp_path / "p.nii.gz")
    for name in ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
        assert written.header[name].tobytes() == header[name].tobytes(), name
    assert np.array_equal(written.affine, header.get_best_affine()) and type(written) is kind
    assert written.header["descrip"] != header["descrip"] and written.header["cal_max"] == 0
    back = read_nifti(tmp_path / "p.nii.gz").values_ZYX
    np.testing.assert_allclose(back, probability_ZYX / 255, rtol=0, atol=1e-7)


def test_grey_is_mapped_back_to_hu_and_hu_is_left_alone(tmp_path: Path) -> None:
    grey = write(tmp_path / "g.nii", np.array([[[0, 255, 51]]], np.uint8), np.eye(4))
    hu, origin = hounsfield(read_nifti(grey))
    assert sorted(hu.ravel().tolist()) == [-1250, -950, 250] and origin == "grey_-1250_250" and hu.dtype == np.int16
    real = write(tmp_path / "h.nii", np.array([[[-1024, 0, 300]]], np.int16), np.eye(4))
    hu, origin = hounsfield(read_nifti(real))
    assert sorted(hu.ravel().tolist()) == [-1024, 0, 300] and origin == "hu"
    with pytest.raises(DistsegError, match="declared hu; they look like grey"):
        hounsfield(read_nifti(grey), "hu")
    with pytest.raises(DistsegError, match="declared grey; they look like hu"):
        hounsfield(read_nifti(real), "grey")


def test_damaged_files_are_one_line_that_names_them(tmp_path: Path) -> None:
    good = write(tmp_path / "good.nii.gz", np.random.default_rng(0).integers(0, 99, (30, 30, 9), np.int16), np.eye(4))
    content = good.read_bytes()
    cases = {
        "cut.nii.gz": content[: len(content) // 2],
        "empty.nii.gz": b"",
        "text.nii.gz": b"hello",
        "cut.nii": gzip.decompress(content)[:5000],
    }
    for name, broken in cases.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DistsegError) as caught:
            read_nifti(tmp_path / name)
        assert name in str(caught.value) and "download it again" in str(caught.value)
    with pytest.raises(DistsegError, match="no such file"):
        read_nifti(tmp_path / "none.nii")


def test_values_and_shapes_that_are_no_ct_are_refused(tmp_path: Path) -> None:
    nan = write(tmp_path / "nan.nii", np.full((2, 2, 2), np.nan, np.float32), np.eye(4))
    with pytest.raises(DistsegError, match="NaN or infinite"):
        read_nifti(nan)
    metres = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4) / 1000)
    metres.header.set_xyzt_units("meter")
    nib.save(metres, tmp_path / "metres.nii")
    with pytest.raises(DistsegError, match="got voxel sizes in metres"):
        read_nifti(tmp_path / "metres.nii")
    flat = write(tmp_path / "flat.nii", np.zeros((2, 2), np.int16), np.eye(4))
    with pytest.raises(DistsegError, match="must be three-dimensional"):
        read_nifti(flat)
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.int16)
    (tmp_path / "huge.nii").write_bytes(header.binaryblock + b"\0" * 4)
    with pytest.raises(DistsegError, match="must hold 1 to 2147483648 voxels"):
        read_nifti(tmp_path / "huge.nii")
