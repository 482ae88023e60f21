"""Text after a prompt, piece by piece as it is sampled."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from nanofed.generation.sampling import generate_ids
from nanofed.model import GPT

SAMPLE_TOKENS = 48  # of a text sample that a run writes beside its validations


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int:
        """The token that begins a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without special tokens."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Turn ids into the bytes they stand for, which may end inside a character."""
        ...


def generate(
    model: GPT,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
) -> Iterator[str]:
    """Stream the text that follows a prompt, up to the end of the document or `max_tokens`.

    Every piece is whole characters: bytes of an unfinished one are held back until it is complete. What can never
    become a character is replaced by U+FFFD. Arguments and errors as in `generate_ids`.
    """
    bos = tokenizer.bos_token_id
    ids = generate_ids(
        model,
        [bos, *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=bos,
    )
    return decode_stream(tokenizer.decode_bytes([i]) for i in ids)


def decode_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield UTF-8 bytes as text as soon as characters are complete, and the broken rest, if any, as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
