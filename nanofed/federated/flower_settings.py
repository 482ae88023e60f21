"""The settings of a Flower run, `[tool.flwr.app.config]`, and the command line of `nanofed federate` that means the same.

Flower carries numbers and strings, checks no types, and has no null: 0 and "" stand for the default.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError

Value = bool | int | float | str

RECIPE_MATRIX_LR = 0.02  # `lr` is Muon's rate; the other groups keep their ratio to it
TASK = "pretraining"
TASKS = ("", TASK, "nanochat")  # the last is what nanofed's first version called it
NAMED_DATASETS = ("fineweb-edu", "demo")
DATASET_ALIASES = {"karpathy/fineweb-edu-100b-shuffle": "fineweb-edu"}

# What pyproject.toml holds, too (a test compares them): d20 over two GPUs, to the recipe's horizon.
DEFAULTS: dict[str, Value] = {
    "task_type": TASK,
    "model_type": "d20",
    "dataset_name": "fineweb-edu",
    "num_shards": 0,
    "num_clients": 2,
    "num_rounds": 0,
    "round_seconds": 300.0,
    "round_steps": 0,
    "lr": 0.0,
    "weight_decay": 0.0,
    "batch_size": 32,
    "max_length": 2048,
    "gradient_accumulation_steps": 0,
    "batch_tokens": 0,
    "seed": 42,
    "name": "",
    "runs_dir": "",
    "base_dir": "",
    "config": "",
    "overrides": "",
}


def check(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return settings with defaults for what is missing.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, or one below 0.
    """
    for name, value in settings.items():
        if name not in DEFAULTS:
            close = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(DEFAULTS)}"
            raise ConfigError(f"the run config has no setting {name!r}: {hint}")
        kind = type(DEFAULTS[name])
        fits = (int, float) if kind is float else kind
        if not isinstance(value, fits) or isinstance(value, bool):
            raise ConfigError(f"the run config's {name} must be of type {kind.__name__}, not {value!r}")
        if not isinstance(value, str) and not 0 <= value < math.inf:
            raise ConfigError(f"the run config's {name} must be 0 (the default) or more, not {value}")
    return {**DEFAULTS, **settings}


def to_args(settings: Mapping[str, Value], *, run_id: int, runs_dir: Path) -> list[str]:
    """Return the arguments of `nanofed federate` that a Flower run's settings mean.

    `config`, a YAML file, says everything about the training: only `overrides` and the names of things come on top.

    Args:
        settings: The settings of the Flower run, by name; what is missing has its default.
        run_id: Flower's number of the run, which gives the run its name where neither `name` nor a config does.
        runs_dir: folder of all runs where `runs_dir` is not set.

    Raises:
        ConfigError: an unknown name, a wrong type or value, or settings that contradict each other.
    """
    given = check(settings)
    try:
        overrides = shlex.split(str(given["overrides"]))
    except ValueError as error:
        raise ConfigError(f"the run config's overrides cannot be split into arguments: {error}") from error
    args = [f"--runs_dir={runs_dir}", f"--name=simulation-{run_id}", "--eval_every=1", "--save_every=1"]
    args += ["--config", str(_absolute("config", given["config"]))] if given["config"] else _training(given)
    args += [f"--name={given['name']}"] if given["name"] else []
    args += [f"--runs_dir={_absolute('runs_dir', given['runs_dir'])}"] if given["runs_dir"] else []
    return args + overrides


def _training(given: Mapping[str, Value]) -> list[str]:
    if given["task_type"] not in TASKS:
        raise ConfigError(
            f"the run config's task_type must be {TASK!r}, which is all there is, not {given['task_type']!r}"
        )
    dataset = DATASET_ALIASES.get(str(given["dataset_name"]), str(given["dataset_name"]))
    if dataset and dataset not in NAMED_DATASETS:
        _absolute("dataset_name", dataset, among=NAMED_DATASETS)
    options: dict[str, Value | None] = {
        "model.depth": _depth(str(given["model_type"])),
        "model.sequence_len": given["max_length"],
        "model.recipe.lr_scale": _lr_scale(given),
        "model.recipe.weight_decay": given["weight_decay"],
        "model.recipe.batch_tokens": _batch_tokens(given),
        "data.path": dataset,
        "data.num_shards": given["num_shards"],
        "data.device_batch_size": given["batch_size"],
        "federation.clients": given["num_clients"],
        "federation.rounds": given["num_rounds"],
        "federation.round_seconds": given["round_seconds"],
        "federation.round_steps": given["round_steps"],
        "seed_everything": given["seed"],
    }
    return [f"--{key}={value}" for key, value in options.items() if value or key == "seed_everything"]


def _lr_scale(given: Mapping[str, Value]) -> float:
    return float(given["lr"]) / RECIPE_MATRIX_LR


def lr_note(settings: Mapping[str, Value]) -> str | None:
    """Return what `lr` does to the recipe's rates, in a line; None where it is the recipe's own, or a config gives the rates."""
    given = check(settings)
    if not given["lr"] or given["config"]:
        return None
    return (
        f"lr = {given['lr']:g} is taken as the rate of the matrices (Muon), {RECIPE_MATRIX_LR:g} in the recipe: the rates of all "
        f"groups are scaled by {_lr_scale(given):g}"
    )


def _depth(model_type: str) -> int | None:
    if not model_type:
        return None
    match = re.fullmatch(r"(?:nanochat_)?d([1-9][0-9]{0,2})", model_type)
    if not match:
        raise ConfigError(f"the run config's model_type is d and the depth, such as d20, not {model_type!r}")
    return int(match[1])


def _batch_tokens(given: Mapping[str, Value]) -> Value:
    accumulation = given["gradient_accumulation_steps"]
    if not accumulation:
        return given["batch_tokens"]
    if given["batch_tokens"]:
        raise ConfigError(
            "the run config gives the batch twice: set gradient_accumulation_steps or batch_tokens to 0 (batch_tokens = "
            "batch_size x max_length x gradient_accumulation_steps)"
        )
    if not given["batch_size"] or not given["max_length"]:
        raise ConfigError("the run config's gradient_accumulation_steps needs batch_size and max_length beside it")
    return int(given["batch_size"]) * int(given["max_length"]) * int(accumulation)


def _absolute(name: str, value: Value, among: tuple[str, ...] = ()) -> Path:
    path = runtime.user_path(str(value))
    if not path.is_absolute():
        names = "".join(f"{other}, " for other in among)
        raise ConfigError(
            f"the run config's {name} must be {names and names + 'or '}an absolute path, since a Flower run has a working "
            f"directory of its own, not {str(value)!r}"
        )
    return path
