"""Every layout a user has becomes the same store, and what does not fit is named."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from distseg.data.layouts import find_source, patient_of
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import Store, open_store
from distseg.errors import DistsegError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LABELS = {"background": 0, "lung": 1, "infection": 2}
CASES = [f"phantom_{i:03d}" for i in range(1, 7)]


def prepare(src: Path, root: Path, **settings: object) -> Store:
    return prepare_store(src, root, FoldRule(2), workers=1, **settings)[0]  # type: ignore[arg-type]


def assert_same_slices(one: Store, other: Store) -> None:
    for mine, theirs in zip(one.cases, other.cases, strict=True):
        for a, b in zip(one.read_case(mine), other.read_case(theirs), strict=True):
            assert np.array_equal(a, b), mine.id


@pytest.fixture
def paired(phantom: Path, tmp_path: Path) -> Path:
    """The phantom as images/ and one folder a label."""
    src = tmp_path / "paired"
    for folder, name in (("COVID-19-CT-Seg_20cases", "images"), ("Lung_Mask", "lung"), ("Infection_Mask", "infection")):
        shutil.copytree(phantom / folder, src / name)
    return src


def write_png(store: Store, src: Path, nested: bool = False) -> None:
    """A store's slices as grey PNGs of the window [-1250, 250] with 0/255 masks, flat or a folder a case."""
    for case in store.cases:
        hu_ZYX, label_ZYX = store.read_case(case)
        grey = np.clip(np.rint((hu_ZYX.astype(np.float32) + 1250) / 1500 * 255), 0, 255)
        for folder, values in (
            ("images", grey),
            ("lung", (label_ZYX > 0) * 255),
            ("infection", (label_ZYX == 2) * 255),
        ):
            for z, slice_YX in enumerate(values.astype(np.uint8)):
                # Numbers without leading zeros: slice 10 comes after slice 9.
                path = src / folder / (f"{case.id}/{z + 3}.png" if nested else f"{case.id}_{z + 3}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(slice_YX).save(path)


def test_paired_folders_make_the_same_store(paired: Path, store: Path, tmp_path: Path) -> None:
    made = prepare(paired, tmp_path / "store")
    assert made.layout == "paired" and dict(made.labels) == {"background": 0, "lung": 1, "infection": 2}
    assert_same_slices(made, open_store(store))


@pytest.mark.parametrize("nested", [False, True])
def test_png_slices_are_grey_of_the_lung_window(nested: bool, store: Path, tmp_path: Path) -> None:
    write_png(open_store(store), tmp_path / "png", nested)
    made = prepare(tmp_path / "png", tmp_path / "store")
    for mine, theirs in zip(made.cases, open_store(store).cases, strict=True):
        assert mine.id == theirs.id and mine.spacing_mm is None and mine.intensity == "grey_-1250_250"
        (hu, label), (true_hu, true_label) = made.read_case(mine), open_store(store).read_case(theirs)
        assert np.array_equal(label, true_label)
        assert np.abs(hu - np.clip(true_hu, -1250, 250)).max() <= 3


@pytest.fixture
def joint(paired: Path) -> Path:
    """images/ and labels/ with maps of 0, 1 and 2."""
    for case in CASES:
        lung, infection = (nib.load(paired / name / f"{case}.nii.gz") for name in ("lung", "infection"))
        joint = np.where(np.asarray(infection.dataobj) > 0, 2, np.asarray(lung.dataobj) > 0)
        (paired / "labels").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(joint.astype(np.uint8), lung.affine), paired / "labels" / f"{case}.nii")
    for name in ("lung", "infection"):
        shutil.rmtree(paired / name)
    return paired


