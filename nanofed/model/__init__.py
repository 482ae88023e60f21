"""The October 2025 nanochat GPT in plain PyTorch."""

from nanofed.model.config import GPTConfig
from nanofed.model.gpt import GPT
from nanofed.model.kv_cache import KVCache

__all__ = ["GPT", "GPTConfig", "KVCache"]
