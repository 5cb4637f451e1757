"""Each set that circulates is prepared at the first command, as a CSV made by hand says it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distseg.commands.prepare import LAYOUTS as OFFERED
from distseg.config import Config
from distseg.data.layouts.finding import BY_HEADER, LAYOUTS, Asked, find_source, source_in_words
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import open_store, settled
from distseg.errors import DistsegError
from tests.data.layouts_made import DOCS, MADE, Rows, Volume, asked, documentation, read_volumes


@pytest.fixture(scope="module")
def volumes(phantom: Path) -> list[Volume]:
    return read_volumes(phantom)


def by_hand(rows: Rows, path: Path) -> Path:
    names = {name: None for row in rows for name in row}
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*names, "patient"])
        table.writeheader()
        table.writerows(row | {"patient": f"p{k}"} for k, row in enumerate(rows))
    return path


@pytest.mark.parametrize("name", MADE)
def test_a_known_set_is_prepared_as_by_hand(name: str, volumes: list[Volume], tmp_path: Path) -> None:
    made = MADE[name]
    rows = made.make(tmp_path / "set", volumes)
    store, _ = prepare_store(tmp_path / "set", tmp_path / "store", FoldRule(2), asked=asked(made.options), workers=1)
    assert store.layout == name.partition(" ")[0]
    own = Asked(labels=asked(("--labels", made.labels)).labels)
    hand, _ = prepare_store(
        by_hand(rows, tmp_path / "hand.csv"), tmp_path / "hand_store", FoldRule(2), asked=own, workers=1
    )
    assert dict(store.labels) == dict(hand.labels) and len(store.cases) == len(hand.cases) == len(rows)
    for mine, theirs in zip(store.cases, hand.cases, strict=True):
        for one, other in zip(store.read_case(mine), hand.read_case(theirs), strict=True):
            assert np.array_equal(one, other), mine.id


def test_the_documentation_of_layouts_is_what_prepare_says(tmp_path: Path) -> None:
    assert DOCS.read_text() == documentation(tmp_path), "run python -m tests.data.layouts_made"


def test_the_command_offers_every_layout() -> None:
    assert sorted(OFFERED) == sorted(["auto", *LAYOUTS, *BY_HEADER])


@pytest.mark.parametrize("name", MADE)
def test_no_known_set_looks_like_another(name: str, volumes: list[Volume], tmp_path: Path) -> None:
    MADE[name].make(tmp_path / "set", volumes)
    if not MADE[name].options:
        assert find_source(tmp_path / "set").layout == name.partition(" ")[0]
    else:
        with pytest.raises(DistsegError, match="of no known layout .*; seen: .*--images 'Train/{case}_ct.nii.gz'"):
            find_source(tmp_path / "set")


def test_two_sets_in_one_folder_are_refused_and_one_below_is_named(volumes: list[Volume], tmp_path: Path) -> None:
    for name in ("lits", "mosmed"):
        MADE[name].make(tmp_path / "both", volumes)
        MADE[name].make(tmp_path / "above" / name, volumes)
    with pytest.raises(DistsegError, match="fits mosmed and lits; choose one with --layout"):
        find_source(tmp_path / "both")
    assert find_source(tmp_path / "both", Asked("lits")).layout == "lits"
    MADE["nnunet"].make(tmp_path / "raw/Dataset001_Lung", volumes)
    with pytest.raises(DistsegError, match="Dataset001_Lung fits nnunet, give that"):
        find_source(tmp_path / "raw")


class TestNnunet:
    @pytest.fixture
    def src(self, volumes: list[Volume], tmp_path: Path) -> Path:
        MADE["nnunet"].make(tmp_path / "nnUNet_raw/Dataset001_Lung", volumes)
        return tmp_path / "nnUNet_raw/Dataset001_Lung"

    def change(self, src: Path, **values: object) -> None:
        described = json.loads((src / "dataset.json").read_text())
        (src / "dataset.json").write_text(json.dumps(described | values))

    def test_its_folds_are_kept_wherever_they_lie(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = {"case_001": 0, "case_005": 0, "case_002": 1, "case_003": 2, "case_004": 2}
        store, _ = prepare_store(src, tmp_path / "store", workers=1)
        assert store.folds.folds == (("case_001", "case_005"), ("case_002",), ("case_003", "case_004"))
        assert store.folds.method == "given" and len(store.cases_of("train", 1)) == 4
        for folder in (tmp_path / "nnUNet_preprocessed", tmp_path / "elsewhere"):
            (folder / src.name).mkdir(parents=True)
            shutil.move(next(tmp_path.rglob("splits_final.json")), folder / src.name / "splits_final.json")
            monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "elsewhere"))
            assert dict(find_source(src).fold_of_patient) == expected

    def test_folds_that_are_not_of_all_cases_are_told_and_not_taken(self, src: Path) -> None:
        (src / "splits_final.json").write_text(json.dumps([{"train": [], "val": ["case_001"]}] * 2))
        source = find_source(src)
        assert not source.fold_of_patient and "splits_final.json is not taken" in source.notes[0]
        assert "splits: none named" in source_in_words(source)

    def test_folds_that_part_a_patient_are_refused(self, src: Path) -> None:
        for old, new in (("case_001", "radiopaedia_4_1"), ("case_002", "radiopaedia_4_2")):
            for path in (src / f"imagesTr/{old}_0000.nii.gz", src / f"labelsTr/{old}.nii.gz"):
                path.rename(path.with_name(path.name.replace(old, new)))
            (src / "splits_final.json").write_text((src / "splits_final.json").read_text().replace(old, new))
        with pytest.raises(DistsegError, match="got patient radiopaedia_4 in fold 0 and 1"):
            find_source(src)

    def test_regions_are_those_of_the_set(self, src: Path, tmp_path: Path) -> None:
        store, _ = prepare_store(src, tmp_path / "store", workers=1)
        expected = {"lung": ("lung_1", "lung_2", "infection"), "infection": ("infection",)}
        assert dict(settled(Config(), open_store(store.root)).regions) == expected
        labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
        self.change(src, labels=labels)
        source = find_source(src)
        assert dict(source.labels) == {"background": 0, "whole": 1, "core": 2, "enhancing": 3}
        assert source.regions["whole"] == ("whole", "core", "enhancing") and source.regions["enhancing"] == (
            "enhancing",
        )
        assert source.cases[0].masks[0].label_of_value[4] == 255

    def test_the_key_dataset_names_files_anywhere(self, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ELSEWHERE", str(src / "imagesTr"))
        listed = {
            f"s{k}": {"images": [f"$ELSEWHERE/case_00{k}_0000.nii.gz"], "label": f"labelsTr/case_00{k}.nii.gz"}
            for k in (1, 2)
        }
        self.change(src, dataset=listed)
        (src / "splits_final.json").unlink()
        assert [case.id for case in find_source(src).cases] == ["s1", "s2"]
        self.change(src, dataset={"s1": {"images": ["none.nii.gz"], "label": "labelsTr/case_001.nii.gz"}})
        with pytest.raises(DistsegError, match="got none.nii.gz; no such file"):
            find_source(src)

    def test_several_channels_are_refused_with_a_pattern_that_works(self, src: Path) -> None:
        self.change(src, channel_names={"0": "CT", "1": "PET"})
        with pytest.raises(DistsegError, match="got channels CT, PET; one is trained on") as caught:
            find_source(src)
        words = str(caught.value).replace("'", "").split()
        images, masks = words[words.index("--images") + 1], words[words.index("--masks") + 1]
        assert len(find_source(src, Asked(images=images, masks=masks)).cases) == 5

    def test_a_mask_that_is_not_there_is_named(self, src: Path) -> None:
        (src / "labelsTr/case_002.nii.gz").unlink()
        with pytest.raises(DistsegError, match="mask: got none for volume .*case_002_0000.nii.gz .1 without."):
            find_source(src)

    def test_version_one_leaves_the_channel_out_of_its_list(self, volumes: list[Volume], tmp_path: Path) -> None:
        MADE["decathlon"].make(tmp_path, volumes)
        for path in (tmp_path / "imagesTr").iterdir():
            path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
        assert len(find_source(tmp_path).cases) == 5


class TestTemplates:
    @pytest.mark.parametrize(
        ("images", "masks", "message"),
        [
            ("{case}/ct", None, "got one of --images and --masks"),
            ("ct.nii.gz", "{case}/Lung", "{case} must stand where"),
            ("{case}/ct", "{case}/{name}", "got {name} in"),
            ("{case}/mr.nii.gz", "{case}/Lung", r"which no file in .* fits; seen: P#/Lung.nii.gz x 6"),
            ("{case}/ct", "{case}/Liver", "--masks: got '{case}/Liver', which no file"),
            ("{case}/ct", "{case}/Lung", r"no names.*--images '{case}/ct' --masks '{case}/Lung' --labels NAME_1=1"),
            ("*/{case}.nii.gz", "{case}/Lung", "got Lung twice"),
        ],
    )
    def test_a_pattern_that_does_not_fit_is_named(
        self, images: str, masks: str | None, message: str, volumes: list[Volume], tmp_path: Path
    ) -> None:
        MADE["template (a file a label)"].make(tmp_path, volumes)
        with pytest.raises(DistsegError, match=message):
            find_source(tmp_path, Asked(images=images, masks=masks))

    def test_labels_choose_among_files_and_what_has_no_mask_is_left_out(
        self, volumes: list[Volume], tmp_path: Path
    ) -> None:
        MADE["template (a file a label)"].make(tmp_path, volumes)
        (tmp_path / "P1/Nodule.nii.gz").unlink()
        (tmp_path / "P2/Nodule.nii.gz").unlink()
        (tmp_path / "P2/Lung.nii.gz").unlink()
        ask = Asked(images="{case}/ct", masks="{case}/{label}")
        source = find_source(tmp_path, ask)
        assert len(source.cases) == 5 and "1 volumes without a mask (P2/ct.nii.gz" in source_in_words(source)
        assert "Nodule: 1 of 5 volumes have no such mask: taken as nothing there" in source.notes
        source = find_source(tmp_path, Asked(images=ask.images, masks=ask.masks, labels={"background": 0, "nodule": 4}))
        assert len(source.cases) == 4 and dict(source.labels) == {"background": 0, "nodule": 4}
        with pytest.raises(DistsegError, match="--labels: got liver; files name Lung, Nodule"):
            find_source(tmp_path, Asked(images=ask.images, masks=ask.masks, labels={"background": 0, "liver": 4}))

    def test_folders_of_pictures_are_volumes(self, volumes: list[Volume], tmp_path: Path) -> None:
        from PIL import Image

        for k, volume in enumerate(volumes[:3]):
            for z in range(8):
                for what, values in (("ct", np.asarray(volume.image.dataobj)), ("seg", volume.lungs > 0)):
                    grey = np.clip((values[:, :, z] + 1250) / 6, 0, 255) if what == "ct" else values[:, :, z] * 255.0
                    path = tmp_path / f"scan{k}/{what}/{z + 7}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(grey.astype(np.uint8)).save(path)
        for images, masks in (("{case}/ct", "{case}/seg"), ("{case}/ct/*", "{case}/seg/*.png")):
            source = find_source(tmp_path, Asked(images=images, masks=masks, labels={"background": 0, "lung": 1}))
            assert [len(case.files) for case in source.cases] == [8, 8, 8]
            assert [path.stem for path in source.cases[0].files] == [
                path.stem for path in source.cases[0].masks[0].files
            ]
            assert source.cases[0].files[3].name == "10.png" and source.cases[0].masks[0].label_of_value[255] == 1


def test_a_csv_names_folds(volumes: list[Volume], tmp_path: Path) -> None:
    rows = MADE["covid-19-20"].make(tmp_path, volumes)
    for row, fold in zip(rows, "0011 ", strict=True):
        row |= {"fold": fold.strip(), "split": "test" if fold == " " else ""}
    store, _ = prepare_store(by_hand(rows, tmp_path / "a.csv"), tmp_path / "store", workers=1)
    assert store.folds.folds == (("p0", "p1"), ("p2", "p3")) and store.folds.test == ("p4",)
    for place, values, message in (
        (0, {"fold": "x"}, "line 2: got fold 'x'"),
        (0, {"fold": ""}, "got patient p0 with fold none and split none"),
        (0, {"fold": "3"}, "got folds 0, 1, 3; they count from 0"),
        (4, {"fold": "1"}, "got patient p4 with fold 1 and split test"),
    ):
        wrong = [row | (values if k == place else {}) for k, row in enumerate(rows)]
        with pytest.raises(DistsegError, match=message):
            find_source(by_hand(wrong, tmp_path / "b.csv"))
