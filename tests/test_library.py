"""`import distseg` in notebooks and other programs: the masks of `distseg predict`, whatever a volume is given as."""

import ast
import doctest
import gzip
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import distseg
from distseg.commands import predict
from distseg.data.nifti import read_nifti
from distseg.library.segmentation import Segmentation, SegmentationModel
from distseg.serving import model as serving
from tests.conftest import ROOT
from tests.data.test_dicom import write_dicom_set

SERIES = "COVID-19-CT-Seg_20cases"
AXES = ("RAS", "LPS", "SRA", "PIL")


@pytest.fixture(scope="module")
def opened(model: Path) -> SegmentationModel:
    return distseg.load(model, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def predicted(model: Path, phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One volume in several axis orders, in/, and what the command makes of them, out/."""
    folder = tmp_path_factory.mktemp("predicted")
    (folder / "in").mkdir()
    image = nib.load(phantom / SERIES / "phantom_002.nii.gz")
    for axes in AXES:
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        nib.save(image.as_reoriented(turn), folder / "in" / f"{axes}.nii.gz")
    assert predict.main([str(model), str(folder / "in"), str(folder / "out")]) == 0
    return folder


@pytest.fixture
def workplace(
    model: Path, small_run: Path, store: Path, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what the examples name; it is the working directory."""
    for name, target in {"model": model, "run": small_run, "store": store, "volumes": phantom}.items():
        (tmp_path / name).symlink_to(target)
    shutil.copy(phantom / SERIES / "phantom_002.nii.gz", tmp_path / "volume.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("axes", AXES)
def test_a_path_and_a_nibabel_image_have_the_bytes_of_predict(
    axes: str, opened: SegmentationModel, predicted: Path, tmp_path: Path
) -> None:
    path, expected = predicted / "in" / f"{axes}.nii.gz", predicted / "out" / f"{axes}.nii.gz"
    in_memory = nib.Nifti1Image.from_bytes(unpacked(path))
    for volume in (path, str(path), nib.load(path), in_memory):
        result = opened.segment(volume)
        result.save(tmp_path / "mask.nii.gz")
        assert unpacked(tmp_path / "mask.nii.gz") == unpacked(expected)
        assert result.image.to_bytes() == unpacked(expected)
        assert np.array_equal(result.mask, read_nifti(expected).values_ZYX) and result.mask.dtype == np.uint8
        assert len(np.unique(result.mask)) == 3


def test_an_array_has_the_mask_and_millilitres_of_predict(
    opened: SegmentationModel, predicted: Path, tmp_path: Path
) -> None:
    volume, expected = (read_nifti(predicted / side / "RAS.nii.gz") for side in ("in", "out"))
    assert volume.spacing_mm is not None
    for values_ZYX in (volume.values_ZYX, volume.values_ZYX.astype(np.float32), volume.values_ZYX[::-1].copy()[::-1]):
        result = opened.segment(values_ZYX, spacing_mm=volume.spacing_mm)
        assert np.array_equal(result.mask, expected.values_ZYX) and result.image is result.mask
        assert result.millilitres is not None
        for region, labels in opened.regions.items():
            voxels = np.isin(expected.values_ZYX, labels).sum()
            assert result.millilitres[region] == pytest.approx(voxels * np.prod(volume.spacing_mm) / 1000, abs=1e-3)
    result.save(tmp_path / "mask.nii")
    written = read_nifti(tmp_path / "mask.nii")
    assert np.array_equal(written.values_ZYX, result.mask) and written.spacing_mm == volume.spacing_mm
    without = opened.segment(volume.values_ZYX)
    assert np.array_equal(without.mask, result.mask) and without.millilitres is None
    with pytest.raises(distseg.DistsegError, match="save: got .*; a volume's file has voxel sizes; give spacing_mm"):
        without.save(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("axes", AXES)
def test_a_simpleitk_image_has_the_mask_of_predict_on_its_own_grid(
    axes: str, opened: SegmentationModel, predicted: Path
) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed; it is no dependency of distseg")
    image = sitk.ReadImage(predicted / "in" / f"{axes}.nii.gz")
    result = opened.segment(image)
    expected = sitk.ReadImage(predicted / "out" / f"{axes}.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(result.image), sitk.GetArrayFromImage(expected))
    assert np.array_equal(result.mask, read_nifti(predicted / "out" / f"{axes}.nii.gz").values_ZYX)
    for of in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(result.image, of)() == getattr(image, of)()
    with pytest.raises(distseg.DistsegError, match="volume SimpleITK image: got 2 dimensions"):
        opened.segment(image[:, :, 0])
    with pytest.raises(distseg.DistsegError, match="3 dimensions of 2 values"):
        opened.segment(sitk.Compose(image, image))


def test_a_dicom_series_has_the_mask_of_predict(model: Path, opened: SegmentationModel, tmp_path: Path) -> None:
    write_dicom_set(tmp_path / "set", masks="nifti")
    series = tmp_path / "set" / "images" / "a"
    assert predict.main([str(model), str(series), str(tmp_path / "mask.nii.gz")]) == 0
    result = opened.segment(series)
    assert result.image.to_bytes() == unpacked(tmp_path / "mask.nii.gz")


def test_a_run_and_a_model_file_have_the_mask_of_their_export(
    model: Path, small_run: Path, opened: SegmentationModel, predicted: Path
) -> None:
    volume = predicted / "in" / "LPS.nii.gz"
    expected = opened.segment(volume, probabilities=True)
    for source in (small_run, model / "model.pt", str(model)):
        result = distseg.load(source).segment(volume, probabilities=True)
        assert np.array_equal(result.mask, expected.mask)
        assert result.probabilities is not None and expected.probabilities is not None
        for region in ("lung", "infection"):
            probability_ZYX = result.probabilities[region]
            assert probability_ZYX.shape == result.mask.shape and probability_ZYX.dtype == np.float32
            np.testing.assert_allclose(probability_ZYX, expected.probabilities[region], atol=1e-5)
    assert opened.segment(volume).probabilities is None


def test_a_server_is_asked_for_probabilities_only_where_they_are_wanted(
    model: Path, predicted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def open_server(url: str, probabilities: bool = True) -> serving.Model:
        asked.append((url, probabilities))
        return serving.open_model(model, torch.device("cpu"))

    monkeypatch.setattr(serving, "open_server", open_server)
    remote = distseg.load("grpc://host:8001")
    remote.segment(predicted / "in" / "LPS.nii.gz")
    assert asked == [("grpc://host:8001", False)]
    assert remote.segment(predicted / "in" / "LPS.nii.gz", probabilities=True).probabilities
    assert asked[1:] == [("grpc://host:8001", True)]


def test_what_is_printed_says_what_was_found(opened: SegmentationModel, predicted: Path) -> None:
    assert repr(opened) == "<distseg model: lung, infection; on cpu>"
    volume = read_nifti(predicted / "in" / "LPS.nii.gz")
    told = repr(opened.segment(volume.values_ZYX, spacing_mm=volume.spacing_mm))
    assert re.fullmatch(r"<distseg segmentation: 8 x 64 x 64; lung \d+\.\d ml, infection \d+\.\d ml>", told)
    assert repr(opened.segment(volume.values_ZYX)) == "<distseg segmentation: 8 x 64 x 64; lung, infection>"


HU = np.full((2, 64, 64), -1000, np.int16)
HU[:, 20:40] = 40
MISTAKES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "volume array: got shape (64, 64); it must be three-dimensional": (lambda: HU[0], {}),
    "volume array: holds NaN or infinite values": (lambda: np.where(HU < 0, np.nan, 0.0), {}),
    "volume array: got values 0..1, scaled to 0..1": (lambda: np.stack([np.eye(64)] * 2), {}),
    "volume array: got values 100..100000; neither HU": (lambda: HU * 0 + np.int64(100) + np.eye(64) * 99900, {}),
    "volume array: got voxels of type <U5; they must be real numbers": (lambda: HU.astype("<U5"), {}),
    "volume array: got voxels of type complex128": (lambda: HU + 1j, {}),
    "volume array: got voxels of type bool": (lambda: HU > 0, {}),
    "volume array: got shape (0, 64, 64); it must hold 1 to": (lambda: HU[:0], {}),
    "volume: got builtins.list; it must be a path, a nibabel or SimpleITK image": (lambda: HU.tolist(), {}),
    "volume: got builtins.NoneType": (lambda: None, {}),
    "volume: got nowhere.nii.gz; no such file or folder; check the path": (lambda: "nowhere.nii.gz", {}),
    "slices as PNG, JPEG or TIFF; convert it": (lambda: ROOT / "README.md", {}),
    "without a DICOM file; it must hold one series": (lambda: ROOT / "tests", {}),
    "volume nibabel image: got shape (2, 32, 64, 2)": (
        lambda: nib.Nifti1Image(HU.reshape(2, 32, 64, 2), np.eye(4)),
        {},
    ),
    "volume nibabel image: got affine None; it must be invertible": (lambda: nib.Nifti1Image(HU, None), {}),
    "spacing_mm: got (1, 2); it must be three sizes": (lambda: HU, {"spacing_mm": (1, 2)}),
    "spacing_mm: got 2.5; it must be three sizes": (lambda: HU, {"spacing_mm": 2.5}),
    "spacing_mm: got (1, 0, 1); it must be three sizes": (lambda: HU, {"spacing_mm": (1, 0, 1)}),
    "spacing_mm: got '111'; it must be three sizes": (lambda: HU, {"spacing_mm": "111"}),
    "spacing_mm: got it for a path, which has its own": (lambda: "a.nii", {"spacing_mm": (1, 1, 1)}),
    "intensity: got 'HU'; it must be one of auto, hu, grey; choose one": (lambda: HU, {"intensity": "HU"}),
    "declared grey; grey is 0..255; use --intensity hu or auto": (lambda: HU, {"intensity": "grey"}),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_wrong_volume_is_told_in_one_line(said: str, opened: SegmentationModel) -> None:
    volume, options = MISTAKES[said]
    with pytest.raises(distseg.DistsegError) as told:
        opened.segment(volume(), **options)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_wrong_word_to_the_others_is_told_in_one_line(
    model: Path, small_run: Path, store: Path, opened: SegmentationModel, phantom: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mistakes: dict[str, Callable[[], object]] = {
        "model: got nowhere; it must be a run folder, an export folder or": lambda: distseg.load("nowhere"),
        "server: got ftp://x; must be grpc://host:port": lambda: distseg.load("ftp://x"),
        "device: got 'cpu' for grpc://h:1; a server has its own": lambda: distseg.load("grpc://h:1", device="cpu"),
        "device: got 'tpu'; it must be auto, cpu, cuda or cuda:N": lambda: distseg.load(model, device="tpu"),
        "device: got 'cuda:99'; this machine has": lambda: distseg.load(model, device="cuda:99"),
        "batch_size: got 0; it must be an integer of at least 1": lambda: distseg.load(model, batch_size=0),
        "store: got nowhere without store.json": lambda: distseg.open_store("nowhere"),
        "split: got 'all'; it must be one of train, val, test": lambda: next(
            distseg.open_store(store).read_slices("all")
        ),
        "fold: got -1;": lambda: next(distseg.open_store(store).read_slices("val", -1)),
        "layout: got 'nii'; it must be one of auto, nnunet": lambda: distseg.prepare(phantom, out, layout="nii"),
        "folds: got 1; at least 2 are needed": lambda: distseg.prepare(phantom, out, folds=1),
        "holdout: got 0.9; must be above 0": lambda: distseg.prepare(phantom, out, holdout=0.9),
        "workers: got 0; it must be at least 1": lambda: distseg.prepare(phantom, out, workers=0),
        "labels: got 'lung=0'; must be NAME=NUMBER": lambda: distseg.prepare(phantom, out, labels={"lung": 0}),
        "split: got 'train'; it must be one of val, test": lambda: distseg.evaluate(small_run, split="train"),
        "require: got 'infection.dice'; must be": lambda: distseg.evaluate(small_run, require=["infection.dice"]),
        "a run is scored as it was trained": lambda: distseg.evaluate(small_run, ["train.epochs=2"]),
        "only evaluate.key=value changes a finished run": lambda: distseg.export(small_run, out, ["train.epochs=2"]),
        "format: got 'pt'; it must be one of torchscript": lambda: distseg.export(small_run, out, format="pt"),
        "precision: got 'int8'; it must be one of auto": lambda: distseg.export(small_run, out, precision="int8"),
        "size: got (512,); it must be height and width": lambda: distseg.export(small_run, out, size=(512,)),
        "dice_tolerance: got -1; it must be": lambda: distseg.export(small_run, out, dice_tolerance=-1),
        "save: got mask.gipl; a mask's name must end in": lambda: opened.segment(HU).save("mask.gipl"),
        "save: got mask.png for": lambda: opened.segment(HU).save("mask.png"),
        "save: got /proc/mask.nii, which cannot be written": lambda: opened.segment(HU, spacing_mm=(1, 1, 1)).save(
            "/proc/mask.nii"
        ),
    }
    for said, call in mistakes.items():
        with pytest.raises(distseg.DistsegError) as told:
            call()
        assert said in str(told.value) and "\n" not in str(told.value), told.value
    assert not out.exists()


def test_a_store_gives_its_cases_splits_and_slices(store: Path) -> None:
    opened = distseg.open_store(store)
    for fold, split in enumerate(opened.splits):
        assert {case.id for cases in split.values() for case in cases} == {case.id for case in opened.cases}
        assert sum(map(len, split.values())) == len(opened.cases) and len(split["test"]) == 1
        assert split["val"] == opened.cases_of("val", fold)
    hu_ZYX, label_ZYX = (
        np.concatenate(parts) for parts in zip(*map(opened.read_case, opened.splits[1]["val"]), strict=True)
    )
    slices = list(opened.read_slices("val", fold=1))
    assert np.array_equal(np.stack([hu for hu, _ in slices]), hu_ZYX) and hu_ZYX.dtype == np.int16
    assert np.array_equal(np.stack([labels for _, labels in slices]), label_ZYX) and label_ZYX.dtype == np.uint8


def test_a_store_without_test_patients_has_an_empty_split(phantom: Path, store: Path, tmp_path: Path) -> None:
    opened = distseg.prepare(phantom, tmp_path / "none", folds=2, workers=1)
    assert [split["test"] for split in opened.splits] == [(), ()]
    distseg.prepare(str(phantom), str(tmp_path / "same"), folds=3, test_patients=1, workers=1)
    assert (tmp_path / "same/store.json").read_text() == (store / "store.json").read_text()


def test_a_requirement_that_does_not_hold_is_told_after_the_scores_are_written(small_run: Path) -> None:
    with pytest.raises(distseg.DistsegError, match=r"--require: infection\.dice"):
        distseg.evaluate(small_run, ["evaluate.bootstrap_resamples=10"], require=["infection.dice>=1"])
    assert json.loads((small_run / "eval/val/summary.json").read_text())["split"] == "val"


def in_fresh_process(code: str) -> Any:
    command = [sys.executable, "-c", f"import json, sys, time\n{code}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_importing_distseg_imports_nothing_else_and_takes_no_time() -> None:
    imported, cpu_s = in_fresh_process(
        "start, before = time.process_time(), set(sys.modules)\nimport distseg\n"
        "print(json.dumps([sorted(set(sys.modules) - before), time.process_time() - start]))"
    )
    assert set(imported) <= {"distseg", "importlib", "importlib._bootstrap", "types", "warnings"}
    assert cpu_s < 0.1  # 2 ms on a quiet machine


def test_a_mistake_and_a_store_need_no_torch(store: Path) -> None:
    code = f"""
import distseg
for mistake in (distseg.load, distseg.evaluate, lambda run: distseg.export(run, "x"), lambda src: distseg.prepare(src, "x")):
    try:
        mistake("nowhere")
    except distseg.DistsegError:
        pass
    else:
        raise AssertionError
distseg.open_store({str(store)!r}).read_case
print(json.dumps("torch" in sys.modules))"""
    assert in_fresh_process(code) is False


def test_the_functions_stay_where_a_module_has_the_same_name() -> None:
    code = """
import distseg, importlib
before = distseg.evaluate
script = importlib.import_module("distseg.evaluate")
from distseg import evaluate
from distseg.evaluate import main
print(json.dumps([before is evaluate is distseg.evaluate, script.main is main, callable(distseg.export)]))"""
    assert in_fresh_process(code) == [True, True, True]


def test_what_is_public_is_listed_and_explained() -> None:
    assert set(distseg.__all__) <= set(dir(distseg)) and len(distseg.__all__) == 7
    public = [getattr(distseg, name) for name in distseg.__all__ if name != "__version__"]
    for one in (*public, SegmentationModel, SegmentationModel.segment, Segmentation, Segmentation.save):
        assert inspect.getdoc(one)
    for one in public:
        if inspect.isfunction(one):
            assert "Raises:" in one.__doc__ and ">>> import distseg" in one.__doc__
    assert "distseg.load(" in distseg.__doc__ and all(name in distseg.__doc__ for name in distseg.__all__[2:])


def run_examples(text: str, name: str, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    assert test.examples, name
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        "module",
        "load",
        "segment",
        "open_store",
        "prepare",
        pytest.param("evaluate", marks=pytest.mark.slow(8)),
        pytest.param("export", marks=pytest.mark.slow(11)),
    ],
)
def test_the_examples_of_the_docstrings_hold(name: str, workplace: Path) -> None:
    of = {"module": distseg, "segment": SegmentationModel.segment}
    documented = of.get(name) or getattr(distseg, name)
    run_examples(inspect.getdoc(documented) or "", name, {"distseg": distseg} if name == "module" else {})


def test_the_examples_of_the_page_hold(workplace: Path) -> None:
    page = (ROOT / "docs/library.md").read_text()
    examples, calls = (
        "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
        for language in ("pycon", "python")
    )
    run_examples(examples, "docs/library.md", {})
    found = [node for node in ast.walk(ast.parse(calls)) if isinstance(node, ast.Call)]
    assert len(found) == 3
    for call in found:  # what they do is tested above
        assert isinstance(call.func, ast.Attribute)
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        inspect.signature(getattr(distseg, call.func.attr)).bind(*map(ast.literal_eval, call.args), **given)


@pytest.mark.slow(5)
def test_the_notebook_like_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs/library_example.py"), run_name="__main__")
    assert "infection" in capsys.readouterr().out
    assert (workplace / "mask.nii.gz").is_file() and (workplace / "mask.png").is_file()
