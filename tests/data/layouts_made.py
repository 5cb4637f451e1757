"""Small copies of the sets that circulate: names and side files are those of the real ones, voxels are the phantom's.

`python -m tests.data.layouts_made` writes docs/layouts.md from them; a test holds it to what `prepare` says.
"""

import json
import re
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from distseg.commands.prepare import parse_arguments
from distseg.data.layouts.finding import Asked, find_source, source_in_words
from distseg.phantoms.case import write_phantom

DOCS = Path(__file__).parents[2] / "docs/layouts.md"
Rows = list[dict[str, str]]  # a hand-made cases.csv


@dataclass(frozen=True)
class Volume:
    image: nib.Nifti1Image
    lungs: np.ndarray
    """[X, Y, Z], right 1, left 2"""
    infection: np.ndarray

    @property
    def joint(self) -> np.ndarray:
        return np.where(self.infection > 0, 3, self.lungs).astype(np.uint8)

    def mask(self, values: np.ndarray) -> nib.Nifti1Image:
        return nib.Nifti1Image(values.astype(np.uint8), self.image.affine)


@dataclass(frozen=True)
class Made:
    """A set, and the same by hand."""

    make: Callable[[Path, list[Volume]], Rows]
    """fills a folder; the rows of a CSV that says the same"""
    labels: str
    """`--labels` of that CSV, in the numbers of the store"""
    says: str
    """what the documentation says of it"""
    options: tuple[str, ...] = ()
    """of prepare"""


def read_volumes(phantom: Path) -> list[Volume]:
    folders = [phantom / name for name in ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask")]
    names = sorted(path.name for path in folders[0].iterdir())
    read = [[nib.load(folder / name) for folder in folders] for name in names]
    return [Volume(image, np.asarray(lungs.dataobj), np.asarray(found.dataobj)) for image, lungs, found in read]


def save(image: nib.Nifti1Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nnunet(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes[:5], start=1):
        image = save(v.image, src / f"imagesTr/case_{k:03d}_0000.nii.gz")
        rows.append({"image": image, "mask": save(v.mask(v.joint), src / f"labelsTr/case_{k:03d}.nii.gz")})
    save(volumes[5].image, src / "imagesTs/case_006_0000.nii.gz")
    labels = {"background": 0, "lung": [1, 2, 3], "infection": [3]}
    described = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "regions_class_order": [1, 3],
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    touch(src / "dataset.json", json.dumps(described))
    names = [f"case_{k:03d}" for k in range(1, 6)]
    folds = ([names[0], names[4]], [names[1]], [names[2], names[3]])
    touch(
        src / "splits_final.json",
        json.dumps([{"train": [n for n in names if n not in val], "val": val} for val in folds]),
    )
    return rows


def decathlon(src: Path, volumes: list[Volume]) -> Rows:
    rows, training = [], []
    for k, v in enumerate(volumes[:5]):
        name = f"lung_{3 * k + 1:03d}.nii.gz"
        rows.append(
            {
                "image": save(v.image, src / "imagesTr" / name),
                "mask": save(v.mask(v.infection > 0), src / "labelsTr" / name),
            }
        )
        touch(src / "labelsTr" / f"._{name}", "a file of macOS")
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    save(volumes[5].image, src / "imagesTs/lung_019.nii.gz")
    described = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "cancer"},
        "numTraining": 5,
        "training": training,
    }
    touch(src / "dataset.json", json.dumps(described | {"test": ["./imagesTs/lung_019.nii.gz"]}))
    return rows


def amos(src: Path, volumes: list[Volume]) -> Rows:
    rows, listed = [], []
    for k, v in enumerate(volumes):
        folder, name = "Va" if k > 3 else "Tr", f"amos_{k + 1:04d}.nii.gz"
        image, mask = (
            save(v.image, src / f"images{folder}" / name),
            save(v.mask(v.lungs), src / f"labels{folder}" / name),
        )
        rows.append({"image": image, "mask": mask})
        listed.append({"image": f"./images{folder}/{name}", "label": f"./labels{folder}/{name}"})
    labels = {"0": "background", "1": "right lung", "2": "left lung"}
    touch(
        src / "dataset.json",
        json.dumps({"modality": {"0": "CT"}, "labels": labels, "training": listed[:4], "validation": listed[4:]}),
    )
    return rows


