"""MetaImage and NRRD beside NIfTI: SimpleITK says where each voxel lies, in any of 48 axis orders and 20 oblique ones."""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import nrrd
import numpy as np
import pytest

from distseg.commands.prepare import prepare
from distseg.data.file_kinds import left_out_in_words, volume_stem
from distseg.data.label_names import names_of_segments
from distseg.data.layouts.source import CaseSource, MaskSource
from distseg.data.masks import read_labels
from distseg.data.nrrd import read_segments, segment_names
from distseg.data.volume_files import read_label_map, read_volume, write_volume
from distseg.errors import DistsegError

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is the oracle here; it is no dependency of distseg")
pytestmark = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcnow:DeprecationWarning"
)  # pynrrd 1.1 on Python 3.12
FORMATS = ("nii.gz", "mha", "mhd", "nrrd")
SHAPE = (4, 5, 6)
SPACING, ORIGIN = (0.7, 0.8123456, 2.5), (-113.1, 22.7, -500.3)
VALUES = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def directions() -> Iterator[np.ndarray]:
    """48 axis orders, and 20 oblique geometries."""
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        yield np.eye(3)[list(order)].T * np.array(signs)
    rng = np.random.default_rng(0)
    for _ in range(20):
        yield np.linalg.qr(rng.normal(size=(3, 3)))[0]


def write(path: Path, direction: np.ndarray | None = None, values: np.ndarray = VALUES) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=path.suffix in (".mha", ".nrrd"))
    return path


def geometry(image: "sitk.Image") -> np.ndarray:
    return np.array([*image.GetOrigin(), *image.GetSpacing(), *image.GetDirection()])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_voxel_lies_where_simpleitk_has_it_and_so_does_the_mask_that_is_written_back(
    kind: str, tmp_path: Path
) -> None:
    for direction in directions():
        theirs = sitk.ReadImage(str(write(tmp_path / f"v.{kind}", direction)))
        volume = read_volume([tmp_path / f"v.{kind}"])
        assert volume.affine is not None
        for corner in itertools.product(*((0, n - 1) for n in volume.values_ZYX.shape)):
            place = (volume.affine @ [*corner[::-1], 1])[:3] * [-1, -1, 1]
            index = np.rint(theirs.TransformPhysicalPointToContinuousIndex(place.tolist())).astype(int).tolist()
            assert np.abs(place - theirs.TransformIndexToPhysicalPoint(index)).max() < 1e-5
            assert volume.values_ZYX[corner] == theirs[index]
        write_volume([tmp_path / f"m.{kind}"], (volume.values_ZYX > 0).astype(np.uint8), volume)
        mask = sitk.ReadImage(str(tmp_path / f"m.{kind}"))
        assert np.array_equal(geometry(mask), geometry(theirs)) and mask.GetPixelID() == sitk.sitkUInt8
        assert np.array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(theirs) > 0)


def test_a_mask_in_another_format_has_its_volume_s_axes_and_place(tmp_path: Path) -> None:
    direction = list(directions())[29]
    for source, kind in itertools.product(FORMATS, FORMATS):
        theirs = sitk.ReadImage(str(write(tmp_path / f"v.{source}", direction)))
        volume = read_volume([tmp_path / f"v.{source}"])
        write_volume([tmp_path / f"m.{kind}"], (volume.values_ZYX > 0).astype(np.float32), volume)
        mask = sitk.ReadImage(str(tmp_path / f"m.{kind}"))
        np.testing.assert_allclose(geometry(mask), geometry(theirs), rtol=0, atol=1e-4)
        assert np.array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(theirs) > 0)
        assert np.array_equal(read_volume([tmp_path / f"m.{kind}"]).values_ZYX, volume.values_ZYX > 0)


@pytest.mark.parametrize("kind", ["mha", "mhd", "nrrd", "nhdr"])
def test_every_type_of_voxel_is_read_as_simpleitk_wrote_it(kind: str, tmp_path: Path) -> None:
    for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"):
        values = VALUES.astype(code)
        read = read_volume([write(tmp_path / f"{code}.{kind}", values=values)]).values_ZYX
        assert read.dtype == values.dtype and np.array_equal(read, values), code


