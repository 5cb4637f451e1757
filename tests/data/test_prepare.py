"""Sources into a store: what is written, what is refused, and that nothing half-done has a final name."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from distseg.data.preparing import FoldRule, foreground_positions, prepare_store
from distseg.data.store import Store, damaged_files, open_store
from distseg.errors import DistsegError


def prepare(src: Path, root: Path, n_folds: int = 3) -> Store:
    return prepare_store(src, root, FoldRule(n_folds), workers=2)[0]


@pytest.fixture
def source(phantom: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(phantom, tmp_path / "src"))


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    image = nib.load(path)
    values, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(values, affine), path)


def test_a_store_holds_the_volumes_in_one_orientation(phantom: Path, store: Path) -> None:
    opened = open_store(store)
    assert [case.id for case in opened.cases] == [f"phantom_{i:03d}" for i in range(1, 7)]
    assert all(case.shape == (8, 64, 64) and case.intensity == "hu" for case in opened.cases)
    for case in (opened.cases[0], opened.cases[3]):  # the fourth is stored in another axis order
        image = nib.as_closest_canonical(nib.load(phantom / case.source))
        hu_ZYX, label_ZYX = opened.read_case(case)
        assert np.array_equal(hu_ZYX, np.asarray(image.dataobj)[::-1, ::-1].T)
        assert hu_ZYX.dtype == np.int16 and label_ZYX.dtype == np.uint8 and set(np.unique(label_ZYX)) <= {0, 1, 2}
        counts = np.bincount(label_ZYX.ravel(), minlength=3).tolist()
        assert list(case.label_voxels.values()) == counts and case.hu_range == (hu_ZYX.min(), hu_ZYX.max())
        held = [z for first, end in case.slices_with["infection"] for z in range(first, end)]
        assert held == np.flatnonzero((label_ZYX == 2).any(axis=(1, 2))).tolist()
    assert not list(store.parent.glob(".*"))


def test_joint_masks_give_the_same_labels_as_separate_ones(source: Path, store: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "Lung_Mask")
    joint = prepare(source, tmp_path / "store")
    for one, other in zip(joint.cases, open_store(store).cases, strict=True):
        assert one.label_voxels == other.label_voxels


def test_preparing_again_reads_only_what_changed(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "store")
    before = written(tmp_path / "store")
    rewrite(source / "Infection_Mask" / "phantom_002.nii.gz", lambda values, affine: (values * 0, affine))
    again = prepare(source, tmp_path / "store")
    after = written(tmp_path / "store")
    assert {path.rsplit("-", 1)[0] for path in (before.keys() ^ after.keys())} == {"phantom_002"}
    assert all(after[path] == before[path] for path in before.keys() & after.keys())
    assert again.cases[1].label_voxels["infection"] == 0


def written(root: Path) -> dict[str, int]:
    """When each case folder of a store was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.rglob("case.json")}


