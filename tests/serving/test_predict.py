"""`distseg predict`: masks that lie where their volumes lie, in every format, from folders that go on after any end."""

import csv
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import CTImageStorage

from distseg.commands.predict import main, parse_arguments
from distseg.data.dicom import on_grid, read_dicom_series, read_segmentation
from distseg.data.nifti import read_nifti
from distseg.data.store import open_store
from distseg.errors import DistsegError
from distseg.files import locked, write_json
from distseg.scoring.evaluation import evaluate_run
from distseg.scoring.postprocessing import RULES, RegionRule, read_rules, rules_as_dict
from distseg.scoring.segmenting import label_map, segment_volume
from distseg.serving.affected_slices import most_affected_slices
from distseg.serving.description import read_description
from distseg.serving.exporting import ExportOptions, export_run
from distseg.serving.model import open_model
from distseg.serving.prediction import measure
from distseg.serving.repository import write_repositories
from distseg.serving.server import find_installation, running_server
from distseg.serving.standalone import METADATA
from distseg.tables import read_rows
from tests.benchmarks.ports import free_endpoints
from tests.data.test_dicom import blank

CPU = torch.device("cpu")
VOLUME = "COVID-19-CT-Seg_20cases/phantom_001.nii.gz"


def has_server() -> bool:
    try:
        return bool(find_installation())
    except DistsegError:
        return False


@pytest.fixture(scope="module")
def hu_ZYX(phantom: Path) -> np.ndarray:
    return read_nifti(phantom / VOLUME).values_ZYX.astype(np.int16)


@pytest.fixture(scope="module")
def run(small_run: Path, hu_ZYX: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, with thresholds at which it finds half of a volume to be lung and a fifth infection."""
    run = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("telling") / "run"))
    _, (lung_ZYX, infection_ZYX) = open_model(small_run, CPU).segment(hu_ZYX, 4)
    rules = {
        "lung": RegionRule(threshold=float(np.quantile(lung_ZYX, 0.5))),
        "infection": RegionRule(threshold=float(np.quantile(infection_ZYX, 0.8)), inside="lung"),
    }
    write_json(run / RULES, {"rules": rules_as_dict(rules)})
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    export_run(run, run.parent / "model", ExportOptions(precision="float32"))
    return run.parent / "model"


@pytest.fixture(scope="module")
def mask_ZYX(model: Path, hu_ZYX: np.ndarray) -> np.ndarray:
    """What the model says of the volume without the command."""
    opened = open_model(model, CPU)
    _, probability_RZYX = segment_volume(opened.segmenter, hu_ZYX, CPU, 4)
    mask_ZYX = label_map(read_rules(model.parent / "run") or {}, probability_RZYX, opened.described.regions)
    assert np.bincount(mask_ZYX.ravel(), minlength=3).min() > 100
    return mask_ZYX


@pytest.fixture
def volumes(phantom: Path, tmp_path: Path) -> Path:
    """Three volumes in a folder."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    for number in (1, 2, 3):
        shutil.copy(phantom / f"COVID-19-CT-Seg_20cases/phantom_00{number}.nii.gz", folder)
    return folder


def write_ct(folder: Path, hu_ZYX: np.ndarray, without: Sequence[int] = ()) -> Path:
    """An axial series, its files not in the order of its slices."""
    folder.mkdir(parents=True)
    for z in set(range(len(hu_ZYX))) - set(without):
        dataset = blank(CTImageStorage)
        dataset.Rows, dataset.Columns = hu_ZYX.shape[1:]
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-30.0, 12.5, 2.5 * z], [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.8], 2.5
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = hu_ZYX[z].astype("<i2").tobytes()
        dataset.save_as(folder / f"IM{(z * 7) % 31:04d}", enforce_file_format=True)
    return folder


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "volumes.csv").open() as file:
        return list(csv.DictReader(file))


