"""`distseg predict` on what is not NIfTI: masks in the source's format and place, from trees, slices and several inputs."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import distseg
from distseg.commands.predict import main
from distseg.data.nifti import read_nifti
from distseg.data.volume_files import read_volume, write_volume
from distseg.errors import DistsegError
from distseg.scoring.to_score import _mask_files
from distseg.serving.model import open_model
from distseg.serving.work import find_work
from tests.serving.test_predict import VOLUME, write_ct

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is the oracle here; it is no dependency of distseg")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hu_ZYX(phantom: Path) -> np.ndarray:
    return read_nifti(phantom / VOLUME).values_ZYX[:3].astype(np.int16)


@pytest.fixture(scope="module")
def mask_ZYX(small_run: Path, hu_ZYX: np.ndarray) -> np.ndarray:
    return open_model(small_run, CPU).segment(hu_ZYX, 4)[0]


def write(path: Path, hu_ZYX: np.ndarray) -> Path:
    """Oblique, as a tilted head rest makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(hu_ZYX)
    image.SetSpacing((0.71, 0.72, 2.5))
    image.SetOrigin((-113.1, 22.7, -500.3))
    image.SetDirection(nib.eulerangles.euler2mat(0.1, -0.2, 0.3).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def predict(*words: object) -> int:
    return main([str(word) for word in words])


def files_in(folder: Path) -> list[str]:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in files if name not in ("predictions.jsonl", "volumes.csv")]


def check(path: Path, source: Path, mask_ZYX: np.ndarray, atol: float = 0) -> None:
    mask, volume = sitk.ReadImage(str(path)), sitk.ReadImage(str(source))
    for of in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, of)(), getattr(volume, of)(), rtol=0, atol=atol)
    assert np.array_equal(sitk.GetArrayFromImage(mask), mask_ZYX)


