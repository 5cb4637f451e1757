"""A model that sees one pixel size: the same mask from every program, for volumes and batches of any pixel size."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from distseg.config_files import load_config
from distseg.data.augment import sampling_matrix
from distseg.data.layouts.finding import Asked
from distseg.data.pipeline import build_val_loader
from distseg.data.plan import Plan
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import open_store, settled
from distseg.errors import DistsegError
from distseg.geometry import working_size
from distseg.models.label_map import LabelMap
from distseg.models.segmenter import SpacedSegmenter
from distseg.runs.folder import open_run
from distseg.scoring.evaluation import evaluate_run
from distseg.serving.client import RemoteSegmenter
from distseg.serving.exporting import ExportOptions, export_run
from distseg.serving.model import open_model
from distseg.serving.prediction import notes_on_size
from distseg.serving.server import find_installation, running_server
from tests.benchmarks.ports import free_endpoints
from tests.conftest import SMALL, shift_heads
from tests.serving.test_cpp import build, runner

CPU = torch.device("cpu")
SPACING_MM = 7.0  # the phantom's pixels have 5.625


@pytest.fixture(scope="module")
def spaced_run(store: Path, run_command: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spaced") / "run"
    words = [
        "data.fit=crop",
        f"data.spacing_mm={SPACING_MM}",
        f"data.store={store}",
        "train.max_steps=4",
        f"output_dir={out}",
    ]
    run_command("distseg", "train", *SMALL, *words)
    shift_heads(out, shares=(0.5, 0.2))
    return out


@pytest.fixture(scope="module")
def spaced_model(spaced_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spaced_model") / "model"
    export_run(spaced_run, out, ExportOptions(precision="float32"))
    return out


@pytest.fixture(scope="module")
def volumes(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One volume under four pixel sizes, in another axis order, not square and with pixels that are not."""
    out = tmp_path_factory.mktemp("volumes")
    image = nib.load(phantom / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz")
    values = np.asarray(image.dataobj)[:, :50, 2:5]
    for name, (x_mm, y_mm) in {"a": (5.625, 5.625), "b": (7.0, 7.0), "c": (3.1, 4.7), "d": (11.0, 5.0)}.items():
        affine = np.diag([-x_mm, -y_mm, 10.0, 1])
        made = nib.Nifti1Image(values, affine)
        if name == "c":
            made = made.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
            made = nib.Nifti1Image(np.asarray(made.dataobj), made.affine)
        nib.save(made, out / f"{name}.nii.gz")
    return out


def test_the_size_follows_the_pixels_and_the_image_is_the_one_that_training_sees(store: Path) -> None:
    assert working_size(512, 512, 0.7, 0.8, 256, 1.4) == (256, 293) and working_size(3, 3, 0.1, 0.1, 0, 5) == (1, 1)
    assert working_size(300, 200, 0.0, 0.0, 256, 0) == (256, 171) and working_size(300, 200, 0.0, 0.0, 0, 0) == (
        300,
        200,
    )
    matrix = sampling_matrix((64, 64), 32, "crop", pixel_mm=(5.625, 2.8125), spacing_mm=5.625)
    assert matrix.tolist() == [[2, 0, 0], [0, 1, 16]]  # across two pixels are one, down one
    opened = open_store(store)
    config = settled(load_config(None, ["data.fit=crop", "data.spacing_mm=11.25", "data.image_size=32"]), opened)
    slices = opened.slices_of(opened.cases[:1])
    batch = next(iter(build_val_loader(config.data, slices, Plan(len(slices), 4), CPU)))
    seen: list[torch.Tensor] = []
    network = lambda image: seen.append(image) or image[:, [0, 0]]  # noqa: E731
    segmenter = SpacedSegmenter(
        network, config.data.windows_hu, 1, 0, 32, LabelMap({"lung": (1,), "x": (2,)}, 0.5), 11.25
    )  # type: ignore[arg-type]
    hu_BCHW = torch.from_numpy(np.stack([np.load(one.image)[None] for one in slices[:4]]))
    segmenter(hu_BCHW, torch.full((4, 2), 5.625))
    torch.testing.assert_close(batch.image_BCHW, seen[0], rtol=0, atol=1e-4)


def test_a_batch_of_many_pixel_sizes_is_its_sizes_one_after_the_other_to_the_bit(spaced_model: Path) -> None:
    segmenter = open_model(spaced_model, CPU).segmenter
    hu_BCHW = torch.randint(-1000, 400, (6, segmenter.n_slices, 40, 50), dtype=torch.int16)
    sizes_B2 = torch.tensor([[5.0, 5.0], [7.0, 7.0], [5.0, 5.0], [3.0, 9.0], [7.0, 7.0], [12.0, 2.0]])
    mask, probability = segmenter(hu_BCHW, sizes_B2)
    for places in ([0, 2], [1, 4], [3], [5]):  # those of one size
        alone_mask, alone_probability = segmenter(hu_BCHW[places], sizes_B2[places])
        assert torch.equal(alone_mask, mask[places]) and torch.equal(alone_probability, probability[places])
    for k in range(6):  # oneDNN sums a batch of two in another order than one of one
        _, one_probability = segmenter(hu_BCHW[k : k + 1], sizes_B2[k : k + 1])
        torch.testing.assert_close(one_probability, probability[k : k + 1], rtol=0, atol=1e-6)
    for wrong, message in (
        (None, "Expected a value of type|missing|PIXEL_MM"),
        (sizes_B2[:2], "as many as slices"),
        (sizes_B2 * float("nan"), "above 0"),
        (sizes_B2 * 1e6, "more than 8192 pixels a side"),
    ):
        with pytest.raises(Exception, match=message):
            segmenter(hu_BCHW, wrong)


def test_the_run_and_the_file_say_what_they_see(spaced_run: Path, spaced_model: Path) -> None:
    described = json.loads((spaced_model / "model.json").read_text())
    assert described["spacing_mm"] == SPACING_MM and "pixel_mm" not in described
    config = (spaced_model / "model_repository/distseg/config.pbtxt").read_text()
    names = [argument.name for argument in torch.jit.load(spaced_model / "model.pt").forward.schema.arguments]
    assert names == ["self", "hu_BCHW", "pixel_mm_B2"]  # Triton takes inputs in the order of the configuration
    assert config.index('name: "HU"') < config.index('name: "PIXEL_MM"')
    assert described["training"]["seen"] == {"pixel_mm": [5.625, 5.625], "field_mm": [360.0, 360.0]}
    assert any("pixel_mm" in check for check in described["verification"]["checks"])
    assert evaluate_run(spaced_run, "val")["regions"]["lung"]["dice"]["mean"] > 0


def test_cpp_and_a_server_give_pythons_bytes(
    spaced_model: Path, volumes: Path, tmp_path: Path, run_command: Callable[..., object]
) -> None:
    run_command("distseg", "predict", spaced_model, volumes, tmp_path / "python")
    program = runner(build("cpp", ["distseg_predict", "triton_client"]) / "distseg_predict")
    for path in sorted(volumes.iterdir()):
        done = program(spaced_model / "model.pt", path, tmp_path / path.name, "--threads", 1)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(
            np.asarray(nib.load(tmp_path / path.name).dataobj),
            np.asarray(nib.load(tmp_path / "python" / path.name).dataobj),
        )
    np.save(tmp_path / "hu.npy", np.zeros((2, 9, 9), np.int16))
    done = program(spaced_model / "model.pt", tmp_path / "hu.npy", tmp_path / "mask.npy")
    assert done.returncode == 1 and "say --pixel-mm Y,X" in done.stderr
    assert (
        program(spaced_model / "model.pt", tmp_path / "hu.npy", tmp_path / "mask.npy", "--pixel-mm", "5,5.5").returncode
        == 0
    )
    assert (
        program(spaced_model / "model.pt", tmp_path / "hu.npy", tmp_path / "mask.npy", "--pixel-mm", "5").returncode
        == 2
    )


@pytest.mark.serve
def test_a_server_takes_batches_of_many_pixel_sizes(
    spaced_model: Path, volumes: Path, tmp_path: Path, run_command: Callable[..., object]
) -> None:
    local = open_model(spaced_model, CPU).segmenter
    hu_BCHW = torch.randint(-1000, 400, (5, local.n_slices, 40, 50), dtype=torch.int16)
    sizes_B2 = torch.tensor([[5.0, 5.0], [7.0, 7.0], [5.0, 5.0], [3.0, 9.0], [12.0, 2.0]])
    expected = local(hu_BCHW, sizes_B2)
    endpoints = free_endpoints()
    with running_server(find_installation(), spaced_model / "model_repository_python", endpoints):
        for address in (endpoints.grpc, endpoints.http):
            mask, probability = RemoteSegmenter(address)(hu_BCHW, sizes_B2)
            assert torch.equal(mask, expected[0]) and torch.equal(probability, expected[1])
            with pytest.raises(DistsegError, match="PIXEL_MM"):
                RemoteSegmenter(address)(hu_BCHW)
        np.save(tmp_path / "hu.npy", hu_BCHW.numpy())
        client = build("cpp", ["distseg_predict", "triton_client"]) / "triton_client"
        words = [client, endpoints.http, tmp_path / "hu.npy", tmp_path / "m.npy", tmp_path / "p.npy"]
        sizes = [f"{y:g},{x:g}" for y, x in sizes_B2.tolist()]
        subprocess.run([*map(str, words), *sizes], check=True)
        assert np.array_equal(np.load(tmp_path / "m.npy"), expected[0].numpy())
        run_command("distseg", "predict", "--server", endpoints.grpc, volumes, tmp_path / "remote")
        run_command("distseg", "predict", spaced_model, volumes, tmp_path / "local")
        for path in volumes.iterdir():
            assert np.array_equal(
                *(np.asarray(nib.load(tmp_path / where / path.name).dataobj) for where in ("remote", "local"))
            )


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_files_of_one_size_have_one_pixel_size_too(format: str, spaced_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match=f"--pixel-mm: got none for {format}; the run sees pixels of 7 mm"):
        export_run(spaced_run, tmp_path / "model", ExportOptions(format=format, precision="float32"))
    options = ExportOptions(format=format, precision="float32", size=(64, 50), pixel_mm=(5.0, 6.0))
    described = export_run(spaced_run, tmp_path / "model", options)
    assert described["pixel_mm"] == [5.0, 6.0] and described["spacing_mm"] == SPACING_MM
    model, whole = open_model(tmp_path / "model", CPU), open_model(spaced_run, CPU)
    hu_ZYX = np.random.default_rng(0).integers(-1000, 400, (3, 64, 50), dtype=np.int16)
    (mask, probability), (expected, expected_probability) = (
        one.segment(hu_ZYX, 2, pixel_mm=(5.0, 6.0)) for one in (model, whole)
    )
    assert np.abs(probability - expected_probability).max() < 1e-3 and (mask == expected).mean() > 0.999
    with pytest.raises(DistsegError, match="got pixels of 5 x 5 mm; this file is for those of 5 x 6 mm"):
        model.segment(hu_ZYX, 2, pixel_mm=(5.0, 5.0))


def test_slices_without_a_pixel_size_need_one(
    spaced_model: Path, store: Path, tmp_path: Path, run_command: Callable[..., object]
) -> None:
    source, opened = tmp_path / "src", open_store(store)
    for case in opened.cases[:3]:
        hu_ZYX, label_ZYX = opened.read_case(case)
        for folder, values in (
            ("images", (hu_ZYX[4].astype(float) + 1250) / 1500 * 255),
            ("lung", (label_ZYX[4] > 0) * 255.0),
        ):
            (source / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(
                source / folder / f"{case.id.replace('_', '')}.png"
            )
    picture = next((source / "images").iterdir())
    done = run_command("distseg", "predict", spaced_model, picture, tmp_path / "mask.png", ok=False)
    assert done.returncode == 1 and "say --pixel-mm Y X" in done.stderr  # type: ignore[attr-defined]
    run_command("distseg", "predict", spaced_model, picture, tmp_path / "mask.png", "--pixel-mm", 5.6, 5.6)
    asked = load_config(None, ["data.fit=crop", "data.spacing_mm=7"])
    made, _ = prepare_store(source, tmp_path / "store", FoldRule(2), asked=Asked(), workers=1)
    with pytest.raises(DistsegError, match="data.spacing_mm: got 7.0; case .* does not say .*--pixel-mm Y X"):
        settled(asked, made)
    made, _ = prepare_store(source, tmp_path / "store", FoldRule(2), asked=Asked(), pixel_mm=(5.6, 5.6), workers=1)
    assert settled(asked, made).data.spacing_mm == 7 and made.slices_of(made.cases)[0].pixel_mm == (5.6, 5.6)
    with pytest.raises(DistsegError, match="data.spacing_mm: got 7.0; images of one pixel size are windows"):
        load_config(None, ["data.spacing_mm=7"])


def test_a_field_of_view_that_training_did_not_show_is_noted(model: Path, phantom: Path) -> None:
    from dataclasses import replace

    from distseg.data.nifti import read_nifti

    described = open_model(model, CPU).described
    volume = read_nifti(phantom / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz")
    assert notes_on_size(described, volume) == []
    for factor, expected in ((1.1, 0), (1.3, 1), (0.8, 1)):
        assert volume.spacing_mm is not None
        z_mm, y_mm, x_mm = volume.spacing_mm
        wider = replace(volume, spacing_mm=(z_mm, y_mm * factor, x_mm * factor))
        notes = notes_on_size(described, wider)
        assert len(notes) == expected and all("training showed 360 to 360 mm" in note for note in notes)


def test_an_ensemble_sees_one_pixel_size(spaced_run: Path, small_run: Path) -> None:
    from distseg.runs.folder import check_members

    with pytest.raises(DistsegError, match="data.fit|data.spacing_mm"):
        check_members([open_run(spaced_run), open_run(small_run)])
