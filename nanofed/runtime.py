"""The machine: devices, ranks, compute dtype, cache paths. The only reader of the environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEFAULT_STREAMS = 8


def base_dir() -> Path:
    """Return the folder of everything that is kept between runs: `NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`."""
    configured = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "nanochat"


def dataset_dir(name: str) -> Path:
    """Return the folder of a dataset: `fineweb-edu` and `demo` live under `base_dir()`, anything else is a path."""
    named = {"fineweb-edu": base_dir() / "base_data", "demo": base_dir() / "demo" / "data"}
    return named.get(name, Path(name).expanduser())


def tokenizer_dir(dataset: str = "fineweb-edu") -> Path:
    """Return the folder of the tokenizer that belongs to a dataset when none is named."""
    return base_dir() / "demo" / "tokenizer" if dataset == "demo" else base_dir() / "tokenizer"


def has_compiler() -> bool:
    """Tell whether a C++ compiler, which torch.compile needs on CPU, can be found."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))


def world_size() -> int:
    """Return the number of ranks that a launcher such as torchrun announced, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank among `world_size()`, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def huggingface_endpoint() -> str:
    """Return the address of the Hugging Face hub: `HF_ENDPOINT`, by default https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def huggingface_token() -> str | None:
    """Return `HF_TOKEN` where it is set: sent as a bearer token with downloads."""
    return os.environ.get("HF_TOKEN") or None


def default_compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of matmuls that is fast on a device: bf16 where the hardware multiplies it natively, else fp32."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # type: ignore[no-untyped-call]
        return torch.bfloat16 if native else torch.float32
    return torch.float32
