"""Random changes: functions of (seed, epoch, sample) alone, within their bounds, as often as the config says."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from distseg.config import PRESETS, AugmentConfig
from distseg.data.augment import (
    Draw,
    deform,
    draw_augmentation,
    draw_displacement,
    sampling_matrix,
    windowing,
)

STRONG = AugmentConfig("strong", **PRESETS["strong"])


def same(one: Draw, other: Draw) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_an_unchanged_sample_maps_corner_to_corner() -> None:
    matrix = sampling_matrix((40, 80), 20, "resize")
    assert (matrix @ [0, 10 - 5, 1]).tolist() == [0, 0] and (matrix @ [20, 15, 1]).tolist() == [80, 40]
    assert sampling_matrix((40, 40), 20, "crop").tolist() == [[1, 0, 10], [0, 1, 10]]


def test_changes_are_a_function_of_seed_epoch_and_sample() -> None:
    keys = list(itertools.product((0, 1), (0, 1), (0, 1)))
    draws = {key: draw_augmentation(STRONG, *key) for key in keys}
    assert all(same(draws[key], draw_augmentation(STRONG, *key)) for key in keys)
    assert len({draw.crop for draw in draws.values()}) == 8
    assert np.array_equal(draw_displacement(STRONG, 1, 2, 3), draw_displacement(STRONG, 1, 2, 3))


def test_a_probability_changes_its_own_change_only() -> None:
    for name in (name for name in PRESETS["none"] if name != "affine_probability"):
        for sample in range(50):
            on, off = (
                draw_augmentation(dataclasses.replace(STRONG, **{name: p}), 0, 0, sample)  # type: ignore[arg-type]
                for p in (1.0, 0.0)
            )
            differing = {
                f.name
                for f in dataclasses.fields(Draw)
                if not np.array_equal(getattr(on, f.name), getattr(off, f.name))
            }
            allowed = {
                "flip_probability": {"linear"}, "focus_probability": {"focus"}, "elastic_probability": {"elastic"},
                "low_resolution_probability": {"resolution"}, "blur_probability": {"blur_sigma"},
                "noise_probability": {"noise_hu", "noise_at"}, "contrast_probability": {"contrast", "brightness"},
                "gamma_probability": {"gamma"}, "cutout_probability": {"cutout"},
            }[name]  # fmt: skip
            assert differing <= allowed, name


def test_probabilities_and_bounds_are_kept() -> None:
    draws = [draw_augmentation(STRONG, 0, 0, i) for i in range(4000)]
    unchanged = Draw(np.eye(2))
    rates = {
        "flip_probability": np.mean([np.linalg.det(draw.linear) < 0 for draw in draws]),
        "affine_probability": np.mean([draw.shift != (0, 0) for draw in draws]),
        "elastic_probability": np.mean([draw.elastic for draw in draws]),
        "low_resolution_probability": np.mean([draw.resolution != 1 for draw in draws]),
        "blur_probability": np.mean([draw.blur_sigma > 0 for draw in draws]),
        "noise_probability": np.mean([draw.noise_hu > 0 for draw in draws]),
        "contrast_probability": np.mean([draw.contrast != 1 for draw in draws]),
        "gamma_probability": np.mean([draw.gamma != 1 for draw in draws]),
        "cutout_probability": np.mean([draw.cutout != unchanged.cutout for draw in draws]),
    }
    for name, rate in rates.items():
        assert abs(rate - getattr(STRONG, name if name != "flip_probability" else "flips")) < 0.03, name
    assert max(abs(s) for draw in draws for s in draw.shift) <= STRONG.shift
    assert all(min(y, x) >= 0 and max(y + height, x + width) <= 1 for y, x, height, width in (d.cutout for d in draws))
    assert all(STRONG.gamma[0] <= draw.gamma <= STRONG.gamma[1] for draw in draws)


def test_presets_name_what_they_do() -> None:
    none = draw_augmentation(AugmentConfig("none", **PRESETS["none"]), 0, 0, 0)
    assert same(none, Draw(np.eye(2), crop=none.crop)) and AugmentConfig() == AugmentConfig("study", **PRESETS["study"])


@pytest.mark.parametrize("pixel", [(3, 4), (50, 90), (99, 199)])
def test_a_focused_crop_holds_its_pixel(pixel: tuple[int, int]) -> None:
    for sample in range(100):
        draw = dataclasses.replace(
            draw_augmentation(AugmentConfig(affine_probability=0), 0, 0, sample), linear=np.eye(2)
        )
        x, y = sampling_matrix((100, 200), 32, "crop", draw, pixel)[:, 2]
        assert x <= pixel[1] < x + 32 and y <= pixel[0] < y + 32 and 0 <= x <= 200 - 32 and 0 <= y <= 100 - 32


def test_windowing_is_the_window_and_jitter_turns_around_its_middle() -> None:
    gain, offset = windowing([(-1000, 1000)], None)[0]
    assert gain * -1000 + offset == pytest.approx(0) and gain * 1000 + offset == pytest.approx(1)
    gain, offset = windowing([(-1000, 1000)], Draw(np.eye(2), contrast=0.5, brightness=0.1))[0]
    assert gain * -1000 + offset == pytest.approx(0.35) and gain * 0 + offset == pytest.approx(0.6)


def test_a_deformation_moves_image_and_label_together_and_invents_no_label() -> None:
    label_BHW = (torch.arange(64).view(1, 64, 1).expand(2, 64, 64) // 16 * 2).to(torch.uint8)
    image_BCHW = label_BHW.unsqueeze(1).float()
    still = deform(image_BCHW, label_BHW, torch.zeros(2, 2, 6, 6))
    assert torch.equal(still[0], image_BCHW) and torch.equal(still[1], label_BHW)
    knots = torch.from_numpy(np.stack([draw_displacement(STRONG, 0, 0, i) for i in range(2)]))
    image, label = deform(image_BCHW, label_BHW, knots)
    assert set(label.unique().tolist()) <= {0, 2, 4, 6} and label.dtype == torch.uint8
    assert (image[:, 0] - label.float()).abs().max() <= 1 + 1e-4 and not torch.equal(label, label_BHW)
