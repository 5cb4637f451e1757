"""The learning rate as a function of the step, and which parameters get which multiple of it."""

import pytest
import torch

from distseg.config import ModelConfig, OptimConfig
from distseg.errors import DistsegError
from distseg.models.network import build_model
from distseg.optim import build_optimizer, learning_rate, set_learning_rate


def test_the_schedules_are_those_of_the_papers() -> None:
    for schedule, middle in (("constant", 1.0), ("cosine", 0.5), ("poly", 0.5**0.9)):
        optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10)  # type: ignore[arg-type]
        assert learning_rate(optim, 0, 110) == pytest.approx(0.1) and learning_rate(optim, 9, 110) == 1.0
        assert learning_rate(optim, 60, 110) == pytest.approx(middle)
    assert learning_rate(OptimConfig(schedule="poly"), 100, 100) == 0.0


def test_sgd_takes_the_steps_of_nesterov_momentum() -> None:
    network = build_model(ModelConfig(encoder="resnet18", decoder_widths=(8, 8, 8, 8, 8)), 1, 2)
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-2), network)
    parameter = network.heads["4"].bias
    before = parameter.detach().clone()
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    # v1 = 1, v2 = 1.9; Nesterov's steps are 1 + 0.9 v1 and 1 + 0.9 v2; a bias has no weight decay.
    assert torch.allclose(before - parameter, torch.full_like(before, 0.1 * (1.9 + 2.71)))


def test_layer_decay_slows_each_finer_level_down_and_spares_the_decoder() -> None:
    network = build_model(ModelConfig(encoder="resnet18", decoder_widths=(8, 8, 8, 8, 8)), 1, 2)
    optim = OptimConfig(layer_decay=0.5, encoder_lr_factor=0.8, lr=1.0)
    optimizer = build_optimizer(optim, network)
    set_learning_rate(optimizer, optim, 1.0, epoch=0)
    rate_of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rate_of[id(parameter)] for name, parameter in network.named_parameters()}
    assert len(found) == len(rate_of)
    assert found["encoder.network.conv1.weight"] == pytest.approx(0.8 / 16)
    for level in range(1, 5):
        name = f"encoder.network.layer{level}.0.conv1.weight"
        assert found[name] == pytest.approx(0.8 / 2 ** (4 - level))
    assert {rate for name, rate in found.items() if not name.startswith("encoder.")} == {1.0}


def test_layer_decay_of_an_encoder_without_levels_is_refused() -> None:
    network = build_model(ModelConfig(encoder="tf_efficientnet_lite0", decoder_widths=(8, 8, 8, 8, 8)), 1, 2)
    with pytest.raises(DistsegError, match="optim.layer_decay: got encoder 'tf_efficientnet_lite0'"):
        build_optimizer(OptimConfig(layer_decay=0.9), network)
