"""The peers of accuracy.py: each is built for a fold, trained by its steps, and labels volumes.

segmentation_models_pytorch is its Unet++ in a plain PyTorch loop with torchvision's augmentation and the study's loss.
nnU-Net is its 2D network, planned and prepared by nnU-Net from the same slices, with its own augmentation, loss, optimiser
and schedule; its batch is ours, for the one it plans takes minutes a step on a CPU, and its learning rate falls each step.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import segmentation_models_pytorch as smp
import torch
from recipes import ENCODER
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from distseg.data.nifti import write_labels
from distseg.data.store import Store, read_slice
from distseg.scoring.segmenting import inference_device

BATCH = 4
DEVICE = inference_device()
WINDOW_HU = (-1250.0, 250.0)
REGION_LABELS = {"lung": (1, 2), "infection": (2,)}


class SegmentationModelsPytorch:
    """Unet++ of its own widths on the encoder of ours, with the same ImageNet weights."""

    LR, ENCODER_LR = 1e-2, 1e-3  # as ours; with 1e-3 for all it finds no infection in ten minutes of a CPU

    def __init__(self, store: Store, fold: int, side: int, weights: Path, work: Path) -> None:
        torch.manual_seed(fold)
        self.side = side
        network = smp.UnetPlusPlus(f"tu-{ENCODER}", encoder_weights=None, in_channels=3, classes=len(REGION_LABELS))
        state = {key.replace(".", "_"): tensor for key, tensor in load_file(weights).items()}
        own = network.encoder.model.state_dict()
        network.encoder.model.load_state_dict(
            {key: state.get(key.replace(".", "_"), tensor) for key, tensor in own.items()}
        )
        self.network = network.to(DEVICE)
        self.batches = self._batches(store, fold)
        fresh = [*network.decoder.parameters(), *network.segmentation_head.parameters()]
        groups = [{"params": fresh}, {"params": network.encoder.parameters(), "lr": self.ENCODER_LR}]
        self.optimizer = torch.optim.Adam(groups, self.LR)
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None

    def plan(self, steps: int) -> None:
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self) -> None:
        image_B1HW, target_BRHW = (tensor.to(DEVICE) for tensor in next(self.batches))
        logits_BRHW = self.network(_normalised(image_B1HW))
        dice = smp.losses.DiceLoss("multilabel")(logits_BRHW, target_BRHW)
        loss = dice + F.binary_cross_entropy_with_logits(logits_BRHW, target_BRHW)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    @torch.inference_mode()
    def label(self, hu_ZYX: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
        """Labels (Z, Y, X)."""
        self.network.eval()
        labels = []
        for hu_YX in hu_ZYX:
            logits = self.network(_normalised(_windowed(hu_YX, self.side)[None].to(DEVICE))).cpu()
            labels.append(_labels(F.interpolate(logits, hu_YX.shape, mode="bilinear")[0] >= 0))
        return np.stack(labels)

    def _batches(self, store: Store, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (BATCH, 1, side, side) in [0, 1] and region masks, shuffled, flipped and warped by torchvision, without end."""
        slices = store.slices_of_split("train", fold)
        change = v2.Compose([
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(15, translate=(0.05, 0.05), scale=(0.85, 1.2), shear=3, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.1, contrast=0.25),
        ])  # fmt: skip
        side = self.side
        kept = [(_windowed(read_slice(f.image), side), _resized_label(read_slice(f.label), side)) for f in slices]
        for _ in itertools.count():
            for places in torch.randperm(len(kept)).split(BATCH):
                changed = [change(tv_tensors.Image(kept[i][0]), tv_tensors.Mask(kept[i][1])) for i in places.tolist()]
                label_BHW = torch.stack([label[0].as_subclass(Tensor) for _, label in changed])
                regions = [
                    torch.isin(label_BHW, torch.tensor(labels, dtype=torch.uint8)) for labels in REGION_LABELS.values()
                ]
                yield torch.stack([image.as_subclass(Tensor) for image, _ in changed]), torch.stack(regions, 1).float()