COVID_NAMES = (
    ("coronacases_org_001", "coronacases_001"), ("coronacases_org_002", "coronacases_002"),
    ("radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm", "radiopaedia_10_85902_1"),
    ("radiopaedia_org_covid-19-pneumonia-10_85902_3-dcm", "radiopaedia_10_85902_3"),
    ("radiopaedia_org_covid-19-pneumonia-14_85914_0-dcm", "radiopaedia_14_85914_0"),
    ("radiopaedia_org_covid-19-pneumonia-4_85506_1-dcm", "radiopaedia_4_85506_1"),
)  # fmt: skip


def covid(src: Path, volumes: list[Volume], folders: tuple[str, str, str, str], suffix: str) -> Rows:
    rows = []
    for (long, short), v in zip(COVID_NAMES, volumes, strict=True):
        row = {"image": save(v.image, src / folders[0] / f"{long}{suffix}"), "id": short}
        row["lung"] = save(v.mask(v.lungs), src / folders[1] / f"{short}{suffix}")
        row["infection"] = save(v.mask(v.infection > 0), src / folders[2] / f"{short}{suffix}")
        save(v.mask(v.joint), src / folders[3] / f"{short}{suffix}")
        rows.append(row)
    return rows


def zenodo(src: Path, volumes: list[Volume]) -> Rows:
    folders = ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask")
    return covid(src, volumes, folders, ".nii.gz")


def kaggle(src: Path, volumes: list[Volume]) -> Rows:
    touch(src / "metadata.csv", "ct_scan,lung_mask\n../input/covid19-ct-scans/ct_scans/coronacases_org_001.nii,...\n")
    return covid(src, volumes, ("ct_scans", "lung_mask", "infection_mask", "lung_and_infection_mask"), ".nii")


def medseg9(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes, start=1):
        findings = np.where(v.infection > 0, 1 + np.arange(v.infection.shape[0])[:, None, None] % 3, 0)
        row = {
            "image": save(v.image, src / f"rp_im/{k}.nii.gz"),
            "lung": save(v.mask(v.lungs), src / f"rp_lung_msk/{k}.nii.gz"),
        }
        save(v.mask(findings), src / f"rp_msk/{k}.nii.gz")
        for value, name in enumerate(("ground_glass", "consolidation", "pleural_effusion"), start=1):
            row[name] = save(v.mask(findings == value), src.parent / f"hand/{name}/{k}.nii.gz")
        rows.append(row)
    return rows


