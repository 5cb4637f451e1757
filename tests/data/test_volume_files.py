"""MetaImage and NRRD as SimpleITK has them: where voxels lie, what is written back, and what is no such file."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine

from distseg.data.nrrd_files import read_segments, segment_names
from distseg.data.volume import LPS_TO_RAS, Volume
from distseg.data.volume_files import read_volume, write_volume
from distseg.errors import DistsegError

VALUES = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) * 7 - 1000  # z, y, x of the file
SUFFIXES = (".nii.gz", ".mha", ".mhd", ".nrrd")


def image(direction: np.ndarray, values: np.ndarray = VALUES) -> sitk.Image:
    made = sitk.GetImageFromArray(values)
    made.SetSpacing((0.71, 0.83, 2.5))
    made.SetOrigin((-11.3, 20.7, -301.25))
    made.SetDirection(direction.ravel().tolist())
    return made


def directions() -> list[np.ndarray]:
    """48 orders of axes, and 20 rotations."""
    orders = [
        np.eye(3)[list(order)] * np.array(signs)
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    rng = np.random.default_rng(0)
    oblique = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(20)]
    return orders + [turned * np.sign(np.linalg.det(turned)) for turned in oblique]


def corners(read: sitk.Image) -> np.ndarray:
    """Of the voxels' centres in mm, to Left, Posterior, Superior."""
    ends = [(0, n - 1) for n in read.GetSize()]
    return np.array([read.TransformIndexToPhysicalPoint(index) for index in itertools.product(*ends)])


def corners_of(volume: Volume) -> np.ndarray:
    ends = [(0, n - 1) for n in volume.values_ZYX.shape[::-1]]
    assert volume.affine is not None
    return apply_affine(LPS_TO_RAS @ volume.affine, np.array(list(itertools.product(*ends))))


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 3).T)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_voxels_lie_where_simpleitk_says_and_masks_go_back_there(suffix: str, tmp_path: Path) -> None:
    for number, direction in enumerate(directions()):
        path = tmp_path / f"{number}{suffix}"
        sitk.WriteImage(image(direction), str(path), number % 2 == 0)
        read, volume = sitk.ReadImage(str(path)), read_volume([path])
        assert np.abs(in_order(corners(read)) - in_order(corners_of(volume))).max() < 1e-5, number
        for z, y, x in ((0, 0, 0), (1, 3, 4)):  # a voxel has one value in both
            place = apply_affine(
                LPS_TO_RAS @ volume.affine, (x % volume.values_ZYX.shape[2], y % volume.values_ZYX.shape[1], z)
            )
            index = read.TransformPhysicalPointToIndex(place.tolist())
            assert (
                read.GetPixel(index)
                == volume.values_ZYX[z, y % volume.values_ZYX.shape[1], x % volume.values_ZYX.shape[2]]
            )
        for other in SUFFIXES:
            out = tmp_path / f"mask{other}"
            write_volume(out, (volume.values_ZYX > -800).astype(np.uint8), volume)
            mask = sitk.ReadImage(str(out))
            assert np.array_equal(sitk.GetArrayFromImage(mask), VALUES > -800), (number, other)
            exact = 0 if other == suffix else 2e-5
            for mine, theirs in (
                (mask.GetOrigin(), read.GetOrigin()),
                (mask.GetSpacing(), read.GetSpacing()),
                (mask.GetDirection(), read.GetDirection()),
            ):
                assert np.abs(np.subtract(mine, theirs)).max() <= exact, (number, other, mine, theirs)