def predict(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["run", "export", "file"])
def test_volumes_in_any_axis_order_get_the_model_s_mask_in_theirs(
    kind: str, run: Path, model: Path, phantom: Path, mask_ZYX: np.ndarray, tmp_path: Path
) -> None:
    source = {"run": run, "export": model, "file": model / "model.pt"}[kind]
    (tmp_path / "in").mkdir()
    for axes in ("LPS", "RAS", "SRA", "PIL"):
        image = nib.load(phantom / VOLUME)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        nib.save(image.as_reoriented(turn), tmp_path / "in" / f"{axes}.nii.gz")
    assert predict(source, tmp_path / "in", tmp_path / "out") == 0
    for path in (tmp_path / "in").iterdir():
        volume, mask = nib.load(path), nib.load(tmp_path / "out" / path.name)
        assert mask.shape == volume.shape and mask.affine.tobytes() == volume.affine.tobytes()
        assert np.array_equal(read_nifti(tmp_path / "out" / path.name).values_ZYX, mask_ZYX)


def test_a_series_has_one_mask_as_nifti_and_as_dicom_seg(
    model: Path, mask_ZYX: np.ndarray, hu_ZYX: np.ndarray, tmp_path: Path
) -> None:
    series = write_ct(tmp_path / "series", hu_ZYX)
    assert predict(model, series, tmp_path / "mask.nii.gz") == 0
    written, volume = nib.load(tmp_path / "mask.nii.gz"), read_dicom_series(sorted(series.iterdir()))
    assert volume.affine is not None and np.array_equal(written.affine, volume.affine.astype(np.float32))
    assert np.array_equal(written.affine[:3, 3], np.array([30.0, -12.5, 0.0]))  # LPS -> RAS
    assert np.array_equal(values(tmp_path / "mask.nii.gz").T, mask_ZYX)
    assert predict(model, series, tmp_path / "mask.dcm", "--format", "dicom-seg") == 0
    segmentation, names = read_segmentation(tmp_path / "mask.dcm")
    assert names == {1: "lung", 2: "infection"}
    assert np.array_equal(on_grid(segmentation, volume), mask_ZYX)


def test_a_folder_of_series_has_a_mask_for_each_and_names_what_is_none(
    model: Path, hu_ZYX: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ct(tmp_path / "in/whole", hu_ZYX)
    write_ct(tmp_path / "in/gap", hu_ZYX, without=[3])
    (tmp_path / "in/notes").mkdir()
    (tmp_path / "in/a.mgz").write_text("")
    (tmp_path / "in/whole/DICOMDIR").write_text("")
    assert predict(model, tmp_path / "in", tmp_path / "out", "--format", "dicom-seg") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.jsonl",
        "volumes.csv",
        "whole.dcm",
    ]
    printed, said = capsys.readouterr()
    assert "note: left out: a.mgz (MGH is not supported; convert it to NIfTI), whole/DICOMDIR" in printed
    assert "slices may be missing" in said and "notes without a DICOM file" in said
    assert said.splitlines()[-1].startswith("error: predict: 1 of 3 volumes are done, gap, notes failed")


def test_probabilities_and_a_picture_lie_beside_the_mask(
    model: Path, phantom: Path, hu_ZYX: np.ndarray, tmp_path: Path
) -> None:
    _, probability_RZYX = open_model(model, CPU).segment(hu_ZYX, 4)
    for dtype in ("float32", "uint8"):
        words = [model, phantom / VOLUME, tmp_path / dtype / "m.nii.gz", "--probabilities", dtype, "--overlay"]
        assert predict(*words) == 0
        assert sorted(path.name for path in (tmp_path / dtype).iterdir()) == [
            "m.nii.gz", "m_overlay.png", "m_probability_infection.nii.gz", "m_probability_lung.nii.gz",
        ]  # fmt: skip
        for index, name in enumerate(("lung", "infection")):
            path = tmp_path / dtype / f"m_probability_{name}.nii.gz"
            assert nib.load(path).affine.tobytes() == nib.load(phantom / VOLUME).affine.tobytes()
            written_ZYX = read_nifti(path).values_ZYX
            tolerance = 0 if dtype == "float32" else 0.5 / 255 + 1e-6
            np.testing.assert_allclose(written_ZYX, probability_RZYX[index], rtol=0, atol=tolerance)
        with Image.open(tmp_path / dtype / "m_overlay.png") as picture:
            assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(2**24)) > 10


