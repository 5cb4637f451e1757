"""The three networks: shapes, gradients, refusals, tracing, and their parts against references."""

import dataclasses
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base.modules import SCSEModule as ReferenceSCSE
from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP as ReferenceASPP
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder as ReferenceV3
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder as ReferenceV3Plus
from torch import nn

from distseg.config import ModelConfig
from distseg.errors import DistsegError
from distseg.models import deeplab, unetplusplus
from distseg.models.deeplab import ASPP, DeepLabV3Decoder, DeepLabV3PlusDecoder
from distseg.models.network import SegmentationNetwork, build_model
from distseg.models.table import forward_cost
from distseg.models.unetplusplus import SCSE, UnetPlusPlusDecoder, upsample
from tests.models import short_encoders  # noqa: F401

DECODERS = ("unetplusplus", "deeplabv3", "deeplabv3plus")
PAIRS = [
    *((decoder, "gernet_s") for decoder in DECODERS),
    ("unetplusplus", "tf_efficientnet_lite0"),
    ("unetplusplus", "densenet_short"),
    ("deeplabv3", "densenet_short"),
    ("deeplabv3plus", "tf_efficientnet_lite0"),
    ("deeplabv3plus", "seresnext26d_32x4d"),
]


def build(
    decoder: str,
    encoder: str = "gernet_s",
    in_channels: int = 1,
    n_regions: int = 2,
    depth: int | None = None,
    **settings: Any,
) -> SegmentationNetwork:
    torch.manual_seed(0)
    section = ModelConfig(encoder=encoder, decoder=decoder, decoder_widths=(8, 12, 16, 24, 32), **settings)  # type: ignore[arg-type]
    return build_model(section, in_channels, n_regions, depth)


@pytest.mark.parametrize(("decoder", "encoder"), PAIRS)
def test_logits_have_the_images_size_and_gradients_reach_every_parameter(decoder: str, encoder: str) -> None:
    network = build(decoder, encoder, in_channels=3, n_regions=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts residual branches at 0, where no gradient passes at first
    logits = network(torch.rand(2, 3, 64, 32))
    assert logits.shape == (2, 4, 64, 32) and logits.dtype == torch.float32
    (logits * torch.randn_like(logits)).sum().backward()
    unreached = [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert unreached == []


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("decoder", "encoder"), PAIRS)
def test_traced_at_one_shape_equals_eager_bit_for_bit_at_others(decoder: str, encoder: str) -> None:
    network = build(decoder, encoder).eval()
    with torch.no_grad():
        traced = torch.jit.trace(network, torch.rand(1, 1, 64, 64), check_trace=False)
        for shape in ((3, 1, 96, 64), (1, 1, 32, 128)):
            image = torch.rand(shape)
            assert torch.equal(traced(image), network(image))


@pytest.mark.parametrize("decoder", DECODERS)
def test_state_dict_round_trip_gives_the_same_logits(decoder: str) -> None:
    first, second = build(decoder).eval(), build(decoder).eval()
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    second.load_state_dict(first.state_dict())
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(image), second(image))


def test_the_image_is_normalised_with_the_encoders_constants() -> None:
    network = build("unetplusplus", "tf_efficientnet_lite0", in_channels=1).eval()
    assert network.mean_C11.shape == (1, 1, 1) and "mean_C11" in network.state_dict()
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        expected = network.heads["4"](network.decoder(network.encoder((image - 0.5) / 0.5))[-1])
        assert torch.equal(network(image), expected)


@pytest.mark.parametrize(
    ("decoder", "size", "advice"),
    [
        ("unetplusplus", (200, 130), "multiples of 32; use 192 or 224 x 128 or 160"),
        ("unetplusplus", (16, 64), "multiples of 32; use 32 x 64"),
        ("deeplabv3", (64, 100), "multiples of 8; use 64 x 96 or 104"),
        ("deeplabv3plus", (72, 64), "multiples of 16; use 64 or 80 x 64"),
    ],
)
def test_other_sizes_are_refused_with_those_that_do(decoder: str, size: tuple[int, int], advice: str) -> None:
    with pytest.raises(DistsegError, match=f"image: got {size[0]} x {size[1]}; .*{advice}$"):
        build(decoder)(torch.rand(1, 1, *size))


def test_an_unknown_decoder_and_wrong_widths_are_refused() -> None:
    with pytest.raises(DistsegError, match="model.decoder: got 'deeplabv3_plus'.*did you mean deeplabv3plus"):
        build("deeplabv3_plus")
    with pytest.raises(DistsegError, match="model.decoder_widths: got .8, 16.; must be paper, reference or 5 integers"):
        dataclasses.replace(ModelConfig(encoder="gernet_s"), decoder_widths=(8, 16))  # type: ignore[arg-type]


