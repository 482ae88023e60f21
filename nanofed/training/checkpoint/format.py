"""One checkpoint format for both paths: a directory of weights, state, tokenizer, and a manifest with hashes written last.

step_00000400/
model.safetensors   the GPT's weights under nanochat's names, fp32
state.pt            everything else (optimizer, data position, clocks); loads with `weights_only`
tokenizer/          the tokenizer, so that a checkpoint can be sampled from and validated anywhere
manifest.json       format_version, model, progress, size and SHA-256 of every file, and a checksum of itself
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanofed import runtime
from nanofed.data.identity import DataIdentity
from nanofed.errors import ConfigError
from nanofed.files import sha256_once
from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.storage import TOKENIZER_JSON, to_json
from nanofed.tokenizer.vocabulary import Vocabulary
from nanofed.training.checkpoint.atomic import CheckpointError, HashedFile, written
from nanofed.training.checkpoint.folder import FOLDER, MANIFEST, candidates, set_aside_later

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHECKSUM = "checksum"  # the field that holds a SHA-256 of the manifest's other fields
WEIGHTS = "model.safetensors"
STATE = "state.pt"
TOKENIZER = "tokenizer"
TOKENIZER_FILE = f"{TOKENIZER}/{TOKENIZER_JSON}"
SMALL_BYTES = 1 << 20  # room for the manifest and for the headers around the tensors
_FILE_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    kind: str  # `fit` or `federated`; `weights` is one to start from, and not to go on with
    model: GPTConfig  # the sizes of the GPT
    step: int  # optimizer steps (fit) or rounds (federated)
    tokens: int  # tokens trained so far
    tokenizer: str  # the tokenizer's fingerprint
    metrics: Mapping[str, float]  # the last measured figures, such as `val/bpb`
    files: Mapping[str, Mapping[str, Any]]  # size and SHA-256 of every file
    format_version: int = FORMAT_VERSION  # the version of this layout
    # The text that the run trains on and validates with; None in one that was imported, or of an older nanofed.
    data: DataIdentity | None = None


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
    data: DataIdentity | None = None,
) -> None:
    """Write a checkpoint directory, all of it or nothing; an old one of that name stays until the new one is whole.

    Tensors are written one at a time from where they are: no second copy of model or optimizer is made in memory. Checkpoints of
    later steps beside it are moved away (`folder.set_aside_later`): they are left from before the run went back.

    Raises:
        NoSpaceError: the disk has too little space for the checkpoint, or its space ran out.
        SaveError: the folder is gone or cannot be written; the run's folder itself is never made here.
    """
    vocabulary = _tokenizer_json(tokenizer.vocabulary)
    needed = len(vocabulary) + SMALL_BYTES + storage_bytes(weights) + storage_bytes(state)
    with written(path, needed) as staging:
        with staging.file(WEIGHTS) as file:
            write_safetensors(weights, file)
        with staging.file(STATE) as file:
            torch.save(dict(state), cast(IO[bytes], file))
        with staging.file(TOKENIZER_FILE) as file:
            file.write(vocabulary)
        figures, files = dict(metrics or {}), dict(staging.files)
        manifest = asdict(
            Manifest(kind, config, step, tokens, tokenizer.fingerprint, figures, files, FORMAT_VERSION, data)
        )
        with staging.file(MANIFEST) as file:
            file.write((json.dumps({**manifest, CHECKSUM: _checksum(manifest)}, indent=1) + "\n").encode())
        set_aside_later(path)


def write_safetensors(tensors: Mapping[str, Tensor], file: HashedFile) -> None:
    """Write tensors in the safetensors format: length of the header, header, then the bytes end to end.

    The library's own writer (github.com/huggingface/safetensors, where the format is described) writes to a path only.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def storage_bytes(values: Any) -> int:
    """Return the bytes of all tensors in a nest of mappings and lists; what two of them share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(values)}
    return sum(storages.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def read_manifest(path: Path, *, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and, by default, hash every file against it.

    A process hashes a file once for every state of the file.

    Raises:
        CheckpointError: no manifest, another format version, or a file that is missing, truncated or altered.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {MANIFEST} cannot be read ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}: this nanofed reads {FORMAT_VERSION}")
    checksum = raw.pop(CHECKSUM, None)
    try:
        data = None if raw.get("data") is None else DataIdentity.from_plain(raw["data"])
        manifest = Manifest(**{**raw, "model": GPTConfig(**raw["model"]), "data": data})
    except (TypeError, KeyError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path / MANIFEST} has missing or unknown fields: {error}") from error
    if checksum != _checksum(raw):
        raise CheckpointError(
            f"{path / MANIFEST} is not what was saved (its checksum differs): the checkpoint is damaged"
        )
    _check_files(path, manifest.files)
    for name, entry in manifest.files.items() if verify else ():
        _verify(path / name, entry)
    return manifest


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the GPT's weights by name, fp32 on the CPU; they are mapped from the file, not copied."""
    try:
        return load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read everything but the weights; only tensors and plain values are unpickled."""
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "Weights only load failed" in reason:  # torch goes on with how to run the code in it
            reason = "it holds something else than tensors and plain values, which could run code"
        raise CheckpointError(f"{path / STATE} cannot be read: {reason}") from error
    return state


def local_path(where: str | Path) -> Path:
    """Return where a checkpoint or run lies on this machine.

    Raises:
        ConfigError: a URL: checkpoints are neither fetched nor sent.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(where)):
        raise ConfigError(f"{where} is a URL: checkpoints are read from local folders only")
    return runtime.user_path(where)


