"""A run that goes on under another config than it began with: which fields differ, and which of them may."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.training.run_options import START

logger = logging.getLogger(__name__)

# What a step computes, from which rows: with another value the run is another one. A name stands for all keys below it.
ARITHMETIC = (
    "seed_everything",
    "model",
    "data",
    "federation",
    "trainer.overfit_batches",
    "trainer.limit_train_batches",
)
SHAPE = ("model.depth", "model.sequence_len")  # no weights fit another one
# Where it ends: rates follow the new horizon from the step of the checkpoint on.
HORIZON = (
    *(f"model.recipe.{name}" for name in ("num_steps", "horizon_tokens", "tokens_per_parameter", "horizon_flops")),
    "federation.rounds",
)
# How the same sums are computed, on what, what is measured and how long is waited: below the names in ARITHMETIC.
FREE = (
    "model.compile",
    "model.seed",  # follows seed_everything
    "data.device_batch_size",
    "data.sequence_len",  # follows model.sequence_len
    "data.prefetch",
    "data.eval_tokens",
    "data.tokenizer",  # its fingerprint counts, not its folder
    "federation.evaluation",
    "federation.round_seconds",
    "federation.client_speeds",
    "federation.quorum",
    "federation.quorum_seconds",
    "federation.grace_seconds",
    "federation.max_failed_rounds",
)
# Where the text lies, and which part of it is read.
TEXT = ("data.path", "data.num_shards", "data.validation_shard", "federation.client_data")
# What runs did that were begun before these options were there.
BEFORE = {
    "federation.asynchronous": False,
    "federation.global_batch_tokens": None,
    "federation.outer": "nesterov",
    "federation.outer_warmdown": 0.0,
    "federation.overlap": False,
    "model.recipe.adamw_beta2": 0.95,
    "model.recipe.lr_scale": 1.0,
}
# Says how to start, not what to train.
UNCOMPARED = ("config", "name", "runs_dir", "wandb_project", "run_name", *START)


def check_resumed_config(there: Path, here: str, *, force: bool, by_content: bool = False) -> None:
    """Compare a run's saved config with the one it is to go on with; list what differs in the log.

    Args:
        there: `config.yaml` of the run that the checkpoint belongs to.
        here: the resolved config, YAML.
        force: go on where a field differs that makes it another run.
        by_content: the text is compared by what it holds (`preflight.check_identity`), so its place may differ.

    Raises:
        ConfigError: such a field differs and `force` is not given; names all of them.
    """
    try:
        saved = yaml.safe_load(there.read_text(encoding="utf-8"))
    except FileNotFoundError:
        logger.warning("there is no %s: what the checkpoint was trained with is not compared", there)
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{there} cannot be read, so it cannot be compared: {error}") from error
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{there} is no config of a run: it holds no mapping of keys to values")
    differing = differences(BEFORE | dict(_flat(saved)), yaml.safe_load(here))
    if by_content:
        differing = {key: shown for key, shown in differing.items() if key not in TEXT}
    refused = [key for key in differing if _below(key, ARITHMETIC) and not _below(key, (*HORIZON, *FREE))]
    if refused:
        listed = "; ".join(differing[key] for key in refused)
        if not force:
            shaped = any(key in SHAPE for key in refused)
            other = "" if shaped else ", start another run with --init_from, or pass --force true"
            raise ConfigError(f"{there} differs in what is trained (there -> here): {listed}: take its values{other}")
        logger.warning("forced: the run goes on as another one (there -> here): %s", listed)
    horizon = [key for key in differing if _below(key, HORIZON)]
    rounding = [key for key in differing if key not in (*refused, *horizon)]
    for keys, meaning in (
        (horizon, "the horizon changes, and with it the rates from here on"),
        (rounding, "options that change no more of the training than its rounding"),
    ):
        if keys:
            logger.info("%s (there -> here): %s", meaning, "; ".join(differing[key] for key in keys))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """Return the dotted keys of two configs that differ, sorted, and for each one `key there -> here`.

    What only one config knows (of another version, say) has no counterpart.
    """
    a, b = dict(_flat(there)), dict(_flat(here))
    return {
        key: f"{key} {_plain(a[key])} -> {_plain(b[key])}"
        for key in sorted(a.keys() & b.keys())
        if a[key] != b[key] and not _below(key, UNCOMPARED) and not (key == "data.path" and _same_place(a[key], b[key]))
    }


def _same_place(there: object, here: object) -> bool:
    return runtime.dataset_dir(str(there)).resolve() == runtime.dataset_dir(str(here)).resolve()


def _below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