def test_the_slices_with_most_infection_are_shown() -> None:
    mask_ZYX = np.ones((20, 4, 4), np.uint8)
    for z in (3, 5, 7, 11, 13, 17):
        mask_ZYX[z, 0, 0] = 2
    shown = most_affected_slices(np.zeros((20, 4, 4), np.int16), mask_ZYX, {"infection": [2], "lung": [1, 2]})
    assert [overlay.title for overlay in shown] == [
        f"slice {z}: lung 16 px, infection 1 px" for z in (3, 5, 7, 11, 13, 17)
    ]


def test_volumes_are_millilitres_and_shares_of_the_lung() -> None:
    mask_ZYX = np.zeros((2, 10, 10), np.uint8)
    mask_ZYX[0, :4] = 1  # 40 voxels of 2.5 x 2 x 2 mm = 0.01 ml
    mask_ZYX[0, 4] = 2
    mask_ZYX[1, 0, :5] = 5
    regions = {"lung": [1, 2], "infection": [2], "pleural_effusion": [5]}
    assert measure(mask_ZYX, regions, (2.5, 2.0, 2.0)) == {
        "lung_ml": 0.5, "infection_ml": 0.1, "pleural_effusion_ml": 0.05, "infection_percent_of_lung": 20.0,
    }  # fmt: skip
    assert measure(mask_ZYX * 0, regions, (1, 1, 1))["infection_percent_of_lung"] is None
    assert measure(mask_ZYX, {"nodule": [2]}, None) == {"nodule_ml": None}


def test_the_csv_has_what_the_masks_hold(model: Path, volumes: Path, tmp_path: Path) -> None:
    assert predict(model, volumes, tmp_path / "out") == 0
    for row, path in zip(rows(tmp_path / "out"), sorted(volumes.iterdir()), strict=True):
        mask = values(tmp_path / "out" / path.name)
        voxel_ml = np.prod(nib.load(path).header.get_zooms()) / 1000
        assert (row["volume"], row["source"], row["mask"]) == (path.name.split(".")[0], str(path), path.name)
        assert float(row["lung_ml"]) == pytest.approx((mask > 0).sum() * voxel_ml, abs=1e-3)
        assert float(row["infection_ml"]) == pytest.approx((mask == 2).sum() * voxel_ml, abs=1e-3)
        if (mask > 0).any():
            share = 100 * (mask == 2).sum() / (mask > 0).sum()
            assert float(row["infection_percent_of_lung"]) == pytest.approx(share, abs=1e-3)


def test_a_series_may_be_the_folder_one_is_in(
    model: Path, hu_ZYX: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_ct(tmp_path / "thorax", hu_ZYX))
    (tmp_path / "masks").mkdir()
    assert predict(model, ".", "../masks") == 0
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["thorax.nii.gz"]


def test_a_volume_that_fails_leaves_no_file(
    model: Path, hu_ZYX: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_ct(tmp_path / "in" / name, hu_ZYX)
    for path in (tmp_path / "in/b").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.FrameOfReferenceUID
        dataset.save_as(path)
    (tmp_path / "out/.partial-1234-model").mkdir(parents=True)  # of an export that was killed
    words = [model, tmp_path / "in", tmp_path / "out", "--format", "dicom-seg", "--probabilities", "uint8", "--overlay"]
    assert predict(*words) == 1 and "b failed" in capsys.readouterr().err
    files = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file())
    assert files == [
        "a.dcm", "a_overlay.png", "a_probability_infection.nii.gz", "a_probability_lung.nii.gz", "predictions.jsonl", "volumes.csv",
    ]  # fmt: skip


