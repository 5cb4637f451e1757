"""From a run to one file: its formats, precisions and options, its verification, and a user's mistakes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distseg.commands.export import main
from distseg.config_files import load_config
from distseg.errors import DistsegError
from distseg.models.segmenter import HuSegmenter
from distseg.runs.folder import open_run
from distseg.runs.trained import load_best
from distseg.scoring.postprocessing import RULES, RegionRule, rules_as_dict
from distseg.serving import exporting, verification
from distseg.serving.exporting import ExportOptions, export_run
from distseg.serving.formats import FORMATS
from distseg.serving.model import open_model
from distseg.serving.to_export import _is_export, run_to_export
from distseg.serving.verification import COMPILED, Accepted, dice_of_samples, read_samples
from distseg.serving.writers import WRITERS, in_precision

Run = Callable[..., Any]
CPU = torch.device("cpu")
FLOAT32 = ExportOptions(precision="float32")


def telling_run(small_run: Path, folder: Path) -> Path:
    """The small run with thresholds in the middle of what it says: half of its pixels are lung, and some of them infection."""
    run = Path(shutil.copytree(small_run, folder / "run"))
    segmenter, config = load_best(*open_run(run))[1], open_run(run)[1]
    hu = torch.cat([sample.hu_NCHW for sample in read_samples(config)])
    with torch.inference_mode():
        lung, infection = segmenter(hu)[1].unbind(dim=1)
    rules: Mapping[str, RegionRule] = {
        "lung": RegionRule(threshold=float(lung.median())),
        "infection": RegionRule(threshold=float(infection.quantile(0.6)), inside="lung"),
    }
    (run / RULES).write_text(json.dumps({"rules": rules_as_dict(rules)}))
    return run


def test_the_exported_file_gives_the_same_masks_without_distseg(small_run: Path, model: Path, tmp_path: Path) -> None:
    hu = torch.randint(-1100, 400, (3, 1, 61, 75), dtype=torch.int16)
    torch.save(hu, tmp_path / "in.pt")
    script = """