def test_deeplab_refuses_to_train_on_one_image_and_segments_one() -> None:
    network, image = build("deeplabv3plus"), torch.rand(1, 1, 64, 64)
    with pytest.raises(DistsegError, match="train.batch_size_per_rank: got a batch of 1 image; must be at least 2"):
        network(image)
    assert network.eval()(image).shape == (1, 2, 64, 64)


def test_unetplusplus_is_the_grid_of_the_paper() -> None:
    torch.manual_seed(0)
    decoder = UnetPlusPlusDecoder((3, 5, 7, 9, 11), (4, 6, 8, 10, 12)).eval()
    features = [torch.rand(1, c, 64 // s, 64 // s) for c, s in zip((3, 5, 7, 9, 11), (2, 4, 8, 16, 32), strict=True)]

    def node(i: int, j: int) -> torch.Tensor:
        if j == 0:
            return decoder.projections[i](features[i])
        beside = [node(i, k) for k in reversed(range(j))]
        return decoder.columns[j - 1][i](torch.cat([upsample(node(i + 1, j - 1)), *beside], 1))

    with torch.no_grad():
        *shallow, deepest = decoder(features)
        assert torch.equal(deepest, decoder.final(upsample(node(0, 4))))
        assert all(torch.equal(result, node(0, j)) for j, result in enumerate(shallow, start=1))


@pytest.mark.parametrize("separable", [False, True])
def test_aspp_equals_segmentation_models_pytorch(separable: bool) -> None:
    torch.manual_seed(0)
    ours = ASPP(5, 8, (1, 2, 3), separable).eval()
    reference = ReferenceASPP(5, 8, (1, 2, 3), separable, dropout=0.5).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(2, 5, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x))


def test_deep_supervision_gives_a_head_a_depth_in_training_and_the_last_one_in_eval() -> None:
    network = build("unetplusplus", deep_supervision=True)
    image = torch.rand(2, 1, 64, 64)
    logits = network(image)
    assert [each.shape for each in logits] == [(2, 2, 64, 64)] * 4
    torch.stack([each.square().mean() for each in logits]).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    plain = build("unetplusplus")
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if key in plain.state_dict()})
    with torch.no_grad():
        assert torch.equal(network.eval()(image), plain.eval()(image))


