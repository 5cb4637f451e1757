"""Volumes in any axis order, broken files, and masks that go back to where the volume lay."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.file_kinds import is_volume, volume_stem
from distseg.data.nifti import read_nifti, write_nifti
from distseg.data.volume import Volume, hounsfield, whole_labels
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
    write_nifti(tmp_path / "m.nii.gz", (lps_ZYX > 0).astype(np.uint8), volume)
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
    write_nifti(tmp_path / "p.nii.gz", probability_ZYX, volume, scale=1 / 255)
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
    with pytest.raises(DistsegError, match="declared grey; grey is 0..255"):
        hounsfield(read_nifti(real), "grey")


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1, 1),
        (-0.8, 1.5),
        (-1.024, 0.09),
        (-6, 228),
        (-150, 400),
        (-1000, -1000),
        (-1024, -800),
        (7, 7),
        (0, 1),
        (0, 4000),
        (-1e6, 9),
    ],
)
def test_what_has_no_air_and_no_tissue_is_not_taken_for_hu(low: float, high: float) -> None:
    values_ZYX = np.linspace(low, high, 60, dtype=np.float32).reshape(3, 4, 5)
    volume = Volume(Path("v.nii"), values_ZYX, (1.0, 1.0, 1.0), np.eye(4))
    with pytest.raises(DistsegError, match=r"volume v.nii: got values .*(--intensity hu|before it was scaled)"):
        hounsfield(volume)
    if low > -1e6:
        hu_ZYX, origin = hounsfield(volume, "hu")
        assert origin == "hu" and np.array_equal(hu_ZYX, np.rint(np.maximum(values_ZYX, -1024)))


@pytest.mark.parametrize(("low", "high"), [(-1000, 40), (-3024, 3071), (-950, 200), (-500, 90), (-1024, 32767)])
def test_parts_of_a_ct_are_taken_for_hu(low: int, high: int) -> None:
    values_ZYX = np.linspace(low, high, 60).round().reshape(3, 4, 5)
    assert hounsfield(Volume(Path("v.nii"), values_ZYX, None, None))[1] == "hu"


def test_grey_that_resampling_has_left_outside_0_to_255_is_cut_off_where_it_is_declared() -> None:
    volume = Volume(Path("v.nii"), np.array([[[-6.0, 0, 255, 261]]]), None, None)
    assert hounsfield(volume, "grey")[0].ravel().tolist() == [-1250, -1250, 250, 250]


def test_a_slanted_grid_is_refused_and_rounding_is_not(tmp_path: Path) -> None:
    values = np.zeros((4, 5, 6), np.int16)
    for degrees, is_read in ((0, True), (0.5, True), (5, False), (20, False)):
        affine = np.diag([-2.0, -2.0, 5.0, 1])
        affine[1, 2] = 5 * np.tan(np.deg2rad(degrees))
        path = write(tmp_path / f"{degrees}.nii", values, affine)
        if is_read:
            read_nifti(path)
        else:
            with pytest.raises(DistsegError, match="axes that are not at right angles .a gantry tilt"):
                read_nifti(path)


def test_a_last_axis_of_one_is_one_volume_and_suffixes_come_in_any_case(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for name, array in (("a.NII.GZ", values), ("b.Nii", values[..., None]), ("c.nii.gz", values[..., None, None])):
        volume = read_nifti(write(tmp_path / name.lower(), array, np.eye(4)).rename(tmp_path / name))
        assert volume.values_ZYX.shape == (5, 4, 3) and is_volume(tmp_path / name)
        write_nifti(tmp_path / "mask.nii.gz", volume.values_ZYX.astype(np.uint8), volume)
        assert nib.load(tmp_path / "mask.nii.gz").shape == (3, 4, 5)
    assert [volume_stem(Path(name)) for name in ("a.NII.GZ", "b.Nii", "c.d.nii.gz", "x.gz")] == [
        "a",
        "b",
        "c.d",
        "x.gz",
    ]
    with pytest.raises(DistsegError, match="must be three-dimensional"):
        read_nifti(write(tmp_path / "two.nii", np.stack([values, values], axis=-1), np.eye(4)))


def test_a_header_that_does_not_say_where_it_lies_is_noted(tmp_path: Path) -> None:
    for codes, notes in (((0, 0), 1), ((1, 0), 0), ((0, 1), 0)):
        image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([-1.0, -1.0, 2.0, 1]))
        image.set_qform(image.affine, codes[0])
        image.set_sform(image.affine, codes[1])
        nib.save(image, tmp_path / "v.nii")
        found = read_nifti(tmp_path / "v.nii").notes
        assert len(found) == notes and all("v.nii: its header does not say where it lies" in note for note in found)


def test_voxels_do_not_begin_inside_the_header(tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "v.nii", np.zeros((3, 4, 5), np.int16), np.eye(4)).read_bytes())
    for offset in (0.0, -100.0, 351.0, float("nan")):
        content[108:112] = np.float32(offset).tobytes()
        (tmp_path / "v.nii").write_bytes(content)
        with pytest.raises(DistsegError, match="v.nii: .*download it again"):
            read_nifti(tmp_path / "v.nii")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sform_code", 9, "got sform_code 9; it must be 0 to 5"),
        ("qform_code", -1, "got qform_code -1; it must be 0 to 5"),
        ("pixdim", [-7, 1, 1, 2, 1, 1, 1, 1], "got pixdim"),
        ("pixdim", [1, 0, 1, 2, 1, 1, 1, 1], "got pixdim"),
        ("pixdim", [1, 1, np.nan, 2, 1, 1, 1, 1], "got pixdim"),
        ("magic", b"ni1", "got a header without voxels"),
        ("sizeof_hdr", 349, "no header of NIfTI"),
    ],
)
def test_a_header_that_readers_would_mend_in_different_ways_is_refused(
    field: str, value: object, said: str, tmp_path: Path
) -> None:
    content = write(tmp_path / "v.nii", np.zeros((3, 4, 5), np.int16), np.eye(4)).read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    header[field] = value
    (tmp_path / "v.nii").write_bytes(header.binaryblock + content[348:])
    with pytest.raises(DistsegError, match=f"v.nii: .*{said}"):
        read_nifti(tmp_path / "v.nii")


def test_labels_are_whole_within_rounding_and_told_in_full_where_they_are_not() -> None:
    for values in ([0.9999999, 2.0000002], [1 + 1e-12, 1.9999], np.array([255, 510]) * np.float32(1 / 255)):
        assert whole_labels(Path("m.nii"), np.array(values)).tolist() == [1, 2]
    with pytest.raises(DistsegError, match=r"mask m.nii: got value 0.123456789 \(1 voxels between whole numbers\)"):
        whole_labels(Path("m.nii"), np.array([1.0, 0.123456789]))


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
