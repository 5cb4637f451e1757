"""What a pair costs: figures checked by hand and against a real forward pass, and the command that prints them."""

import json
import re

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distseg.commands.models import main
from distseg.config import ModelConfig
from distseg.models.network import build_model
from distseg.models.table import GRID, forward_cost, pair_cost


def test_multiply_accumulates_and_kept_bytes_of_one_convolution_are_those_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    macs, saved_bytes = forward_cost(network, torch.rand(2, 3, 16, 12))
    assert macs == 2 * 16 * 12 * 8 * 3 * 3 * 3
    output, statistics = 2 * 16 * 12 * 8, 2 * 8
    assert saved_bytes == 4 * (2 * output + statistics)  # of the convolution and of ReLU, not the batch norm's


def test_groups_divide_the_multiply_accumulates_and_a_tensor_kept_twice_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(8, 8, kernel_size=1, groups=4)
            self.second = nn.Conv2d(8, 8, kernel_size=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x - 1
            return self.first(x) + self.second(x)

    assert forward_cost(Twice(), torch.rand(1, 8, 5, 5)) == (25 * (8 * 2 + 8 * 8), 4 * 8 * 25)


@pytest.mark.parametrize("recompute", ["none", "cheap", "decoder", "all"])
def test_kept_bytes_are_what_torchs_allocator_still_holds(recompute: str) -> None:
    network = build_model(ModelConfig(encoder="gernet_s", recompute=recompute), in_channels=3, n_regions=2)  # type: ignore[arg-type]
    image_BCHW = torch.rand(2, 3, 64, 64)
    _, kept_bytes = forward_cost(network, image_BCHW)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        logits_BRHW = network(image_BCHW)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    held_bytes = sum(event.nbytes() for event in events if event.name() == "[memory]") - logits_BRHW.nbytes
    assert held_bytes == pytest.approx(kept_bytes, rel=0.03)  # a state of the random numbers for each recomputed part


@pytest.mark.parametrize("decoder", ["unetplusplus", "deeplabv3", "deeplabv3plus"])
def test_the_meta_device_gives_what_a_real_forward_pass_does(decoder: str) -> None:
    model = ModelConfig(encoder="gernet_s", decoder=decoder)
    network = build_model(model, in_channels=3, n_regions=2)
    cost = pair_cost(model, in_channels=3, size=64)
    macs, saved_bytes = forward_cost(network, torch.rand(2, 3, 64, 64))
    assert (cost.gmacs * 2e9, cost.saved_mib * 2**21) == pytest.approx((macs, saved_bytes), rel=1e-12)
    assert cost.parameters_m * 1e6 == pytest.approx(sum(p.numel() for p in network.parameters()), rel=1e-12)
    assert cost.output_stride == {"unetplusplus": 32, "deeplabv3": 8, "deeplabv3plus": 16}[decoder]
    assert cost.reductions == tuple(min(stride, cost.output_stride) for stride in (2, 4, 8, 16, 32))


def test_resnet18_has_the_parameters_and_multiply_accumulates_that_are_published() -> None:
    with torch.device("meta"):
        network, image = timm.create_model("resnet18"), torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) == 11_689_512  # torchvision's documentation: 1.81 GFLOPS
    assert forward_cost(network, image)[0] / 1e9 == pytest.approx(1.81, abs=0.01)


def test_recomputed_activations_are_not_kept() -> None:
    costs = [
        pair_cost(ModelConfig(encoder="gernet_s", recompute=recompute), in_channels=1, size=64)  # type: ignore[arg-type]
        for recompute in ("none", "cheap", "decoder", "all")
    ]
    assert [cost.saved_mib for cost in costs] == sorted((cost.saved_mib for cost in costs), reverse=True)
    assert len({cost.gmacs for cost in costs}) == 1 and costs[1].saved_mib < 0.95 * costs[0].saved_mib


@pytest.mark.slow(30)
def test_every_pair_of_the_grid_is_listed_with_pretrained_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--size", "64", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    decoders = ("unetplusplus", "deeplabv3", "deeplabv3plus")
    assert [(c["encoder"], c["decoder"]) for c in costs] == [(e, d) for e in GRID for d in decoders]
    assert all(c["weights"] and c["parameters_m"] > 0 and c["gmacs"] > 0 and c["saved_mib"] > 0 for c in costs)
    known = {c["encoder"]: c["weights"] for c in costs}
    assert known["densenet121"] == ["ra_in1k", "tv_in1k"] and known["gernet_s"] == ["idstcv_in1k"]


def test_the_table_has_a_line_for_each_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--encoder", "seresnet18", "--encoder", "gernet_s.idstcv_in1k", "--size", "64"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "encoder" and len(lines) == 6
    assert lines[0].split()[:2] == ["seresnet18", "unetplusplus"] and lines[0].endswith("2 4 8 16 32  none")
    assert lines[4].split()[:2] == ["gernet_s.idstcv_in1k", "deeplabv3"] and lines[4].endswith(
        "2 4 8 8 8    idstcv_in1k"
    )


def test_pairs_that_do_not_fit_are_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--encoder", "gernet_s", "--size", "40"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["deeplabv3"]
    assert "left out: image: got 40 x 40; height and width must be multiples of 32" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--encoder", "densnet161"], "got 'densnet161'; must be a timm model; the nearest names are densenet161"),
        (["--encoder", "gernet_s", "--decoder", "deeplab3"], "got 'deeplab3'; .*did you mean deeplabv3"),
        (
            ["--encoder", "gernet_s", "--size", "33"],
            "got 33 x 33; height and width must be multiples of 32; use 32 or 64",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert re.search(said, err)
