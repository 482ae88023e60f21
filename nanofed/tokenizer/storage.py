"""Tokenizer files: our `tokenizer.json`, which Hugging Face tools read too; nanochat's `tokenizer.pkl`."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanofed.errors import ConfigError, DataError
from nanofed.files import write_atomically
from nanofed.tokenizer.vocabulary import Vocabulary

T = TypeVar("T")

TOKENIZER_JSON = "tokenizer.json"
NANOCHAT_PICKLE = "tokenizer.pkl"

# GPT-2's alphabet (Radford et al. 2019): a byte that prints stands for itself, the others for U+0100 and up, in order.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_TO_TEXT = {byte: byte for byte in _PRINTABLE} | {byte: 256 + n for n, byte in enumerate(_OTHERS)}
_INVALID = 0xFFFF  # not in latin-1, so that a character that stands for no byte fails to encode
_TO_BYTE = dict.fromkeys(_OTHERS, _INVALID) | {character: byte for byte, character in _TO_TEXT.items()}


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer, ours or nanochat's."""
    return any((folder / name).exists() for name in (TOKENIZER_JSON, NANOCHAT_PICKLE))


def check_writable(folder: Path, *, force: bool = False) -> None:
    """Refuse a folder that has a tokenizer, unless forced, or that cannot be written; it need not exist yet.

    Raises:
        ConfigError: the folder has a tokenizer already and `force` is false.
        DataError: the folder, or the one that it is to be made in, cannot be written.
    """
    if has_tokenizer(folder) and not force:
        raise ConfigError(f"{folder} has a tokenizer already: choose another folder, or replace it with --force")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"cannot write a tokenizer to {folder}: {existing} is not a folder that can be written")


def to_json(vocabulary: Vocabulary) -> str:
    """Return a vocabulary as the text of a `tokenizer.json` of Hugging Face `tokenizers`.

    Raises:
        ValueError: the tokens are not those of a BPE.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabulary.split_pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = [
        {"id": len(vocabulary.tokens) + n, "content": text, **flags} for n, text in enumerate(vocabulary.special_tokens)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # as tiktoken does it: a whole word that is a token needs no merging
        "vocab": {_as_text(token): rank for rank, token in enumerate(vocabulary.tokens)},
        "merges": [[_as_text(left), _as_text(right)] for left, right in vocabulary.merges()],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str) -> Vocabulary:
    """Read a vocabulary back from the text of our `tokenizer.json`.

    Raises:
        ValueError: the text is damaged, or of another kind (another model, normalizer or order of ids).
    """
    try:
        content = json.loads(text)
        model = content["model"]
        split, byte_level = content["pre_tokenizer"]["pretokenizers"]
        if model["type"] != "BPE" or content["normalizer"] is not None or byte_level["type"] != "ByteLevel":
            raise ValueError("it is not a byte-level BPE without a normalizer")
        if byte_level["add_prefix_space"] or byte_level["use_regex"] or split["behavior"] != "Isolated":
            raise ValueError("it splits text in another way than nanofed does")
        tokens = _in_order({_as_bytes(token): rank for token, rank in model["vocab"].items()}, 0)
        specials = _in_order({token["content"]: token["id"] for token in content["added_tokens"]}, len(tokens))
        made = [_as_bytes(left) + _as_bytes(right) for left, right in model["merges"]]
        vocabulary = Vocabulary(tuple(tokens), tuple(specials), str(split["pattern"]["Regex"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a field is missing or of the wrong kind ({type(error).__name__}: {error})") from error
    if made != [token for token in tokens if len(token) > 1]:
        raise ValueError("its merges do not make its tokens in the order of their ids")
    return vocabulary


def read_json(path: Path) -> Vocabulary:
    """Read a `tokenizer.json` that nanofed wrote.

    Raises:
        DataError: the file cannot be read, is damaged, or was written by something else.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or not a tokenizer of nanofed's: {error}") from error


def write_json(vocabulary: Vocabulary, folder: Path) -> None:
    """Write `tokenizer.json` into a folder, made if it is missing, all of it or nothing.

    Another tokenizer that is there is kept beside it, as `tokenizer.json.` and the first 8 digits of its SHA-256: models may
    have been trained with it.
    """
    text = to_json(vocabulary)
    path = folder / TOKENIZER_JSON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and (before := path.read_bytes()) != text.encode():
            write_atomically(path.with_name(f"{path.name}.{hashlib.sha256(before).hexdigest()[:8]}"), before)
        write_atomically(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


class _PickledEncoding:
    """Stands in for tiktoken's Encoding while unpickling: it keeps what was in the pickle and runs nothing."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _NanochatUnpickler(pickle.Unpickler):
    """Knows one class, tiktoken's Encoding; a pickle that asks for any other name is refused before anything runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a tokenizer has no need of")


def read_nanochat(path: Path) -> Vocabulary:
    """Read nanochat's `tokenizer.pkl`, a pickled tiktoken Encoding, without running anything that the file asks for.

    Raises:
        DataError: the file cannot be read, is damaged, or holds anything but such an Encoding.
    """
    try:
        with path.open("rb") as file:
            encoding = _NanochatUnpickler(file).load()
        state = encoding.state if isinstance(encoding, _PickledEncoding) else None
        if not isinstance(state, Mapping):
            raise ValueError("it does not hold a tiktoken Encoding with its tokens")
        tokens = _in_order(state["mergeable_ranks"], 0)
        specials = _in_order(state["special_tokens"], len(tokens))
        if not all(isinstance(token, bytes) for token in tokens) or not isinstance(state["pat_str"], str):
            raise ValueError("its tokens are not bytes, or its split pattern is not text")
        return Vocabulary(tuple(tokens), tuple(str(text) for text in specials), state["pat_str"])
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{path} is damaged or not nanochat's tokenizer: {error}") from error


def _in_order(ids: Mapping[T, int], start: int) -> Sequence[T]:
    ordered = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in ordered] != list(range(start, start + len(ordered))):
        raise ValueError(f"its {len(ordered)} ids do not run on from {start} without a gap")
    return ordered


def _as_text(token: bytes) -> str:
    return token.decode("latin-1").translate(_TO_TEXT)


def _as_bytes(text: str) -> bytes:
    return text.translate(_TO_BYTE).encode("latin-1")
