"""From a finished run to scores, a verified file, masks and a page; and a user's mistakes on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from distseg.config_files import load_config
from distseg.data.nifti import read_nifti
from distseg.data.store import open_store
from distseg.data.volume_files import read_volume, write_volume
from distseg.errors import DistsegError
from distseg.files import locked, write_json
from distseg.regions import write_order
from distseg.runs.folder import CASES
from distseg.scoring.evaluation import evaluate_masks, evaluate_run
from distseg.serving.exporting import ExportOptions, export_run

Run = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_of_two_cases(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, said to have been validated on a fold of two cases."""
    left_out = shutil.ignore_patterns("eval", CASES)
    run = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("two") / "run", ignore=left_out))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("fold: 0", "fold: 1"))
    return run


@pytest.mark.dist
def test_two_ranks_score_as_one_process(run_of_two_cases: Path, run_ranks: Run) -> None:
    run = run_of_two_cases
    run_ranks(1, "evaluate", run, "--tta")
    one = {path.name: path.read_bytes() for path in (run / "eval/val").rglob("*.*")}
    done = run_ranks(2, "evaluate", run, "--tta")
    assert done.stdout.count("lung: Dice") == 1
    two = {path.name: path.read_bytes() for path in (run / "eval/val").rglob("*.*")}
    assert one.keys() == two.keys() and {"summary.json", "per_slice.csv", "probabilities.json"} <= one.keys()
    assert [name for name in one if one[name] != two[name] and not name.endswith(".gz")] == []  # gzip holds the time


def test_masks_of_anything_are_scored_as_a_run_s_own(
    run_of_two_cases: Path, store: Path, tmp_path: Path, run_command: Run
) -> None:
    own = evaluate_run(run_of_two_cases, "val")
    masks = Path(shutil.copytree(run_of_two_cases / "eval/val/masks", tmp_path / "masks"))
    words = ["distseg", "evaluate", masks, "--store", store, "--config", run_of_two_cases / "config.yaml"]
    run_command(*words)
    scored = json.loads((masks / "eval/val/summary.json").read_text())
    assert scored["regions"] == own["regions"] and scored["model"] is None
    assert not (masks / "eval/val/probabilities.json").exists()
    scored_again = tmp_path / "again"  # in folders, in other formats
    for number, path in enumerate(sorted(masks.glob("*.nii.gz"))):
        volume, target = read_volume([path]), scored_again / f"sub/{number}" / path.name.split(".")[0]
        target.parent.mkdir(parents=True)
        write_volume([target.with_suffix((".mha", ".nrrd")[number % 2])], volume.values_ZYX.astype(np.uint8), volume)
    run_command(*words[:2], scored_again, *words[3:])
    assert json.loads((scored_again / "eval/val/summary.json").read_text())["regions"] == scored["regions"]
    first, second = sorted(path for path in masks.iterdir() if path.is_file())[:2]
    first.unlink()
    done = run_command(*words, ok=False)
    assert done.returncode == 1 and "without 1 of 2 cases" in done.stderr and first.name.split(".")[0] in done.stderr
    shutil.copy(second, first)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), second)
    assert "must lie on its volume's grid" in run_command(*words, ok=False).stderr


def test_masks_may_be_of_any_format_in_folders_however_deep(
    run_of_two_cases: Path, store: Path, tmp_path: Path
) -> None:
    config, masks = load_config(run_of_two_cases / "config.yaml"), tmp_path / "masks"
    own = evaluate_run(run_of_two_cases, "val")["regions"]
    first, second = sorted((run_of_two_cases / "eval/val/masks").iterdir())
    (masks / "a/b").mkdir(parents=True)
    sitk.WriteImage(sitk.ReadImage(str(first)), str(masks / "a/b" / first.name.replace(".nii.gz", ".mha")))
    for z, slice_YX in enumerate(read_nifti(second).values_ZYX):  # pictures of slices
        Image.fromarray(slice_YX).save(masks / f"{second.name.removesuffix('.nii.gz')}_{z + 5}.png")
    assert evaluate_masks(masks, "val", store, config)["regions"] == own
    shutil.copy(first, masks / first.name)
    with pytest.raises(DistsegError, match="for case .*; each has one; move the other away"):
        evaluate_masks(masks, "val", store, config)