class NnUNet:
    """nnU-Net v2's 2D configuration."""

    DATASET = "Dataset001_ct"

    def __init__(self, store: Store, fold: int, side: int, weights: Path, work: Path) -> None:
        torch.manual_seed(fold)
        np.random.seed(fold)
        self.side = side
        folders = {name: work / "nnunet" / name for name in ("raw", "preprocessed", "results")}
        os.environ.update({f"nnUNet_{name}": str(folder) for name, folder in folders.items()})
        prepared = folders["preprocessed"] / self.DATASET
        if not (prepared / "splits_final.json").is_file():
            self._prepare(store, folders["raw"] / self.DATASET, prepared)
        os.environ.update({"nnUNet_n_proc_DA": "0"})  # augmented by the thread that trains: the others have no more
        self.trainer = self._trainer(prepared, fold)

    def plan(self, steps: int) -> None:
        from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

        self.trainer.lr_scheduler = PolyLRScheduler(self.trainer.optimizer, self.trainer.initial_lr, steps)

    def step(self) -> None:
        self.trainer.network.train()
        self.trainer.lr_scheduler.step()
        self.trainer.train_step(next(self.trainer.dataloader_train))

    def label(self, hu_ZYX: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
        """Labels (Z, Y, X), averaged over mirrored slices as nnU-Net does."""
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        trainer = self.trainer
        predictor = nnUNetPredictor(device=DEVICE, allow_tqdm=False)
        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        predictor.manual_initialization(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            [trainer.network.state_dict()],
            trainer.dataset_json,
            type(trainer).__name__,
            trainer.inference_allowed_mirroring_axes,
        )
        small_ZYX = _resized_volume(hu_ZYX, self.side)
        spacing = _spacing_of(hu_ZYX, spacing_mm, self.side)
        _, probability_RZYX = predictor.predict_single_npy_array(
            small_ZYX[None], {"spacing": spacing}, save_or_return_probabilities=True
        )
        shown = F.interpolate(torch.from_numpy(np.asarray(probability_RZYX)), hu_ZYX.shape[1:], mode="bilinear")
        return np.stack([_labels(regions >= 0.5) for regions in shown.transpose(0, 1)])

    def _prepare(self, store: Store, raw: Path, prepared: Path) -> None:
        from nnunetv2.experiment_planning import plan_and_preprocess_api as api

        for case in store.cases:
            hu_ZYX, label_ZYX = store.read_case(case)
            spacing = _spacing_of(hu_ZYX, case.spacing_mm, self.side)
            small = [_resized_label(label_YX, self.side)[0].numpy() for label_YX in label_ZYX]
            write_labels(raw / "labelsTr" / f"{case.id}.nii.gz", np.stack(small), spacing)
            grid = nib.load(raw / "labelsTr" / f"{case.id}.nii.gz").affine
            image = nib.Nifti1Image(_resized_volume(hu_ZYX, self.side).T, grid)
            (raw / "imagesTr").mkdir(exist_ok=True)
            nib.save(image, raw / "imagesTr" / f"{case.id}_0000.nii.gz")
        described = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, **{name: list(labels) for name, labels in REGION_LABELS.items()}},
            "regions_class_order": [1, 2],
            "numTraining": len(store.cases),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(described))
        api.extract_fingerprints([1], num_processes=1)
        api.plan_experiments([1])
        api.preprocess([1], configurations=["2d"], num_processes=[1])
        splits = [
            {split: [case.id for case in store.cases_of(split, fold)] for split in ("train", "val")}
            for fold in range(len(store.folds.folds))
        ]
        (prepared / "splits_final.json").write_text(json.dumps(splits))

    def _trainer(self, prepared: Path, fold: int) -> Any:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        plans = json.loads((prepared / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        plans["configurations"]["2d"]["batch_size"] = BATCH
        dataset = json.loads((prepared / "dataset.json").read_text())
        trainer = nnUNetTrainer(plans, "2d", fold, dataset, DEVICE)
        with contextlib.redirect_stdout(None):
            trainer.on_train_start()
        return trainer


def _spacing_of(hu_ZYX: np.ndarray, spacing_mm: tuple[float, ...], side: int) -> tuple[float, float, float]:
    """(Z, Y, X) in mm of the slices when they are side x side."""
    z, y, x = spacing_mm
    return (z, y * hu_ZYX.shape[1] / side, x * hu_ZYX.shape[2] / side)


def _resized_volume(hu_ZYX: np.ndarray, side: int) -> np.ndarray:
    images = torch.from_numpy(hu_ZYX).float()[:, None]
    return F.interpolate(images, (side, side), mode="bilinear")[:, 0].numpy()


def _windowed(hu_YX: np.ndarray, side: int) -> Tensor:
    low, high = WINDOW_HU
    image = ((torch.from_numpy(hu_YX).float() - low) / (high - low)).clamp(0, 1)
    return F.interpolate(image[None, None], (side, side), mode="bilinear")[0]


def _normalised(image_B1HW: Tensor) -> Tensor:
    return ((image_B1HW - 0.5) / 0.5).expand(-1, 3, -1, -1)  # the encoder's own constants


def _resized_label(label_YX: np.ndarray, side: int) -> Tensor:
    return F.interpolate(torch.from_numpy(label_YX)[None, None], (side, side), mode="nearest")[0]


def _labels(shown_RHW: Tensor) -> np.ndarray:
    lung, infection = shown_RHW
    return torch.where(infection, 2, lung.to(torch.uint8)).numpy()