import sys, torch, warnings
warnings.simplefilter("ignore")
sys.modules["distseg"] = None
torch.set_num_threads(1)
with torch.inference_mode():
    torch.save(torch.jit.load(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
"""
    words = [sys.executable, "-I", "-c", script, model / "model.pt", tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run([str(word) for word in words], check=True)
    mask, probability = torch.load(tmp_path / "out.pt")
    torch.set_num_threads(1)
    with torch.inference_mode():
        eager_mask, eager_probability = load_best(*open_run(small_run))[1](hu)
    assert torch.equal(mask, eager_mask) and mask.dtype == torch.uint8 and mask.shape == (3, 1, 61, 75)
    torch.testing.assert_close(probability, eager_probability, rtol=0, atol=1e-6)
    assert probability.dtype == torch.float32 and probability.shape == (3, 2, 61, 75)


def test_the_file_describes_itself_inside_and_beside(model: Path) -> None:
    beside = json.loads((model / "model.json").read_text())
    extra = {"distseg.json": ""}
    torch.jit.load(str(model / "model.pt"), _extra_files=extra)
    inside = json.loads(extra["distseg.json"])
    assert {key: beside[key] for key in inside} == inside
    assert inside["regions"] == {"lung": [1, 2], "infection": [2]} and inside["windows_hu"] == [[-1250.0, 250.0]]
    checks = beside["verification"]["checks"]
    assert sum(check["slices"] == "random" for check in checks) == 6
    assert sum(check["slices"].startswith("phantom_") for check in checks) == 1, "a slice of each validation case"
    assert all(check["differing_mask_pixels"] == 0 for check in checks)
    triton = ["model_repository", "model_repository_python"]
    assert sorted(path.name for path in model.iterdir()) == ["model.json", "model.pt", *triton]


def test_a_file_that_disagrees_is_not_published(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = WRITERS["torchscript"]

    def another_window(segmenter: HuSegmenter, *rest: Any) -> None:
        segmenter.low_hu = [low - 400 for low in segmenter.low_hu]
        honest(segmenter, *rest)
        segmenter.low_hu = [low + 400 for low in segmenter.low_hu]

    monkeypatch.setitem(exporting.WRITERS, "torchscript", another_window)
    with pytest.raises(DistsegError, match="the file differs from the eager model at shape"):
        export_run(small_run, tmp_path / "model", FLOAT32)
    assert list(tmp_path.iterdir()) == []


def test_reduced_precision_is_measured_kept_where_it_is_cheap_and_refused_where_it_is_not(
    small_run: Path, tmp_path: Path
) -> None:
    run = telling_run(small_run, tmp_path)
    cheap = export_run(run, tmp_path / "cheap", ExportOptions(dice_tolerance=1.0))
    found = cheap["precision"]
    assert (
        found["weights"] == "bfloat16" and found["slices"] == 8 and set(found["dice_change"]) == {"lung", "infection"}
    )
    _, config = open_run(run)
    whole = load_best(*open_run(run))[1]
    whole.label_map.thresholds, whole.label_map.outer = list(cheap["thresholds"].values()), [-1, 0]
    samples = read_samples(config)
    before, after = (dice_of_samples(one, samples, config) for one in (whole, in_precision(whole, "bfloat16")))
    assert before["lung"] is not None and after["lung"] is not None and before == found["dice"]
    assert found["dice_change"]["lung"] == after["lung"] - before["lung"] != 0
    with pytest.raises(DistsegError, match="bfloat16 changes the Dice of .*, more than 0; take float32"):
        export_run(run, tmp_path / "dear", ExportOptions(precision="bfloat16", dice_tolerance=0.0))
    assert not (tmp_path / "dear").exists()
    dear = export_run(run, tmp_path / "dear", ExportOptions(dice_tolerance=0.0))
    assert dear["precision"]["weights"] == "float32" and "more than 0" in dear["precision"]["because"]
    saved = [(tmp_path / name / "model.pt").stat().st_size for name in ("cheap", "dear")]
    assert saved[0] < 0.6 * saved[1]


def test_without_its_store_a_run_is_exported_in_float32_only(small_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    config, store = (run / "config.yaml").read_text(), load_config(run / "config.yaml").data.store
    (run / "config.yaml").write_text(config.replace(store, str(tmp_path / "gone")))
    described = export_run(run, tmp_path / "model")
    assert described["precision"]["weights"] == "float32" and "gone" in described["precision"]["because"]
    assert {check["slices"] for check in described["verification"]["checks"]} == {"random"}
    with pytest.raises(DistsegError, match="cannot be measured; take float32"):
        export_run(run, tmp_path / "half", ExportOptions(precision="float16"))


@pytest.mark.parametrize(
    ("before", "after", "weights", "because"),
    [
        ((0.9, None), (0.9, None), "bfloat16", ""),  # found in neither
        ((0.9, None), (0.9, 0.0), "float32", "changes the Dice of infection by +1.0000"),  # false alarms
        ((0.9, 0.5), (0.9, None), "float32", "changes the Dice of infection by +1.0000"),
        ((None, None), (None, None), "float32", "no region has a Dice on the validation slices"),
    ],
)
def test_a_region_without_a_dice_does_not_count_as_kept(
    before: tuple[float | None, ...],
    after: tuple[float | None, ...],
    weights: str,
    because: str,
    small_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = open_run(small_run)[1]
    found = iter([dict(zip(("lung", "infection"), dice, strict=True)) for dice in (before, after)])
    monkeypatch.setattr(exporting, "dice_of_samples", lambda *_: next(found))
    whole, samples = load_best(*open_run(small_run))[1], read_samples(config)
    _, precision = exporting._in_chosen_precision(whole, FORMATS["torchscript"], ExportOptions(), samples, config)
    assert precision["weights"] == weights and because in precision.get("because", "")


def test_slices_are_sampled_over_all_cases_however_short(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_run(small_run)[1]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, fold=1))
    all_of_them = [sample.case.id for sample in read_samples(config)]
    assert len(all_of_them) == 2
    for limit, taken in ((1, [1]), (3, [1, 2]), (16, [8, 8])):  # of 2 x 8 slices
        monkeypatch.setattr(verification, "SAMPLE", limit)
        assert [len(sample.z) for sample in read_samples(config)] == taken


def test_a_folder_of_somebody_else_is_not_replaced(small_run: Path, model: Path, tmp_path: Path) -> None:
    for name, text in (("foreign", "{}"), ("cut", "{"), ("more", (model / "model.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(text)
        (tmp_path / name / "thesis.txt").write_text("mine")
        with pytest.raises(DistsegError, match="which holds something else; give a new folder"):
            export_run(small_run, tmp_path / name, FLOAT32)
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distseg.serving.to_export.is_free", lambda _: pytest.fail("went on"))
    with pytest.raises(DistsegError, match="whose name is not UTF-8; torch writes to no such path"):
        run_to_export(small_run, tmp_path / os.fsdecode(b"mod\xe8le"), FLOAT32)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(DistsegError, match="must be a folder that can be written"):
        run_to_export(small_run, tmp_path / "model", FLOAT32)


def test_an_earlier_export_in_a_file_system_of_its_own_is_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Path(shutil.copytree(model, tmp_path / "disk"))
    (disk / "lost+found").mkdir()
    assert not _is_export(disk)
    monkeypatch.setattr("os.path.ismount", lambda place: Path(place) == disk)
    assert _is_export(disk)


def test_an_earlier_export_is_replaced_also_by_way_of_a_link(
    small_run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "real")
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "real")
        with pytest.raises(DistsegError, match="the folder you are in"):
            export_run(small_run, Path("."), FLOAT32)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = (tmp_path / "real/model.pt").stat().st_ino
    export_run(small_run, tmp_path / "link", FLOAT32)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/model.pt").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_what_post_processing_does_to_a_slice_is_inside_the_file(small_run: Path, tmp_path: Path) -> None:
    run = telling_run(small_run, tmp_path)
    described = export_run(run, tmp_path / "model", FLOAT32)
    assert described["inside"] == {"infection": "lung"}
    hu = torch.randint(-1100, 400, (2, 1, 64, 64), dtype=torch.int16)
    mask, probability = open_model(tmp_path / "model", CPU).segmenter(hu)
    lung = probability[:, :1] >= described["thresholds"]["lung"]
    infection = lung & (probability[:, 1:] >= described["thresholds"]["infection"])
    assert torch.equal(mask, lung.to(torch.uint8) + infection.to(torch.uint8))
    assert 0 < infection.sum() < (probability[:, 1:] >= described["thresholds"]["infection"]).sum()


def test_an_ensemble_is_one_file_that_averages_probabilities(small_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(small_run, tmp_path / "other"))
    weights = other / "best" / "weights.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file(
        {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()},
        weights,
        metadata,
    )
    export_run(small_run, tmp_path / "model", dataclasses.replace(FLOAT32, ensemble=[other]))
    hu = torch.randint(-1100, 400, (2, 1, 64, 64), dtype=torch.int16)
    both, first, second = (open_model(path, CPU).segmenter(hu)[1] for path in (tmp_path / "model", small_run, other))
    torch.testing.assert_close(both, (first + second) / 2, rtol=0, atol=2e-6)
    assert not torch.allclose(first, second, atol=1e-4)


def test_a_frozen_file_agrees_within_its_tolerance(small_run: Path, tmp_path: Path) -> None:
    described = export_run(small_run, tmp_path / "model", dataclasses.replace(FLOAT32, frozen=True))
    assert described["verification"]["accepted"]["probability"] == 1e-3
    frozen = torch.jit.load(str(tmp_path / "model" / "model.pt"))
    assert not list(frozen.parameters()) and frozen.n_slices == 1


def test_a_file_too_far_from_the_model_is_refused(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPILED, "float32", Accepted(-1.0, 0.0))
    with pytest.raises(DistsegError, match="at most -1 and 0 .* nothing was written; .*without --frozen is exact"):
        export_run(small_run, tmp_path / "model", dataclasses.replace(FLOAT32, frozen=True))
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_float32_where_the_file_in_bfloat16_is_too_far(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, frozen = telling_run(small_run, tmp_path), ExportOptions(dice_tolerance=1.0, frozen=True)
    monkeypatch.setitem(COMPILED, "bfloat16", Accepted(1.0, 1.0))
    assert export_run(run, tmp_path / "near", frozen)["precision"]["weights"] == "bfloat16"
    monkeypatch.setitem(COMPILED, "bfloat16", Accepted(0.0, 0.0))
    precision = export_run(run, tmp_path / "far", frozen)["precision"]
    assert precision.keys() == {"weights", "because"} and precision["weights"] == "float32"
    assert "the file in bfloat16 differs from the eager model at shape [1, 1, 512, 512]" in precision["because"]
    with pytest.raises(DistsegError, match="nothing was written; --precision float32 comes closer"):
        export_run(run, tmp_path / "refused", dataclasses.replace(frozen, precision="bfloat16"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow(15)
def test_onnx_takes_one_size_and_gives_the_same(small_run: Path, model: Path, tmp_path: Path) -> None:
    out = compiled(small_run, tmp_path, "onnx")
    agrees(out, model)


@pytest.mark.slow(60)
def test_aot_inductor_takes_one_size_and_gives_the_same(small_run: Path, model: Path, tmp_path: Path) -> None:
    out = compiled(small_run, tmp_path, "pt2")
    agrees(out, model)
    assert json.loads((out / "model.json").read_text())["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_pt2_without_a_compiler_is_refused(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DistsegError, match="got pt2 without a C.. compiler"):
        compiled(small_run, tmp_path, "pt2")
    assert list(tmp_path.iterdir()) == []


def compiled(run: Path, folder: Path, format: str) -> Path:
    described = export_run(run, folder / format, dataclasses.replace(FLOAT32, format=format, size=(64, 80)))
    assert described["input"]["shape"] == ["N", 1, 64, 80]
    assert len(described["verification"]["checks"]) == 7 and sorted(p.name for p in (folder / format).iterdir()) == [
        "model.json", FORMATS[format].file,
    ]  # fmt: skip
    return folder / format


def agrees(out: Path, model: Path) -> None:
    hu = torch.randint(-1100, 400, (3, 1, 64, 80), dtype=torch.int16)
    one, other = open_model(out, CPU), open_model(model, CPU)
    torch.testing.assert_close(one.segmenter(hu)[1], other.segmenter(hu)[1], rtol=0, atol=1e-4)
    same = dataclasses.replace(one.described, input=None, format=None, device=None)
    assert same == dataclasses.replace(other.described, input=None, format=None, device=None)
    with pytest.raises(DistsegError, match=r"this model takes int16 \(N, 1, 64, 80\).*export it with --size"):
        one.segment(torch.zeros(2, 64, 64, dtype=torch.int16).numpy(), batch_size=2)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--format", "onnx", "--precision", "bfloat16"],
            1,
            "got bfloat16 for onnx, which takes float32; choose another",
        ),
        (["--format", "onnx", "--frozen"], 1, "only TorchScript is frozen"),
        (["--depth", "2"], 1, "only a Unet++ trained with model.deep_supervision"),
        (["data.fold=1"], 1, "only evaluate.key=value changes a finished run"),
        (["--size", "0", "512"], 2, "must be at least 1"),
        (["--ensemble", "nowhere"], 1, "got nowhere without config.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], status: int, message: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        given = main([str(small_run), str(tmp_path / "model"), *words])
    except SystemExit as stopped:  # argparse's own
        given = stopped.code
    said = capsys.readouterr().err
    assert given == status and message in said and not (tmp_path / "model").exists()


def test_a_run_with_test_time_augmentation_exports_it(small_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("tta: false", "tta: true").replace("window: null", "window: 64"))
    export_run(run, tmp_path / "model", FLOAT32)  # compares the file with the eager model at several sizes
    hu = torch.randint(-1100, 400, (1, 1, 64, 64), dtype=torch.int16)
    plain, averaged = open_model(small_run, CPU).segmenter(hu)[1], open_model(tmp_path / "model", CPU).segmenter(hu)[1]
    turned = open_model(tmp_path / "model", CPU).segmenter(hu.flip(3))[1].flip(3)
    torch.testing.assert_close(turned, averaged, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, averaged, atol=1e-5)


@pytest.mark.parametrize("scale", [(64, 64), (630, 630), (96, 40), (1, 5)])
def test_any_slice_size_gives_a_mask_of_that_size(scale: tuple[int, int], small_run: Path) -> None:
    segmenter = open_model(small_run, CPU).segmenter
    mask, probability = segmenter(torch.zeros(2, 1, *scale, dtype=torch.int16))
    assert mask.shape == (2, 1, *scale) and probability.shape == (2, 2, *scale)


def test_wrong_tensors_are_refused_by_the_model_itself(model: Path) -> None:
    segmenter = torch.jit.load(str(model / "model.pt"))
    for wrong in (torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.int16), torch.zeros(1, 1, 0, 8).short()):
        with pytest.raises(torch.jit.Error, match="input: must"):
            segmenter(wrong)


def test_what_scanners_pad_with_is_air_in_the_file_too(model: Path) -> None:
    hu = torch.randint(-1024, 400, (2, 1, 64, 64), dtype=torch.int16)
    hu[..., :9, :] = -1024
    padded = hu.clone()
    padded[..., :9, :] = -2048
    segmenter = open_model(model, CPU).segmenter
    assert all(torch.equal(one, other) for one, other in zip(segmenter(padded), segmenter(hu), strict=True))
