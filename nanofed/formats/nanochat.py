"""nanochat's own checkpoints of October 2025 (karpathy/nanochat at dfc8833), written and read.

base_checkpoints/d20/            one folder a model; mid_checkpoints and the others look the same
    model_021400.pt              the weights by name; on a GPU nanochat keeps the embedding in bf16
    optim_021400.pt              the state dicts of its two optimizers, AdamW and Muon, as one rank holds them
    meta_021400.json             step, val_bpb, model_config, user_config
tokenizer/
    tokenizer.pkl                a pickled tiktoken Encoding
    token_bytes.pt               bytes of every token, for bits per byte

A folder of this layout is what `NANOCHAT_BASE_DIR` names. nanochat does not save where it stood in its text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanofed.errors import ConfigError, DataError
from nanofed.formats import nanochat_optimizers
from nanofed.formats.nanochat_optimizers import EMBEDDING, IncompleteError
from nanofed.formats.pretrained import Pretrained, empty_model, listed
from nanofed.formats.provenance import Provenance
from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.storage import NANOCHAT_PICKLE
from nanofed.training.checkpoint.atomic import CheckpointError

logger = logging.getLogger(__name__)

MODEL = re.compile(r"model_(\d+)\.pt")
META = "nanochat"  # in the state of an imported checkpoint: the peer's meta, which is exported again as it was


@dataclass(frozen=True)
class NanochatCheckpoint:
    """A checkpoint of nanochat's."""

    model: Pretrained  # sizes, weights in fp32 and tokenizer
    meta: dict[str, Any]  # the content of its `meta_*.json`
    optimizer_file: Path  # its `optim_*.pt`, which need not be there

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for."""
        return int(self.meta["step"])

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on; 0 where its options do not say how many a step has."""
        return self.step * int((self.meta.get("user_config") or {}).get("total_batch_size", 0))

    def optimizer(self) -> dict[str, Any]:
        """Read the state of `MuonAdamW`, without its clock, that goes on where nanochat's optimizers stood.

        Raises:
            IncompleteError: there is none, or only one rank's part; says which.
            CheckpointError: the file is damaged.
        """
        path = self.optimizer_file
        if not path.is_file():
            raise IncompleteError(f"there is no {path.name}")
        try:
            return nanochat_optimizers.read(_load(path), self.model.config)
        except IncompleteError as error:
            raise IncompleteError(f"{path.name} {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} does not hold nanochat's two optimizers: {error!r}") from error


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a nanochat checkpoint, or the checkpoints of a `NANOCHAT_BASE_DIR`."""
    return bool(_steps(folder) or _models(folder))


def read(folder: Path, *, tokenizer: Path | None = None, step: int | None = None) -> NanochatCheckpoint:
    """Read a checkpoint but for its optimizers; nothing but tensors, plain values and the tokenizer's tokens is unpickled.

    Args:
        folder: the folder of a model, or a `NANOCHAT_BASE_DIR` that holds one model.
        tokenizer: the folder of its tokenizer; by default the model's own folder, or `tokenizer` beside `base_checkpoints`.
        step: which of several; by default the last.

    Raises:
        ConfigError: there are several models, or none of that step.
        CheckpointError: it is damaged, or of a later architecture than October's; what this GPT lacks is named.
        DataError: there is no tokenizer, or it is damaged.
    """
    folder = _one_model(folder)
    steps = _steps(folder)
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise ConfigError(f"{folder} has no checkpoint of step {chosen}: it has {', '.join(map(str, sorted(steps)))}")
    number = steps[chosen]
    path = folder / f"model_{number}.pt"
    meta = _read_meta(folder / f"meta_{number}.json")
    saved = _load(path)
    if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise CheckpointError(f"{path} does not hold weights by name")
    weights = {str(name).removeprefix("_orig_mod."): value.float() for name, value in saved.items()}
    sizes = dict(meta["model_config"])
    fields = asdict(GPTConfig()).keys()
    try:
        config = GPTConfig(**{name: sizes[name] for name in fields})
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / f'meta_{number}.json'} has no model_config of nanochat's: {error}") from error
    later = [*sorted(sizes.keys() - fields), *sorted(weights.keys() - empty_model(config).state_dict().keys())]
    if later:
        raise CheckpointError(f"{path} is of another recipe than October 2025's: this GPT has no {listed(later)}")
    model = Pretrained(config, weights, _tokenizer(folder, tokenizer), path)
    model.check()
    return NanochatCheckpoint(model, meta, folder / f"optim_{number}.pt")


def write(folder: Path, model: Pretrained, provenance: Provenance, state: Mapping[str, Any]) -> None:
    """Write a model into an empty folder, which is a `NANOCHAT_BASE_DIR` afterwards.

    Weights are written in fp32. The embedding, and its moments with it, are written in bf16 where that loses nothing: nanochat
    keeps them so on a GPU, and what was imported goes out as it came in.

    Args:
        folder: the empty folder.
        model: sizes, weights and tokenizer.
        provenance: how it was trained.
        state: the rest of its checkpoint, whose optimizer state is written too where there is one.

    Raises:
        CheckpointError: the weights are not those of this GPT.
    """
    model.check()
    number = f"{provenance.manifest.step:06d}"
    checkpoint = folder / "base_checkpoints" / f"d{model.config.n_layer}"
    checkpoint.mkdir(parents=True)
    optimizer = next((saved for saved in state.get("optimizer_states", ()) if saved.get("state")), None)
    embedding = [model.weights[EMBEDDING], *(_moments(optimizer) if optimizer else ())]
    narrow = torch.bfloat16 if all(torch.equal(part, part.bfloat16().float()) for part in embedding) else torch.float32
    names = empty_model(model.config).state_dict()
    weights = {name: model.weights[name].to(narrow if name == EMBEDDING else torch.float32) for name in names}
    torch.save(weights, checkpoint / f"model_{number}.pt")
    if optimizer:
        torch.save(
            nanochat_optimizers.write(optimizer, weights, provenance.manifest.step), checkpoint / f"optim_{number}.pt"
        )
    else:
        federated = provenance.manifest.kind == "federated"
        why = "in a federation it stays with the clients" if federated else "the checkpoint has none"
        logger.info("no optimizer state is exported: %s", why)
    meta = state.get(META) or _meta(model.config, provenance)
    (checkpoint / f"meta_{number}.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / NANOCHAT_PICKLE).write_bytes(model.tokenizer.to_nanochat())
    torch.save(token_bytes(model.tokenizer), tokens / "token_bytes.pt")


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Return what nanochat divides by for bits per byte, (vocab_size,) int32: the bytes of each token's text.

    A token that is no UTF-8 by itself counts as its replacement characters, three bytes each, as nanochat has it. That
    differs from `Tokenizer.token_bytes`, and so bits per byte measured there differ from nanofed's in such tokens.
    """
    texts = [token.decode("utf-8", errors="replace") for token in tokenizer.vocabulary.tokens]
    lengths = [len(text.encode()) for text in texts] + [0 for _ in tokenizer.special_tokens]
    return torch.tensor(lengths, dtype=torch.int32)


