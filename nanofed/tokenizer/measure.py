"""How well a tokenizer compresses text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nanofed.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Compression:
    """Documents, the UTF-8 bytes of their text, and the tokens that a tokenizer makes of it, without any BOS."""

    documents: int
    num_bytes: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for a token; more is better. 0 without text."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0


def measure_compression(tokenizer: Tokenizer, texts: Iterable[str]) -> Compression:
    """Count the bytes and the tokens of documents, read one at a time.

    Bytes are counted in the tokens, so that text which a split pattern leaves out does not look like compression.
    """
    documents = num_bytes = num_tokens = 0
    for text in texts:
        ids = tokenizer.encode_array(text)
        documents += 1
        num_bytes += int(tokenizer.token_bytes[ids].sum())
        num_tokens += len(ids)
    return Compression(documents, num_bytes, num_tokens)
