"""Configuration: what is read, what is refused, and that shipped files stay true."""

from pathlib import Path

import pytest

from distseg.config import Config, config_as_yaml, load_config
from distseg.errors import DistsegError
from distseg.studies.grid import load_study

ROOT = Path(__file__).parent.parent


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None, ["optim.lr=3e-4", "train.max_steps=7", "regions={lung: [1, 2]}", "data.windows_hu=[[-1000, 400]]"]
    )
    assert config.optim.lr == 3e-4 and config.train.max_steps == 7 and dict(config.regions) == {"lung": (1, 2)}
    (tmp_path / "c.yaml").write_text(config_as_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_later_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\noptim: {lr: 1e-2}\n")
    config = load_config(tmp_path / "c.yaml", ["optim.lr=1", "optim.lr=2"])
    assert config.seed == 3 and config.optim.lr == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epcohs=2", "got train.epcohs; no such key; did you mean train.epochs?"),
        ("epochs=2", "did you mean train.epochs?"),
        ("data.augment.rotate=1", "did you mean data.augment.rotate_deg?"),
        ("train.epochs=two", "config train.epochs: got 'two'"),
        ("train.epochs=0", "config train.epochs: got 0; must be at least 1"),
        ("model.decoder=unet", "config model.decoder: got 'unet'"),
        ("data.windows_hu=[[10, -10]]", "must be low < high"),
        ("regions={lung: [0]}", "must name labels from 1 to 62"),
        ("data=3", "config data: got 3"),
        ("seed.x=3", "got seed.x"),
        ("optim.max_grad_norm=0", "config optim.max_grad_norm: got 0.0; must be above 0, or null for no clipping"),
        ("optim.weight_decay=-1", "config optim.weight_decay: got -1.0; must be 0 or more"),
        ("optim.warmup_steps=-5", "config optim.warmup_steps: got -5; must be 0 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_rule(override: str, message: str) -> None:
    with pytest.raises(DistsegError) as caught:
        load_config(None, ["seed=1", override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_predecessors_decoder_name_is_understood() -> None:
    assert load_config(None, ["model.decoder=unetplus"]).model.decoder == "unetplusplus"


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match="config file: got .*none.yaml; no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(DistsegError, match="broken.yaml; it must be YAML"):
        load_config(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "yaml_configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    if path.name.startswith("study"):
        runs = load_study(path).runs
        assert len(runs) >= 6 and all(isinstance(run.config, Config) for run in runs)
    else:
        assert isinstance(load_config(path), Config)


def test_a_preset_fills_in_what_is_not_given() -> None:
    strong = load_config(None, ["data.augment={preset: strong, noise_probability: 0}"]).data.augment
    assert (strong.noise_probability, strong.rotate_deg, strong.elastic_probability) == (0, 30, 0.2)
    assert load_config(None, ["data.augment.preset=none"]).data.augment.flip_probability == 0
    with pytest.raises(DistsegError, match="config data.augment.preset: got 'weak'"):
        load_config(None, ["data.augment.preset=weak"])
    with pytest.raises(DistsegError, match="set data.fit=crop"):
        load_config(None, ["data.augment.focus_probability=0.5"])
    with pytest.raises(DistsegError, match="config data.focus_region: got lesion; must be one of the regions"):
        load_config(None, ["data.focus_share=0.5", "data.focus_region=lesion"])


def test_a_preset_behind_the_command_replaces_what_a_written_file_says_of_every_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(config_as_yaml(load_config(None, ["data.augment.preset=strong", "seed=4"])))
    words = ["data.augment.gamma_probability=0.1", "data.augment.preset=none"]
    changed, none = (load_config(path, words) for path in (tmp_path / "c.yaml", None))
    assert changed.data.augment == none.data.augment and changed.seed == 4
    assert (none.data.augment.flip_probability, none.data.augment.gamma_probability) == (0, 0.1)
