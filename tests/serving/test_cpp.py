"""The C++ program of export/cpp: Python's masks and headers to the bit, and one line for whatever is wrong."""

import gzip
import itertools
import json
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from torch import nn

from distseg.commands import predict
from distseg.data.dicom import on_grid, read_dicom_series, read_segmentation
from distseg.data.layouts.finding import Asked
from distseg.data.nifti import read_nifti
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.volume import hounsfield
from distseg.errors import DistsegError
from distseg.models.label_map import LabelMap
from distseg.models.segmenter import HuSegmenter
from distseg.serving.exporting import ExportOptions, export_run
from distseg.serving.model import open_model
from distseg.serving.server import find_installation, running_server
from tests.benchmarks.labelled import LABELS, write_labelled
from tests.benchmarks.ports import free_endpoints
from tests.conftest import ROOT, SMALL, shift_heads
from tests.data.test_fuzz import mutated
from tests.serving.test_predict import write_ct

SHARED = ROOT.parent / "shared" / "data"
HEADERS = ("nifti/nifti2_io.h", "nlohmann/json.hpp")
MISSING = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
MISSING += [header for header in HEADERS if not (Path("/usr/include") / header).is_file()]
pytestmark = [
    pytest.mark.cpp,
    pytest.mark.slow(6),  # minutes of compiling, shared
    pytest.mark.skipif(bool(MISSING), reason=f"export/cpp cannot be built without {', '.join(MISSING)}"),
    pytest.mark.timeout(3000),  # the first test builds the program
]
Program = Callable[..., subprocess.CompletedProcess[str]]
FUZZED = 2000


def build(name: str, programs: Sequence[str], *settings: str) -> Path:
    """Builds programs in a folder that stays, so that only the first session compiles all of them."""
    folder = ROOT / "build" / name
    for words in (
        ["cmake", "-S", ROOT / "export/cpp", "-B", folder, f"-DTORCH_WHEEL={Path(torch.__file__).parent}", *settings],
        ["cmake", "--build", folder, "--target", *programs],
    ):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def runner(binary: Path, **environment: str) -> Program:
    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        return subprocess.run(
            [str(word) for word in (binary, *words)], capture_output=True, text=True, timeout=600, env=env, **options
        )

    return run


@pytest.fixture(scope="session")
def built() -> Path:
    return build("cpp", ["distseg_predict"])


@pytest.fixture(scope="session")
def program(built: Path) -> Program:
    return runner(built / "distseg_predict")