@pytest.mark.parametrize("widths", ["reference", (8, 12, 16, 24, 32)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_cut_network_is_the_head_of_that_depth_at_less_cost(depth: int, widths: Any) -> None:
    section = ModelConfig(encoder="gernet_s", decoder_widths=widths, deep_supervision=True)
    torch.manual_seed(0)
    whole = build_model(section, 1, 2)
    cut = build_model(section, 1, 2, depth)
    state = whole.state_dict()
    cut.load_state_dict({key: state[key] for key in cut.state_dict()})
    assert cut.stride == 2 ** (depth + 1)
    assert sum(p.numel() for p in cut.parameters()) < 0.7 * sum(p.numel() for p in whole.parameters())
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # but the network trains, so that it gives every head
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(cut.eval()(image), whole(image)[depth - 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("recompute", ["cheap", "decoder", "all"])
@pytest.mark.parametrize("encoder", ["gernet_s", "densenet_short", "seresnet_short", "legacy_seresnet18"])
def test_recomputed_activations_change_neither_gradients_nor_running_statistics(recompute: str, encoder: str) -> None:
    networks = [build("unetplusplus", encoder, recompute=choice) for choice in ("none", recompute)]
    image = torch.rand(2, 1, 64, 64)
    kept_bytes = [forward_cost(network, image)[1] for network in networks]
    for network in networks:
        network(image).square().mean().backward()
    for (name, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for (name, one), other in zip(networks[0].named_buffers(), networks[1].buffers(), strict=True):
        assert torch.equal(one, other), name
    assert kept_bytes[1] < {"cheap": 0.85, "decoder": 0.9, "all": 0.3}[recompute] * kept_bytes[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_concatenation_is_made_again_from_its_parts_to_the_same_bits(
    decoder: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(2, 1, 32, 32)
    gradients, kept_bytes = [], []
    for keep in (False, True):
        if keep:
            for module in (deeplab, unetplusplus):
                monkeypatch.setattr(module, "convolved", lambda block, join, *parts: block(join(*parts)))
        network = build(decoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            kept_bytes.append(forward_cost(network, image)[1])
            network(image).float().square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(again, kept) for again, kept in zip(*gradients, strict=True))
    assert kept_bytes[0] < kept_bytes[1]


def test_unetplusplus_in_reference_widths_keeps_at_most_0_7_of_what_segmentation_models_pytorch_does() -> None:
    for encoder in ("gernet_s", "seresnet50"):
        with torch.device("meta"):
            ours = build_model(ModelConfig(encoder=encoder, decoder_widths="reference"), 3, 2)
            reference = smp.UnetPlusPlus(f"tu-{encoder}", encoder_weights=None, classes=2)
            image = torch.empty(2, 3, 64, 64)
        assert forward_cost(ours, image)[1] <= 0.7 * forward_cost(reference, image)[1], encoder


def test_attention_and_dropout_are_there_when_asked_for() -> None:
    network = build("unetplusplus", attention="scse", dropout=0.5)
    image = torch.rand(2, 1, 64, 64)
    assert not torch.equal(network(image), network(image))
    assert sum(isinstance(module, SCSE) for module in network.modules()) == 11  # ten nodes and the last block
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(image), network(image))
    with pytest.raises(DistsegError, match="deep_supervision and attention are Unet"):
        ModelConfig(decoder="deeplabv3", deep_supervision=True)


def test_scse_equals_segmentation_models_pytorch() -> None:
    torch.manual_seed(0)
    ours, reference = SCSE(32).eval(), ReferenceSCSE(32).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(2, 32, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x))


@pytest.mark.parametrize("encoder", ["gernet_s", "densenet121", "seresnet50"])
def test_unetplusplus_in_reference_widths_is_that_of_segmentation_models_pytorch(encoder: str) -> None:
    torch.manual_seed(0)
    ours = build_model(ModelConfig(encoder=encoder, decoder_widths="reference"), 3, 2).eval()
    reference = smp.UnetPlusPlus(f"tu-{encoder}", encoder_weights=None, classes=2).eval()
    reference.encoder.model.load_state_dict(ours.encoder.network.state_dict())
    blocks = {}  # X[i][j] is its x_{start}_{layer}: layer counts levels from the deepest, start is layer - j + 1
    for j, column in enumerate(ours.decoder.columns, start=1):
        for i, node in enumerate(column):
            blocks[f"x_{3 - i - j + 1}_{3 - i}"] = node
    blocks["x_0_4"] = ours.decoder.final
    assert blocks.keys() == reference.decoder.blocks.keys()
    for name, node in blocks.items():
        theirs = reference.decoder.blocks[name]
        theirs.load_state_dict(dict(zip(theirs.state_dict(), node.state_dict().values(), strict=True)))
    # Its head is 3 x 3, the paper's (and ours) 1 x 1: the same with zeros around it.
    head = reference.segmentation_head[0]
    nn.init.zeros_(head.weight)
    head.weight.data[:, :, 1:2, 1:2] = ours.heads["4"].weight.data
    head.bias.data = ours.heads["4"].bias.data
    image = torch.rand(2, 3, 64, 96)
    normalised = (image - ours.mean_C11) / ours.std_C11  # the reference leaves that to its user
    with torch.no_grad():
        torch.testing.assert_close(ours(image), reference(normalised), rtol=1e-4, atol=1e-5)


def test_deeplabs_equal_segmentation_models_pytorch_where_they_mean_the_same() -> None:
    torch.manual_seed(0)
    features = [torch.rand(1, c, 64 // s, 64 // s) for c, s in zip((4, 6, 8, 10, 12), (2, 4, 8, 8, 8), strict=True)]
    ours = DeepLabV3Decoder((4, 6, 8, 10, 12), 8).eval()
    reference = ReferenceV3(12, 256, (12, 24, 36), aspp_separable=False, aspp_dropout=0.5).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), ours.state_dict().values(), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours(features)[0], reference(features), rtol=1e-4, atol=1e-5)
    # V3+ as in the paper's table 2: no convolution between ASPP and upsampling, two after the concatenation (the reference has
    # one and one), and align_corners=False. What is left to compare are the ASPP (above), the low level and a fusing one.
    plus = DeepLabV3PlusDecoder((4, 6, 8, 10, 12)).eval()
    theirs = ReferenceV3Plus(
        (3, 4, 6, 8, 10, 12), 5, 256, (6, 12, 18), 16, aspp_separable=True, aspp_dropout=0.5
    ).eval()
    for mine, its in ((plus.low_level, theirs.block1), (plus.fuse[0], theirs.block2)):
        its.load_state_dict(dict(zip(its.state_dict(), mine.state_dict().values(), strict=True)))
        x = torch.rand(1, next(mine.parameters()).shape[1] if mine is plus.low_level else 304, 9, 7)
        with torch.no_grad():
            torch.testing.assert_close(mine(x), its(x), rtol=1e-4, atol=1e-5)
