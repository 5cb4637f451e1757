"""The DALI pipeline: its pixels against torch, its exactness over ranks and restarts, and the GPU graph."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distseg.config import AugmentConfig, DataConfig
from distseg.data.pipeline import Batch, build_train_loader, build_val_loader, slice_pipeline
from distseg.data.plan import Plan, Position
from distseg.data.store import SliceFiles, open_store
from distseg.errors import DistsegError

CPU = torch.device("cpu")
DATA = DataConfig(image_size=48, num_threads=2)


@pytest.fixture(scope="module")
def slices(store: Path) -> list[SliceFiles]:
    opened = open_store(store)
    return opened.slices_of(opened.cases_of("train", 0))


def batches(
    slices: list[SliceFiles],
    rank: int,
    world: int,
    count: int,
    start: Position = Position(),  # noqa: B008 (frozen)
    data: DataConfig = DATA,
) -> list[Batch]:
    plan = Plan(len(slices), 6 // world, 0, rank, world)
    return list(itertools.islice(build_train_loader(data, slices, plan, 0, CPU, start), count))


def test_validation_pixels_are_those_of_torch_resize_and_window(slices: list[SliceFiles]) -> None:
    batch = next(iter(build_val_loader(DATA, slices, Plan(len(slices), 4), CPU)))
    hu = torch.from_numpy(np.stack([np.load(f.image) for f in slices[:4]])).float().unsqueeze(1)
    resized = F.interpolate(hu, (48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(batch.image_B1HW, ((resized + 1250) / 1500).clamp(0, 1), rtol=0, atol=1e-4)
    # At twice the size no sample point lies on the border of two pixels, where rounding would decide.
    double = next(iter(build_val_loader(DataConfig(image_size=128), slices, Plan(len(slices), 4), CPU)))
    labels = torch.from_numpy(np.stack([np.load(f.label) for f in slices[:4]]))
    expected = labels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.equal(double.label_BHW, expected) and double.label_BHW.dtype == torch.uint8


def test_a_crop_keeps_the_native_scale(slices: list[SliceFiles]) -> None:
    data = DataConfig(image_size=48, fit="crop")
    batch = next(iter(build_val_loader(data, slices, Plan(len(slices), 1), CPU)))
    assert np.array_equal(batch.label_BHW[0].numpy(), np.load(slices[0].label)[8:56, 8:56])


def test_ranks_and_restarts_see_the_same_bits(slices: list[SliceFiles]) -> None:
    one = batches(slices, 0, 1, 9)  # into the second epoch
    two, three = ([batches(slices, rank, world, 9) for rank in range(world)] for world in (2, 3))
    for number, batch in enumerate(one):
        for ranks in (two, three):
            parts = [of_rank[number] for of_rank in ranks]
            assert torch.equal(batch.image_B1HW, torch.cat([part.image_B1HW for part in parts]))
            assert torch.equal(batch.label_BHW, torch.cat([part.label_BHW for part in parts]))
    resumed = batches(slices, 0, 1, 6, start=one[2].plan.position)
    for before, after in zip(one[3:], resumed, strict=True):
        assert before.plan == after.plan and torch.equal(before.image_B1HW, after.image_B1HW)


def test_fillers_are_ignored_and_labels_never_show_a_new_value(slices: list[SliceFiles]) -> None:
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


def test_a_flip_mirrors_image_and_label_together(slices: list[SliceFiles]) -> None:
    still, flipped = (
        batches(slices, 0, 1, 1, data=DataConfig(image_size=64, augment=AugmentConfig(flip, 0)))[0]
        for flip in (0.0, 1.0)
    )
    torch.testing.assert_close(flipped.image_B1HW, still.image_B1HW.flip(-1), rtol=0, atol=1e-4)
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


def test_the_gpu_graph_is_built_from_the_same_definition() -> None:
    # Tracing needs no CUDA and finds operators or arguments that a GPU has not.
    graph = slice_pipeline(iter(()), 64, (-1250.0, 250.0), True, batch_size=2, num_threads=1, device_id=0)
    graph._build_graph()
    devices = [(node.name, node.device) for op in graph._ops for node in op.outputs]
    on_gpu = [name for name, device in devices if device == "gpu"]
    assert sum("WarpAffine" in name for name in on_gpu) == 2, devices
    assert all(device == "cpu" for name, device in devices if "ExternalSource" in name or "Numpy" in name)
