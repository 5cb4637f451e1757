"""The timm encoder: levels, dilation, weights and refusals."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from distseg.errors import DistsegError
from distseg.models.encoder import TimmEncoder


def levels(encoder: TimmEncoder, channels: int = 3, size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return encoder.eval()(torch.rand(2, channels, size, size, generator=generator))


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [("gernet_s", 32), ("gernet_s", 8), ("tf_efficientnet_lite0", 16), ("seresnext26d_32x4d", 8), ("densenet121", 16)],
)
def test_channels_and_reductions_are_those_of_the_levels(name: str, output_stride: int) -> None:
    encoder = TimmEncoder(name, in_channels=1, output_stride=output_stride)
    assert encoder.reductions == tuple(min(s, output_stride) for s in (2, 4, 8, 16, 32))
    for feature, channels, reduction in zip(levels(encoder, 1), encoder.channels, encoder.reductions, strict=True):
        assert feature.shape == (2, channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("name", ["densenet121", "legacy_seresnet18", "legacy_seresnet50"])
def test_a_dilated_encoder_sampled_on_the_old_grid_is_the_plain_encoder(name: str, output_stride: int) -> None:
    torch.manual_seed(0)
    plain = TimmEncoder(name)
    dilated = TimmEncoder(name, output_stride=output_stride)
    dilated.load_state_dict(plain.state_dict())
    for encoder in (plain, dilated):
        for module in encoder.modules():
            if hasattr(module, "se_module"):  # averages over the image, hence over all pixels and not the old grid's
                module.se_module = nn.Identity()
    for level, (coarse, fine) in enumerate(zip(levels(plain), levels(dilated), strict=True)):
        step = plain.reductions[level] // dilated.reductions[level]
        assert fine.shape[-1] == 64 // dilated.reductions[level]
        if step == 1:
            assert torch.equal(fine, coarse)
        else:
            torch.testing.assert_close(
                fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5 * float(coarse.abs().max())
            )


def test_channels_last_gives_the_gradient_of_contiguous() -> None:
    """In the shortcut of gernet_s oneDNN corrupts memory where it is left alone: 13 channels at stride 2."""
    torch.manual_seed(0)
    encoder = TimmEncoder("gernet_s", levels=2)
    image = torch.randn(4, 3, 192, 192)
    gradients = []
    for order in (torch.contiguous_format, torch.channels_last):
        encoder.zero_grad()
        encoder.to(memory_format=order)(image.contiguous(memory_format=order))[-1].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None])
    for contiguous, last in zip(*gradients, strict=True):
        assert (contiguous - last).norm() < 1e-3 * contiguous.norm() + 1e-7


def test_normalisation_is_averaged_for_one_channel_and_cycled_past_three() -> None:
    one, five = TimmEncoder("resnet18", in_channels=1), TimmEncoder("resnet18", in_channels=5)
    assert one.mean == pytest.approx((0.449,), abs=1e-6) and one.std == pytest.approx((0.226,), abs=1e-6)
    assert five.mean == (0.485, 0.456, 0.406, 0.485, 0.456) and len(five.std) == 5
    assert TimmEncoder("tf_efficientnet_lite0").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["densenet121", "tf_efficientnet_lite0"])
def test_weights_from_a_file_give_the_features_of_the_model_they_are_from(
    name: str, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7).eval()
    path = tmp_path / f"weights{suffix}"
    save_file(whole.state_dict(), path) if suffix == ".safetensors" else torch.save(whole.state_dict(), path)
    image = torch.rand(1, 1, 64, 64)
    of_three, of_one = (TimmEncoder(name, in_channels=n, weights=str(path)).eval() for n in (3, 1))
    with torch.no_grad():
        expected = whole.forward_intermediates(image.expand(-1, 3, -1, -1), intermediates_only=True)
        for found, adapted, wanted in zip(of_three(image.expand(-1, 3, -1, -1)), of_one(image), expected, strict=True):
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(adapted, wanted, rtol=1e-3, atol=1e-4)  # the stem's kernels, summed first


def test_weights_of_an_encoder_load_into_an_encoder_and_old_files_without_counters_do(tmp_path: Path) -> None:
    first = TimmEncoder("resnet18", in_channels=1)
    state = {key: value for key, value in first.network.state_dict().items() if "num_batches" not in key}
    save_file(state, tmp_path / "encoder.safetensors")
    second = TimmEncoder("resnet18", in_channels=1, weights=str(tmp_path / "encoder.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(levels(first, 1), levels(second, 1), strict=True))


@pytest.mark.parametrize(
    "file", ["missing.pth", "broken.pth", "broken.safetensors", "list.pth", "other.pth", "shape.pth"]
)
def test_weights_that_do_not_fit_are_refused_with_the_place_to_fetch_them_from(file: str, tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    torch.save({**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "shape.pth")
    with pytest.raises(DistsegError, match="model.encoder_weights: got .*must be a .safetensors.*timm/resnet18"):
        TimmEncoder("resnet18", weights=str(tmp_path / file))


def test_imagenet_weights_without_a_network_name_the_file_and_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("Name or service not known")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DistsegError, match=r"gernet_s.*timm/gernet_s.idstcv_in1k.*model.encoder_weights=path"):
        TimmEncoder("gernet_s", weights="imagenet")


def test_an_unknown_encoder_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(DistsegError, match=r"model.encoder: got 'densnet161'.*densenet161"):
        TimmEncoder("densnet161")


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [("convnext_atto", 32), ("vgg11_bn", 32), ("vgg11_bn", 16), ("dla34", 16), ("resnet18.x", 32)],
)
def test_an_encoder_without_the_five_levels_is_refused(name: str, output_stride: int) -> None:
    with pytest.raises(DistsegError, match=f"got '{name}' with .*must give five feature levels at strides .2, 4, 8"):
        TimmEncoder(name, output_stride=output_stride)
