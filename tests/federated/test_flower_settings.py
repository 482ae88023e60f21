from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from nanofed.errors import ConfigError
from nanofed.federated.federation import Federation
from nanofed.federated.flower import toml
from nanofed.federated.flower_settings import DEFAULTS, Value, lr_note, to_args
from tests.support import REPOSITORY

RUNS = Path("/somewhere/runs")


def parsed(**settings: Value) -> Federation:
    return Federation.from_args(to_args(settings, run_id=7, runs_dir=RUNS))


def test_pyproject_holds_the_defaults() -> None:
    app = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert app["config"] == DEFAULTS
    assert {name: type(value) for name, value in app["config"].items()} == {n: type(v) for n, v in DEFAULTS.items()}


def test_the_defaults_are_d20_by_its_recipe() -> None:
    run = parsed()
    model, data, federation = run.config.model, run.config.data, run.federation
    assert (model.depth, model.sequence_len, data.path, data.device_batch_size) == (20, 2048, "fineweb-edu", 32)
    assert (model.recipe.batch_tokens, model.recipe.lr_scale, model.recipe.weight_decay) == (524_288, "auto", 0.0)
    assert (federation.clients, federation.rounds) == (2, None)
    assert (federation.round_seconds, federation.round_steps) == (300, None)
    assert data.num_shards is None
    assert (run.folder, run.options.eval_every, run.options.save_every) == (RUNS / "simulation-7", 1, 1)
    assert run.config.seed_everything == 42


def test_every_setting_reaches_the_config() -> None:
    of_the_run: dict[str, Value] = {"task_type": "pretraining", "seed": 0, "name": "mine", "runs_dir": "/runs"}
    of_data: dict[str, Value] = {"dataset_name": "/data", "num_shards": 3, "max_length": 128, "batch_size": 8}
    recipe: dict[str, Value] = {"model_type": "d4", "lr": 0.01, "weight_decay": 0.1, "gradient_accumulation_steps": 3}
    rounds: dict[str, Value] = {"num_clients": 4, "num_rounds": 5, "round_seconds": 20, "round_steps": 6}
    more = "--data.eval_tokens=64 --sample_prompts='[\"a b\"]'"
    run = parsed(**of_the_run, **of_data, **recipe, **rounds, overrides=more)
    model, data, federation = run.config.model, run.config.data, run.federation
    assert (model.depth, model.sequence_len, model.recipe.weight_decay, model.recipe.lr_scale) == (4, 128, 0.1, 0.5)
    assert (data.path, data.num_shards, data.device_batch_size, data.eval_tokens) == ("/data", 3, 8, 64)
    assert model.recipe.batch_tokens == 8 * 128 * 3
    assert (federation.clients, federation.rounds, federation.round_seconds, federation.round_steps) == (4, 5, 20, 6)
    assert (run.folder, run.options.sample_prompts, run.config.seed_everything) == (Path("/runs/mine"), ["a b"], 0)


def test_the_settings_of_the_first_nanofed_mean_the_same() -> None:
    dataset = "karpathy/fineweb-edu-100b-shuffle"
    seed = parsed(task_type="nanochat", model_type="nanochat_d20", dataset_name=dataset, max_length=2048)
    assert seed.config == parsed().config


def test_lr_says_what_it_scales() -> None:
    assert lr_note({"lr": 0.0006}) == (
        "lr = 0.0006 is taken as the rate of the matrices (Muon), 0.02 in the recipe: the rates of all groups are scaled by 0.03"
    )
    assert lr_note({}) is None
    assert lr_note({"lr": 0.0006, "config": "/some.yaml"}) is None, "the config gives the rates"


def test_lr_scales_every_group() -> None:
    assert parsed(lr=0.04).config.model.recipe.lr_scale == pytest.approx(2)
    assert parsed(lr=0.0).config.model.recipe.lr_scale == "auto"


def test_batch_tokens_may_be_given_itself() -> None:
    assert parsed(batch_tokens=65_536).config.model.recipe.batch_tokens == 65_536


def test_a_config_says_everything_about_the_training(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("name: own\nmodel:\n  depth: 3\nfederation:\n  clients: 5\n")
    run = parsed(config=str(config), model_type="d9", num_clients=2, overrides="--federation.rounds=2")
    assert (run.config.model.depth, run.federation.clients, run.federation.rounds, run.folder.name) == (3, 5, 2, "own")
    assert parsed(config=str(config), name="other").folder == RUNS / "other"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_round": 3}, "no setting 'num_round': did you mean num_rounds"),
        ({"epochs_of_joy": 3}, "no setting 'epochs_of_joy': there are task_type"),
        ({"num_rounds": "3"}, "num_rounds must be of type int, not '3'"),
        ({"num_rounds": 3.0}, "num_rounds must be of type int, not 3.0"),
        ({"num_rounds": True}, "num_rounds must be of type int, not True"),
        ({"lr": "0.1"}, "lr must be of type float, not '0.1'"),
        ({"lr": True}, "lr must be of type float, not True"),
        ({"lr": -0.1}, "lr must be 0 .* or more, not -0.1"),
        ({"lr": float("nan")}, "lr must be 0 .* or more, not nan"),
        ({"name": 5}, "name must be of type str, not 5"),
        ({"model_type": "gpt2"}, "model_type is d and the depth, such as d20, not 'gpt2'"),
        ({"model_type": "d0"}, "model_type is d and the depth"),
        ({"task_type": "sft"}, "task_type must be 'pretraining'"),
        ({"dataset_name": "data"}, "dataset_name must be fineweb-edu, demo, or an absolute path"),
        ({"config": "configs/tiny.yaml"}, "config must be an absolute path"),
        ({"gradient_accumulation_steps": 2, "batch_tokens": 4096}, "gives the batch twice"),
        ({"gradient_accumulation_steps": 2, "batch_size": 0}, "needs batch_size and max_length"),
        ({"overrides": "--a='b"}, "overrides cannot be split"),
        ({"overrides": "--no_such_key=1"}, "no_such_key"),
        ({"config": "/no/such.yaml"}, "no config file /no/such.yaml"),
    ],
)
def test_what_is_wrong_is_said(settings: dict[str, Value], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parsed(**settings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        'a"b',
        "a'b",
        "a\\",
        'a\\"',
        "\\u0022",
        "a=b",
        'x="y" z=1',
        "ü🙂",
        "a\nb\t\x7f\x07",
        "8612e71",
        "x.toml",
    ],
)
def test_what_is_passed_on_to_flower_reads_back(text: str) -> None:
    assert tomllib.loads(f"key = {toml(text)}") == {"key": text}
    line = f"name={toml('a')} key={toml(text)}"
    assert parse_config_args([line]) == {"name": "a", "key": text}