def test_values_of_a_label_map_are_named_by_the_user_or_by_the_data_and_never_guessed(
    joint: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(DistsegError, match=r"with values \[0, 1, 2\].*not guessed.*--labels NAME_1=1,NAME_2=2"):
        find_source(joint)
    assert_same_slices(prepare(joint, tmp_path / "store", labels=LABELS), open_store(store))
    for labels, named in (
        ({"background": 0, "Left Lung": 1, "cancer": 2}, {"background": 0, "left_lung": 1, "cancer": 2}),
        ({"0": "background", "1": "liver", "2": "tumour-core"}, {"background": 0, "liver": 1, "tumour_core": 2}),
        ({"background": 0, "cancer": 1, "ignore": 2}, {"background": 0, "cancer": 1}),
    ):
        (joint / "dataset.json").write_text(json.dumps({"labels": labels}))
        source = find_source(joint)
        assert dict(source.labels) == named and any("from dataset.json" in note for note in source.notes)
        assert (source.cases[0].masks[0].label_of_value.get(2) == 255) == ("ignore" in labels)
    for labels, message in (
        ({"background": 0, "whole": [1, 2]}, "got label 'whole' of several values"),
        ({"a b": 1, "a-b": 2}, "got 'a-b'=2 twice"),
        ([1], "no readable labels"),
    ):
        (joint / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(DistsegError, match=message):
            find_source(joint)
    assert dict(find_source(joint, labels=LABELS).labels) == LABELS  # what the user says goes first


def test_folders_name_labels_and_two_that_overlap_have_no_order(paired: Path, tmp_path: Path) -> None:
    (paired / "infection").rename(paired / "Nodule")
    made = prepare(paired, tmp_path / "store")
    assert dict(made.labels) == {"background": 0, "lung": 1, "nodule": 2}
    (paired / "lung").rename(paired / "lobe")
    for path in (paired / "lobe").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.uint8), image.affine), path)
    with pytest.raises(DistsegError, match="overlaps label lobe; which of lobe and Nodule .*--labels lobe=1,Nodule=2"):
        prepare(paired, tmp_path / "other")
    assert prepare(paired, tmp_path / "other", labels={"background": 0, "lobe": 1, "nodule": 2}).cases


def test_several_masks_in_a_cell_are_joined_by_a_named_rule(paired: Path, tmp_path: Path) -> None:
    first = nib.load(paired / "lung/phantom_001.nii.gz")
    drawn = np.asarray(first.dataobj) > 0
    half = np.arange(drawn.shape[0])[:, None, None] < drawn.shape[0] // 2
    for name, mask in (("a", drawn & half), ("b", drawn & ~half), ("c", drawn)):
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), first.affine), paired / f"{name}.nii.gz")
    rows = ["image,lung,patient", "images/phantom_001.nii.gz,a.nii.gz; b.nii.gz;c.nii.gz,1"]
    rows += [f"images/{case}.nii.gz,lung/{case}.nii.gz,{case}" for case in CASES[1:4]]
    (paired / "cases.csv").write_text("\n".join(rows) + "\n")
    for readers, expected in (("union", drawn), ("majority", drawn), ("first", drawn & half)):
        made, notes = prepare_store(paired, tmp_path / readers, FoldRule(2), layout="csv", readers=readers, workers=1)  # type: ignore[arg-type]
        assert made.cases[0].label_voxels["lung"] == expected.sum()
        assert any(f"1 volumes have a mask of several files: taken is their {readers}" in note for note in notes)


def test_an_empty_cell_is_nothing_there_and_a_row_of_them_is_not_annotated(paired: Path, tmp_path: Path) -> None:
    rows = ["image,lung,infection,patient"]
    cells = ["lung/{0}.nii.gz,infection/{0}.nii.gz", "lung/{0}.nii.gz,", ",", "none,none", "lung/{0}.nii.gz,none"]
    rows += [f"images/{case}.nii.gz,{cell.format(case)},{case}" for case, cell in zip(CASES, cells, strict=False)]
    (paired / "cases.csv").write_text("\n".join(rows) + "\n")
    made, notes = prepare_store(paired, tmp_path / "store", FoldRule(2), layout="csv", workers=1)
    said = "; ".join(notes)
    assert "infection: 1 of 5 cells are empty: taken as nothing there" in said
    assert "1 of 5 volumes have no mask at all: not annotated" in said
    assert [set(np.unique(made.read_case(case)[1]).tolist()) for case in made.cases[2:4]] == [{255}, {0}]


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        ("([", "not a regular expression"),
        ("^nobody", "finds no patient in the name or path of case phantom_001 .6 so."),
        ("^phantom", "got 2 folds and 0 test patients for 1 patients.*--patients 'REGEX'"),
    ],
)
def test_a_regular_expression_that_finds_no_patients_is_refused(
    patients: str, message: str, paired: Path, tmp_path: Path
) -> None:
    with pytest.raises(DistsegError, match=message):
        prepare(paired, tmp_path / "store", patients=patients)