def find_checkpoint(where: str | Path) -> Path:
    """Return the checkpoint that `where` means: one itself, or the newest of a run folder that verifies.

    Raises:
        ConfigError: a URL (a checkpoint is never fetched), or nothing there.
        CheckpointError: the run has checkpoints, and all of them are damaged.
    """
    path = local_path(where)
    if (path / MANIFEST).is_file():
        return path
    found = newest_whole(path)
    if found is None:
        raise ConfigError(f"there is no checkpoint in {path} (name a run folder such as runs/tiny, or one checkpoint)")
    return found


def newest_whole(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that verifies in full, None if it has none at all; damaged ones are logged.

    Raises:
        CheckpointError: all that it has are damaged.
    """
    damaged: list[str] = []
    for path in reversed(candidates(run)):
        try:
            read_manifest(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            say_once(logging.WARNING, f"skipped: {reason}; the newest whole checkpoint is {path}")
        return path
    if damaged:
        briefly = [
            reason.replace(f"{run / FOLDER}/", "").removesuffix(": the checkpoint is damaged") for reason in damaged[:3]
        ]
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise CheckpointError(f"{run / FOLDER} holds no checkpoint that is whole: {'; '.join(briefly)}{more}")
    return None


def check_model(manifest: Manifest, config: GPTConfig, path: Path) -> None:
    """Refuse a checkpoint of another shape, naming the fields that differ."""
    saved, wanted = asdict(manifest.model), asdict(config)
    differing = [f"{name} {saved[name]} there, {wanted[name]} here" for name in wanted if saved[name] != wanted[name]]
    if differing:
        raise ConfigError(f"{path} holds another model: {'; '.join(differing)}")


@functools.lru_cache(maxsize=2)
def _tokenizer_json(vocabulary: Vocabulary) -> bytes:
    return to_json(vocabulary).encode()  # takes seconds for a large vocabulary, and every save needs it


def _check_files(path: Path, files: Any) -> None:
    """Refuse a manifest that lacks a file, or names one that could lie outside of the checkpoint."""
    names = files if isinstance(files, dict) else {}
    if missing := {WEIGHTS, STATE, TOKENIZER_FILE} - set(names):
        raise CheckpointError(f"{path / MANIFEST} does not list {', '.join(sorted(missing))}")
    for name, entry in names.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST} lists {name!r}, which is no name of a file in a checkpoint")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CheckpointError(f"{path / MANIFEST} does not give size and SHA-256 of {name}")


def _verify(file: Path, entry: Mapping[str, Any]) -> None:
    try:
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file} has another size than {MANIFEST} says: the checkpoint is damaged")
        digest = sha256_once(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): the checkpoint is damaged") from error
    if digest != entry["sha256"]:
        raise CheckpointError(f"{file} is not what was saved (SHA-256 differs): the checkpoint is damaged")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def say_once(level: int, line: str) -> None:
    """Log a line, once a process: a checkpoint is looked at more than once on the way to the first step."""
    logger.log(level, "%s", line)
