"""Which format a path holds; a checkpoint taken out of nanofed in one of three formats; any of them taken in as a run."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from nanofed.errors import ConfigError, NanofedError
from nanofed.files import created
from nanofed.formats import huggingface, nanochat, single_file
from nanofed.formats.model_card import model_card
from nanofed.formats.nanochat_optimizers import IncompleteError
from nanofed.formats.pretrained import Pretrained
from nanofed.formats.provenance import WEIGHTS_ONLY, Provenance
from nanofed.training.checkpoint.folder import FOLDER, MANIFEST, candidates
from nanofed.training.checkpoint.format import find_checkpoint, local_path, read_state, write_checkpoint
from nanofed.training.run_folder import Marker, Reached
from nanofed.training.signals import Signals

logger = logging.getLogger(__name__)

Target = Literal["hf", "nanochat", "torch"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read(where: str | Path) -> Pretrained:
    """Read a trained model: a run (its newest checkpoint), a checkpoint, or what `nanofed export` makes.

    Raises:
        ConfigError: nothing is there.
        CheckpointError: it is damaged, or of another architecture; says in what.
        DataError: it has no tokenizer, or one that is damaged.
    """
    path = local_path(where)
    if (path / MANIFEST).is_file() or candidates(path):
        return Pretrained.from_checkpoint(find_checkpoint(path))
    if path.is_file():
        return single_file.read(path)
    if (path / huggingface.CONFIG).is_file():
        return huggingface.read(path)
    if nanochat.is_checkpoint(path):
        return nanochat.read(path).model
    return Pretrained.from_checkpoint(find_checkpoint(path))


def export(checkpoint: Path, output: Path, target: Target, *, dtype: str, licence: str, address: str) -> None:
    """Write a checkpoint in another format, all of it or nothing; arguments and errors are those of `nanofed.export`.

    `address` is what the model card loads the model from: the folder's name, or OWNER/NAME on the Hub.
    """
    if target not in get_args(Target):
        raise ConfigError(f"export: there is no target {target!r}: choose one of {', '.join(get_args(Target))}")
    written = to_dtype(dtype)
    if target == "nanochat" and written != torch.float32:
        raise ConfigError(f"export: nanochat's checkpoints have dtypes of their own: leave out dtype {dtype}")
    model, provenance = Pretrained.from_checkpoint(checkpoint), Provenance.of(checkpoint)
    try:
        with Signals(), created(output) as temporary:  # a signal ends it as an error does, and nothing is left
            if target == "torch":
                single_file.write(temporary, model, provenance, dtype=written)
                return
            temporary.mkdir()
            if target == "hf":
                huggingface.write(temporary, model, dtype=written, card=model_card(provenance, licence, address))
            else:
                nanochat.write(temporary, model, provenance, read_state(checkpoint))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has three names: torch's is a RuntimeError
        raise NanofedError(f"{output} could not be written, and nothing is left of it: {error}") from error


def to_dtype(said: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(said, str) and said not in DTYPES:
        raise ConfigError(f"there is no dtype {said!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[said] if isinstance(said, str) else said


def import_run(source: Path, run: Path, *, tokenizer: Path | None = None, step: int | None = None) -> Path:
    """Make a run of a model from elsewhere in a folder that is not there yet; arguments and errors are `nanofed.import_model`'s.

    A nanochat checkpoint with the optimizers' whole state is one that `fit` goes on with (`--ckpt_path last`); every other
    model is one that a run starts from (`--init_from`).
    """
    state: dict[str, Any]
    if nanochat.is_checkpoint(source):
        found = nanochat.read(source, tokenizer=tokenizer, step=step)
        model, at, tokens = found.model, found.step, found.tokens
        state = {nanochat.META: found.meta}
        metrics = {"val/bpb": found.meta["val_bpb"]} if isinstance(found.meta.get("val_bpb"), float) else {}
        try:
            state |= _lightning_state(found.optimizer(), at, tokens)
            kind = "fit"
            logger.info(
                "the optimizer's state is imported; the text begins anew: nanochat does not save where it stood"
            )
        except IncompleteError as error:
            kind = WEIGHTS_ONLY
            logger.info("the optimizer's state is not imported: %s", error)
    elif tokenizer is not None or step is not None:
        raise ConfigError(f"{source} is no nanochat checkpoint: --tokenizer and --step are for those")
    else:
        if (source / MANIFEST).is_file() or candidates(source):
            raise ConfigError(f"{source} is nanofed's own: a run starts from it with --init_from {source}")
        model = read(source)
        model.check()
        at, tokens, state, metrics, kind = 0, 0, {}, {}, WEIGHTS_ONLY
    checkpoint = Path(FOLDER) / f"step_{at:08d}"
    with Signals(), created(run) as temporary:
        temporary.mkdir()
        write_checkpoint(
            temporary / checkpoint,
            kind=kind,
            weights=dict(model.weights),
            state=state,
            config=model.config,
            tokenizer=model.tokenizer,
            step=at,
            tokens=tokens,
            metrics=metrics,
        )
        Marker("fit", Reached.CHECKPOINT).write(temporary)
    if kind == WEIGHTS_ONLY:
        logger.info("a run starts from these weights with `nanofed fit --config CONFIG --init_from %s`", run)
    else:
        logger.info("it goes on with `nanofed fit --config CONFIG --name %s --ckpt_path last`", run.name)
    return run / checkpoint


def _lightning_state(optimizer: dict[str, Any], step: int, tokens: int) -> dict[str, Any]:
    """Return what Lightning looks for in a checkpoint that `fit` goes on with."""
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": importlib.metadata.version("lightning"),
        "callbacks": {},
        "optimizer_states": [{**optimizer, "clock": {"step": step, "tokens": tokens}}],
        "lr_schedulers": [],
        "data": None,
    }