def write_model(path: Path, n_slices: int) -> Path:
    """Random weights, whose masks hold every label and tell each axis and direction from the others."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(n_slices, 2, 7, padding=3), nn.InstanceNorm2d(2))
    segmenter = HuSegmenter(
        network, [(-1250, 250)], n_slices, 48, 32, LabelMap({"lung": (1, 2), "infection": (2,)}, 0.5)
    )
    described = {
        "input": {"name": "HU", "shape": ["N", n_slices, "H", "W"]},
        "labels": {"lung": 1, "infection": 2},
        "regions": {"lung": [1, 2], "infection": [2]},
        "weights_sha256": "0",
        "format": "torchscript",
        "device": "any",
        "postprocessing": None,
    }
    path.parent.mkdir()
    torch.jit.script(segmenter.eval()).save(str(path), _extra_files={"distseg.json": json.dumps(described)})
    return path


@pytest.fixture(scope="session")
def one_slice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cpp") / "one" / "model.pt", 1)


@pytest.fixture(scope="session")
def three_slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cpp") / "three" / "model.pt", 3)


@pytest.fixture(scope="session")
def image(phantom: Path) -> nib.Nifti1Image:
    """A CT whose axes differ in length, 48 x 40 x 5 voxels."""
    volume = read_nifti(phantom / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz")
    return nib.Nifti1Image(hounsfield(volume)[0][1:6, :40, :48].T, volume.affine)


def in_order(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    return image.as_reoriented(ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(codes)))


def write_variant(name: str, image: nib.Nifti1Image, path: Path) -> Path:
    """The volume as some scanner or converter might have written it."""
    hu_XYZ, affine = np.asanyarray(image.dataobj), image.affine
    if name == "float32":
        image = nib.Nifti1Image(hu_XYZ.astype(np.float32) + 0.5, affine)
    elif name == "grey":
        image = nib.Nifti1Image((np.clip(hu_XYZ + 1250, 0, 1500) / 1500 * 255).astype(np.uint8), affine)
    elif name == "scaled":
        image = nib.Nifti1Image(hu_XYZ, affine)
        image.set_data_dtype(np.uint16)
        image.header.set_slope_inter(2, -1024)
    elif name == "big-endian":
        image = nib.Nifti1Image(hu_XYZ, affine, nib.Nifti1Header(endianness=">"))
    elif name == "nifti2":
        image = nib.Nifti2Image(hu_XYZ, affine)
    elif name in ("qform", "neither"):
        image = nib.Nifti1Image(hu_XYZ, affine)
        image.header.set_qform(affine, int(name == "qform"))
        image.header.set_sform(affine, 0)
    elif name == "oblique":
        turn = np.array([[0.9, -0.4, 0.1, 7], [0.4, 0.9, -0.1, -3], [-0.05, 0.1, 1, 11], [0, 0, 0, 1]])
        image = nib.Nifti1Image(hu_XYZ, turn @ affine)
    nib.save(image, path)
    return path


VARIANTS = ("int16", "float32", "grey", "scaled", "big-endian", "nifti2", "qform", "neither", "oblique")


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def assert_same_as_python(program: Program, model: Path, source: Path, tmp_path: Path) -> np.ndarray:
    """Both programs write the same bytes, header and voxels; gives the voxels."""
    ours, pythons = tmp_path / f"ours-{source.name}", tmp_path / f"pythons-{source.name}"
    done = program(model, source, ours)
    assert done.returncode == 0, done.stderr
    assert predict.main([str(model), str(source), str(pythons)]) == 0
    assert content(ours) == content(pythons)
    return np.asanyarray(nib.load(ours).dataobj)


@pytest.mark.parametrize("codes", ["RAS", "ASR", "SPL", "IRP"])
def test_axis_orders_give_pythons_mask_and_header(
    codes: str, program: Program, three_slices: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    source = tmp_path / "volume.nii.gz"
    nib.save(in_order(image, codes), source)
    mask = assert_same_as_python(program, three_slices, source, tmp_path)
    assert set(np.unique(mask)) == {0, 1, 2}


def test_all_48_axis_orders_give_pythons_mask_and_header(
    program: Program, three_slices: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    pairs = ("RL", "AP", "SI")
    for axes in itertools.permutations(pairs):
        for codes in itertools.product(*axes):
            source = tmp_path / f"{''.join(codes)}.nii"
            nib.save(in_order(image, "".join(codes)), source)
            assert_same_as_python(program, three_slices, source, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_kinds_of_nifti_give_pythons_mask_and_header(
    name: str, program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    source = write_variant(name, image, tmp_path / "volume.nii")
    assert set(np.unique(assert_same_as_python(program, one_slice, source, tmp_path))) == {0, 1, 2}


def with_extension(plain: bytes, length: int) -> bytes:
    """A NIfTI-1 file with 32 bytes more between header and voxels, an extension that claims a length."""
    offset, announced = struct.pack("<f", 384), b"\1\0\0\0"
    return plain[:108] + offset + plain[112:348] + announced + struct.pack("<ii", length, 6) + b"x" * 24 + plain[352:]


def write_all_kinds(folder: Path, image: nib.Nifti1Image) -> dict[str, bool]:
    """Files of every kind that the table of rules in export/cpp/README.md names -> whether they are volumes."""
    hu, affine = np.asanyarray(image.dataobj), image.affine
    unit = (hu - hu.min()) / np.float64(hu.max() - hu.min())
    verdicts: dict[str, bool] = {}

    def put(name: str, good: bool, values: np.ndarray = hu, mm: np.ndarray = affine, **header: Any) -> Path:
        made = nib.Nifti1Image(values, mm, dtype=values.dtype)
        for key, value in header.items():
            made.header[key] = value
        nib.save(made, folder / name)
        verdicts[name] = good
        return folder / name

    def patch(name: str, good: bool, at: int, value: Any, suffix: str = ".nii") -> None:
        """Bytes of the header changed after libraries had a look at it."""
        content = bytearray(put(name + suffix, good).read_bytes())
        content[at : at + value.nbytes] = value.tobytes()
        (folder / (name + suffix)).write_bytes(content)

    put("hu.nii.gz", True)
    put("hu.nii", True)
    for dtype in ("int16", "int32", "int64", "float32", "float64"):
        put(f"{dtype}.nii", True, hu.astype(dtype))
    put("lung_only.nii", True, np.clip(hu, -1000, -300))
    put("padded.nii", True, np.where(np.arange(hu.shape[0])[:, None, None] < 5, -3024, hu).astype(np.int16))
    put("grey_uint8.nii", True, (unit * 255).astype(np.uint8))
    put("grey_float.nii", True, (unit * 255).astype(np.float32))
    put("grey_int8.nii", True, (unit * 127).astype(np.int8))
    put("label_map.nii", False, (unit * 5).astype(np.uint8))
    put("mask_255.nii", False, np.where(unit > 0.5, 255, 0).astype(np.float32))
    put("spline.nii", False, (unit * 264 - 6).astype(np.float32))
    put("unit.nii", False, unit.astype(np.float32))
    put("minus1to1.nii", False, (2 * unit - 1).astype(np.float32))
    put("z_score.nii", False, ((hu - hu.mean()) / hu.std()).astype(np.float32))
    put("thousandth.nii", False, (hu / 1000).astype(np.float32))
    put("constant.nii", False, np.full_like(hu, -1000))
    put("zeros.nii", False, np.zeros_like(hu))
    put("one_grey.nii", False, np.full(hu.shape, 9, np.uint8))
    put("narrow.nii", False, np.clip(hu, -1024, -800))
    put("no_air.nii", False, np.clip(hu, -150, 1000))
    put("positive.nii", False, (hu + 1100).astype(np.int16))
    put("beyond.nii", False, hu.astype(np.int32) * 40)
    put("nan.nii", False, np.where(hu == hu.max(), np.nan, hu).astype(np.float32))
    put("four_axes.nii", True, hu[..., None])
    put("two_volumes.nii", False, np.stack([hu, hu], axis=-1))
    put("one_slice.nii", True, hu[..., :1])
    put("two_axes.nii", False, hu[..., 0])
    put("metres.nii", False, xyzt_units=1)
    put("micrometres.nii", False, xyzt_units=3)
    put("no_unit.nii", True, xyzt_units=0)
    put("odd_unit.nii", True, xyzt_units=5)
    slanted, nearly = affine.copy(), affine.copy()
    slanted[1, 2], nearly[1, 2] = affine[2, 2] * 0.36, affine[2, 2] * 0.01
    put("gantry_tilt.nii", False, mm=slanted)
    put("rounded_tilt.nii", True, mm=nearly)
    patch("codes_0", True, 252, np.zeros(2, np.int16))
    for name, offset, good in (
        ("nan", np.nan, False),
        ("minus", -100, False),
        ("0", 0, False),
        ("351", 351, False),
        ("352", 352, True),
    ):
        patch(f"offset_{name}", good, 108, np.float32(offset))
    patch("offset_inf", False, 108, np.float32(np.inf))
    patch("magic_of_a_pair", False, 344, np.array(b"ni1", "S4"))
    patch("header_length", False, 0, np.int32(349))
    patch("sign_0", True, 76, np.float32(0))
    patch("sign_-7", False, 76, np.float32(-7))
    for name, size, good in (("minus", -0.8, True), ("0", 0, False), ("nan", np.nan, False)):
        patch(f"size_{name}", good, 80, np.float32(size))
    patch("qform_code_-1", False, 252, np.array([-1, 1], np.int16))
    patch("sform_code_9", False, 252, np.array([1, 9], np.int16))
    patch("unused_quaternion_nan", True, 252, np.array([0, 1] + 6 * [0x7FC0], np.int16))
    patch("long_quaternion", False, 252, np.frombuffer(struct.pack("<2h3f", 1, 0, 0.9, 0.9, 0), np.uint8))
    patch("slope_nan", True, 112, np.float32(np.nan))
    patch("slope_0", True, 112, np.zeros(2, np.float32))
    patch("intercept_nan", False, 112, np.array([1, np.nan], np.float32))
    patch("scaled", True, 112, np.array([2, -24], np.float32))
    patch("flat_voxels", False, 280, np.diag([-1, -1, 0, 1])[:3].astype(np.float32))
    patch("affine_nan", False, 280, np.full(4, np.nan, np.float32))
    plain, packed = (folder / "hu.nii").read_bytes(), (folder / "hu.nii.gz").read_bytes()
    for name, content, good in (
        ("upper.NII.GZ", packed, True), ("mixed.Nii", plain, True), ("raw.nii.gz", plain, False), ("packed.nii", packed, False),
        ("cut.nii", plain[:-1], False), ("longer.nii", plain + b"more", True), ("cut.nii.gz", packed[:-9], False), ("empty.nii", b"", False),
        ("text.nii.gz", b"<html>504</html>" * 40, False), ("extension.nii", with_extension(plain, 32), True),
        ("long_extension.nii", with_extension(plain, 999), False), ("negative_extension.nii", with_extension(plain, -16), False),
    ):  # fmt: skip
        (folder / name).write_bytes(content)
        verdicts[name] = good
    return verdicts


def test_both_programs_take_and_refuse_the_same_files(
    program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    verdicts, wrong = write_all_kinds(tmp_path / "in", image), {}
    for name, good in verdicts.items():
        source, ours, pythons = tmp_path / "in" / name, tmp_path / f"c_{name.lower()}", tmp_path / f"p_{name.lower()}"
        done = program(one_slice, source, ours)
        python = predict.main([str(one_slice), str(source), str(pythons)])
        if (done.returncode == 0, python == 0) != (good, good):
            wrong[name] = (good, done.returncode, done.stderr, python)
        elif good and content(ours) != content(pythons):
            wrong[name] = "other bytes"
    assert len(verdicts) == 73 and wrong == {}


def test_a_declared_intensity_is_taken_alike(
    program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    hu, wrong = np.asanyarray(image.dataobj), {}
    kinds = {
        "no_air": np.clip(hu, -150, 1000), "grey": np.clip(hu / 8 + 125, 0, 255).astype(np.float32), "hu": hu,
        "spline": np.linspace(-6, 258, hu.size, dtype=np.float32).reshape(hu.shape), "air": np.full_like(hu, -1000),
    }  # fmt: skip
    accepted = {("no_air", "hu"), ("grey", "grey"), ("hu", "hu"), ("spline", "grey"), ("spline", "hu"), ("air", "hu")}
    for name, intensity in itertools.product(kinds, ("hu", "grey")):
        source = tmp_path / f"{name}.nii"
        nib.save(nib.Nifti1Image(kinds[name], image.affine), source)
        ours, pythons = tmp_path / f"c_{intensity}_{name}.nii", tmp_path / f"p_{intensity}_{name}.nii"
        done = program(one_slice, source, ours, "--intensity", intensity)
        python = predict.main([str(one_slice), str(source), str(pythons), "--intensity", intensity])
        good = (name, intensity) in accepted
        if (done.returncode == 0, python == 0) != (good, good) or good and content(ours) != content(pythons):
            wrong[name, intensity] = (good, done.returncode, done.stderr, python)
    assert wrong == {}


def test_exported_run_gives_pythons_mask_and_its_description(
    program: Program, model: Path, phantom: Path, tmp_path: Path
) -> None:
    source = phantom / "COVID-19-CT-Seg_20cases/phantom_002.nii.gz"
    mask = assert_same_as_python(program, model / "model.pt", source, tmp_path)
    said = program(model / "model.pt", source, tmp_path / "again.nii.gz").stdout
    described = json.loads((model / "model.json").read_text())
    for word in (described["weights_sha256"], "slices/s", f"lung: {np.count_nonzero(mask)} voxels, "):
        assert word in said


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CT data are not on this machine")
def test_real_volumes_give_pythons_mask_and_header(program: Program, three_slices: Path, tmp_path: Path) -> None:
    for source in sorted((SHARED / "hu_samples").glob("*.nii.gz")):
        assert set(np.unique(assert_same_as_python(program, three_slices, source, tmp_path))) == {0, 1, 2}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_npy_is_hu_and_its_mask_is_npy(
    batch_size: int, program: Program, three_slices: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    hu_ZYX = np.ascontiguousarray(np.asanyarray(image.dataobj).T)
    np.save(tmp_path / "hu.npy", hu_ZYX)
    done = program(three_slices, tmp_path / "hu.npy", tmp_path / "mask.npy", "--batch", batch_size, "--threads", 1)
    assert done.returncode == 0, done.stderr
    mask_ZYX = np.load(tmp_path / "mask.npy")
    assert mask_ZYX.dtype == np.uint8
    expected_ZYX, _ = open_model(three_slices, torch.device("cpu")).segment(hu_ZYX, batch_size)
    np.testing.assert_array_equal(mask_ZYX, expected_ZYX)


def test_rules_for_whole_volumes_are_named_as_not_applied(
    program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    extra = {"distseg.json": ""}
    loaded = torch.jit.load(one_slice, _extra_files=extra)
    described = json.loads(extra["distseg.json"]) | {"postprocessing": {"infection": {"components": 1}}}
    loaded.save(str(tmp_path / "model.pt"), _extra_files={"distseg.json": json.dumps(described)})
    source = write_variant("int16", image, tmp_path / "volume.nii")
    assert (
        "not applied: post-processing of whole volumes"
        in program(tmp_path / "model.pt", source, tmp_path / "m.nii").stdout
    )
    assert "not applied" not in program(one_slice, source, tmp_path / "m.nii").stdout


def test_wrong_use_exits_with_2_and_help_with_0(program: Program) -> None:
    helped = program("--help")
    assert helped.returncode == 0 and "--batch" in helped.stdout
    for words in ([], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "--batch", "0"], ["a", "b", "c", "--batch"],
                  ["a", "b", "c", "--device", "tpu"], ["a", "b", "c", "--threads", "two"], ["a", "b", "c", "--fast"]):  # fmt: skip
        done = program(*words)
        assert done.returncode == 2 and "usage:" in done.stderr, words


def write_bad_inputs(folder: Path, image: nib.Nifti1Image, model: Path) -> dict[str, tuple[list[Path], str]]:
    """What a user may get wrong: [model, input, output] and words that the message must have."""
    good, out = write_variant("int16", image, folder / "good.nii"), folder / "mask.nii"
    hu_XYZ = np.asanyarray(image.dataobj)
    whole = good.read_bytes()
    packed = gzip.compress(whole)

    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def saved(name: str, values: np.ndarray) -> Path:
        nib.save(nib.Nifti1Image(values, image.affine), folder / name)
        return folder / name

    def header_with(name: str, **fields: object) -> Path:
        header = image.header.copy()
        for field, value in {"vox_offset": 352, **fields}.items():
            header[field] = value
        return written(name, header.binaryblock + whole[348:])

    def array(name: str, values: np.ndarray) -> Path:
        np.save(folder / name, values)
        return folder / name

    with_nan = hu_XYZ.astype(np.float32)
    with_nan[3, 3, 3] = np.nan
    npy = array("good.npy", hu_XYZ.T.copy())
    bare = folder / "bare.pt"
    torch.jit.script(nn.Identity()).save(str(bare))
    inputs = {
        "missing": (folder / "none.nii.gz", "no such file"),
        "no volume": (written("notes.txt", b"hello"), "must end in"),
        "truncated": (written("short.nii", whole[:-100]), "more than the file can hold"),
        "only a header": (written("header.nii", whole[:348]), "more than the file can hold"),
        "truncated gzip": (written("short.nii.gz", packed[: len(packed) // 2]), "truncated or damaged"),
        "gzip without its end": (written("end.nii.gz", packed[:-4]), "truncated or damaged"),
        "wrong checksum": (written("sum.nii.gz", packed[:-8] + b"\1\2\3\4" + packed[-4:]), "truncated or damaged"),
        "no NIfTI": (written("noise.nii", b"noise" * 500), "no header of NIfTI"),
        "huge claim": (
            header_with("huge.nii", dim=[3, 2000, 2000, 500, 1, 1, 1, 1]),
            "more than the file can hold",
        ),
        "absurd claim": (header_with("absurd.nii", dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "2^31"),
        "no voxels": (header_with("empty.nii", dim=[3, 0, 40, 5, 1, 1, 1, 1]), "truncated or damaged"),
        "four dimensions": (saved("four.nii", np.stack([hu_XYZ, hu_XYZ], axis=-1)), "in 4 dimensions"),
        "affine of NaN": (header_with("lost.nii", srow_x=[np.nan, 0, 0, 0]), "not finite"),
        "affine of rank 2": (header_with("flat.nii", srow_x=[0, 0, 0, 0]), "span space"),
        "complex numbers": (saved("complex.nii", hu_XYZ.astype(np.complex64)), "COMPLEX64"),
        "NaN": (saved("nan.nii", with_nan), "NaN"),
        "no CT": (saved("mr.nii", hu_XYZ - hu_XYZ.min() + np.int16(300)), "neither HU"),
        "npy of floats": (array("f.npy", hu_XYZ.T.astype(np.float32)), "type <f4"),
        "npy in Fortran order": (array("o.npy", np.asfortranarray(hu_XYZ.T)), "Fortran"),
        "npy of rank 2": (array("r.npy", hu_XYZ[0]), "rank 2"),
        "truncated npy": (written("t.npy", npy.read_bytes()[:-1]), "header and length disagree"),
    }
    bad = {
        name: ([model, path, out.with_suffix(".npy" if path.suffix == ".npy" else ".nii")], words)
        for name, (path, words) in inputs.items()
    }
    return bad | {
        "no model": ([folder / "none.pt", good, out], "no such file"),
        "a model of noise": ([written("noise.pt", b"noise" * 500), good, out], "not a readable TorchScript file"),
        "another's model": ([bare, good, out], "without distseg.json"),
        "output below a file": ([model, good, good / "mask.nii"], "cannot be written"),
        "output is a folder": ([model, good, folder / "sub.nii"], "cannot be written"),
        "output of another format": ([model, good, folder / "mask.npy"], "must end in .nii.gz or .nii"),
        "output is the input": ([model, good, good], "is the input"),
    }  # fmt: skip


def test_bad_inputs_are_one_line_and_leave_no_output(
    program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    (tmp_path / "sub.nii" / "full").mkdir(parents=True)
    bad = write_bad_inputs(tmp_path, image, one_slice)
    before = sorted(tmp_path.rglob("*"))
    for name, (words, expected) in bad.items():
        done = program(*words)
        assert done.returncode == 1, (name, done.stdout, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr, name
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(
    program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    source = write_variant("int16", image, tmp_path / "volume.nii")
    done = program(one_slice, source, tmp_path / "mask.nii", "--device", "cuda")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "--device" in done.stderr


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "npy"])
def test_full_disk_leaves_the_old_mask(
    suffix: str, program: Program, one_slice: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    if suffix == "npy":
        np.save(tmp_path / "volume.npy", np.asanyarray(image.dataobj).T.copy())
    else:
        nib.save(image, tmp_path / f"volume.{suffix}")
    out = tmp_path / f"mask.{suffix}"
    out.write_bytes(b"an earlier mask")

    def fill_disk() -> None:
        """No file may grow beyond 300 bytes; Python ignores the signal that says so, and lets its child ignore it too."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    done = program(one_slice, tmp_path / f"volume.{suffix}", out, preexec_fn=fill_disk, restore_signals=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "cannot be written" in done.stderr
    assert out.read_bytes() == b"an earlier mask" and len(list(tmp_path.iterdir())) == 2


