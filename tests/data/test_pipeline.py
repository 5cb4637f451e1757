"""The DALI pipeline: its pixels against torch, its exactness over ranks and restarts, and the GPU graph."""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distseg.config import PRESETS, AugmentConfig, DataConfig
from distseg.data.augment import draw_augmentation
from distseg.data.pipeline import Batch, build_train_loader, build_val_loader, slice_pipeline
from distseg.data.plan import Plan, Position
from distseg.data.store import Slices, open_store
from distseg.errors import DistsegError, RankError
from distseg.models.label_map import LabelMap
from distseg.models.segmenter import HuSegmenter

CPU = torch.device("cpu")
STRONG = AugmentConfig("strong", **PRESETS["strong"])
WINDOWS = ((-1250.0, 250.0), (-160.0, 240.0), (-1000.0, -500.0))
DATA = DataConfig(image_size=48, num_threads=2)
EVERYTHING = DataConfig(image_size=48, num_threads=2, fit="crop", neighbours=1, windows_hu=WINDOWS,
                        augment=AugmentConfig("strong", **dict.fromkeys(PRESETS["none"], 0.5)))  # fmt: skip


@pytest.fixture(scope="module")
def slices(store: Path) -> Slices:
    opened = open_store(store)
    return opened.slices_of(opened.cases_of("train", 0))


def copied(given: Iterable[Batch]) -> list[Batch]:
    """Batches that outlive the loader's buffers."""
    return [dataclasses.replace(b, image_BCHW=b.image_BCHW.clone(), label_BHW=b.label_BHW.clone()) for b in given]


