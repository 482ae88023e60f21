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
from nanofed.formats.pretrained import Pretrained, empty_model, listed
from nanofed.formats.provenance import Provenance
from nanofed.model import GPTConfig
from nanofed.optim import Schedule, parameter_groups
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.storage import NANOCHAT_PICKLE, to_nanochat
from nanofed.training.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

MODEL = re.compile(r"model_(\d+)\.pt")
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
META = "nanochat"  # in the state of an imported checkpoint: the peer's meta, which is exported again as it was


class IncompleteError(CheckpointError):
    """An optimizer's state lacks parameters or parts of them."""


@dataclass(frozen=True)
class NanochatCheckpoint:
    """A checkpoint of nanochat's.

    Attributes:
        model: sizes, weights in fp32 and tokenizer.
        meta: the content of its `meta_*.json`.
        optimizer: the state of `MuonAdamW` that continues its optimizers' states, without a clock; None where there is none.
        without: why there is no optimizer state; empty where there is one.
    """

    model: Pretrained
    meta: dict[str, Any]
    optimizer: dict[str, Any] | None
    without: str = ""

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for."""
        return int(self.meta["step"])

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on; 0 where its options do not say how many a step has."""
        return self.step * int((self.meta.get("user_config") or {}).get("total_batch_size", 0))


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a nanochat checkpoint, or the checkpoints of a `NANOCHAT_BASE_DIR`."""
    return bool(_steps(folder) or _models(folder))


def read(folder: Path, *, tokenizer: Path | None = None, step: int | None = None) -> NanochatCheckpoint:
    """Read a checkpoint; nothing in it is run, and nothing but tensors, plain values and the tokenizer's tokens is unpickled.

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
    optimizer_path = folder / f"optim_{number}.pt"
    if not optimizer_path.is_file():
        return NanochatCheckpoint(model, meta, None, f"there is no {optimizer_path.name}")
    try:
        return NanochatCheckpoint(model, meta, optimizer_from(_load(optimizer_path), config))
    except IncompleteError as error:
        return NanochatCheckpoint(model, meta, None, f"{optimizer_path.name} {error}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{optimizer_path} does not hold nanochat's two optimizers: {error!r}") from error


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
    optimizer = next(iter(state.get("optimizer_states", ())), None)
    embedding = [model.weights[EMBEDDING], *(_moments(optimizer) if optimizer else ())]
    narrow = torch.bfloat16 if all(torch.equal(part, part.bfloat16().float()) for part in embedding) else torch.float32
    names = empty_model(model.config).state_dict()
    weights = {name: model.weights[name].to(narrow if name == EMBEDDING else torch.float32) for name in names}
    torch.save(weights, checkpoint / f"model_{number}.pt")
    if optimizer:
        torch.save(optimizer_to(optimizer, weights, provenance.manifest.step), checkpoint / f"optim_{number}.pt")
    else:
        logger.info("no optimizer state is exported: %s", _why_no_optimizer(provenance))
    meta = state.get(META) or _meta(model.config, provenance)
    (checkpoint / f"meta_{number}.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / NANOCHAT_PICKLE).write_bytes(to_nanochat(model.tokenizer.vocabulary))
    torch.save(token_bytes(model.tokenizer), tokens / "token_bytes.pt")


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Return what nanochat divides by for bits per byte, (vocab_size,) int32: the bytes of each token's text.

    A token that is no UTF-8 by itself counts as its replacement characters, three bytes each, as nanochat has it. That
    differs from `Tokenizer.token_bytes`, and so bits per byte measured there differ from nanofed's in such tokens.
    """
    texts = [token.decode("utf-8", errors="replace") for token in tokenizer.vocabulary.tokens]
    lengths = [len(text.encode()) for text in texts] + [0 for _ in tokenizer.special_tokens]
    return torch.tensor(lengths, dtype=torch.int32)


def optimizer_from(saved: Any, config: GPTConfig) -> dict[str, Any]:
    """Return the state of `MuonAdamW`, without its clock, that continues nanochat's AdamW and Muon.

    nanochat's AdamW has the head and the embedding, in that order. Its Muon has the blocks' matrices in groups of as many
    elements (on one process) or of one shape (on several), each in the order of the model.

    Raises:
        IncompleteError: several ranks trained, and the file holds the state of one of them.
        KeyError, TypeError, ValueError: it is no state of these optimizers.
    """
    adamw, muon = saved
    model = empty_model(config)
    groups = parameter_groups(model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    shapes = [parameter.shape for parameter in parameters]
    states: dict[int, dict[str, Any]] = {}
    for index in (0, 1):
        state = adamw["state"].get(index, {})
        moments = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq") if name in state}
        states[index] = {"step": int(state.get("step", 0)), **moments}
    left = list(range(2, len(parameters)))
    for group in muon["param_groups"]:
        buffers = [muon["state"].get(index, {}).get("momentum_buffer") for index in group["params"]]
        kinds = {buffer.shape for buffer in buffers if buffer is not None}
        taken = [index for index in left if shapes[index] in kinds]
        if None in buffers or len(taken) != len(buffers):
            raise IncompleteError("holds the state of one rank of several, and the others' is nowhere")
        left = [index for index in left if index not in taken]
        states |= {index: {"momentum_buffer": buffer.float()} for index, buffer in zip(taken, buffers, strict=True)}
    for index, shape in enumerate(shapes):
        tensors = [value for value in states.get(index, {}).values() if isinstance(value, Tensor)]
        if len(tensors) != (2 if index < 2 else 1) or any(tensor.shape != shape for tensor in tensors):
            raise IncompleteError("holds the state of one rank of several, and the others' is nowhere")
    theirs = [*adamw["param_groups"], muon["param_groups"][0]]
    kept = {"adamw": ("lr", "initial_lr", "betas", "eps", "weight_decay"), "muon": ("lr", "initial_lr", "ns_steps")}
    param_groups = []
    for group, their in zip(groups, theirs, strict=True):
        first = sum(len(before["params"]) for before in param_groups)
        known = {name: their[name] for name in kept[group["kind"]]}
        indices = list(range(first, first + len(group["params"])))
        param_groups.append({"name": group["name"], "kind": group["kind"], **known, "params": indices})
    return {"state": states, "param_groups": param_groups}


def optimizer_to(state: Mapping[str, Any], weights: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
    """Return the state dicts of nanochat's AdamW and Muon, as one process has them, that continue `MuonAdamW`'s state.

    Args:
        state: the state dict of `MuonAdamW`.
        weights: the model's weights as they are exported; moments take their dtypes.
        step: optimizer steps so far, which Muon's momentum follows.
    """
    head, embedding, matrices = state["param_groups"]
    adamw = torch.optim.AdamW([{"params": [weights[HEAD]]}, {"params": [weights[EMBEDDING]]}], fused=True)
    for index, (group, ours, name) in enumerate(
        zip(adamw.param_groups, (head, embedding), (HEAD, EMBEDDING), strict=True)
    ):
        group |= {key: ours[key] for key in ("lr", "betas", "eps", "weight_decay", "initial_lr")}
        moments = state["state"][index]
        adamw.state[weights[name]] = {
            "step": torch.tensor(float(moments["step"])),
            **{key: moments[key].to(weights[name].dtype) for key in ("exp_avg", "exp_avg_sq")},
        }
    names = [name for name in weights if name not in (HEAD, EMBEDDING)]
    numbers = dict(zip(names, matrices["params"], strict=True))
    groups, buffers = [], {}
    for elements in {weights[name].numel() for name in names}:  # in the order of the same set that nanochat makes
        of_size = [name for name in names if weights[name].numel() == elements]
        indices = list(range(len(buffers), len(buffers) + len(of_size)))
        buffers |= {
            index: {"momentum_buffer": state["state"][numbers[name]]["momentum_buffer"]}
            for index, name in zip(indices, of_size, strict=True)
        }
        rates = {"lr": matrices["lr"], "initial_lr": matrices["initial_lr"], "ns_steps": matrices["ns_steps"]}
        momentum = Schedule().momentum(max(0, step - 1))
        groups.append({**rates, "momentum": momentum, "nesterov": True, "params": indices})
    return [adamw.state_dict(), {"state": buffers, "param_groups": groups}]


def _moments(optimizer: Mapping[str, Any]) -> Iterator[Tensor]:
    (embedding,) = (group for group in optimizer["param_groups"] if group["name"] == "embedding")
    state = optimizer["state"][embedding["params"][0]]
    yield from (state["exp_avg"], state["exp_avg_sq"])


def _why_no_optimizer(provenance: Provenance) -> str:
    if provenance.manifest.kind == "federated":
        return "in a federation it stays with the clients"
    return "the checkpoint has none"


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
        int(meta["step"]), dict(meta["model_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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