def fuzzed(folder: Path, image: nib.Nifti1Image, count: int) -> list[Path]:
    """Damaged files of each format, every second gzip one damaged inside."""
    nib.save(image, folder / "good.nii")
    np.save(folder / "good.npy", np.asanyarray(image.dataobj).T.copy())
    nii, npy = (folder / "good.nii").read_bytes(), (folder / "good.npy").read_bytes()
    rng = np.random.default_rng(8)
    kinds: dict[str, Callable[[], bytes]] = {
        "nii": lambda: mutated(nii, npy, rng),
        "gz": lambda: gzip.compress(mutated(nii, npy, rng), 1),
        "nii.gz": lambda: mutated(gzip.compress(nii, 1), nii, rng),
        "npy": lambda: mutated(npy, nii, rng),
    }
    paths = []
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        paths.append(folder / f"{number}.{'nii.gz' if kind == 'gz' else kind}")
        paths[-1].write_bytes(kinds[kind]())
    return paths


def assert_refused_or_read(fuzz: Program, paths: list[Path]) -> None:
    """Every file is refused in one line, or read and its mask written; some the one, some the other."""
    done = fuzz(*paths)
    said = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), (done.stderr[-3000:], paths[len(said) : len(said) + 1])
    assert len(said) == len(paths)
    for path, line in zip(paths, said, strict=True):
        mask = path.with_name(f"mask-{path.name}")
        assert mask.exists() == (line == "read"), line
        if line == "read":
            voxels = np.load(mask) if path.suffix == ".npy" else np.asanyarray(nib.load(mask).dataobj)
            assert voxels.dtype == np.uint8 and voxels.ndim == 3 and not voxels.any()
        else:
            assert line.startswith(f"refused volume {path}: "), line
    assert len(paths) // 10 < said.count("read") < len(paths) * 9 // 10