def batches(
    slices: Slices,
    rank: int,
    world: int,
    count: int,
    start: Position = Position(),  # noqa: B008 (frozen)
    data: DataConfig = DATA,
) -> list[Batch]:
    plan = Plan(len(slices), 6 // world, 0, rank, world)
    return copied(itertools.islice(build_train_loader(data, slices, plan, 0, CPU, start, (2,)), count))


def test_validation_pixels_are_those_of_torch_resize_and_window(slices: Slices) -> None:
    batch = next(iter(build_val_loader(DATA, slices, Plan(len(slices), 4), CPU)))
    hu = torch.from_numpy(np.stack([np.load(f.image) for f in slices[:4]])).float().unsqueeze(1)
    resized = F.interpolate(hu, (48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(batch.image_BCHW, ((resized + 1250) / 1500).clamp(0, 1), rtol=0, atol=1e-4)
    # At twice the size no sample point lies on the border of two pixels, where rounding would decide.
    double = next(iter(build_val_loader(DataConfig(image_size=128), slices, Plan(len(slices), 4), CPU)))
    labels = torch.from_numpy(np.stack([np.load(f.label) for f in slices[:4]]))
    expected = labels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.equal(double.label_BHW, expected) and double.label_BHW.dtype == torch.uint8


def test_a_crop_keeps_the_native_scale(slices: Slices) -> None:
    data = DataConfig(image_size=48, fit="crop")
    batch = next(iter(build_val_loader(data, slices, Plan(len(slices), 1), CPU)))
    assert np.array_equal(batch.label_BHW[0].numpy(), np.load(slices[0].label)[8:56, 8:56])


@pytest.mark.parametrize("data", [DATA, EVERYTHING], ids=["study", "everything"])
def test_ranks_threads_and_restarts_see_the_same_bits(data: DataConfig, slices: Slices) -> None:
    one = batches(slices, 0, 1, 9, data=data)  # into the second epoch
    other_threads = dataclasses.replace(data, num_threads=1)
    two, three = ([batches(slices, rank, world, 9, data=other_threads) for rank in range(world)] for world in (2, 3))
    for number, batch in enumerate(one):
        for ranks in (two, three):
            parts = [of_rank[number] for of_rank in ranks]
            assert torch.equal(batch.image_BCHW, torch.cat([part.image_BCHW for part in parts]))
            assert torch.equal(batch.label_BHW, torch.cat([part.label_BHW for part in parts]))
    resumed = batches(slices, 0, 1, 6, start=one[2].plan.position, data=data)
    for before, after in zip(one[3:], resumed, strict=True):
        assert before.plan == after.plan and torch.equal(before.image_BCHW, after.image_BCHW)


def test_fillers_are_ignored_and_labels_never_show_a_new_value(slices: Slices) -> None:
    plan = Plan(len(slices), 7, 0)  # 24 or 32 slices: the last batch is not full
    epoch = list(
        itertools.islice(build_train_loader(DATA, slices, plan, 0, CPU, Position()), plan.steps_left(Position()))
    )
    real = epoch[-1].plan.n_real
    assert (
        real < 7 and bool((epoch[-1].label_BHW[real:] == 255).all()) and bool((epoch[-1].label_BHW[:real] < 255).all())
    )
    values = set(torch.cat([batch.label_BHW[: batch.plan.n_real].flatten() for batch in epoch]).tolist())
    assert values == {0, 1, 2}


def test_a_flip_mirrors_image_and_label_together(slices: Slices) -> None:
    still, flipped = (
        batches(
            slices,
            0,
            1,
            1,
            data=DataConfig(image_size=64, augment=AugmentConfig(flip_probability=flip, affine_probability=0)),
        )[0]
        for flip in (0.0, 1.0)
    )
    torch.testing.assert_close(flipped.image_BCHW, still.image_BCHW.flip(-1), rtol=0, atol=1e-4)
    assert torch.equal(flipped.label_BHW, still.label_BHW.flip(-1))


@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_a_damaged_slice_is_named(damage: str, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    opened = open_store(copy)
    slices = opened.slices_of(opened.cases_of("train", 0))
    bad = slices[3].image
    content = bad.read_bytes()
    bad.unlink()
    if damage == "cut":
        bad.write_bytes(content[:100])
    elif damage == "shape":
        np.save(bad, np.zeros((9, 9, 2), np.int16))
    with pytest.raises(DistsegError, match=str(bad)):
        list(itertools.islice(build_val_loader(DATA, slices, Plan(len(slices), 4), CPU), 4))


def test_damaged_positions_of_crops_are_named(store: Path, tmp_path: Path) -> None:
    opened = open_store(Path(shutil.copytree(store, tmp_path / "store")))
    slices = opened.slices_of(opened.cases_of("train", 0))
    for path in opened.root.rglob("foreground.npy"):
        path.write_bytes(b"cut")
    data = DataConfig(image_size=32, fit="crop", augment=AugmentConfig(focus_probability=1.0))
    with pytest.raises(RankError, match="foreground.npy"):
        next(iter(build_train_loader(data, slices, Plan(len(slices), 4, seed=0), 0, CPU, focus_labels=(2,))))


def test_the_gpu_graph_is_built_from_the_same_definition() -> None:
    # Tracing needs no CUDA and finds operators or arguments that a GPU has not.
    data = DataConfig(image_size=64, neighbours=1, windows_hu=WINDOWS, augment=STRONG)
    graph = slice_pipeline(iter(()), data, STRONG, True, batch_size=2, num_threads=1, device_id=0)
    graph._build_graph()
    devices = [(node.name, node.device) for op in graph._ops for node in op.outputs]
    on_gpu = [name for name, device in devices if device == "gpu"]
    assert sum("WarpPerspective" in name for name in on_gpu) == 4, devices
    for changed in ("Resize", "GaussianBlur", "Erase", "ArithmeticGenericOp", "Cat"):
        assert any(changed in name for name in on_gpu), (changed, devices)
    assert all(device == "cpu" for name, device in devices if "ExternalSource" in name or "Numpy" in name)


def changed_by(slices: Slices, **augment: Any) -> tuple[Batch, Batch]:
    """The first batch with one change and with none."""
    none = AugmentConfig("none", **PRESETS["none"])
    datas = (dataclasses.replace(DATA, image_size=64, augment=a) for a in (dataclasses.replace(none, **augment), none))
    changed, still = (batches(slices, 0, 1, 1, data=data)[0] for data in datas)
    return changed, still


def test_noise_is_white_and_of_the_drawn_strength(slices: Slices) -> None:
    wide = dataclasses.replace(DATA, image_size=64, windows_hu=((-5000.0, 5000.0),))
    none = AugmentConfig("none", **PRESETS["none"])
    noisy = dataclasses.replace(none, noise_probability=1.0, noise_hu=100.0)
    changed, still = (batches(slices, 0, 1, 1, data=dataclasses.replace(wide, augment=a))[0] for a in (noisy, none))
    for image, before, sample in zip(changed.image_BCHW, still.image_BCHW, changed.plan.samples, strict=True):
        noise = (image - before)[0] * 10000
        drawn = draw_augmentation(noisy, 0, 0, sample).noise_hu
        assert noise.std().item() == pytest.approx(drawn, rel=0.05) and abs(noise.mean().item()) < 0.1 * drawn
        assert abs((noise[1:] * noise[:-1]).mean().item()) < 0.1 * drawn**2
    assert torch.equal(changed.label_BHW, still.label_BHW)


def test_blur_low_resolution_gamma_and_contrast_do_what_they_say(slices: Slices) -> None:
    def roughness(batch: Batch) -> float:
        return batch.image_BCHW.diff(dim=-1).abs().mean().item()

    for change in ({"blur_probability": 1.0}, {"low_resolution_probability": 1.0, "low_resolution": (0.3, 0.5)}):
        changed, still = changed_by(slices, **change)
        assert roughness(changed) < 0.9 * roughness(still) and torch.equal(changed.label_BHW, still.label_BHW)
    changed, still = changed_by(slices, gamma_probability=1.0, gamma=(2.0, 2.0))
    torch.testing.assert_close(changed.image_BCHW, still.image_BCHW**2, rtol=0, atol=1e-5)
    changed, still = changed_by(slices, contrast_probability=1.0, contrast=(0.5, 0.5), brightness=0.0)
    inside = (still.image_BCHW > 0.01) & (still.image_BCHW < 0.99)
    torch.testing.assert_close(changed.image_BCHW[inside], 0.25 + 0.5 * still.image_BCHW[inside], rtol=0, atol=1e-4)


def test_cutout_empties_one_rectangle_of_the_image_and_no_label(slices: Slices) -> None:
    changed, still = changed_by(slices, cutout_probability=1.0, cutout=0.5)
    assert torch.equal(changed.label_BHW, still.label_BHW)
    differing = changed.image_BCHW != still.image_BCHW
    assert bool(differing.any()) and bool((changed.image_BCHW[differing] == 0).all())


def test_windows_and_neighbours_are_the_channels_that_the_served_model_makes(slices: Slices) -> None:
    data = dataclasses.replace(DATA, image_size=64, windows_hu=WINDOWS, neighbours=1)
    batch = next(iter(build_val_loader(data, slices, Plan(len(slices), 3), CPU)))
    seen = []
    segmenter = HuSegmenter(
        lambda image: seen.append(image) or image[:, :2], WINDOWS, 3, 64, 32, LabelMap({"lung": (1,)}, 0.5)
    )  # type: ignore[arg-type,func-returns-value]
    hu_BCHW = torch.from_numpy(np.stack([[np.load(path) for path in f.images(1)] for f in slices[:3]]))
    segmenter(hu_BCHW)
    assert data.channels == 9 and batch.image_BCHW.shape == (3, 9, 64, 64)
    torch.testing.assert_close(batch.image_BCHW, seen[0], rtol=0, atol=1e-4)
    assert slices[0].images(1)[0] == slices[0].images(1)[1]  # the first slice is its own neighbour


def test_focused_crops_show_the_region_more_often(slices: Slices) -> None:
    def share(probability: float) -> float:
        augment = AugmentConfig("none", **{**PRESETS["none"], "focus_probability": probability})
        data = dataclasses.replace(DATA, image_size=32, fit="crop", augment=augment)
        found = [bool((label == 2).any()) for b in batches(slices, 0, 1, 20, data=data) for label in b.label_BHW]
        return float(np.mean(found))

    assert share(1.0) > share(0.0) + 0.1


def test_batches_that_are_held_are_not_written_again(slices: Slices) -> None:
    plan = Plan(len(slices), 6, 0)
    held, kept = [], []
    for batch in itertools.islice(build_train_loader(EVERYTHING, slices, plan, 0, CPU, Position(), (2,)), 12):
        held.append(batch)
        kept.append((batch.image_BCHW.clone(), batch.label_BHW.clone()))
    for batch, (image, label) in zip(held, kept, strict=True):
        assert torch.equal(batch.image_BCHW, image) and torch.equal(batch.label_BHW, label)


def test_the_same_request_gives_the_same_pixels_again(slices: Slices) -> None:
    # Broadcasting shapes that differ within a batch reads foreign memory in DALI 2.4: then runs differ.
    runs = [batches(slices, 0, 1, 12, data=EVERYTHING) for _ in range(3)]
    for first, *others in zip(*runs, strict=True):
        assert (
            bool(torch.isfinite(first.image_BCHW).all()) and 0 <= first.image_BCHW.min() <= first.image_BCHW.max() <= 1
        )
        assert all(torch.equal(first.image_BCHW, other.image_BCHW) for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("data", [DATA, EVERYTHING], ids=["study", "everything"])
def test_the_gpu_gives_the_pixels_of_the_cpu_also_when_its_work_lags_behind(data: DataConfig, slices: Slices) -> None:
    on_gpu = []
    plan = Plan(len(slices), 6, 0)
    for batch in itertools.islice(build_train_loader(data, slices, plan, 0, torch.device("cuda"), Position(), (2,)), 9):
        torch.cuda._sleep(50_000_000)  # some 30 ms, in which DALI must not write what is still to be read
        on_gpu += copied([batch])
        del batch  # so that DALI could
    for mine, expected in zip(on_gpu, batches(slices, 0, 1, 9, data=data), strict=True):
        assert mine.plan == expected.plan
        far = (mine.image_BCHW.cpu() - expected.image_BCHW).abs() > 5e-3
        assert far.float().mean() < 1e-3  # borders of a rectangle, of a rounded place
        assert (mine.label_BHW.cpu() != expected.label_BHW).float().mean() < 1e-3


def test_a_store_in_a_folder_of_any_bytes_is_read(store: Path, tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"M\xfcller")
    opened = open_store(Path(shutil.copytree(store, root)))
    slices = opened.slices_of(opened.cases_of("train", 0))
    assert len(next(iter(build_val_loader(DATA, slices, Plan(len(slices), 4), CPU))).image_BCHW) == 4