def test_post_processing_is_chosen_on_validation_and_used_from_then_on(
    small_run: Path, store: Path, phantom: Path, tmp_path: Path, run_command: Run
) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    raw = evaluate_run(run, "test")
    evaluate_run(run, "val")
    done = run_command("distseg", "evaluate", run, "--tune", "--split", "test")
    assert "note: 1 of them holds lung; a rule chosen by one case may not hold for others" in done.stdout
    assert f"note: scores in {run / 'eval/val'} are stale. They are older than the post-processing" in done.stdout
    chosen = json.loads((run / "postprocessing.json").read_text())
    assert chosen["split"] == "val" and "tuned on 1 validation cases, lung" in done.stdout
    # What is told is what is scored, of the label map: regions lie over each other there.
    scored = {"plain": evaluate_run(run, "val", raw=True), "chosen": evaluate_run(run, "val")}
    for region, dice in chosen["dice"].items():
        for which, value in dice.items():
            assert value == pytest.approx(scored[which]["regions"][region]["dice"]["mean"])
    assert sum(dice["chosen"] for dice in chosen["dice"].values()) > sum(d["plain"] for d in chosen["dice"].values())
    with pytest.raises(DistsegError, match="postprocessing.json has the regions' own; leave it out, or give --raw"):
        evaluate_run(run, "val", overrides=["evaluate.threshold=0.9"])
    summary = json.loads((run / "eval/test/summary.json").read_text())
    assert summary["postprocessing"] == chosen["rules"] and raw["postprocessing"] is None
    assert evaluate_run(run, "test", raw=True)["regions"] == raw["regions"]
    model, volume = tmp_path / "model", phantom / open_store(store).cases_of("test", 0)[0].source
    export_run(run, model, ExportOptions(precision="float32"))
    run_command("distseg", "predict", model, volume, tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert summary["regions"]["lung"]["predicted_ml"]["mean"] == pytest.approx(
        (mask > 0).sum() * np.prod(nib.load(volume).header.get_zooms()) / 1000, rel=1e-5
    )


def test_an_ensemble_is_scored_on_patients_that_no_member_has_seen(
    small_run: Path, store: Path, tmp_path: Path, run_command: Run
) -> None:
    alone = evaluate_run(small_run, "test")
    twice = evaluate_run(small_run, "test", ensemble=[small_run])
    assert (
        twice["ensemble"] == [str(small_run)]
        and twice["regions"]["lung"]["pooled"] == alone["regions"]["lung"]["pooled"]
    )
    other = Path(shutil.copytree(small_run, tmp_path / "other"))
    config = (other / "config.yaml").read_text()
    dealt = {split: open_store(store).cases_of(split, fold=1) for split in ("train", "val")}
    write_json(other / CASES, {split: {case.folder: case.patient for case in cases} for split, cases in dealt.items()})
    with pytest.raises(DistsegError, match="--ensemble: .* was trained on 1 of the patients of split val"):
        evaluate_run(small_run, "val", ensemble=[other])
    # A store whose folds were dealt anew since: what is held out now was trained on.
    with pytest.raises(
        DistsegError, match="run: .* was trained on 1 of the patients .* use the store it was trained on"
    ):
        evaluate_run(other, "val")
    (other / "config.yaml").write_text(config.replace("image_size: 64", "image_size: 96"))
    with pytest.raises(DistsegError, match="data.image_size 96; .* has 64; members must see the same images"):
        evaluate_run(small_run, "test", ensemble=[other])


def test_a_requirement_decides_the_exit_status_and_two_runs_are_compared(small_run: Path, run_command: Run) -> None:
    words = ["distseg", "evaluate", small_run, "evaluate.threshold=0.4", "--require", "lung.pooled.specificity>=0"]
    run_command(*words)
    done = run_command(*words, "--require", "lung.dice>=1.5", ok=False)
    assert done.returncode == 1 and "--require: lung.dice is" in done.stderr and "lung: Dice" in done.stdout
    out = run_command("distseg", "evaluate", "--compare", small_run, small_run).stdout
    assert "lung dice: " in out and "difference 0.0000" in out


def test_an_evaluation_is_one_process_s_and_removes_what_a_killed_one_left(run_of_two_cases: Path) -> None:
    out = run_of_two_cases / "eval/val"
    (out.parent / ".partial-0-val/masks").mkdir(parents=True)
    with (
        locked(out.with_name(".lock-val"), "", "process 7 on another node"),
        pytest.raises(DistsegError, match="evaluation: got .*val, which process 7 on another node works on; wait"),
    ):
        evaluate_run(run_of_two_cases, "val")
    assert (out.parent / ".partial-0-val").is_dir()
    evaluate_run(run_of_two_cases, "val")
    assert [path.name for path in out.parent.iterdir()] == ["val"]


def test_regions_write_the_label_of_their_own() -> None:
    assert write_order({"infection": (2,), "lung": (1, 2)}) == [(1, 1), (0, 2)]
    assert write_order({"lung": (1, 2, 3), "infection": (2, 3), "consolidation": (3,)}) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(DistsegError, match="each region needs a label of its own"):
        write_order({"a": (1,), "b": (1,)})


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["evaluate", "/nowhere"], 1, "run: got /nowhere without config.yaml"),
        (["evaluate"], 2, "give RUN"),
        (["evaluate", "{run}", "data.fold=1"], 1, "override: got data.fold=1; a run is scored as it was trained"),
        (["evaluate", "{run}", "--require", "dice>0.7"], 2, "must be region.score>=value"),
        (["evaluate", "--compare", "/nowhere", "{run}"], 1, "/nowhere, which is not scored on split val"),
        (["evaluate", "--compare", "{run}", "{run}", "--require", "lung.dice>0.7"], 2, "takes --split alone"),
        (["evaluate", "{run}", "--require", "lungs.dice>0.7"], 1, "the regions are lung, infection; name one of them"),
        (
            ["evaluate", "{run}", "evaluate.tta_scales=[1.0"],
            1,
            "its value must be YAML; a bracket or quote may be open",
        ),
        (["evaluate", "{run}", "--tune", "--ensemble", "{run}"], 1, "rules are chosen for one run"),
        (["evaluate", "{phantom}", "--store", "{store}", "--raw"], 1, "it is for a trained run; leave it out"),
        (["evaluate", "{phantom}", "--store", "{store}", "regions={bone: [9]}"], 1, "regions.bone: got label 9"),
        (["evaluate", "{phantom}"], 1, "to score a folder of masks, give its --store"),
        (["export", "{run}", "{store}"], 1, "which holds something else"),
        (["export", "{run}", "/tmp/never", "--dice-tolerance", "nan"], 2, "must be a finite number of at least 0"),
        (["train", "--config", "/nowhere.yaml"], 1, "config file: got /nowhere.yaml; no such file"),
        (["train", "train.epcohs=1"], 1, "did you mean train.epochs?"),
        (["train", "train.epochs"], 2, "must be section.key=value"),
        (["train", "data.store=/nowhere", "output_dir=/tmp/never"], 1, "store: got /nowhere without store.json"),
        (["train", "data.store={store}", "data.fold=3", "output_dir=/tmp/never"], 1, "has folds 0 to 2"),
        (
            ["train", "data.store={store}", "data.image_size=100", "model.encoder=gernet_s", "output_dir=/tmp/never"],
            1,
            "image: got 100 x 100; height and width must be multiples of 32; use 96 or 128",
        ),
        (["train", "data.store={store}", "regions={bone: [3]}", "output_dir=/tmp/never"], 1, "got label 3"),
        (["prepare", "/nowhere", "/tmp/never"], 1, "source: got /nowhere; no such folder"),
        (["prepare", "{phantom}", "/tmp/never", "--folds", "1"], 2, "at least 2"),
        (["trian"], 2, "did you mean train?"),
    ],
)
def test_a_mistake_is_one_line_and_the_right_status(
    words: list[str],
    status: int,
    message: str,
    small_run: Path,
    store: Path,
    phantom: Path,
    refused: Run,
) -> None:
    places = {"run": small_run, "store": store, "phantom": phantom}
    filled = words
    for name, place in places.items():
        filled = [word.replace(f"{{{name}}}", str(place)) for word in filled]
    done = refused(*filled)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    assert not Path("/tmp/never").exists()


def test_the_predecessors_flags_train_and_score(phantom: Path, tmp_path: Path, run_command: Run) -> None:
    shared = ["--datadir", phantom, "--savedir_base", tmp_path]
    settings = [*_small_settings(), "train.max_steps=1"]
    run_command("python", "distseg/train.py", "--encoder", "gernet_s", "--base", "unetplus", *shared, *settings)
    config = load_config(tmp_path / "unetplus_gernet_s" / "config.yaml")
    assert config.model.decoder == "unetplusplus" and (tmp_path / "store" / "store.json").is_file()
    out = run_command("python", "distseg/evaluate.py", *shared, "-ei", "unetplus_gernet_s").stdout
    assert "lung: Dice" in out


def _small_settings() -> list[str]:
    from tests.conftest import SMALL

    return [word for word in SMALL if not word.startswith("model.encoder=")]
