"""What a command imports: a mistake waits for no torch, and nothing needs a package that its work does not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from distseg.cli import COMMANDS
from distseg.config_files import config_as_yaml, load_config
from distseg.packages import EXTRA_OF
from tests.conftest import ROOT
from tests.data.test_dicom import write_dicom_set

SLOW = {
    "torch",
    "timm",
    "torchvision",
    "accelerate",
    "nvidia",
    "deepspeed",
    "scipy",
    "matplotlib",
    "nibabel",
    "pydicom",
}
OF_TRAINING = ("nvidia", "deepspeed", "tensorboard")  # packages that only train and preview need


def in_one_process(steps: Sequence[tuple[Sequence[object], Collection[str]]]) -> list[dict[str, Any]]:
    """What commands do in a fresh process, each with packages that are absent; see tests/one_process.py."""
    asked = [{"words": [str(word) for word in words], "absent": sorted(absent)} for words, absent in steps]
    command = [sys.executable, "-m", "tests.one_process"]
    done = subprocess.run(command, input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def begun(store: Path, tmp_path: Path) -> Path:
    """The folder of a run that has a best model, as far as can be seen without reading it."""
    from safetensors.numpy import save_file

    run = tmp_path / "begun"
    (run / "best").mkdir(parents=True)
    save_file({}, run / "best" / "weights.safetensors", {"step": "1"})
    config = load_config(None, [f"data.store={store}", f"output_dir={run}"])
    (run / "config.yaml").write_text(config_as_yaml(config))
    return run


def test_help_imports_no_package_that_is_slow() -> None:
    steps = [((name, "--help"), ()) for name in COMMANDS]
    for (words, _), done in zip(steps, in_one_process(steps), strict=True):
        assert done["status"] == 0 and f"distseg {words[0]}" in done["out"]
        assert not {*SLOW, "numpy"} & {*done["imported"]}, words


def test_a_mistake_is_answered_before_torch_is_imported(store: Path, begun: Path, tmp_path: Path) -> None:
    nowhere, taken, volume, masks = (tmp_path / name for name in ("nowhere", "taken", "volume.nii.gz", "masks"))
    taken.mkdir()
    (taken / "letter.txt").touch()
    masks.mkdir()
    volume.touch()
    here, out = f"data.store={store}", tmp_path / "mask.nii.gz"
    mistakes = {
        ("train", f"data.store={nowhere}"): "without store.json",
        ("train", "data.stor=x"): "did you mean data.store?",
        ("train", here, "data.fold=9"): "data.fold: got 9",
        ("train", here, "regions={lung: [60]}", "data.focus_region=lung"): "regions.lung: got label 60",
        ("train", here, f"output_dir={begun}"): "holds a run already",
        ("train", here, f"output_dir={begun}", "--resume", "optim.lr=0.5"): "--resume: got another configuration",
        ("train", here, f"output_dir={nowhere}", f"model.start_from={nowhere}"): "run: got",
        ("predict", nowhere, volume, out): "it must be a run folder, an export folder or one of",
        ("predict", taken, volume, out): "it must be a run folder, an export folder or one of",
        ("predict", begun, nowhere, out): "no such file or folder",
        ("predict", begun, volume, tmp_path / "mask.png"): "a mask's name must end in",
        ("predict", begun, volume, volume): "the volume itself",
        ("predict", "--server", "ftp://x", volume, out): "must be grpc://host:port or http://host:port",
        ("evaluate", nowhere): "it must be a run folder",
        ("evaluate", begun, "--store", nowhere): "without store.json",
        ("evaluate", begun, "--ensemble", nowhere): "it must be a run folder",
        ("evaluate", begun, "train.epochs=2"): "a run is scored as it was trained",
        ("evaluate", begun, "--require", "infection.dice"): "must be region.score>=value",
        ("evaluate", begun, "--require", "infection.dicce>=0.5"): "--require: got infection.dicce>=0.5",
        ("evaluate", begun, "--require", "heart.dice>=0.5"): "the regions are lung, infection",
        ("evaluate", masks, "--store", store): "masks: got",
        ("evaluate", "--compare", begun, nowhere): "is not scored on split val",
        ("export", nowhere, out): "it must be a run folder",
        ("export", begun, taken): "holds something else",
        ("export", begun, nowhere, "--depth", 2): "--depth: got 2",
        ("export", begun, nowhere, "--frozen", "--format", "pt2"): "--frozen: got it for pt2",
        ("export", begun, nowhere, "--ensemble", nowhere): "it must be a run folder",
        ("preview", nowhere, tmp_path / "x.png"): "without store.json",
        ("report", nowhere): "it must be the folder of a run or a study",
    }
    answers = in_one_process([(words, ()) for words in mistakes])
    for (words, said), done in zip(mistakes.items(), answers, strict=True):
        assert done["status"] in (1, 2) and said in done["err"], (words, done["err"])
        assert not SLOW & {*done["imported"]}, words


def test_what_is_not_training_works_without_its_packages(
    model: Path, small_run: Path, phantom: Path, store: Path, tmp_path: Path
) -> None:
    run, scored = (shutil.copytree(small_run, tmp_path / name) for name in ("run", "scored"))
    write_dicom_set(tmp_path / "dicom", masks="seg")
    series = tmp_path / "dicom" / "images" / "a"
    volume = sorted((phantom / "COVID-19-CT-Seg_20cases").iterdir())[0]
    core = {  # what `pip install distseg` without any extra can do, prediction first: the others import more
        ("predict", model, volume, tmp_path / "mask.nii.gz"): "mask.nii.gz: lung",
        ("predict", model, series, tmp_path / "of_series.nii.gz"): "of_series.nii.gz: lung",
        ("report", run): "report.html",
        ("prepare", phantom, tmp_path / "store", "--workers", 1): "6 volumes of 6 patients",
        ("phantom", tmp_path / "set", "--cases", 1, "--size", 64, "--slices", 8): "1 cases",
        ("download", "--help"): "RECORD",
        ("doctor",): "not installed",
    }
    refused = {
        ("predict", model, series, tmp_path / "mask.dcm", "--format", "dicom-seg"): "dicom",
        ("prepare", tmp_path / "dicom", tmp_path / "z", "--workers", 1, "--folds", 2): "dicom",
        ("train", f"data.store={store}", f"output_dir={tmp_path / 'none'}"): "train",
        ("evaluate", run): "train",
        ("models",): "train",
        ("export", run, tmp_path / "x", "--format", "onnx"): "onnx",
        ("prepare", phantom, tmp_path / "y", "--cluster", "tcp://127.0.0.1:9"): "cluster",
    }
    networks = {  # with the packages that build networks and join ranks, but those of training
        ("predict", run, volume, tmp_path / "of_run.nii.gz"): "of_run.nii.gz: lung",
        ("evaluate", scored, "evaluate.bootstrap_resamples=10"): "infection: Dice",
        ("export", run, tmp_path / "exported", "--precision", "float32"): "model.pt: ",
        ("models", "--encoder", "gernet_s", "--decoder", "deeplabv3plus", "--size", 64): "gernet_s",
    }
    steps = [(words, EXTRA_OF) for words in (*core, *refused)] + [(words, OF_TRAINING) for words in networks]
    of_command = dict(zip((words for words, _ in steps), in_one_process(steps), strict=True))
    first, *_, last = of_command.values()
    assert not {"scipy.ndimage", "scipy.stats", "matplotlib", "distseg.pictures"} & {*first["imported"]}
    assert not {*OF_TRAINING} & {*last["imported"]}
    for words, said in (core | networks).items():
        done = of_command[words]
        assert said in done["out"], (words, done["err"])
        assert done["status"] == 0 or words == ("doctor",), (words, done["err"])  # which looks for what training needs
    for words, extra in refused.items():
        done = of_command[words]
        told = rf"error: distseg: got an installation without \S+; it belongs to the extra {extra}; pip install 'distseg\[{extra}\]'"
        assert done["status"] == 1 and re.fullmatch(told, done["err"].splitlines()[-1]), (words, done["err"])