def test_patients_are_told_apart_as_is_said_and_two_spellings_or_one_image_are_refused(
    paired: Path, tmp_path: Path
) -> None:
    made, notes = prepare_store(paired, tmp_path / "store", FoldRule(2), patients=r"00\d", workers=1)
    assert len({case.patient for case in made.cases}) == 6 and "told apart by --patients" in notes[-1]
    rows = [
        "image,lung,patient",
        *(f"images/{case}.nii.gz,lung/{case}.nii.gz,p{i % 3}" for i, case in enumerate(CASES)),
    ]
    for old, new, message in (
        (",p0", ",P0", "got 'P0' and 'p0', one patient in two spellings"),
        ("images/phantom_002.nii.gz", "images/again.nii", "got one image under two, 'p0' .* and 'p1'"),
    ):
        nib.save(nib.load(paired / "images/phantom_001.nii.gz"), paired / "images/again.nii")
        (paired / "cases.csv").write_text("\n".join(rows).replace(old, new, 1) + "\n")
        with pytest.raises(DistsegError, match=message):
            prepare(paired, tmp_path / "other", layout="csv")


def test_one_image_under_two_names_is_noted_where_nobody_named_patients(paired: Path, tmp_path: Path) -> None:
    for folder in ("images", "lung", "infection"):
        if (paired / folder).is_dir():
            shutil.copy(paired / folder / "phantom_001.nii.gz", paired / folder / "again.nii.gz")
    _, notes = prepare_store(paired, tmp_path / "store", FoldRule(2), workers=1)
    assert any("one image under two, 'again' (images/again.nii.gz) and 'phantom_001'" in note for note in notes)
    (paired / "cases.csv").write_text(
        "image,lung,patient\nimages/again.nii.gz,lung/again.nii.gz,p1\nimages/phantom_001.nii.gz,lung/phantom_001.nii.gz,p1\n"
        "images/phantom_002.nii.gz,lung/phantom_002.nii.gz,p2\n"
    )
    _, notes = prepare_store(paired, tmp_path / "other", FoldRule(2), layout="csv", workers=1)
    assert any("patient p1: images/again.nii.gz and images/phantom_001.nii.gz are one image" in note for note in notes)


def test_patients_are_found_in_the_path_where_the_name_has_none(paired: Path, tmp_path: Path) -> None:
    rows = ["image,lung,patient,id"]
    rows += [f"images/{case}.nii.gz,lung/{case}.nii.gz,x{i},scan{'abcdef'[i]}" for i, case in enumerate(CASES)]
    (paired / "cases.csv").write_text("\n".join(rows) + "\n")
    found = find_source(paired, "csv", patients=r"phantom_(\d+)")
    assert {case.patient for case in found.cases} == {case.removeprefix("phantom_") for case in CASES}


def test_a_patient_of_a_csv_is_one_in_either_form_of_unicode(paired: Path) -> None:
    forms = [unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD")]
    rows = ["image,lung,patient"]
    rows += [f"images/{case}.nii.gz,lung/{case}.nii.gz,{forms[i % 2]}" for i, case in enumerate(CASES)]
    (paired / "cases.csv").write_text("\n".join(rows) + "\n")
    assert {case.patient for case in find_source(paired, "csv").cases} == {forms[0]}


def test_what_lies_beside_the_slices_that_a_csv_names_is_told(store: Path, tmp_path: Path) -> None:
    write_png(open_store(store), tmp_path / "png", nested=True)
    (tmp_path / "png/images/phantom_001/scan.mgz").touch()
    rows = ["image,lung,patient", *(f"images/{case},lung/{case},{case}" for case in CASES)]
    (tmp_path / "png/mine.csv").write_text("\n".join(rows) + "\n")
    notes = find_source(tmp_path / "png/mine.csv").notes
    assert "left out: images/phantom_001/scan.mgz (MGH is not supported; convert it to NIfTI)" in notes


def test_numbered_pictures_of_one_patient_stay_together(store: Path, tmp_path: Path) -> None:
    write_png(open_store(store), tmp_path / "png")
    for path in sorted((tmp_path / "png").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("phantom_00", "p").replace("_", "-")))
    source = find_source(tmp_path / "png")
    assert len(source.cases) == 48 and {case.patient for case in source.cases} == {f"p{i}" for i in range(1, 7)}
    assert source.told_by == "what stands before the number of a PNG file"


