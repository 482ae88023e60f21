"""One safetensors file for everybody else: nanochat's names, with sizes, tokenizer and origin in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanofed.errors import ConfigError
from nanofed.formats.pretrained import Pretrained
from nanofed.formats.provenance import Provenance
from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.storage import from_json, to_json
from nanofed.training.checkpoint.atomic import CheckpointError


def write(path: Path, model: Pretrained, provenance: Provenance, *, dtype: torch.dtype) -> None:
    """Write a model to one file.

    Its metadata has `model_config` (the fields of `GPTConfig` as JSON), `tokenizer` (the text of a `tokenizer.json`) and
    `training` (what the run says of itself, as JSON).

    Raises:
        CheckpointError: the weights are not those of this GPT.
    """
    model.check()
    metadata = {
        "format": "pt",
        "model_config": json.dumps(asdict(model.config)),
        "tokenizer": to_json(model.tokenizer.vocabulary),
        "training": json.dumps({"name": provenance.name, **provenance.facts()}),
    }
    save_file({name: weight.to(dtype) for name, weight in model.weights.items()}, path, metadata)


def read(path: Path) -> Pretrained:
    """Read a model that `write` has written; its weights are returned in fp32.

    Raises:
        CheckpointError: the file is damaged, or its metadata are not those of such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = GPTConfig(**json.loads(metadata["model_config"]))
        tokenizer = Tokenizer(from_json(metadata["tokenizer"]))
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    except KeyError as error:
        raise CheckpointError(
            f"{path} has no {error} in its metadata: it was not written by `nanofed export --to torch`"
        ) from error
    except (OSError, ValueError, TypeError, SafetensorError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Pretrained(config, weights, tokenizer, path)