def test_a_failure_leaves_the_old_store_as_it_was(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "store")
    rewrite(source / "Infection_Mask" / "phantom_001.nii.gz", lambda values, affine: (values * 0, affine))
    rewrite(source / "Infection_Mask" / "phantom_005.nii.gz", lambda values, affine: (values + 9, affine))
    with pytest.raises(DistsegError, match="got value 9"):
        prepare(source, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert not list(damaged_files(store)) and store.cases[0].label_voxels["infection"] > 0


def test_a_full_disk_is_one_line_and_leaves_the_old_store_as_it_was(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "store")
    for name in ("phantom_001", "phantom_002"):
        rewrite(source / "Infection_Mask" / f"{name}.nii.gz", lambda values, affine: (values * 0, affine))
    # The system refuses to write more than 5 kB to a file, as it does on a full disk; a slice has 8 kB.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); from distseg.commands.prepare import main; sys.exit(main())"
    words = [sys.executable, "-c", limited, str(source), str(tmp_path / "store"), "--folds", "3"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "error: store: cannot write" in done.stderr and "free some space" in done.stderr
    store = open_store(tmp_path / "store")
    assert not list(damaged_files(store)) and store.cases[0].label_voxels["infection"] > 0
    assert not list((tmp_path / "store").rglob(".partial-*"))


def test_a_second_prepare_of_the_same_store_is_refused_while_one_runs(source: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock-store").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DistsegError, match="store: got .*store, which another process works on; wait"):
            prepare(source, tmp_path / "store")
    prepare(source, tmp_path / "store")
    assert not list(tmp_path.glob(".lock-*"))


def test_a_killed_prepare_takes_its_workers_and_its_lock_along(source: Path, tmp_path: Path) -> None:
    slow = (
        "import os, sys, time, distseg.data.preparing as p; p.read_image = lambda source: (os.write(1, b'reading\\n'), time.sleep(600));"
        "from distseg.commands.prepare import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", slow, str(source), str(tmp_path / "store"), "--folds", "3", "--workers", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None and running.stdout.readline() == "reading\n"
        workers = psutil.Process(running.pid).children()
        running.kill()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) == 2 and not alive
    prepare(source, tmp_path / "store")  # nobody holds its lock


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * path.stat().st_size)]
)
def test_prepare_mends_what_check_finds(damage: Callable[[Path], object], source: Path, tmp_path: Path) -> None:
    before = prepare(source, tmp_path / "store")
    whole, case = before.read_case(before.cases[1]), before.cases[1]
    damage(tmp_path / "store" / case.folder / "0002.image.npy")
    assert len(list(damaged_files(before))) == 1
    after = prepare(source, tmp_path / "store")
    assert not list(damaged_files(after)) and after.cases == before.cases
    assert all(np.array_equal(a, b) for a, b in zip(after.read_case(case), whole, strict=True))