def test_a_tree_of_any_formats_has_a_tree_of_masks_in_them(
    small_run: Path, hu_ZYX: np.ndarray, mask_ZYX: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.nii.gz", "sub/b.mha", "sub/c.mhd", "sub/deep/d.nrrd", "sub/e.nhdr", "sub/deep/e.nii"]
    sources = [write(tmp_path / "in" / name, hu_ZYX) for name in names]
    (tmp_path / "in/sub/deep/preview.png").touch()
    (tmp_path / "in/sub/empty/notes").mkdir(parents=True)
    (tmp_path / "in/sub/labels.seg.nrrd").touch()
    assert predict(small_run, tmp_path / "in", tmp_path / "same", "--format", "source") == 0
    assert (
        "left out: sub/deep/preview.png, sub/empty (a folder), sub/labels.seg.nrrd (a segmentation)\n"
        in capsys.readouterr().out
    )
    assert files_in(tmp_path / "same") == sorted([*(n.replace(".nhdr", ".nrrd") for n in names), "sub/c.raw"])
    for source, name in zip(sources, names, strict=True):
        check(tmp_path / "same" / name.replace(".nhdr", ".nrrd"), source, mask_ZYX)
    with (tmp_path / "same/volumes.csv").open() as file:
        told = {row["volume"]: row["mask"] for row in csv.DictReader(file)}
    assert told["sub/deep/d"] == "sub/deep/d.nrrd" and told["sub/c"] == "sub/c.mhd" and len(told) == 6
    assert predict(small_run, tmp_path / "in", tmp_path / "same", "--format", "source") == 0
    assert "6 of 6 volumes are done already" in capsys.readouterr().out
    (tmp_path / "in/sub/c.raw").write_bytes((hu_ZYX + 1).tobytes())  # what the header names counts, too
    assert predict(small_run, tmp_path / "in", tmp_path / "same", "--format", "source") == 0
    assert "5 of 6 volumes are done already" in capsys.readouterr().out
    assert predict(small_run, *sources[1:3], tmp_path / "as_nifti") == 0  # several inputs; NIfTI without a word
    assert files_in(tmp_path / "as_nifti") == ["b.nii.gz", "c.nii.gz"]
    check(tmp_path / "as_nifti/b.nii.gz", sources[1], mask_ZYX, atol=1e-4)


def test_the_name_of_one_mask_says_its_format(
    small_run: Path, hu_ZYX: np.ndarray, mask_ZYX: np.ndarray, tmp_path: Path
) -> None:
    source = write(tmp_path / "v.mha", hu_ZYX)
    for name in ("m.mha", "m.nii.gz"):
        assert predict(small_run, source, tmp_path / name) == 0
        check(tmp_path / name, source, mask_ZYX, atol=1e-4 * (name != "m.mha"))
    assert predict(small_run, source, tmp_path / "p/m.mha", "--probabilities", "float32") == 0
    assert files_in(tmp_path / "p") == ["m.mha", "m_probability_infection.mha", "m_probability_lung.mha"]
    read = read_volume([tmp_path / "p/m_probability_lung.mha"]).values_ZYX
    assert read.dtype == np.float32 and 0 < read.max() <= 1
    result = distseg.load(small_run).segment(source)
    for name in ("s.mha", "s.mhd", "s.nrrd", "s.nii"):
        result.save(tmp_path / name)
        check(tmp_path / name, source, mask_ZYX, atol=0 if name != "s.nii" else 1e-4)


def test_slices_have_label_maps_of_their_names(
    small_run: Path, hu_ZYX: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    grey = np.clip((hu_ZYX.astype(float) + 1250) / 1500 * 255, 0, 255).astype(np.uint8)
    for z, slice_YX in enumerate(grey):
        Image.fromarray(slice_YX).save(folder / f"p_{z + 8}.png")
        Image.fromarray(slice_YX).save(folder / f"other{z}.tif")
    first, *others = map(Image.fromarray, grey)
    first.save(folder / "stack.tiff", save_all=True, append_images=others)
    assert predict(small_run, folder / "stack.tiff", tmp_path / "m.tif") == 0
    (folder / "stack.tiff").unlink()
    assert predict(small_run, folder, tmp_path / "out", "--probabilities", "uint8") == 0
    masks = [name for name in files_in(tmp_path / "out") if "prob" not in name]
    assert masks == ["other0.tif", "other1.tif", "other2.tif", "p_10.png", "p_8.png", "p_9.png"]
    stack_ZYX = read_volume([tmp_path / "m.tif"]).values_ZYX
    for z in range(3):
        assert np.array_equal(np.array(Image.open(tmp_path / f"out/p_{z + 8}.png")), stack_ZYX[z])
        assert np.array_equal(np.array(Image.open(tmp_path / f"out/other{z}.tif")), stack_ZYX[z])
    assert "p: lung of unknown size" in capsys.readouterr().out.replace("/out/p_8.png", "p")
    result = distseg.load(small_run).segment(folder / "p_8.png")
    result.save(tmp_path / "one.png")
    assert np.array_equal(result.image, stack_ZYX[:1]) and np.array_equal(result.mask, stack_ZYX[:1])
    deep = tmp_path / "deep.png"
    Image.fromarray((hu_ZYX[0].astype(int) + 1024).astype(np.uint16)).save(deep)
    assert predict(small_run, deep, tmp_path / "m.png") == 1 and "--hu-offset 1024" in capsys.readouterr().err
    assert predict(small_run, deep, tmp_path / "m.png", "--hu-offset", "1024") == 0


def empty(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_nnunet_s_channel_is_left_off_and_a_second_one_refused(tmp_path: Path) -> None:
    one = empty(
        tmp_path / "one", "case_1_0000.nii.gz", "case_2_0000.mha", "sub/case_0003.nii.gz", "sub/case_0004.nii.gz"
    )
    work = find_work([one], tmp_path / "out", None)
    assert [task.name for task in work.tasks] == ["case_1", "case_2", "sub/case_0003", "sub/case_0004"]
    assert [task.mask.name for task in work.tasks][:2] == ["case_1.nii.gz", "case_2.nii.gz"]
    assert "_0000, nnU-Net's first channel, is left off" in work.notes[0]
    two = empty(tmp_path / "two", *(f"c{case}_000{channel}.nrrd" for case in (1, 2) for channel in (0, 1)))
    with pytest.raises(DistsegError, match=r"got c1_0000 and c1_0001 .*two channels of one case; .*_0000.\* OUT"):
        find_work([two], tmp_path / "out", None)
    work = find_work(sorted(two.glob("*_0000.*")), tmp_path / "out", "source")
    assert [task.mask.name for task in work.tasks] == ["c1.nrrd", "c2.nrrd"]
    numbered = empty(tmp_path / "numbered", *(f"ct_{number:04d}.nii" for number in range(9)))
    assert find_work([numbered], tmp_path / "out", None).tasks[0].name == "ct_0000"


def test_inputs_that_would_write_one_mask_or_hold_two_kinds_are_refused(tmp_path: Path, hu_ZYX: np.ndarray) -> None:
    first, second = empty(tmp_path / "1", "sub/a.nii.gz"), empty(tmp_path / "2", "sub/a.mha")
    for inputs in ([first, second], [first / "sub/a.nii.gz", second / "sub/a.mha"]):  # told apart by their folders
        assert [t.name for t in find_work(inputs, tmp_path / "out", None).tasks] == ["1/sub/a", "2/sub/a"]
    twins = empty(tmp_path / "twins", "a.nii", "a.mha")
    with pytest.raises(DistsegError, match="their masks would have one name"):
        find_work([twins], tmp_path / "out", None)
    with pytest.raises(DistsegError, match="their masks would have one name"):
        find_work([twins / "a.nii", twins / "a.mha"], tmp_path / "out", None)
    assert [t.name for t in find_work([first / "sub", second], tmp_path / "out", None).tasks] == ["a", "sub/a"]
    write_ct(first / "patient/study/series", hu_ZYX)
    with pytest.raises(DistsegError, match="with volumes .* and DICOM series"):
        find_work([first], tmp_path / "out", None)
    (first / "sub/a.nii.gz").unlink()
    (task,) = find_work([first / "patient"], tmp_path / "out", "source").tasks
    assert task.name == "study/series" and task.mask == tmp_path / "out/study/series.dcm"
    voxels = tmp_path / "voxels.mhd"
    voxels.write_text("ElementDataFile = mask.raw")
    (tmp_path / "mask.raw").touch()
    for words, message in (
        (([voxels], tmp_path / "mask.mhd", None), "mask.raw, the volume itself"),
        (([second], tmp_path / "out", "dicom-seg"), "it references DICOM images"),
        (([second / "sub/a.mha"], tmp_path / "m.nrrd", "source"), "must end in .mha"),
        (([second], tmp_path / "out", "source", "uint8"), "MetaImage and NRRD cannot say that a step is 1/255"),
        (([empty(tmp_path / "png", "a.png")], tmp_path / "out", "nifti"), "pictures do not say where they lie"),
    ):
        with pytest.raises(DistsegError, match=message):
            find_work(*words)


def test_label_maps_beside_the_volumes_are_not_taken_for_grey(
    small_run: Path, hu_ZYX: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in/ct/a.mha", hu_ZYX)
    for number, values in enumerate(([0, 1, 2, 3], [0, 255])):
        write(tmp_path / f"in/masks/a{number}.mha", np.resize(np.array(values, np.uint8), hu_ZYX.shape))
    assert predict(small_run, tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "got only the values [0, 1, 2, 3]; a label map" in said and "got only the values [0, 255]" in said
    assert files_in(tmp_path / "out") == ["ct/a.nii.gz"]


def test_masks_are_paired_by_name_by_place_and_by_folder(tmp_path: Path) -> None:
    class Of:
        def __init__(self, name: str, source: str) -> None:
            self.id, self.source = name, source

    cases = [
        Of("a", "images/a.nii"),
        Of("s1", "s1/ct.nii.gz"),
        Of("p", "images/p_1.png and 2 more"),
        Of("d", "x/d/IM0 and 9 more"),
    ]
    folder = empty(
        tmp_path, "deep/a.seg.nrrd", "s1/ct.mha", "p_2.png", "p_10.png", "p_1.png", "d.mha", "a_overlay.png",
        "s1/ct_probability_lung.mha", "eval/val/masks/a.nii.gz", "notes.txt",
    )  # fmt: skip
    found = _mask_files(folder, cases)  # type: ignore[arg-type]
    assert {name: [path.name for path in files] for name, files in found.items()} == {
        "a": ["a.seg.nrrd"], "s1": ["ct.mha"], "p": ["p_1.png", "p_2.png", "p_10.png"], "d": ["d.mha"],
    }  # fmt: skip
    with pytest.raises(DistsegError, match=r"without 1 of 1 cases \(q\); .* \(a DICOM-SEG does not say which slices"):
        _mask_files(empty(tmp_path / "segs", "q.dcm"), [Of("q", "q/IM0 and 9 more")])  # type: ignore[list-item]
    empty(tmp_path, "other/a.nii")
    with pytest.raises(DistsegError, match=r"deep/a.seg.nrrd and .*other/a.nii for case a; each has one"):
        _mask_files(folder, cases)  # type: ignore[arg-type]


def test_a_mask_that_is_written_again_is_the_same_bytes(hu_ZYX: np.ndarray, tmp_path: Path) -> None:
    for kind in ("mha", "mhd", "nrrd", "tif"):
        volume = read_volume([write(tmp_path / "v.mha", hu_ZYX)])
        for name in ("first", "again"):
            write_volume([tmp_path / name / f"m.{kind}"], (hu_ZYX > 0).astype(np.uint8), volume)
        assert (tmp_path / f"first/m.{kind}").read_bytes() == (tmp_path / f"again/m.{kind}").read_bytes(), kind
