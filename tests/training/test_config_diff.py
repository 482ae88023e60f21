"""A run that goes on under another config: what is refused, what is listed, what is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanofed.errors import ConfigError
from nanofed.training.config_diff import check_resumed_config, differences

CONFIG: dict[str, Any] = {
    "name": "run",
    "seed_everything": 42,
    "log_every": 10,
    "model": {"depth": 2, "sequence_len": 64, "compile": "auto", "recipe": {"batch_tokens": 512, "num_steps": 10}},
    "data": {"path": "demo", "streams": 8, "packing": "contiguous", "device_batch_size": 8, "tokenizer": None},
    "trainer": {"devices": 1, "strategy": "auto"},
    "federation": {"clients": 2, "rounds": 10, "round_seconds": 300.0, "outer_lr": 0.7},
}


def changed(**changes: object) -> str:
    """The config with other values; `__` stands for the dots of a key."""
    content = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[name] = value
    return yaml.safe_dump(content)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model__recipe__batch_tokens", 1024, "model.recipe.batch_tokens 512 -> 1024"),
        ("data__packing", "best_fit", "data.packing contiguous -> best_fit"),
        ("data__path", "fineweb-edu", "data.path demo -> fineweb-edu"),
        ("data__streams", 4, "data.streams 8 -> 4"),
        ("seed_everything", 43, "seed_everything 42 -> 43"),
        ("federation__outer_lr", 1.0, "federation.outer_lr 0.7 -> 1.0"),
    ],
)
def test_what_is_trained_is_not_changed_unasked(
    key: str, value: object, shown: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = changed(**{key: value, "log_every": 1})
    with pytest.raises(ConfigError) as refused:
        check_resumed_config(saved, here, force=False)
    assert f"differs in what is trained (there -> here): {shown}: take its values" in str(refused.value)
    assert "--force true" in str(refused.value)
    with caplog.at_level(logging.INFO):
        check_resumed_config(saved, here, force=True)
    assert f"forced: the run goes on as another one (there -> here): {shown}" in caplog.messages
    assert any("log_every 10 -> 1" in message for message in caplog.messages)


def test_all_that_differ_are_named_and_no_shape_is_forced(saved: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        check_resumed_config(saved, changed(model__depth=4, data__streams=2), force=False)
    assert "data.streams 8 -> 2; model.depth 2 -> 4" in str(refused.value)
    assert "--force" not in str(refused.value)


ROUNDING = {"data__device_batch_size": 4, "trainer__devices": 2, "model__compile": False, "data__tokenizer": "t"}
LISTED = (
    "data.device_batch_size 8 -> 4; data.tokenizer null -> t; log_every 10 -> 1; model.compile auto -> False; "
    "trainer.devices 1 -> 2"
)
HORIZON = {"model__recipe__num_steps": 20, "federation__rounds": 20}


@pytest.mark.parametrize(
    ("changes", "begins", "ends"),
    [
        ({**ROUNDING, "name": "other", "log_every": 1}, "", LISTED),  # what changes rounding at most
        (HORIZON, "the horizon changes", "federation.rounds 10 -> 20; model.recipe.num_steps 10 -> 20"),
        ({}, None, None),
    ],
    ids=["rounding", "horizon", "nothing"],
)
def test_what_may_change_is_said(
    changes: dict[str, Any], begins: str | None, ends: str | None, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_resumed_config(saved, changed(**changes), force=False)
    assert len(caplog.messages) == (begins is not None)
    assert all(line.startswith(str(begins)) and line.endswith(str(ends)) for line in caplog.messages)


def test_a_config_that_is_not_there_or_damaged(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_resumed_config(saved.with_name("none.yaml"), changed(), force=False)
    assert "is not compared" in caplog.text
    for content in ("a: [", "just text"):
        saved.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            check_resumed_config(saved, changed(), force=False)


def test_keys_of_one_version_only_are_not_compared() -> None:
    found = differences({"model": {"old": 1, "depth": 2}}, {"model": {"new": 1, "depth": 4}, "name": "x"})
    assert list(found.values()) == ["model.depth 2 -> 4"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model__recipe__adamw_beta2", 0.999, "model.recipe.adamw_beta2 0.95 -> 0.999"),
        ("model__recipe__lr_scale", "auto", "model.recipe.lr_scale 1.0 -> auto"),
        ("federation__overlap", True, "federation.overlap False -> True"),
        ("federation__asynchronous", True, "federation.asynchronous False -> True"),
        ("federation__global_batch_tokens", 4096, "federation.global_batch_tokens null -> 4096"),
    ],
)
def test_an_option_that_is_younger_than_the_run_is_compared_with_what_the_run_did(
    key: str, value: object, shown: str, saved: Path
) -> None:
    with pytest.raises(ConfigError, match=shown):
        check_resumed_config(saved, changed(**{key: value}), force=False)
    old = {"adamw_beta2": 0.95, "lr_scale": 1, "overlap": False, "asynchronous": False, "global_batch_tokens": None}
    check_resumed_config(saved, changed(**{key: old[key.rpartition("__")[2]]}), force=False)


def test_a_federation_begun_before_the_outer_step_could_be_chosen_goes_on_with_its_own(saved: Path) -> None:
    here = yaml.safe_load(changed())
    here["federation"] |= {"outer": "auto", "outer_warmdown": 0.4}
    with pytest.raises(
        ConfigError, match=r"federation\.outer nesterov -> auto; federation\.outer_warmdown 0\.0 -> 0\.4"
    ):
        check_resumed_config(saved, yaml.safe_dump(here), force=False)
    here["federation"] |= {"outer": "nesterov", "outer_warmdown": 0}
    check_resumed_config(saved, yaml.safe_dump(here), force=False)