def test_what_is_not_annotated_counts_nowhere(paired: Path, tmp_path: Path) -> None:
    (paired / "labels").mkdir()
    for path in (paired / "lung").iterdir():
        image = nib.load(path)
        values = (np.asarray(image.dataobj) > 0).astype(np.uint8)
        values[:, :, ::2] = 9
        nib.save(nib.Nifti1Image(values, image.affine), paired / "labels" / path.name)
    for name in ("lung", "infection"):
        shutil.rmtree(paired / name)
    with pytest.raises(DistsegError, match="got value 9; declared are"):
        prepare(paired, tmp_path / "store", labels=LABELS)
    made = prepare(paired, tmp_path / "store", labels=LABELS, ignore=9)
    case = made.cases[0]
    _, label_ZYX = made.read_case(case)
    assert (label_ZYX[::2] == 255).all() and set(np.unique(label_ZYX[1::2])) <= {0, 1} and label_ZYX[1::2].any()
    assert sum(case.label_voxels.values()) == (label_ZYX != 255).sum()
    kept = np.load(made.root / case.folder / "foreground.npy")
    assert set(kept[:, 1]) == {1} and (kept[:, 0] % 2 == 1).all()
    with pytest.raises(DistsegError, match="--ignore: got 1; 1 is the number of a label"):
        find_source(paired, labels=LABELS, ignore=1)


def test_a_csv_names_patients_splits_and_masks(paired: Path, store: Path, tmp_path: Path) -> None:
    rows = ["image,lung,infection,patient,split"]
    for case, patient, split in zip(CASES, "aabcde", ("train", "train", "val", "test", "train", "train"), strict=True):
        rows.append(f"images/{case}.nii.gz, lung/{case}.nii.gz, infection/{case}.nii.gz, {patient}, {split}")
    table = paired / "mine.csv"
    table.write_text("\n".join(rows) + "\n")
    made = prepare(table, tmp_path / "store")
    assert made.layout == "csv" and made.folds.method == "given"
    assert (made.folds.folds, made.folds.test) == ((("b",),), ("c",))
    assert [case.patient for case in made.cases_of("train", 0)] == ["a", "a", "d", "e"]
    assert_same_slices(made, open_store(store))
    for old, new, message in (
        ("a, train", "a, val", "got patient a in train, above in val"),
        ("infection,patient", "tumour,patient", "got column 'tumour'"),
        ("images/phantom_003.nii.gz", "images/none.nii.gz", "line 4: got 'images/none.nii.gz'"),
        ("e, train", "e, training", "line 7: got split 'training'"),
        ("c, test", "c, ", "got rows with a split and rows without"),
        ("images/phantom_002.nii.gz", "images/phantom_001.nii.gz", "got phantom_001 twice"),
    ):
        table.write_text("\n".join(rows).replace(old, new, 1) + "\n")
        with pytest.raises(DistsegError, match=message):
            find_source(table)


def test_labels_of_your_own_have_names_and_numbers(
    paired: Path, phantom: Path, tmp_path: Path, run_command: Callable[..., object]
) -> None:
    with pytest.raises(DistsegError, match="--labels: got background, lung, nodule; layout zenodo has its own"):
        find_source(phantom, labels={"background": 0, "lung": 1, "nodule": 7})
    (paired / "infection").rename(paired / "nodule")
    with pytest.raises(DistsegError, match="label folder: got .*nodule; labels are"):
        find_source(paired, labels=LABELS)
    run_command("distseg", "prepare", paired, tmp_path / "store", "--folds", 2, "--labels", "lung=1,nodule=7")
    made = open_store(tmp_path / "store")
    assert dict(made.labels) == {"background": 0, "lung": 1, "nodule": 7}
    assert set(np.unique(made.read_case(made.cases[0])[1])) <= {0, 1, 7}
    assert any(case.label_voxels["nodule"] for case in made.cases)


def test_a_patient_may_be_named_like_another_ones_case(paired: Path, tmp_path: Path) -> None:
    """Image 1 is of patient 2 and image 2 of patient 1: who is asked for is the patient."""
    lines = [
        f"images/{CASES[i]}.nii.gz,labels{i}.nii.gz,{i + 1},{patient}" for i, patient in enumerate((2, 1, 3, 2, 1, 4))
    ]
    for i, name in enumerate(CASES):
        shutil.copy(paired / "lung" / f"{name}.nii.gz", paired / f"labels{i}.nii.gz")
    (paired / "cases.csv").write_text("\n".join(["image,lung,id,patient", *lines]) + "\n")
    made = prepare(paired, tmp_path / "store", layout="csv")
    for fold in range(len(made.folds.folds)):
        train, val = ({case.patient for case in made.cases_of(split, fold)} for split in ("train", "val"))
        assert not train & val and len(train | val) == 4, fold


def test_a_name_is_one_in_either_unicode_form(paired: Path, tmp_path: Path) -> None:
    for folder, form in (("images", "NFD"), ("lung", "NFC"), ("infection", "NFC")):
        name = unicodedata.normalize(form, "Müller.nii.gz")
        (paired / folder / "phantom_001.nii.gz").rename(paired / folder / name)
    assert [case.id for case in find_source(paired).cases][0] == unicodedata.normalize("NFC", "Müller")


