"""Byte-level BPE: trained with rustbpe, encoded with tiktoken, saved for Hugging Face tools too."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanofed.tokenizer.bpe import Tokenizer, load_tokenizer
    from nanofed.tokenizer.storage import check_writable
    from nanofed.tokenizer.training import train_tokenizer
    from nanofed.tokenizer.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary

_PUBLIC = {
    "Tokenizer": "bpe",
    "load_tokenizer": "bpe",
    "check_writable": "storage",
    "SPECIAL_TOKENS": "vocabulary",
    "SPLIT_PATTERN": "vocabulary",
    "train_tokenizer": "training",
    "Vocabulary": "vocabulary",
}

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "Tokenizer",
    "Vocabulary",
    "check_writable",
    "load_tokenizer",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"nanofed.tokenizer.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'nanofed.tokenizer' has no attribute {name!r}")