def _moments(optimizer: Mapping[str, Any]) -> Iterator[Tensor]:
    (embedding,) = (group for group in optimizer["param_groups"] if group["name"] == "embedding")
    state = optimizer["state"][embedding["params"][0]]
    yield from (state["exp_avg"], state["exp_avg_sq"])


def _meta(config: GPTConfig, provenance: Provenance) -> dict[str, Any]:
    """Return a `meta_*.json`; its user_config has the options of nanochat's script that the run knows."""
    recipe = provenance.option("model", "recipe") or {}
    options = {
        "run": provenance.name,
        "depth": config.n_layer,
        "max_seq_len": config.sequence_len,
        "num_iterations": recipe.get("num_steps"),
        "device_batch_size": provenance.option("data", "device_batch_size"),
        "total_batch_size": recipe.get("batch_tokens"),
        "embedding_lr": recipe.get("embedding_lr"),
        "unembedding_lr": recipe.get("head_lr"),
        "weight_decay": recipe.get("weight_decay"),
        "matrix_lr": recipe.get("matrix_lr"),
        "grad_clip": recipe.get("clip"),
    }
    return {
        "step": provenance.manifest.step,
        "val_bpb": provenance.bits_per_byte,
        "model_config": asdict(config),
        "user_config": {name: value for name, value in options.items() if value is not None},
        "device_batch_size": options["device_batch_size"],
        "max_seq_len": config.sequence_len,
    }


def _steps(folder: Path) -> dict[int, str]:
    """Return the steps of the checkpoints in a model's folder, with their digits as the files' names have them."""
    found = [MODEL.fullmatch(path.name) for path in folder.glob("model_*.pt")]
    return {int(match[1]): match[1] for match in found if match}


def _models(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*_checkpoints/*") if _steps(path))


def _one_model(folder: Path) -> Path:
    if _steps(folder):
        return folder
    found = _models(folder)
    if len(found) != 1:
        named = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise ConfigError(f"{folder} is no folder of one nanochat model; models in it: {named}; name the folder of one")
    return found[0]


def _tokenizer(folder: Path, named: Path | None) -> Tokenizer:
    beside = folder.resolve().parent.parent / "tokenizer"
    for place in [named] if named else [folder, beside]:
        if any((place / name).exists() for name in (NANOCHAT_PICKLE, "tokenizer.json")):
            return Tokenizer.load(place)
    raise DataError(f"there is no tokenizer in {named or f'{folder} or {beside}'}: name its folder with --tokenizer")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        step, batch_tokens = int(meta["step"]), int((meta.get("user_config") or {}).get("total_batch_size", 0))
        dict(meta["model_config"])
        if not 0 <= step < 1 << 40 or batch_tokens < 0:
            raise ValueError(f"step {step}, total_batch_size {batch_tokens}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read, or is no meta file of nanochat's: {error!r}") from error
    return dict(meta)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "Weights only load failed" in reason:  # torch goes on with how to run the code in it
            reason = "it holds something else than tensors and plain values, which could run code"
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
