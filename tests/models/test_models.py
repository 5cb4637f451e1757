"""The three networks: shapes, gradients, refusals, tracing, and their parts against references."""

from types import SimpleNamespace

import pytest
import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP as ReferenceASPP
from torch import nn

from distseg.errors import DistsegError
from distseg.models import SegmentationNetwork, build_model
from distseg.models.deeplab import ASPP
from distseg.models.unetplusplus import UnetPlusPlusDecoder, upsample

DECODERS = ("unetplusplus", "deeplabv3", "deeplabv3plus")
PAIRS = [
    *((decoder, "gernet_s") for decoder in DECODERS),
    ("unetplusplus", "tf_efficientnet_lite0"),
    ("unetplusplus", "densenet121"),
    ("deeplabv3", "densenet121"),
    ("deeplabv3plus", "tf_efficientnet_lite0"),
    ("deeplabv3plus", "seresnext26d_32x4d"),
]


def build(decoder: str, encoder: str = "gernet_s", in_channels: int = 1, n_regions: int = 2) -> SegmentationNetwork:
    torch.manual_seed(0)
    section = SimpleNamespace(
        encoder=encoder, decoder=decoder, encoder_weights=None, decoder_widths=(8, 12, 16, 24, 32)
    )
    return build_model(section, in_channels, n_regions)


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
        expected = network.head(network.decoder(network.encoder((image - 0.5) / 0.5)))
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
    section = SimpleNamespace(encoder="gernet_s", decoder="unetplusplus", encoder_weights=None, decoder_widths=(8, 16))
    with pytest.raises(DistsegError, match="model.decoder_widths: got .8, 16.; must be 5 numbers"):
        build_model(section, 1, 2)


def test_deeplab_refuses_to_train_on_one_image_and_segments_one() -> None:
    network, image = build("deeplabv3plus"), torch.rand(1, 1, 64, 64)
    with pytest.raises(DistsegError, match="train.batch_size_per_rank: got a batch of 1 image; must be at least 2"):
        network(image)
    assert network.eval()(image).shape == (1, 2, 64, 64)


def test_unetplusplus_is_the_grid_of_the_paper() -> None:
    torch.manual_seed(0)
    decoder = UnetPlusPlusDecoder((3, 5, 7, 9, 11), (4, 6, 8, 10, 12), final_width=2).eval()
    features = [torch.rand(1, c, 64 // s, 64 // s) for c, s in zip((3, 5, 7, 9, 11), (2, 4, 8, 16, 32), strict=True)]

    def node(i: int, j: int) -> torch.Tensor:
        if j == 0:
            return decoder.projections[i](features[i])
        return decoder.columns[j - 1][i](torch.cat([*(node(i, k) for k in range(j)), upsample(node(i + 1, j - 1))], 1))

    with torch.no_grad():
        assert torch.equal(decoder(features), decoder.final(upsample(node(0, 4))))


@pytest.mark.parametrize("separable", [False, True])
def test_aspp_equals_segmentation_models_pytorch(separable: bool) -> None:
    torch.manual_seed(0)
    ours = ASPP(5, 8, (1, 2, 3), separable).eval()
    reference = ReferenceASPP(5, 8, (1, 2, 3), separable, dropout=0.5).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(2, 5, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x))