def test_check_names_every_file_that_is_not_what_it_was(
    store: Path, tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert "every file is what it was" in run_command("distseg", "prepare", "--check", store).stdout
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    slices = open_store(copy).slices_of(open_store(copy).cases)
    content = bytearray(slices[3].image.read_bytes())
    content[-1] ^= 1
    slices[3].image.write_bytes(content)
    slices[9].label.unlink()
    checked = run_command("distseg", "prepare", "--check", copy, ok=False)
    assert checked.returncode == 1 and "got 2 missing or changed files" in checked.stderr
    assert f"changed file {slices[3].image} " in checked.stdout and f"missing file {slices[9].label};" in checked.stdout


def test_foreground_positions_are_on_their_label() -> None:
    label_ZYX = np.random.default_rng(0).integers(0, 3, (5, 20, 30)).astype(np.uint8)
    label_ZYX[2] = 0
    label_ZYX[3, :, :] = 0
    label_ZYX[3, 19, 29] = 2
    kept = foreground_positions(label_ZYX)
    assert all(label_ZYX[z, y, x] == label > 0 for z, label, y, x in kept.tolist())
    assert kept[kept[:, 0] == 3].tolist() == [[3, 2, 19, 29]] and not (kept[:, 0] == 2).any()
    assert np.array_equal(kept, foreground_positions(label_ZYX))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: shutil.rmtree(src), "source: got .*src; no such folder"),
        (
            lambda src: shutil.rmtree(src / "COVID-19-CT-Seg_20cases"),
            "of no known layout .nnunet, .*; seen: Infection_Mask/phantom_#.nii.gz x 6",
        ),
        (lambda src: (src / "Lung_Mask/phantom_003.nii.gz").unlink(), "mask: got none for volume .*phantom_003"),
        (
            lambda src: (src / "COVID-19-CT-Seg_20cases/phantom_003.nii.gz").unlink(),
            "phantom_003.nii.gz without a volume",
        ),
        (
            lambda src: rewrite(src / "Lung_Mask/phantom_002.nii.gz", lambda v, a: (v[:-1], a)),
            r"mask .*phantom_002.*got shape \(63, 64, 8\); it must be that of .*\(64, 64, 8\)",
        ),
        (
            lambda src: rewrite(src / "Lung_Mask/phantom_002.nii.gz", lambda v, a: (v, a @ np.diag([1, 1, 2, 1]))),
            "mask .*phantom_002.*got another affine",
        ),
        (
            lambda src: rewrite(src / "Infection_Mask/phantom_002.nii.gz", lambda v, a: (v + 7, a)),
            r"mask .*phantom_002.*got value 7; declared are \[0, 1\]",
        ),
        (
            lambda src: (src / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz").write_bytes(
                (src / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz").read_bytes()[:9000]
            ),
            "volume .*phantom_001.*damaged",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_store(
    spoil: Callable[[Path], None], message: str, source: Path, tmp_path: Path
) -> None:
    spoil(source)
    with pytest.raises(DistsegError, match=message) as caught:
        prepare(source, tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_more_folds_than_patients_and_a_foreign_folder_are_refused(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match="7 folds and 0 test patients for 6 patients; every fold needs a patient"):
        prepare(phantom, tmp_path / "store", n_folds=7)
    with pytest.raises(DistsegError, match="which holds something else"):
        prepare(phantom, phantom)


def test_a_store_of_another_version_or_damaged_is_refused(store: Path, tmp_path: Path) -> None:
    values = json.loads((store / "store.json").read_text())
    for spoiled, message in (
        (json.dumps(values | {"version": 99}), "got version 99; this distseg reads 2"),
        (json.dumps(values)[:300], "damaged"),
        (json.dumps({k: v for k, v in values.items() if k != "folds"}), "damaged store.json .folds: "),
    ):
        (tmp_path / "store.json").write_text(spoiled)
        with pytest.raises(DistsegError, match=message):
            open_store(tmp_path)
    with pytest.raises(DistsegError, match="without store.json"):
        open_store(tmp_path / "nowhere")


def test_a_store_that_parts_a_patient_is_refused(store: Path, tmp_path: Path) -> None:
    values = json.loads((store / "store.json").read_text())
    patient = values["folds"]["folds"][0][0]
    values["folds"]["folds"][1].append(patient)
    (tmp_path / "store.json").write_text(json.dumps(values))
    with pytest.raises(DistsegError, match=f"got patient {patient} in fold 0 and in fold 1"):
        open_store(tmp_path)


def test_values_that_are_no_ct_are_refused(source: Path, tmp_path: Path) -> None:
    image = source / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz"
    for change, message in (
        (lambda v, a: (v.astype(np.float32) * np.nan, a), "holds NaN or infinite values"),
        (lambda v, a: (v.astype(np.float32) + 1e6, a), "neither HU"),
        (lambda v, a: ((v + 3000).astype(np.int16), a), "neither HU"),
    ):
        content = image.read_bytes()
        rewrite(image, change)
        with pytest.raises(DistsegError, match=message) as caught:
            prepare(source, tmp_path / "store")
        assert str(image) in str(caught.value)
        image.write_bytes(content)


def test_padding_below_air_becomes_air(source: Path, tmp_path: Path) -> None:
    rewrite(source / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz", lambda v, a: (np.where(v < -900, -2048, v), a))
    assert prepare(source, tmp_path / "store").cases[0].hu_range[0] == -1024


def test_the_leaky_split_deals_slices_and_says_so_by_its_name(store: Path) -> None:
    opened = open_store(store)
    train, val = (opened.slices_of_split(split, 0, leaky_seed=3) for split in ("train", "val"))
    ids = [{files.id for files in slices} for slices in (train, val)]
    everyone = {
        files.id for case in opened.cases if case.patient not in opened.folds.test for files in opened.slices_of([case])
    }
    assert ids[0] | ids[1] == everyone and not ids[0] & ids[1] and abs(len(ids[1]) / len(everyone) - 1 / 3) < 0.1
    assert {i.split("/")[0] for i in ids[0]} & {i.split("/")[0] for i in ids[1]}  # the leak
    kept = {f"{case.id}/{z:04d}" for case, chosen in val.by_case() for z in chosen}
    assert kept == ids[1]
    with pytest.raises(DistsegError, match="data.fold: got 3; .* has folds 0 to 2"):
        opened.slices_of_split("val", 3, leaky_seed=3)
    honest = opened.slices_of_split("val", 0)
    assert [files.id for files in honest] == [files.id for files in opened.slices_of(opened.cases_of("val", 0))]
