"""nanofed: pretrain the nanochat GPT on one cluster with Lightning, or across sites that come and go with Flower."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanofed.api import complete, evaluate, export, federate, fit, generate, import_model, load
    from nanofed.data.datamodule import TokenDataModule
    from nanofed.model import GPT, GPTConfig
    from nanofed.tokenizer.bpe import Tokenizer
    from nanofed.training.module import GPTModule

__version__ = "0.1.0"

# Public name -> the module that defines it: torch, lightning and flwr load only when a name is first used.
_PUBLIC = {
    "fit": "nanofed.api",
    "federate": "nanofed.api",
    "load": "nanofed.api",
    "evaluate": "nanofed.api",
    "generate": "nanofed.api",
    "complete": "nanofed.api",
    "export": "nanofed.api",
    "import_model": "nanofed.api",
    "GPT": "nanofed.model",
    "GPTConfig": "nanofed.model",
    "GPTModule": "nanofed.training.module",
    "Tokenizer": "nanofed.tokenizer.bpe",
    "TokenDataModule": "nanofed.data.datamodule",
}

__all__ = [
    "GPT",
    "GPTConfig",
    "GPTModule",
    "TokenDataModule",
    "Tokenizer",
    "__version__",
    "complete",
    "evaluate",
    "export",
    "federate",
    "fit",
    "generate",
    "import_model",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'nanofed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