@pytest.mark.parametrize(
    "kind", [sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkInt32, sitk.sitkUInt16, sitk.sitkFloat32, sitk.sitkFloat64]
)
def test_voxels_of_any_type_are_read(kind: int, tmp_path: Path) -> None:
    written = sitk.Cast(image(np.eye(3), VALUES // 100 + 20), kind)
    for suffix, packed in itertools.product((".mha", ".mhd", ".nrrd"), (False, True)):
        sitk.WriteImage(written, str(tmp_path / f"a{suffix}"), packed)
        assert np.array_equal(read_volume([tmp_path / f"a{suffix}"]).values_ZYX, VALUES // 100 + 20)


def test_big_endian_and_a_detached_header_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"head" + VALUES.astype(">i2").tobytes())
    (tmp_path / "a.mhd").write_text(
        "NDims = 3\nDimSize = 5 4 3\nElementType = MET_SHORT\nBinaryDataByteOrderMSB = True\nElementSize = 1 2 3\nHeaderSize = 4\nElementDataFile = a.raw\n"
    )
    volume = read_volume([tmp_path / "a.mhd"])
    assert np.array_equal(volume.values_ZYX, VALUES) and volume.spacing_mm == (3, 2, 1)
    (tmp_path / "b.raw").write_bytes(VALUES.astype(">i2").tobytes())
    (tmp_path / "b.nhdr").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 3\nspace: LPS\nspace directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\n"
        "encoding: raw\nendian: big\ndata file: b.raw\n"
    )
    volume = read_volume([tmp_path / "b.nhdr"])
    assert np.array_equal(volume.values_ZYX, VALUES) and volume.spacing_mm == (3, 2, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("DimSize = 5 4 3", "DimSize = 5 4 4", "truncated or damaged"),
        ("DimSize = 5 4 3", "DimSize = 5 4 2", "truncated or damaged"),
        ("DimSize = 5 4 3", "DimSize = 99999 99999 99999", "it must hold 1 to"),
        ("NDims = 3", "NDims = 2", "it must be three-dimensional"),
        ("MET_SHORT", "MET_OTHER", "got voxels of type MET_OTHER"),
        ("ElementSpacing = 0.", "ElementSpacing = 0 0.", "got affine"),
        ("ElementSpacing = 0.", "ElementSpacing = nan 0.", "got affine"),
        ("ElementDataFile = LOCAL", "ElementDataFile = LIST", "one file beside the header"),
        ("ElementDataFile = LOCAL", "ElementDataFile = ../secret.raw", "one file beside the header"),
        ("ElementDataFile = LOCAL", "Nothing = LOCAL", "no header of MetaImage"),
        ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", "several values a voxel"),
        ("TransformMatrix = 1 0 0", "TransformMatrix = 1 0.4 0", "not at right angles"),
    ],
)
def test_a_metaimage_that_is_wrong_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    sitk.WriteImage(image(np.eye(3)), str(tmp_path / "a.mha"))
    whole = (tmp_path / "a.mha").read_bytes()
    assert old.encode() in whole
    (tmp_path / "a.mha").write_bytes(whole.replace(old.encode(), new.encode(), 1))
    (tmp_path.parent / "secret.raw").write_bytes(VALUES.tobytes())
    with pytest.raises(DistsegError, match=message):
        read_volume([tmp_path / "a.mha"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sizes: 5 4 3", "sizes: 5 4 4", "damaged or not readable"),
        ("sizes: 5 4 3", "sizes: 99999 99999 99999", "it must hold 1 to"),
        ("space: left-posterior-superior", "space: scanner-xyz", "got space 'scanner-xyz'; it must say"),
        (
            "space: left-posterior-superior",
            'space: left-posterior-superior\nspace units: "cm" "cm" "cm"',
            "got voxel sizes in cm",
        ),
        ("encoding: gzip", "encoding: gzip\ndata file: ../secret.raw", "one file beside the header"),
        ("NRRD0004", "BRRD0004", "damaged or not readable"),
        ("(0.", "(nan", "got .* axes in space|got affine|not readable"),
    ],
)
def test_an_nrrd_that_is_wrong_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    sitk.WriteImage(image(np.eye(3)), str(tmp_path / "a.nrrd"), True)
    whole = (tmp_path / "a.nrrd").read_bytes()
    assert old.encode() in whole
    (tmp_path / "a.nrrd").write_bytes(whole.replace(old.encode(), new.encode(), 1))
    with pytest.raises(DistsegError, match=message):
        read_volume([tmp_path / "a.nrrd"])


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_cut_anywhere_is_one_line(suffix: str, packed: bool, tmp_path: Path) -> None:
    sitk.WriteImage(image(np.eye(3)), str(tmp_path / f"a{suffix}"), packed)
    whole = (tmp_path / f"a{suffix}").read_bytes()
    for part in range(20):
        (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(DistsegError) as caught:
            read_volume([tmp_path / f"a{suffix}"])
        assert "\n" not in str(caught.value)


def test_segments_of_slicer_have_names_in_one_layer_or_several_on_a_part_of_the_grid(tmp_path: Path) -> None:
    lung, nodule = VALUES > -900, VALUES > -650
    fields = {
        "Segment0_Name": "Lung Left",
        "Segment0_LabelValue": "1",
        "Segment0_Layer": "0",
        "Segment1_Name": "Nodule",
    }
    one = image(np.eye(3), np.where(nodule, 2, lung).astype(np.uint8))
    for name, value in (fields | {"Segment1_LabelValue": "2", "Segment1_Layer": "0"}).items():
        one.SetMetaData(name, value)
    sitk.WriteImage(one, str(tmp_path / "one.seg.nrrd"), True)
    import nrrd

    header = nrrd.read_header(str(tmp_path / "one.seg.nrrd"))
    layered = {k: v for k, v in header.items() if k in ("space", "space origin")} | fields
    layered |= {"Segment1_LabelValue": "1", "Segment1_Layer": "1", "kinds": ["list", "domain", "domain", "domain"]}
    layered["space directions"] = np.vstack([np.full(3, np.nan), header["space directions"]])
    nrrd.write(str(tmp_path / "two.seg.nrrd"), np.stack([lung, nodule]).transpose(0, 3, 2, 1).astype(np.uint8), layered)
    for name in ("one", "two"):
        path = tmp_path / f"{name}.seg.nrrd"
        assert segment_names(path) == ["lung_left", "nodule"]
        segments, names = read_segments(path)
        assert names == {1: "lung_left", 2: "nodule"} and np.array_equal(segments.values_ZYX, np.where(nodule, 2, lung))


def test_a_mask_for_slicer_has_a_segment_a_label(tmp_path: Path) -> None:
    sitk.WriteImage(image(np.eye(3)), str(tmp_path / "a.nii.gz"))
    volume = read_volume([tmp_path / "a.nii.gz"])
    mask = np.where(volume.values_ZYX > -650, 2, volume.values_ZYX > -900).astype(np.uint8)
    write_volume(tmp_path / "m.seg.nrrd", mask, volume, labels={"background": 0, "lung": 1, "nodule": 2})
    segments, names = read_segments(tmp_path / "m.seg.nrrd")
    assert names == {1: "lung", 2: "nodule"} and np.array_equal(segments.values_ZYX, mask)