def test_what_is_no_volume_is_told(paired: Path, tmp_path: Path) -> None:
    (paired / "images/x.mgz").touch()
    shutil.copytree(paired / "images", paired / "lung/nested/deeper")
    _, notes = prepare_store(paired, tmp_path / "store", FoldRule(2), workers=1)
    assert "images/x.mgz (MGH is not supported; convert it to NIfTI), lung/nested (a folder)" in notes[1]
    prepare(paired, paired / "store")
    prepare(paired, paired / "store")  # a store inside its source is no folder of masks


def test_medseg_stacks_become_a_case_a_slice(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    hu, labels = (
        np.concatenate(stack) for stack in zip(*(opened.read_case(case) for case in opened.cases), strict=True)
    )
    findings = np.where(labels == 2, 1 + np.arange(len(labels))[:, None, None] % 3, 0).astype(np.uint8)
    src = tmp_path / "medseg"
    src.mkdir()
    for name, values in (
        ("tr_im", hu),
        ("tr_mask", findings),
        ("tr_lungmasks_updated", (labels > 0).astype(np.uint8)),
        ("val_im", hu[:4]),
    ):
        nib.save(nib.Nifti1Image(values.T, np.diag([-1.0, -1, 1, 1])), src / f"{name}.nii.gz")
    made, notes = prepare_store(src, tmp_path / "store", FoldRule(5), workers=1)
    assert len(made.cases) == len(hu) == len({case.patient for case in made.cases})
    assert "val_im has no masks and is left out" in notes and "patients are not named" in notes[0]
    assert dict(made.labels) == {
        "background": 0,
        "lung": 1,
        "ground_glass": 3,
        "consolidation": 4,
        "pleural_effusion": 5,
    }
    expected = np.where(findings > 0, findings + 2, labels > 0)
    for z in (0, 7, len(hu) - 1):
        of_slice, label = made.read_case(made.cases[z])
        assert of_slice.shape == (1, 64, 64) and np.array_equal(of_slice[0], hu[z])
        assert np.array_equal(label[0], expected[z])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: shutil.rmtree(src / "images"), "of no known layout"),
        (lambda src: (src / "cases.csv").write_text(""), "that fits paired and csv; choose one with --layout"),
        (lambda src: (src / "lung/phantom_002.nii.gz").unlink(), "mask: got none for volume .*phantom_002"),
        (lambda src: (src / "images/phantom_004.nii.gz").unlink(), "phantom_004.nii.gz without a volume"),
        (
            lambda src: (src / "images/phantom_001.nii").write_bytes(b""),
            "case: got phantom_001 twice .*phantom_001.nii.gz",
        ),
        (
            lambda src: (src / "lung/phantom_001.nii").write_bytes(b""),
            "case: got phantom_001 twice .*lung/phantom_001.nii",
        ),
        (lambda src: [shutil.rmtree(src / name) for name in ("lung", "infection")], "without masks"),
    ],
)
def test_what_does_not_fit_is_named(spoil: Callable[[Path], object], message: str, paired: Path) -> None:
    spoil(paired)
    with pytest.raises(DistsegError, match=message) as caught:
        find_source(paired)
    assert "\n" not in str(caught.value)
    with pytest.raises(DistsegError, match="declared medseg; it must hold tr_im"):
        find_source(paired, "medseg")


def test_a_png_pair_of_different_sizes_or_without_a_mask_is_named(store: Path, tmp_path: Path) -> None:
    write_png(open_store(store), tmp_path / "png")
    odd = tmp_path / "png/lung/phantom_001_5.png"
    odd.unlink()
    with pytest.raises(DistsegError, match="mask: got none for slice .*images/phantom_001_5.png"):
        find_source(tmp_path / "png")
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(odd)
    with pytest.raises(DistsegError, match="phantom_001"):
        prepare(tmp_path / "png", tmp_path / "store")


def test_series_of_one_patient_stay_together() -> None:
    assert patient_of("radiopaedia_10_85902_1") == patient_of("radiopaedia_10_85902_3") == "radiopaedia_10"
    assert patient_of("coronacases_001") == "coronacases_001"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CT data are not on this machine")
def test_real_volumes_and_png_slices_are_found_and_grouped_by_patient() -> None:
    volumes = find_source(SHARED / "medseg9").cases
    assert len(volumes) == 7 and len({case.patient for case in volumes}) == 5
    slices = find_source(SHARED / "zenodo20_png").cases
    assert len(slices) == 6 and sum(len(case.files) for case in slices) == 739
