"""torch.compile computes what the plain networks do: each family of encoders, each decoder, each kind of recomputing."""

import copy

import pytest
import torch
from torch import nn

from distseg.config import ModelConfig
from distseg.models.network import SegmentationNetwork, build_model
from tests.models import short_encoders  # noqa: F401

PAIRS = [
    *(("gernet_s", decoder) for decoder in ("unetplusplus", "deeplabv3", "deeplabv3plus")),
    ("densenet_short", "deeplabv3"),
    ("seresnet_short", "deeplabv3plus"),
    ("legacy_seresnet18", "unetplusplus"),
]


def assert_compiled_is_plain(network: SegmentationNetwork, backend: str) -> None:
    """Logits, gradients and running statistics of one step, in float64, where no order of additions shows."""
    torch._dynamo.reset()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts residual branches at 0, where no gradient passes at first
    plain = network.double()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=backend, fullgraph=True)
    image_B1HW = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    weight_BRHW = torch.randn(2, 2, 64, 64, dtype=torch.float64)
    logits = []
    for each in (plain, compiled):
        logits.append(each(image_B1HW))
        (logits[-1] * weight_BRHW).sum().backward()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-8)
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6)
    for one, other in zip(plain.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(other, one)


def build(encoder: str, decoder: str, recompute: str = "none") -> SegmentationNetwork:
    torch.manual_seed(0)
    section = ModelConfig(encoder=encoder, decoder=decoder, decoder_widths=(8, 8, 8, 8, 8), recompute=recompute)  # type: ignore[arg-type]
    return build_model(section, in_channels=1, n_regions=2)


@pytest.mark.slow(12)
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_a_traced_graph_gives_the_plain_networks_gradients(encoder: str, decoder: str) -> None:
    assert_compiled_is_plain(build(encoder, decoder), "aot_eager")


@pytest.mark.slow(12)
@pytest.mark.parametrize("recompute", ["cheap", "all"])
def test_a_traced_graph_may_compute_activations_again(recompute: str) -> None:
    assert_compiled_is_plain(build("seresnet_short", "unetplusplus", recompute), "aot_eager")


@pytest.mark.slow(40)
def test_generated_code_gives_the_plain_networks_gradients() -> None:
    assert_compiled_is_plain(build("seresnet_short", "unetplusplus"), "inductor")