def covid_19_20(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for number, v in zip((3, 11, 14, 16, 25), volumes, strict=False):
        name = f"Train/volume-covid19-A-{number:04d}"
        image = save(v.image, src / f"{name}_ct.nii.gz")
        rows.append({"image": image, "infection": save(v.mask(v.infection > 0), src / f"{name}_seg.nii.gz")})
    save(volumes[5].image, src / "Validation/volume-covid19-A-0039_ct.nii.gz")
    return rows


def mosmed(src: Path, volumes: list[Volume]) -> Rows:
    save(volumes[0].image, src / "studies/CT-0/study_0001.nii.gz")
    rows = []
    for k, v in enumerate(volumes[1:], start=255):
        image = save(v.image, src / f"studies/CT-1/study_{k:04d}.nii.gz")
        rows.append(
            {"image": image, "infection": save(v.mask(v.infection > 0), src / f"masks/study_{k:04d}_mask.nii.gz")}
        )
    touch(src / "README_EN.md")
    return rows


def lits(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        image = save(v.image, src / f"volume-{k}.nii")
        rows.append({"image": image, "mask": save(v.mask(np.minimum(v.joint, 2)), src / f"segmentation-{k}.nii")})
    return rows


def kits(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        image = save(v.image, src / f"case_{k:05d}/imaging.nii.gz")
        rows.append(
            {
                "image": image,
                "mask": save(v.mask(v.joint), src / f"case_{k:05d}/segmentation.nii.gz"),
                "id": f"case_{k:05d}",
            }
        )
    return rows


def totalsegmentator(src: Path, volumes: list[Volume]) -> Rows:
    rows, lines = [], ["\ufeffimage_id;age;gender;institute;study_type;split"]
    for k, v in enumerate(volumes, start=1):
        row = {"image": save(v.image, src / f"s{k:04d}/ct.nii.gz"), "id": f"s{k:04d}"}
        upper = np.arange(v.lungs.shape[2]) > 3
        of_label = {
            "heart": v.lungs > 9,
            "lung_lower_lobe_left": (v.lungs == 2) & ~upper,
            "lung_upper_lobe_left": (v.lungs == 2) & upper,
            "lung_upper_lobe_right": v.lungs == 1,
            "lung_vessels": v.infection > 0,  # over the lobes
        }
        for name, mask in of_label.items():
            row[name] = save(v.mask(mask), src / f"s{k:04d}/segmentations/{name}.nii.gz")
        rows.append(row)
        lines.append(f"s{k:04d};60;m;A;ct thorax;{('train', 'train', 'train', 'train', 'val', 'test')[k - 1]}")
    touch(src / "meta.csv", "\n".join(lines) + "\n")
    return rows


def paired(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        row = {
            "image": save(v.image, src / f"images/p{k}.nii.gz"),
            "lung": save(v.mask(v.lungs), src / f"lung/p{k}.nii.gz"),
        }
        rows.append(row | {"nodule": save(v.mask(v.infection > 0), src / f"nodule/p{k}.nii.gz")})
    return rows


def pictures(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        grey = np.clip((np.asarray(v.image.dataobj)[:, :, 4] + 1250) / 1500 * 255, 0, 255).astype(np.uint8)
        row = {"id": f"scan{chr(97 + k)}"}
        for what, values, ending in (
            ("image", np.stack([grey] * 3, -1), ""),
            ("masks", (v.lungs[:, :, 4] > 0) * np.uint8(255), "_mask"),
        ):
            path = src / ("images" if what == "image" else "masks") / f"scan{chr(97 + k)}{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
            row[what] = str(path)
        rows.append(row)
    return rows


def template(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        folder = src / f"train/Patient_{k:02d}"
        image = save(v.image, folder / f"Patient_{k:02d}.nii.gz")
        rows.append({"image": image, "mask": save(v.mask(v.lungs), folder / "GT.nii.gz")})
    return rows


def template_of_labels(src: Path, volumes: list[Volume]) -> Rows:
    rows = []
    for k, v in enumerate(volumes):
        row = {"image": save(v.image, src / f"P{k}/ct.nii.gz"), "id": f"P{k}"}
        for name, mask in (("Lung", v.lungs > 0), ("Nodule", v.infection > 0)):
            row[name.lower()] = save(v.mask(mask), src / f"P{k}/{name}.nii.gz")
        rows.append(row)
    return rows


MADE: Mapping[str, Made] = {
    "nnunet": Made(nnunet, "lung_1=1,lung_2=2,infection=3", "nnU-Net v2. Regions (`[1, 2, 3]`), `ignore`, the key `dataset` and "
        "`splits_final.json` are read, also from `nnUNet_preprocessed/`. Several channels are refused; a pattern chooses one."),
    "decathlon": Made(decathlon, "cancer=1", "The Medical Segmentation Decathlon and nnU-Net v1."),
    "decathlon (AMOS)": Made(amos, "right_lung=1,left_lung=2", "AMOS, whose list `validation` becomes the validation patients."),
    "zenodo": Made(zenodo, "lung=1,infection=2", "Zenodo 3757476 under both namings, and what `distseg phantom` writes."),
    "kaggle": Made(kaggle, "lung=1,infection=2", "`covid19-ct-scans` of Kaggle: the same volumes."),
    "covid-19-20": Made(covid_19_20, "infection=2", "The COVID-19-20 challenge."),
    "mosmed": Made(mosmed, "infection=2", "MosMedData, of which a part has masks."),
    "medseg9": Made(medseg9, "lung=1,ground_glass=3,consolidation=4,pleural_effusion=5", "MedSeg's nine volumes."),
    "lits": Made(lits, "liver=1,tumor=2", "LiTS."),
    "kits": Made(kits, "kidney=1,tumor=2,cyst=3", "KiTS."),
    "totalsegmentator": Made(totalsegmentator, "heart=1,lung_lower_lobe_left=2,lung_upper_lobe_left=3,lung_upper_lobe_right=4,lung_vessels=5",
        "TotalSegmentator with the splits of its `meta.csv`. `--labels` takes some of its labels."),
    "paired": Made(paired, "lung=1,nodule=2", "Your own volumes: `images/` and a folder a label. With `labels/` in place of those, the label "
        "maps need names, see [labels](data.md#labels)."),
    "paired (pictures)": Made(pictures, "masks=1", "Pictures of slices. Name the label with `--labels lung=1`."),
    "template": Made(template, "right=1,left=2", "Anything else, by patterns (SegTHOR here).",
        ("--images", "train/{case}/{case}.nii.gz", "--masks", "train/{case}/GT.nii.gz", "--labels", "right=1,left=2")),
    "template (a file a label)": Made(template_of_labels, "lung=1,nodule=2", "`{label}` stands for the name of a label.",
        ("--images", "{case}/ct.nii.gz", "--masks", "{case}/{label}.nii.gz")),
}  # fmt: skip


def asked(options: tuple[str, ...]) -> Asked:
    """What the command line says of a source."""
    args = parse_arguments(["SRC", "STORE", *options])
    labels = {"background": 0} | args.labels if args.labels else None
    return Asked(args.layout, args.images, args.masks, labels, args.ignore, args.patients)


def drawn(src: Path) -> str:
    """The tree: of each folder the first file of each kind, and how many there are."""
    folders: dict[str, list[str]] = {}
    for path in sorted(path for path in src.rglob("*") if path.is_file() and not path.name.startswith(".")):
        folders.setdefault(str(path.parent.relative_to(src)), []).append(path.name)
    shapes: dict[str, tuple[str, int]] = {}
    for folder, names in folders.items():
        where = "" if folder == "." else f"{folder}/"
        for name in names:
            shape = re.sub(r"(?<![a-z])\d+|(?<=scan)[a-f]", "#", where + name)
            first, n = shapes.get(shape, (where + name, 0))
            shapes[shape] = (first, n + 1)
    return "\n".join(f"{first}{f'   ... {n}' if n > 1 else ''}" for first, n in shapes.values())


def documentation(folder: Path) -> str:
    """docs/layouts.md."""
    write_phantom(folder / "phantom", cases=6, seed=0, size=64, n_slices=8)
    volumes = read_volumes(folder / "phantom")
    blocks = [HEAD]
    for name, made in MADE.items():
        src = folder / re.sub(r"\W+", "_", name)
        made.make(src, volumes)
        options = "".join(f" {shlex.quote(word)}" for word in made.options)
        line = source_in_words(find_source(src, asked(made.options)))
        blocks.append(
            f"## {name}\n\n{made.says}\n\n```\n{drawn(src)}\n```\n\n```bash\ndistseg prepare SRC store{options}\n```\n\n```\n"
            f"{textwrap.fill(line, 120, break_on_hyphens=False)}\n```\n"
        )
    return "\n".join(blocks)


HEAD = """# Layouts

What `distseg prepare` finds by itself: the names in a folder, the command, and the line that says what was taken for
what. The numbers behind `...` count files. `--layout` chooses where several fit; a pattern describes anything else.

In a pattern, `{case}` is the case's name, `{label}` a label's, `*` anything in a name, and `**/` any folders. A pattern
may leave out the suffix, and may end at a folder of slices.

CT series with DICOM-SEG files that refer to them (`dicom-seg`, LIDC-IDRI of TCIA) are found by their headers, in folders
of any name. Readers of one finding are joined by `--readers`. `medseg` and `csv` are described in [data](data.md#layouts).
"""

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        DOCS.write_text(documentation(Path(folder)))
