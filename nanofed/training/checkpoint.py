"""One checkpoint format for both paths: a directory of weights, state, tokenizer, and a manifest with hashes written last.

step_00000400/
model.safetensors   the GPT's weights under nanochat's names, fp32
state.pt            everything else (optimizer, data position, clocks); loads with `weights_only`
tokenizer/          the tokenizer, so that a checkpoint can be sampled from and validated anywhere
manifest.json       format_version, model, progress, size and SHA-256 of every file, and a checksum of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanofed.errors import ConfigError, NanofedError
from nanofed.model import GPTConfig
from nanofed.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # of the manifest's other fields
WEIGHTS = "model.safetensors"
STATE = "state.pt"
TOKENIZER = "tokenizer"
PREFIX = "gpt."  # of the GPT's names in the LightningModule


class CheckpointError(NanofedError):
    """A checkpoint is missing, damaged, or of another kind than asked for."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        kind: `fit` or `federated`.
        model: the sizes of the GPT.
        step: optimizer steps (fit) or rounds (federated).
        tokens: tokens trained so far.
        tokenizer: fingerprint of the tokenizer.
        metrics: the last measured figures, such as `val/bpb`.
        files: size and SHA-256 of every file.
        format_version: of this layout.
    """

    kind: str
    model: GPTConfig
    step: int
    tokens: int
    tokenizer: str
    metrics: Mapping[str, float]
    files: Mapping[str, Mapping[str, Any]]
    format_version: int = FORMAT_VERSION


def write_checkpoint(
    path: Path,
    *,
    kind: str,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: GPTConfig,
    tokenizer: Tokenizer,
    step: int,
    tokens: int,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint directory: under a temporary name beside it, renamed when it is whole.

    One that is there already under that name leaves its place in one rename, so that no half of it is ever found.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
    torch.save(dict(state), temporary / STATE)
    tokenizer.save(temporary / TOKENIZER)
    files = {
        file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(temporary.rglob("*"))
        if file.is_file()
    }
    manifest = Manifest(kind, config, step, tokens, tokenizer.fingerprint, dict(metrics or {}), files)
    content = {**asdict(manifest), CHECKSUM: _checksum(asdict(manifest))}
    (temporary / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    for file in (*files, MANIFEST):
        _sync(temporary / file)
    _sync(temporary)
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def read_manifest(path: Path, *, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and, by default, hash every file against it.

    Raises:
        CheckpointError: no manifest, another format version, or a file that is missing, truncated or altered.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {MANIFEST} cannot be read ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}: this nanofed reads {FORMAT_VERSION}")
    checksum = raw.pop(CHECKSUM, None)
    try:
        manifest = Manifest(**{**raw, "model": GPTConfig(**raw["model"])})
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path / MANIFEST} has missing or unknown fields: {error}") from error
    if checksum != _checksum(raw):
        raise CheckpointError(
            f"{path / MANIFEST} is not what was saved (its checksum differs): the checkpoint is damaged"
        )
    for name, entry in manifest.files.items() if verify else ():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} is missing or has another size than {MANIFEST} says: the checkpoint is damaged"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is not what was saved (SHA-256 differs): the checkpoint is damaged")
    return manifest


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the GPT's weights by name, fp32 on the CPU."""
    try:
        return load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read everything but the weights; only tensors and plain values are unpickled."""
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise CheckpointError(f"{path / STATE} cannot be read: {error}") from error
    return state


def checkpoints(run: Path) -> list[Path]:
    """Return a run's whole checkpoints, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.glob("*_*") if (path / MANIFEST).is_file() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run; 0 keeps all."""
    for old in checkpoints(run)[:-keep] if keep else ():
        _remove(old)


def find_checkpoint(where: str | Path) -> Path:
    """Return the checkpoint that `where` means: one itself, or the newest of a run folder.

    Raises:
        ConfigError: a URL (a checkpoint is never fetched), or nothing there.
    """
    if "://" in str(where):
        raise ConfigError(f"{where} is a URL: checkpoints are read from local folders only")
    path = Path(where).expanduser()
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ConfigError(f"there is no checkpoint in {path} (name a run folder such as runs/tiny, or one checkpoint)")
    return found[-1]


class DirectoryCheckpointIO(CheckpointIO):
    """Saves and loads Lightning's checkpoint dictionary in nanofed's format."""

    def __init__(self, config: GPTConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one checkpoint directory."""
        state = dict(checkpoint)
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.pop("state_dict").items()}
        optimizer = state["optimizer_states"][0] if state.get("optimizer_states") else {"clock": {"tokens": 0}}
        write_checkpoint(
            Path(path),
            kind="fit",
            weights={name: tensor for name, tensor in weights.items() if not name.startswith("bits_per_byte.")},
            state=state,
            config=self._config,
            tokenizer=self._tokenizer,
            step=int(state["global_step"]),
            tokens=int(optimizer["clock"]["tokens"]),
            metrics=state.pop("metrics", None),
        )

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint directory, verified, as Lightning's dictionary."""
        manifest = read_manifest(Path(path))
        check_model(manifest, self._config, Path(path))
        if manifest.kind != "fit":
            raise CheckpointError(f"{path} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        weights = {PREFIX + name: tensor for name, tensor in read_weights(Path(path)).items()}
        return {**read_state(Path(path)), "state_dict": weights}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one checkpoint directory."""
        if Path(path).exists():
            _remove(Path(path))


def check_model(manifest: Manifest, config: GPTConfig, path: Path) -> None:
    """Refuse a checkpoint of another shape, naming the fields that differ."""
    saved, wanted = asdict(manifest.model), asdict(config)
    differing = [f"{name} {saved[name]} there, {wanted[name]} here" for name in wanted if saved[name] != wanted[name]]
    if differing:
        raise ConfigError(f"{path} holds another model: {'; '.join(differing)}")


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first: what is left of an interrupted removal is no checkpoint
    shutil.rmtree(path)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
