"""The contract of every encoder x decoder of the study's grid: it builds, learns, refuses odd sizes, traces and reloads."""

import pytest
import torch
from torch import nn

from distseg.config import ModelConfig
from distseg.errors import DistsegError
from distseg.models.network import build_model
from distseg.models.table import GRID

DECODERS = ("unetplusplus", "deeplabv3", "deeplabv3plus")


@pytest.mark.slow(10)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("encoder", GRID)
def test_every_pair_keeps_the_contract(encoder: str) -> None:
    for decoder in DECODERS:
        torch.manual_seed(0)
        section = ModelConfig(encoder=encoder, decoder=decoder, decoder_widths=(8, 8, 8, 8, 8))
        network = build_model(section, in_channels=1, n_regions=2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm starts residual branches at 0, where no gradient passes at first
        logits = network(torch.rand(2, 1, 64, 64))
        assert logits.shape == (2, 2, 64, 64)
        (logits * torch.randn_like(logits)).sum().backward()
        unreached = [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
        assert unreached == [], (decoder, unreached[:3])
        with pytest.raises(DistsegError, match=f"multiples of {network.stride}"):
            network(torch.rand(1, 1, 64, 60))
        network.eval()
        with torch.device("meta"):  # nothing to initialise
            other = build_model(section, in_channels=1, n_regions=2).eval()
        other.load_state_dict(network.state_dict(), assign=True)
        with torch.no_grad(), torch.jit.optimized_execution(False):  # what it makes of a graph is torch's own
            traced = torch.jit.trace(network, torch.rand(1, 1, 64, 64), check_trace=False)
            image = torch.rand(3, 1, 32, 96)
            expected = network(image)
            assert torch.equal(traced(image), expected) and torch.equal(other(image), expected), decoder
