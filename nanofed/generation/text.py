"""Text after prompts: streamed character by character from one, or whole from many."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanofed.errors import ConfigError
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.ranges import Count, check_number

if TYPE_CHECKING:
    from nanofed.tokenizer.bpe import Tokenizer

SAMPLE_TOKENS = 48  # of a text sample that a run writes beside its validations


@dataclass(frozen=True)
class Completion:
    """What a model makes of a prompt.

    Attributes:
        prompt: The text that it goes on from.
        text: What follows, without the prompt.
        num_tokens: Tokens of `text`.
        ended: `stop` where the model ended it by a stop token, `length` where `max_tokens` did.
    """

    prompt: str
    text: str
    num_tokens: int
    ended: str


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the text that follows a prompt as it is drawn, up to the end of the document, a stop token or `max_tokens`.

    Every piece is whole characters: bytes of an unfinished one are held back until it is complete. What can never
    become a character is replaced by U+FFFD. Arguments are checked at the call, not at the first piece.

    Arguments and errors are those of `nanofed.generate`.
    """
    steps = engine.generate(
        [_tokens(tokenizer, prompt)], sampling, max_tokens=max_tokens, stop_ids=_stop_ids(tokenizer, stop)
    )
    return decode_stream(tokenizer.decode_bytes([token]) for (token,) in steps if token is not None)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[Completion]:
    """Yield what follows each prompt, in their order; `batch_size` prompts at a time are rows of one batch.

    Arguments and errors are those of `stream`, and all prompts are checked at the call.
    """
    check_number("generate: batch_size", batch_size, Count)
    rows, stop_ids = [_tokens(tokenizer, prompt) for prompt in prompts], _stop_ids(tokenizer, stop)
    for number, row in enumerate(rows, start=1):
        engine.check(row, max_tokens, f"prompt {number} of {len(rows)}")
    batches = [
        (
            prompts[n : n + batch_size],
            engine.generate(rows[n : n + batch_size], sampling, max_tokens=max_tokens, stop_ids=stop_ids),
        )
        for n in range(0, len(rows), batch_size)
    ]
    return (completion for batch in batches for completion in _completions(tokenizer, *batch, max_tokens))


def _completions(
    tokenizer: Tokenizer, prompts: Sequence[str], steps: Iterator[list[int | None]], max_tokens: int
) -> Iterator[Completion]:
    drawn: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for ids, token in zip(drawn, step, strict=True):
            if token is not None:
                ids.append(token)
    for prompt, ids in zip(prompts, drawn, strict=True):
        text = tokenizer.decode_bytes(ids).decode(errors="replace")
        yield Completion(prompt, text, len(ids), "length" if len(ids) == max_tokens else "stop")


def decode_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield UTF-8 bytes as text as soon as characters are complete, and the broken rest, if any, as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def _tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(prompt)]


def _stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    if isinstance(stop, str):  # whose letters would be taken for the texts
        raise ConfigError(f"generate: stop takes a list of texts, such as [{stop!r}]")
    ids = {tokenizer.bos_token_id}
    for text in stop:
        found = [tokenizer.special_tokens[text]] if text in tokenizer.special_tokens else tokenizer.encode(text)
        if len(found) != 1:
            raise ConfigError(
                f"generate: stop {text!r} is {len(found)} tokens and has to be one; special tokens are "
                f"{', '.join(tokenizer.special_tokens)}"
            )
        ids.update(found)
    return ids