def test_big_endian_voxels_and_other_names_of_the_same_line_are_read(tmp_path: Path) -> None:
    text = "NDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementSize = 0.7 0.8 2.5\nPosition = 1 2 3\nRotation = 1 0 0 0 1 0 0 0 1\n"
    text += "ElementByteOrderMSB = True\nElementDataFile = LOCAL\n"
    (tmp_path / "v.mha").write_bytes(text.encode() + VALUES.astype(">i2").tobytes())
    volume = read_volume([tmp_path / "v.mha"])
    assert np.array_equal(volume.values_ZYX, VALUES) and volume.spacing_mm == (2.5, 0.8, 0.7) and volume.notes == ()
    assert volume.affine is not None and volume.affine[:3, 3].tolist() == [-1, -2, 3]
    header = {"space": "RAS", "space directions": np.diag([1.0, 1, 2]), "space origin": [1, 2, 3], "endian": "big"}
    nrrd.write(str(tmp_path / "v.nrrd"), VALUES.T.astype(">i2"), header | {"encoding": "bzip2"})
    assert np.array_equal(read_volume([tmp_path / "v.nrrd"]).values_ZYX, VALUES[:, ::-1, ::-1])


def test_a_header_that_does_not_say_how_it_lies_is_noted(tmp_path: Path) -> None:
    lines = write(tmp_path / "v.mha").read_bytes().replace(b"TransformMatrix", b"Xransform_atrix", 1)
    (tmp_path / "v.mha").write_bytes(lines)
    assert "v.mha: its header has no TransformMatrix" in read_volume([tmp_path / "v.mha"]).notes[0]
    (tmp_path / "v.mha").write_bytes(write(tmp_path / "v.mha").read_bytes().replace(b"Offset", b"Offzet", 1))
    assert "v.mha: its header has no Offset" in read_volume([tmp_path / "v.mha"]).notes[0]
    nrrd.write(str(tmp_path / "v.nrrd"), VALUES.T, {"spacings": [1.0, 2.0, 3.0]})
    volume = read_volume([tmp_path / "v.nrrd"])
    assert volume.spacing_mm == (3, 2, 1) and "v.nrrd: its header does not say where it lies" in volume.notes[0]
    write_volume([tmp_path / "m.nrrd"], VALUES.astype(np.uint8), volume)
    assert nrrd.read_header(str(tmp_path / "m.nrrd"))["spacings"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("mha", b"ElementSpacing", b"ElementSpacinh", "without ElementSpacing"),
        ("mha", b"ElementType = MET_SHORT", b"ElementType = MET_SHRT", "got ElementType MET_SHRT; it must be one of"),
        ("mha", b"DimSize = 6 5 4", b"DimSize = 6 5 3", "the header claims 180 bytes of voxels"),
        ("mha", b"DimSize = 6 5 4", b"DimSize = 6 5 9999", "the header claims"),
        ("mha", b"DimSize = 6 5 4", b"DimSize = 90000 90000 90000", "it must hold 1 to 2147483648 voxels"),
        ("mha", b"DimSize = 6 5 4", b"DimSize = 30 4", "it must be three-dimensional"),
        ("mha", b"TransformMatrix = 1 0", b"TransformMatrix = 1 2", "axes have length 1"),
        ("mha", b"TransformMatrix = 1 0 0 0 1", b"TransformMatrix = 1 0 0 .6 .8", "not at right angles"),
        ("mha", b"BinaryData = True", b"BinaryData = False", "got BinaryData = False; only True is read"),
        ("mha", b"NDims = 3", b"NDims = 3\nElementNumberOfChannels = 3", "got ElementNumberOfChannels = 3"),
        ("mha", b"NDims = 3", b"NDims = 3\nNDims = 4", "got header line 'NDims = 4'"),
        ("mha", b"Offset = -", b"Offset = nan ", "it must be 3 numbers"),
        ("mhd", b"ElementDataFile = v.raw", b"ElementDataFile = LIST", "got voxels in several files"),
        ("mhd", b"ElementDataFile = v.raw", b"ElementDataFile = v%02d.raw 1 9 1", "got voxels in several files"),
        ("mhd", b"ElementDataFile = v.raw", b"ElementDataFile = ../v.raw", "they lie beside the header"),
        ("mhd", b"ElementDataFile = v.raw", b"ElementDataFile = /etc/passwd", "they lie beside the header"),
        ("mhd", b"ElementDataFile = v.raw", b"ElementDataFile = gone.raw", "got no gone.raw beside it"),
        ("nhdr", b"data file: v.raw", b"data file: ../../v.raw", "they lie beside the header"),
        ("nrrd", b"sizes: 6 5 4", b"sizes: 6 5 3", "the header claims 180 bytes of voxels"),
        ("nrrd", b"sizes: 6 5 4", b"sizes: 99999 99999 99999", "it must hold 1 to 2147483648 voxels"),
        ("nrrd", b"type: int16", b"type: block", "got type block"),
        ("nrrd", b"type: short", b"type: float", "the header claims 480 bytes"),
        ("nrrd", b"endian: little", b"endian: none", "got endian none"),
        ("nrrd", b"encoding: gzip", b"encoding: hex", "got encoding hex"),
        ("nrrd", b"space: left", b"space: up", "got space up-posterior-superior"),
        ("nrrd", b"space directions", b"space durections", "without space directions or spacings"),
        ("nrrd", b"space directions: (0.", b"space directions: (x.", "damaged or not readable"),
        ("nrrd", b"NRRD000", b"NRXD000", "no header of NRRD"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_rightly_is_refused_by_name(
    kind: str, old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"v.{kind}")
    content = path.read_bytes()
    old = old if old in content else old.replace(b"int16", b"short")
    assert content.count(old) == 1, content[:600]
    path.write_bytes(content.replace(old, new))
    with pytest.raises(DistsegError, match="v.(mha|mhd|nrrd|nhdr)") as caught:
        read_volume([path])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mha", "mhd", "nrrd", "nhdr"])
def test_a_file_that_was_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"v.{kind}")
    for path in [whole, *(tmp_path / f"v{s}" for s in (".raw",) if kind in ("mhd", "nhdr"))]:
        content = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(content[: len(content) * tenth // 10])
            with pytest.raises(DistsegError):
                read_volume([whole])
        path.write_bytes(content + b"\0")
        if path != whole:
            with pytest.raises(DistsegError, match="truncated or damaged"):
                read_volume([whole])
        path.write_bytes(content)
    assert np.array_equal(read_volume([whole]).values_ZYX, VALUES)


def test_no_more_is_unpacked_than_the_header_claims(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mha")
    head = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")[0].replace(b"CompressedDataSize", b"Unknown")
    path.write_bytes(head + b"ElementDataFile = LOCAL\n" + zlib.compress(b"\0" * 2**28))
    with pytest.raises(DistsegError, match="the header claims 240 bytes of voxels"):
        read_volume([path])


SEGMENTS = {
    "Segment0_Name": "Infektion, beidseitig", "Segment0_LabelValue": "1", "Segment0_Layer": "0",
    "Segment1_Name": "Lunge fuer alle", "Segment1_LabelValue": "1", "Segment1_Layer": "1",
}  # fmt: skip


def write_segmentation(path: Path, layered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Infection (segment 1) in the lung (segment 2), cropped as 3D Slicer does: in two layers, or one."""
    lung, infection = VALUES > -500, VALUES > 500
    cropped = [part[1:, :, 2:] for part in (infection, lung)]
    header = {"space": "left-posterior-superior", "encoding": "gzip", **SEGMENTS}
    header["space origin"] = np.array(ORIGIN) + np.array([2, 0, 1]) * SPACING
    directions = np.diag(SPACING)
    if layered:
        values = np.stack([part.T for part in cropped])
        header |= {
            "kinds": ["list", "domain", "domain", "domain"],
            "space directions": np.vstack([[np.nan] * 3, directions]),
        }
    else:
        values = np.where(cropped[0], 1, np.where(cropped[1], 2, 0)).T
        header |= {"space directions": directions, "Segment1_LabelValue": "2", "Segment1_Layer": "0"}
    nrrd.write(str(path), values.astype(np.uint8), header)
    content = path.read_bytes()  # pynrrd writes ASCII, 3D Slicer UTF-8
    path.write_bytes(content.replace(b"Lunge fuer alle", "Lunge für alle".encode()))
    lung[0], infection[0] = False, False
    lung[..., :2], infection[..., :2] = False, False
    return lung, infection


@pytest.mark.parametrize("layered", [False, True])
def test_segments_of_slicer_go_by_name_and_the_higher_label_lies_on_top(layered: bool, tmp_path: Path) -> None:
    lung, infection = write_segmentation(tmp_path / "s.seg.nrrd", layered)
    names = {1: "infektion_beidseitig", 2: "lunge_für_alle"}
    assert segment_names(tmp_path / "s.seg.nrrd") == names
    assert names_of_segments([tmp_path / "s.seg.nrrd"]) == list(names.values())
    assert volume_stem(tmp_path / "s.seg.nrrd") == "s"
    source = CaseSource("s", "s", (write(tmp_path / "v.nrrd"),), ())
    labels = {"infektion_beidseitig": 2, "lunge_für_alle": 1}
    mask = MaskSource((tmp_path / "s.seg.nrrd",), {1: 1, 2: 2}, labels)
    volume = read_volume(source.files)
    read = read_labels(CaseSource("s", "s", source.files, (mask,)), volume)
    assert np.array_equal(read, np.where(infection, 2, lung))
    assert np.array_equal(
        read_segments(tmp_path / "s.seg.nrrd", {1: 1, 2: 1}).values_ZYX, (lung | infection)[1:, :, 2:]
    )
    unknown = MaskSource((tmp_path / "s.seg.nrrd",), {1: 1}, {"lung": 1})
    with pytest.raises(DistsegError, match="got segment 'infektion_beidseitig'"):
        read_labels(CaseSource("s", "s", source.files, (unknown,)), volume)
    if layered:
        with pytest.raises(DistsegError, match="a volume has one value a voxel"):
            read_volume([tmp_path / "s.seg.nrrd"])


def test_a_label_map_called_seg_nrrd_without_names_is_a_label_map(tmp_path: Path) -> None:
    path = write(tmp_path / "s.seg.nrrd", values=(VALUES > 0).astype(np.uint8))
    assert names_of_segments([path]) == [] and np.array_equal(read_label_map([path]).values_ZYX, VALUES > 0)


@pytest.mark.parametrize("kind", ["mha", "mhd", "nrrd", "nhdr", "seg.nrrd"])
def test_a_store_of_any_format_holds_what_that_of_nifti_holds(kind: str, tmp_path: Path) -> None:
    direction = list(directions())[30]
    for number, folder in itertools.product(range(3), ("images", "labels")):
        values = (
            np.roll(VALUES, number, axis=0)
            if folder == "images"
            else (np.roll(VALUES, number, axis=0) > 0).astype(np.uint8)
        )
        for own in ("nii.gz", kind):
            (tmp_path / own / folder).mkdir(parents=True, exist_ok=True)
            suffix = own if folder == "labels" else own.removeprefix("seg.")
            write(tmp_path / own / folder / f"p{number}.{suffix}", direction, values)
    words = {"folds": 2, "workers": 1, "labels": {"lung": 1}}
    mine, theirs = (prepare(tmp_path / own, tmp_path / "stores" / own, **words) for own in (kind, "nii.gz"))
    for case, other in zip(mine.cases, theirs.cases, strict=True):
        assert case.id == other.id and case.spacing_mm == pytest.approx(other.spacing_mm, abs=1e-6)
        for read, expected in zip(mine.read_case(case), theirs.read_case(other), strict=True):
            assert np.array_equal(read, expected)
    if kind == "mhd":  # voxels beside a header count, too
        raw = tmp_path / kind / "images/p0.raw"
        raw.write_bytes((np.frombuffer(raw.read_bytes(), np.int16) + 1).astype(np.int16).tobytes())
        again = prepare(tmp_path / kind, tmp_path / "stores" / kind, **words)
        changed = [one.sha256 != other.sha256 for one, other in zip(again.cases, mine.cases, strict=True)]
        assert changed == [True, False, False]


def test_files_that_are_read_through_another_are_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "v.mhd")
    for name in ("other.raw", "notes.json", "t.tif", "t.json"):
        (tmp_path / name).touch()
    beside = [tmp_path / name for name in ("v.raw", "other.raw", "notes.json", "t.json")]
    assert left_out_in_words(beside, tmp_path) == "left out: other.raw, notes.json"
    assert left_out_in_words(beside[:1], tmp_path) == ""


def test_a_mask_for_slicer_has_a_segment_a_label(tmp_path: Path) -> None:
    volume = read_volume([write(tmp_path / "v.mha", list(directions())[50])])
    mask_ZYX = np.where(volume.values_ZYX > 500, 2, volume.values_ZYX > -500).astype(np.uint8)
    write_volume([tmp_path / "m.seg.nrrd"], mask_ZYX, volume, labels={"background": 0, "lung": 1, "nodule": 2})
    assert segment_names(tmp_path / "m.seg.nrrd") == {1: "lung", 2: "nodule"}
    assert np.array_equal(read_segments(tmp_path / "m.seg.nrrd", {1: 1, 2: 2}).values_ZYX, mask_ZYX)
    assert np.array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m.seg.nrrd"))) > 0,
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "v.mha"))) > -500,
    )