@pytest.mark.slow(15)
def test_a_kill_leaves_whole_files_and_the_same_command_goes_on(model: Path, phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(6):
        shutil.copy(phantom / VOLUME, tmp_path / "in" / f"v{index:02d}.nii.gz")
    out, done = tmp_path / "out", tmp_path / "out" / "predictions.jsonl"
    words = [sys.executable, "-m", "distseg", "predict", model, tmp_path / "in", out, "--overlay"]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    while not (done.is_file() and done.read_text().count('"row"') >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    whole = [line["volume"] for line in read_rows(done) if line["files"]]
    assert 2 <= len(whole) < 6
    for name in before:
        assert values(out / name).shape == nib.load(phantom / VOLUME).shape
    with done.open("a") as file:
        file.write('{"volume": "v0')  # as a kill within a write leaves it
    (out / ".partial-1234-v05.nii.gz").write_bytes(b"half")
    assert predict(model, tmp_path / "in", out, "--overlay") == 0
    assert [row["volume"] for row in rows(out)] == [f"v{index:02d}" for index in range(6)]
    for name in whole:
        assert (out / f"{name}.nii.gz").stat().st_mtime_ns == before[f"{name}.nii.gz"]
    assert len(list(out.iterdir())) == 6 * 2 + 2  # masks, pictures, the CSV, the list


def test_what_has_changed_is_done_again_and_nothing_else(
    model: Path, small_run: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def written() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("phantom_*")}

    assert predict(model, volumes, out, "--probabilities", "uint8") == 0
    first = written()
    assert predict(model, volumes, out, "--probabilities", "uint8") == 0
    assert written() == first and "3 of 3 volumes are done already" in capsys.readouterr().out
    shutil.copy(volumes / "phantom_002.nii.gz", volumes / "phantom_001.nii.gz")
    (out / "phantom_003.nii.gz").unlink()
    assert predict(model, volumes, out, "--probabilities", "uint8") == 0
    second = written()
    assert {name.split(".")[0].split("_p")[0] for name in second if second[name] != first[name]} == {
        "phantom_001", "phantom_003",
    }  # fmt: skip
    assert np.array_equal(values(out / "phantom_001.nii.gz"), values(out / "phantom_002.nii.gz"))
    # Another model and no probabilities: those of the first would mislead.
    assert predict(small_run, volumes, out) == 0
    assert sorted(written()) == [f"phantom_00{n}.nii.gz" for n in (1, 2, 3)]
    assert all(written()[name] != second[name] for name in written())


def test_what_somebody_else_put_or_changed_there_is_not_lost(
    model: Path, small_run: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    last = (volumes / "phantom_003.nii.gz").rename(tmp_path / "phantom_003.nii.gz")
    assert predict(model, volumes, out) == 0
    shutil.copy(last, volumes)
    shutil.copy(last, out)
    assert predict(model, volumes, out) == 1
    assert "which holds phantom_003.nii.gz of something else; nothing is overwritten" in capsys.readouterr().err
    assert (out / "phantom_003.nii.gz").read_bytes() == last.read_bytes()
    (out / "phantom_003.nii.gz").unlink()
    assert predict(model, volumes, out) == 0
    capsys.readouterr()
    corrected, size = out / "phantom_002.nii.gz", (out / "phantom_002.nii.gz").stat().st_size
    corrected.write_bytes(b"x" * size)  # as a mask without compression keeps its size
    assert predict(model, volumes, out) == 0 and corrected.read_bytes() == b"x" * size
    assert predict(small_run, volumes, out) == 1
    assert "phantom_002.nii.gz was changed after predict wrote it; nothing is over" in capsys.readouterr().err
    corrected.write_bytes(b"longer" * size)
    assert predict(model, volumes, out) == 1 and corrected.read_bytes() == b"longer" * size
    corrected.unlink()
    assert predict(small_run, volumes, out) == 0 and len(rows(out)) == 3


def test_no_file_of_somebody_else_is_replaced_and_no_two_volumes_write_one(
    model: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", ("--overlay", "--probabilities", "uint8")
    out.mkdir()
    for name in ("volumes.csv", "phantom_002_overlay.png", "phantom_002_probability_lung.nii.gz"):
        (out / name).write_text("mine")
        assert predict(model, volumes, out, *words) == 1
        assert f"which holds {name} of something else; nothing is overwritten" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"
        (out / name).unlink()
    assert predict(model, volumes, out) == 0
    (out / "phantom_002_overlay.png").write_text("mine")
    assert predict(model, volumes, out) == 0  # it asks for none
    assert predict(model, volumes, out, *words) == 1
    assert "which holds phantom_002_overlay.png of something else" in capsys.readouterr().err
    assert (out / "phantom_002_overlay.png").read_text() == "mine" and len(rows(out)) == 3
    (volumes / "phantom_003.nii.gz").rename(volumes / "phantom_001_probability_lung.nii.gz")
    assert predict(model, volumes, tmp_path / "other") == 0
    capsys.readouterr()
    assert predict(model, volumes, tmp_path / "third", *words) == 1
    assert "both would write phantom_001_probability_lung.nii.gz; rename one" in capsys.readouterr().err


def test_one_bad_volume_does_not_stop_the_others(
    model: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (volumes / "phantom_002.nii.gz").read_bytes()
    (volumes / "phantom_002.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert predict(model, volumes, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "1/3" in said.out and "3/3" in said.out and "2/3 phantom_002: failed: volume" in said.err
    assert said.err.splitlines()[-1].startswith("error: predict: 2 of 3 volumes are done, phantom_002 failed")
    assert [row["volume"] for row in rows(tmp_path / "out")] == ["phantom_001", "phantom_003"]
    (volumes / "phantom_002.nii.gz").write_bytes(whole)
    assert predict(model, volumes, tmp_path / "out") == 0
    assert "2 of 3 volumes are done already" in capsys.readouterr().out and len(rows(tmp_path / "out")) == 3


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        assert predict(model, volumes, tmp_path / "out", "--probabilities", "float32") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert capsys.readouterr().err == (
        f"error: output: got {tmp_path / 'out'}, which cannot be written (File too large); make room, or choose another\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


def test_a_folder_belongs_to_one_predict(
    model: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out/.predict.lock", "", "process 7 on another node"):
        assert predict(model, volumes, tmp_path / "out") == 1
    assert (
        "out, which process 7 on another node works on; wait for it to end, or choose another"
        in capsys.readouterr().err
    )


@pytest.mark.serve
@pytest.mark.skipif(not has_server(), reason="no tritonserver; bash launch/setup_triton.sh")
def test_a_server_gives_the_same_files(model: Path, volumes: Path, tmp_path: Path) -> None:
    for name in ("model.pt", "model.json"):
        (tmp_path / "served").mkdir(exist_ok=True)
        shutil.copy(model / name, tmp_path / "served")
    described = read_description(model, json.loads((model / "model.json").read_text()))
    write_repositories(tmp_path / "served", described)
    endpoints = free_endpoints()
    with running_server(find_installation(), tmp_path / "served/model_repository_python", endpoints):
        for address in (endpoints.grpc, endpoints.http):
            assert predict("--server", address, volumes, tmp_path / address[:4], "--probabilities", "float32") == 0
        assert predict("--server", endpoints.grpc, volumes, tmp_path / "masks") == 0
    assert predict(model, volumes, tmp_path / "here", "--probabilities", "float32") == 0
    assert predict(model, volumes, tmp_path / "masks_here") == 0
    for path in (tmp_path / "masks_here").glob("*.nii.gz"):
        assert np.array_equal(values(tmp_path / "masks" / path.name), values(path))
    for path in (tmp_path / "here").glob("*.nii.gz"):
        for name in ("grpc", "http"):
            assert np.array_equal(values(tmp_path / name / path.name), values(path))


def test_words_may_come_in_any_order() -> None:
    for words in (["M", "--batch-size", "2", "IN", "OUT"], ["M", "IN", "--batch-size", "2", "OUT"]):
        args = parse_arguments(words)
        assert (args.model, args.input, args.output) == (Path("M"), [Path("IN")], Path("OUT"))
    args = parse_arguments(["IN", "--server", "grpc://127.0.0.1:1", "OUT"])
    assert (args.model, args.input, args.output) == (None, [Path("IN")], Path("OUT"))
    for wrong in (["IN", "OUT"], ["--server", "grpc://127.0.0.1:1", "OUT"]):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "/nowhere.nii", "{out}/x.nii"], "input: got /nowhere.nii; no such file or folder"),
        (["{model}", "{store}/store.json", "{out}/x.nii"], "no NIfTI, MetaImage, NRRD, DICOM, or slices as PNG"),
        (["{model}", "{empty}", "{out}"], "with no volume; it must hold one of"),
        (
            ["{model}", "{mixed}", "{out}"],
            "with volumes (NIfTI, MetaImage, NRRD, TIFF of several pages) and DICOM series",
        ),
        (["{model}", "{twins}", "{out}"], "/a.nii.gz; their masks would have one name"),
        (["{model}", "{gap}", "{out}.nii"], "slices may be missing; complete the series"),
        (["{model}", "{cut}", "{out}.nii"], "cut.nii.gz: damaged or not readable"),
        (["{model}", "{volumes}", "{volumes}/masks"], "masks would be taken for volumes"),
        (["{model}", "{volume}", "{volume}"], "the volume itself"),
        (["{model}", "{volume}", "{out}.png"], "must end in .nii.gz or .nii"),
        (["{model}", "{gap}", "{out}.nii", "--format", "dicom-seg"], "must end in .dcm"),
        (["{model}", "{volumes}", "{out}.nii.gz"], "for a folder of volumes; it must be a folder"),
        (
            ["{model}", "{volume}", "{out}.dcm", "--format", "dicom-seg"],
            "it references DICOM images, and this is none",
        ),
        (
            ["{model}", "{volumes}", "{taken}"],
            "which holds phantom_001.nii.gz of something else; nothing is overwritten",
        ),
        (["{model}", "{volume}", "/proc/never/x.nii"], "got /proc/never/x.nii, which cannot be written"),
        (["{model}", "{volume}", "{volume}/x.nii"], "must be a folder that can be written"),
        (["{store}/store.json", "{volume}", "{out}.nii"], "it must end in one of .pt, .pt2, .onnx"),
        (["{half}/model.pt", "{volume}", "{out}.nii"], "model.pt: not readable (PytorchStreamReader failed"),
        (["{store}", "{volume}", "{out}.nii"], "it must be a run folder, an export folder or one of model.pt,"),
        (["{torn}", "{volume}", "{out}.nii"], "model.json, damaged (Expecting"),
        (["{other}", "{volume}", "{out}.nii"], "which describes another file than model.pt"),
        (["{lame}", "{volume}", "{out}.nii"], "with damaged postprocessing.lung.threshold"),
        (["{mute}", "{volume}", "{out}.nii"], "its distseg.json is damaged: KeyError('device')"),
        (["{bad_onnx}/model.onnx", "{volume}", "{out}.nii"], "model.onnx: not readable ([ONNXRuntimeError]"),
        (["{model}", "{gap}/IM0007", "{taken}"], "which holds IM0007.nii.gz; give the name of the file to replace it"),
        (["--server", "ftp://x", "{volume}", "{out}.nii"], "must be grpc://host:port or http://host:port"),
        (["--server", "grpc://127.0.0.1:1", "{volume}", "{out}.nii"], "no such server answers there"),
    ],
    ids=lambda value: value.replace("/", "_")[:40] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    model: Path,
    store: Path,
    volumes: Path,
    hu_ZYX: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"model": model, "store": store, "volumes": volumes, "out": tmp_path / "out"}
    places["volume"] = volumes / "phantom_001.nii.gz"
    places |= wrong_inputs(tmp_path, hu_ZYX) | wrong_models(tmp_path, model)
    before = sorted(tmp_path.rglob("*"))
    assert main([word.format(**places) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and said.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def wrong_inputs(root: Path, hu_ZYX: np.ndarray) -> dict[str, Path]:
    folders = {name: root / name for name in ("empty", "mixed", "twins", "taken")}
    for folder in folders.values():
        folder.mkdir()
    image = nib.Nifti1Image(hu_ZYX.T, np.eye(4))
    for path in ("mixed/a.nii", "twins/a.nii", "twins/a.nii.gz", "taken/phantom_001.nii.gz", "taken/IM0007.nii.gz"):
        nib.save(image, root / path)
    write_ct(root / "mixed/series", hu_ZYX[:1])
    cut = root / "cut.nii.gz"
    cut.write_bytes((root / "twins/a.nii.gz").read_bytes()[:999])
    return folders | {"cut": cut, "gap": write_ct(root / "gap", hu_ZYX, without=[2])}


def wrong_models(root: Path, model: Path) -> dict[str, Path]:
    described = json.loads((model / "model.json").read_text())
    texts = {
        "torn": "{",
        "other": json.dumps(described | {"weights_sha256": "0" * 64}),
        "lame": json.dumps(described | {"postprocessing": {"lung": {"threshold": "high"}}}),
    }
    for name, text in texts.items():
        (root / name).mkdir()
        (root / name / "model.pt").symlink_to(model / "model.pt")
        (root / name / "model.json").write_text(text)
    (root / "half").mkdir()
    whole = (model / "model.pt").read_bytes()
    (root / "half/model.pt").write_bytes(whole[: len(whole) // 2])
    (root / "bad_onnx").mkdir()
    (root / "bad_onnx/model.onnx").write_bytes(b"no protobuf")
    (root / "mute").mkdir()
    mute = torch.jit.script(torch.nn.Identity())
    torch.jit.save(mute, root / "mute/model.pt", _extra_files={METADATA: json.dumps({"regions": {}})})
    return {name: root / name for name in (*texts, "half", "bad_onnx", "mute")}


@pytest.mark.parametrize("split", ["val", "test"])
def test_scores_are_those_of_the_masks_that_predict_writes(
    split: str, run: Path, phantom: Path, store: Path, model: Path, tmp_path: Path
) -> None:
    summary = evaluate_run(run, split)
    assert json.loads((run / f"eval/{split}/summary.json").read_text()) == summary
    with (run / f"eval/{split}/per_case.csv").open() as file:
        per_case = {row["case"]: row for row in csv.DictReader(file)}
    cases = open_store(store).cases_of(split, 0)
    assert sorted(per_case) == sorted(case.id for case in cases) and summary["n_cases"] == len(cases)
    case = cases[0]
    assert predict(model, phantom / case.source, tmp_path / "mask.nii.gz") == 0
    mask = values(tmp_path / "mask.nii.gz") > 0
    truth = values(phantom / "Lung_Mask" / Path(case.source).name) > 0
    scored = per_case[case.id]
    assert int(scored["lung_tp"]) == (mask & truth).sum() and int(scored["lung_fp"]) == (mask & ~truth).sum()
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert float(scored["lung_dice"]) == pytest.approx(dice, abs=1e-6)