def test_sanitizers_find_nothing_in_good_bad_and_damaged_files(
    one_slice: Path, three_slices: Path, image: nib.Nifti1Image, tmp_path: Path
) -> None:
    folder = build("cpp-sanitized", ["distseg_predict", "fuzz_volumes"], "-DDISTSEG_SANITIZE=ON")
    # libtorch keeps what it made until the process ends, which would count as leaks.
    program, fuzz = (
        runner(folder / name, ASAN_OPTIONS="detect_leaks=0") for name in ("distseg_predict", "fuzz_volumes")
    )
    for name in VARIANTS:
        source = write_variant(name, image, tmp_path / f"{name}.nii.gz")
        done = program(three_slices, source, tmp_path / f"mask-{name}.nii.gz")
        assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "sub.nii" / "full").mkdir(parents=True)
    for name, (words, expected) in write_bad_inputs(tmp_path, image, one_slice).items():
        done = program(*words)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and expected in done.stderr, (name, done.stderr)
    assert_refused_or_read(fuzz, fuzzed(tmp_path, image, FUZZED))


def test_five_lobes_keep_their_names_and_masks_from_the_store_to_c_plus_plus_triton_and_dicom_seg(
    program: Program, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    write_labelled(tmp_path / "src", "lobes", cases=4, size=64, n_slices=6)
    prepare_store(
        tmp_path / "src", tmp_path / "store", FoldRule(2), asked=Asked(labels={"background": 0} | LABELS["lobes"])
    )
    run, model, names = tmp_path / "run", tmp_path / "model", list(LABELS["lobes"])
    words = [*SMALL, f"data.store={tmp_path / 'store'}", "train.max_steps=2", f"output_dir={run}"]
    said = run_command("distseg", "train", *words).stdout
    assert "right_upper = label 3 (right_upper)" in said and "images are not flipped" in said
    shift_heads(run, shares=[0.4] * 5)  # most pixels would be in several
    described = export_run(run, model, ExportOptions(precision="float32"))
    assert described["labels"] == {"background": 0} | LABELS["lobes"] and len(described["exclusive"]) == 10
    source = tmp_path / "src/images/case_0.nii.gz"
    mask = assert_same_as_python(program, model / "model.pt", source, tmp_path)
    assert set(np.unique(mask)) == set(range(6))
    series = write_ct(tmp_path / "series", read_nifti(source).values_ZYX)
    assert predict.main([str(model), str(series), str(tmp_path / "mask.dcm"), "--format", "dicom-seg"]) == 0
    segmentation = hd.seg.segread(tmp_path / "mask.dcm")
    found, _ = read_segmentation(tmp_path / "mask.dcm")
    assert np.array_equal(on_grid(found, read_dicom_series(sorted(series.iterdir()))), mask.T)
    described_segments = [segmentation.get_segment_description(n) for n in range(1, 6)]
    assert [segment.segment_label for segment in described_segments] == names
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in described_segments}) == 5
    try:
        installed = find_installation()
    except DistsegError:
        return  # no Triton here; its own tests say so
    endpoints = free_endpoints()
    with running_server(installed, model / "model_repository_python", endpoints):
        assert predict.main(["--server", endpoints.grpc, str(source), str(tmp_path / "triton.nii.gz")]) == 0
    assert content(tmp_path / "triton.nii.gz") == content(tmp_path / f"pythons-{source.name}")
