"""Configuration: what is read, what is refused, and that shipped files stay true."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from distseg.cli import main
from distseg.config import AugmentConfig, Config, DataConfig, EvaluateConfig, LossConfig, ModelConfig, OptimConfig
from distseg.config_files import config_as_yaml, config_keys, load_config
from distseg.config_reference import as_markdown, entries_below
from distseg.errors import DistsegError
from distseg.shipped import presets
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
        ("train.epochs=two", "config train.epochs: got 'two'; must be an integer of at least 1"),
        (
            "train.epochs=0",
            "config train.epochs: got 0; must be an integer of at least 1; see distseg config train.epochs",
        ),
        ("train.max_steps=2.5", "config train.max_steps: got 2.5; must be an integer of at least 1, or null"),
        ("model.decoder=unet", "config model.decoder: got 'unet'; must be unetplusplus, unetplus, deeplabv3 or"),
        ("model.decoder=deeplab", "deeplabv3 or deeplabv3plus; did you mean deeplabv3?"),
        ("model.decoder_widths=[8, 16]", "got [8, 16]; must be paper, reference or 5 integers of at least 1"),
        ("model.decoder_widths=[8, 8, 8, 8, 0]", "got [8, 8, 8, 8, 0]; must be paper, reference or 5 integers of at"),
        ("data.windows_hu=[[10, -10]]", "got [10, -10]; must be a pair of numbers, low < high"),
        ("data.windows_hu=[]", "got []; must be a list of one or more pairs of numbers, low < high"),
        (
            "data.augment.scale=[2, 1]",
            "config data.augment.scale: got [2, 1]; must be a pair of numbers, 0 < low <= high",
        ),
        ("data.augment.low_resolution=[1, 2]", "got [1, 2]; must be a pair of numbers, 0 < low <= high <= 1"),
        ("data.focus_share=1", "config data.focus_share: got 1; must be a number in (0, 1), or null"),
        ("train.trackers=[wandbb]", "got 'wandbb'; must be tensorboard, wandb or mlflow; did you mean wandb?"),
        ("evaluate.tta_scales=[20]", "config evaluate.tta_scales: got 20; must be a number in [0.1, 10]"),
        ("loss.region_weights={lung: 0}", "config loss.region_weights.lung: got 0; must be a number above 0"),
        ("optim.lr=.inf", "config optim.lr: got inf; must be finite"),
        ("data.augment.preset=[]", "config data.augment.preset: got []; must be none, study or strong"),
        ("regions={1: [1]}", "config regions: got 1; must be text"),
        ("regions={lung: [0]}", "config regions.lung: got 0; must be a label, by name or by number (1 to 62)"),
        ("data=3", "config data: got 3"),
        ("seed.x=3", "got seed.x"),
        ("optim.max_grad_norm=0", "config optim.max_grad_norm: got 0; must be a number above 0, or null"),
        ("optim.weight_decay=-1", "config optim.weight_decay: got -1; must be a number of at least 0"),
        ("optim.warmup_steps=-5", "config optim.warmup_steps: got -5; must be an integer of at least 0"),
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
        load_config(None, ["data.focus_share=0.5", "data.focus_region=lesion", "regions={lung: [lung]}"])


def test_a_preset_behind_the_command_replaces_what_a_written_file_says_of_every_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(config_as_yaml(load_config(None, ["data.augment.preset=strong", "seed=4"])))
    words = ["data.augment.gamma_probability=0.1", "data.augment.preset=none"]
    changed, none = (load_config(path, words) for path in (tmp_path / "c.yaml", None))
    assert changed.data.augment == none.data.augment and changed.seed == 4
    assert (none.data.augment.flip_probability, none.data.augment.gamma_probability) == (0, 0.1)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {"dropout": 2}, "config model.dropout: got 2; must be a number in [0, 1)"),
        (OptimConfig, {"lr": 0.0}, "config optim.lr: got 0.0; must be a number above 0"),
        (AugmentConfig, {"cutout": 1.5}, "config data.augment.cutout: got 1.5; must be a number in [0, 1]"),
        (DataConfig, {"augment": AugmentConfig(focus_probability=1)}, "set data.fit=crop"),
        (EvaluateConfig, {"tta_scales": ()}, "config evaluate.tta_scales: got ()"),
        (LossConfig, {"bce_weight": 0, "dice_weight": 0}, "config loss.dice_weight: got 0.0; must be above 0"),
        (Config, {"model": 3}, "config model: got 3; must be a section"),
    ],
)
def test_a_wrong_value_is_refused_in_python_too(section: type, values: dict[str, Any], message: str) -> None:
    right: Any = section()
    for make in (lambda: section(**values), lambda: dataclasses.replace(right, **values)):
        with pytest.raises(DistsegError) as caught:
            make()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=f"{section.__name__}: no_such_key"):
        section(no_such_key=1)


def test_sections_are_plain_frozen_dataclasses() -> None:
    config = load_config(None, ["regions={lung: [1]}", "seed=3"])
    assert pickle.loads(pickle.dumps(config)) == config == dataclasses.replace(config)
    assert dataclasses.replace(config, seed=4).data is config.data
    assert Config(regions={"lung": (1,)}, seed=3) == config and hash(ModelConfig()) == hash(ModelConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]


def test_every_key_is_described_and_the_page_of_them_is_up_to_date() -> None:
    entries = [entry for section in dataclasses.fields(Config) for entry in entries_below(section.name)]
    assert sorted(entry.key for entry in entries) == sorted(config_keys()) and all(entry.meaning for entry in entries)
    stale = "docs/configuration.md is stale; write it again: distseg config > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == as_markdown(), stale


def test_the_command_shows_what_a_key_means(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        main(["config", *words])
        return capsys.readouterr().out

    assert said("data.augment.rotate_deg").splitlines() == [
        "data.augment.rotate_deg=15.0",
        "    largest rotation either way, degrees",
        "    it must be a number of at least 0",
    ]
    augment = said("data.augment")
    assert augment == said("data.augment.") and augment.count("    it must be ") == len(
        dataclasses.fields(AugmentConfig)
    )
    assert "evaluate.window=null\n" in said("evaluate") and "must be an integer of at least 32, or null" in said(
        "evaluate"
    )
    assert said("regions.lung") == said("regions") and said() == as_markdown()
    for asked, near in {"data.augmnt": "data.augment", "optim.lrr": "optim.lr", "optim.lr.x": "optim.lr"}.items():
        assert main(["config", asked]) == 1
        told = capsys.readouterr().err
        assert told == f"error: config key: got {asked}; no such key; did you mean {near}?\n"


def test_config_without_a_file_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"a shipped one: {', '.join(presets('train'))}") and {"covid_ct", "quickstart"} <= {
        *presets("train")
    }
