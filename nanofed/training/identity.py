"""Whether a checkpoint may be used with a model, a tokenizer and a text: the one comparison, for both paths."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Literal

from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.training.checkpoint import TOKENIZER, Manifest, check_model
from nanofed.training.module import GPTModule

logger = logging.getLogger(__name__)

Use = Literal["resume", "init_from", "validate"]


def check_identity(
    path: Path,
    manifest: Manifest,
    module: GPTModule,
    data: TokenDataModule,
    use: Use,
    *,
    force: bool = False,
    training: bool = True,
) -> None:
    """Refuse a checkpoint that is of another model, tokenizer or text than its use allows, by fingerprint and not by name.

    Every use needs the same model and tokenizer; a run that goes on needs the same training and validation text too.
    `force` lets a run start from weights of another tokenizer of the same size, and go on with other text; a model of another
    shape, and other ids for the optimizer state or the figure of a validation, it does not make good.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        module: the model here.
        data: tokenizer and shards here; the shards are opened for `resume` only.
        use: what the checkpoint is wanted for.
        force: say what differs in the log instead, where that makes sense.
        training: whether the training shards here are what the run trains on.

    Raises:
        ConfigError: it differs; says in what, and what to do.
        DataError: a shard cannot be read.
    """
    if manifest.tokenizer != data.tokenizer.fingerprint:
        problem = f"{path} was trained with another tokenizer than data.tokenizer: its ids mean other texts"
        possible = use == "init_from" and manifest.model.vocab_size == data.vocab_size
        if not (possible and force):
            other = ", or start from the weights all the same with --force true" if possible else ""
            raise ConfigError(f"{problem}: take the checkpoint's own, --data.tokenizer {path / TOKENIZER}{other}")
        _say_once(logging.WARNING, f"forced: {problem}")
    check_model(manifest, module.config, path)
    if use != "resume":
        return
    if manifest.data is None:
        said = (
            "was saved by an older nanofed and does not record its text: that data.path holds the same is not checked"
        )
        _say_once(logging.INFO, f"{path} {said}")
        return
    differing = manifest.data.differences(data.dataset.identity, training=training)
    if not differing:
        return
    problem = f"{data.dataset.path} is not the text that {path} was trained with: {'; '.join(differing)}"
    if not force:
        raise ConfigError(f"{problem}: restore it, start another run with --init_from, or pass --force true")
    _say_once(logging.WARNING, f"forced: {problem}")


@functools.cache
def _say_once(level: int, line: str) -> None:
    logger.log(level, "%s", line)  # a checkpoint is looked at more than once on the way to the first step
