"""What a byte-level BPE is: tokens in the order of their merges, special tokens after them, a split pattern."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

# What nanochat trained its tokenizer with (October 2025).
VOCAB_SIZE = 65_536
MAX_CHARS = 10_000_000_000
DOC_CAP = 10_000  # characters of one document

# The first starts every document; the others mark the turns of a conversation and its use of tools.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# GPT-4's pattern, but numbers in groups of two digits rather than three: smaller vocabularies do better so (nanochat).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens as bytes; a token's id is its place and its merge priority, special tokens follow.

    Raises:
        ValueError: a byte is missing, a token occurs twice, or there is no special token.
    """

    tokens: tuple[bytes, ...]  # the bytes of every token but the special ones; all 256 single bytes are among them
    special_tokens: tuple[str, ...]  # the texts of the special tokens; the first marks the beginning of a document
    split_pattern: str  # the regular expression whose matches are merged one by one, never across

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("a token occurs twice")
        if missing := {bytes([byte]) for byte in range(256)}.difference(self.tokens):
            raise ValueError(f"{len(missing)} of the 256 single bytes are no tokens")
        if not self.special_tokens or len(set(self.special_tokens)) != len(self.special_tokens):
            raise ValueError("at least one special token is needed, and none may occur twice")
        if not all(self.special_tokens):
            raise ValueError("a special token is empty")

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The id of every token but the special ones."""
        return {token: rank for rank, token in enumerate(self.tokens)}

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over tokens in their order, special tokens and split pattern, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.split_pattern, list(self.special_tokens)]).encode())
        digest.update(b"".join(len(token).to_bytes(4, "little") + token for token in self.tokens))
        return digest.hexdigest()

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the pair that makes each token of several bytes, in the order of ids.

        No merge crossed a token's ends while it was learned, so merging its bytes by the earlier ranks alone leads to
        the same two parts.

        Raises:
            ValueError: a token cannot be made from two earlier ones, so these are not the tokens of a BPE.
        """
        pairs = []
        for rank, token in enumerate(self.tokens):
            if len(token) > 1:
                parts = self._merge_below(token, rank)
                if len(parts) != 2:
                    raise ValueError(f"token {rank} {token!r} is not a merge of two earlier tokens")
                pairs.append((parts[0], parts[1]))
        return pairs

    def _merge_below(self, token: bytes, limit: int) -> list[bytes]:
        """Merge the bytes of a token, lowest rank first and leftmost among equals, with the ranks below a limit."""
        ranks = self.ranks
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, place = limit, -1
            for i in range(len(parts) - 1):
                rank = ranks.get(parts[i] + parts[i + 1], limit)
                if rank < best:
                    best, place = rank, i
            if place < 0:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts
