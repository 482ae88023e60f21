"""The validation text: one fixed list of rows, whatever the micro-batch, the streams, the ranks or the sites that score it.

The text is the first `eval_tokens` targets of the validation shard in document order, laid end to end. The rows of one
forward pass are fixed as well, by `sequence_len` and `eval_tokens` alone: a kernel may round a row differently in a batch of
another shape, so a row is always scored beside the same neighbours. Ranks and sites divide the list by whole forward passes.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from nanofed import runtime
from nanofed.data.packing import Tokens
from nanofed.data.prefetch import made_ahead
from nanofed.data.shards import Shard, all_texts
from nanofed.data.streams import NO_DATA, Batch, cuda_device, empty_batch
from nanofed.errors import DataError
from nanofed.model.loss import IGNORED_TARGET

if TYPE_CHECKING:
    from nanofed.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

# Tokens of one forward pass: four rows of 2,048. They keep a large GPU busy (some 20 ms of a d20), and need less memory than a
# training step of any batch: nothing is kept for a backward pass, and there are no gradients.
FORWARD_TOKENS = 8192
LEAST_PASSES = 8  # of a short text, so that as many ranks or sites have a part of it


def rows_at_once(sequence_len: int, eval_tokens: int) -> int:
    """Return the rows of one forward pass: `FORWARD_TOKENS` or an eighth of the text, whichever is less, and at least one."""
    rows = -(-eval_tokens // sequence_len)
    return max(1, min(FORWARD_TOKENS // sequence_len, -(-rows // LEAST_PASSES)))


def tokens_of_share(sequence_len: int, eval_tokens: int, shares: int) -> int:
    """Return the targets that the largest of `shares` shares of the text can hold."""
    at_once = rows_at_once(sequence_len, eval_tokens) * sequence_len
    passes = -(-eval_tokens // at_once)
    return min(eval_tokens, -(-passes // shares) * at_once)


class ValidationText(Iterable[Tokens]):
    """The rows of the validation text, read and tokenized once and then kept (4 bytes a token).

    A row holds `sequence_len + 1` tokens, the last one of the text perhaps fewer: its last target is the last of the text.
    Several threads may iterate at once.

    Args:
        shard: the validation shard.
        tokenizer: encodes the documents.
        sequence_len: targets a row.
        eval_tokens: targets of the text; fewer where the shard is shorter, which is logged once.

    Raises:
        DataError: the shard is damaged, or so short that there is no target in it.
    """

    def __init__(self, shard: Shard, tokenizer: Tokenizer, *, sequence_len: int, eval_tokens: int) -> None:
        self.sequence_len = sequence_len
        self.eval_tokens = eval_tokens
        self.rows_at_once = rows_at_once(sequence_len, eval_tokens)
        self._shard = shard
        self._tokenizer = tokenizer
        self._rows: list[Tokens] = []
        self._more: Iterator[Tokens] = self._read()
        self._lock = threading.Lock()

    def __iter__(self) -> Generator[Tokens, None, None]:
        for number in itertools.count():
            with self._lock:
                if number == len(self._rows):
                    try:
                        row = next(self._more, None)
                    except BaseException:
                        # A generator that has raised is over; the disk may be there again when the text is next asked for.
                        self._more = itertools.islice(self._read(), number, None)
                        raise
                    if row is None:
                        return
                    self._rows.append(row)
            yield self._rows[number]

    def _read(self) -> Iterator[Tokens]:
        text, left = np.empty(0, np.int32), self.eval_tokens + 1
        found = 0
        for document in map(self._tokenizer.encode_document, all_texts(self._shard)):
            text = np.concatenate((text, document[:left]))
            left -= min(left, len(document))
            while len(text) > self.sequence_len:
                yield text[: self.sequence_len + 1].copy()
                text = text[self.sequence_len :]
                found += self.sequence_len
            if not left:
                break
        found += max(0, len(text) - 1)
        if not found:
            raise DataError(f"validation shard {self._shard.path} holds no text to score")
        if left and runtime.is_first_rank():
            logger.info(
                "validation: %s of the %s tokens asked for: the shard is shorter", f"{found:,}", f"{self.eval_tokens:,}"
            )
        if len(text) > 1:
            yield text


class ValidationLoader(Iterable[Batch]):
    """The micro-batches of one rank: the same every time, and as many on every rank.

    Forward pass f of the text belongs to share f mod `shares`, and within a share its n-th pass to rank n mod `world_size`.
    What is missing of the last passes is filled up with targets that do not count (-1).

    Args:
        text: the text that ranks and sites divide.
        rank: this rank's number, below `world_size`.
        world_size: the number of ranks that divide a share.
        share: the number of this site's share, below `shares`.
        shares: the number of parts that are scored in different places; a part of a short text may be empty.
        prefetch: micro-batches that a thread makes ahead; 0 makes each when it is asked for.
    """

    def __init__(
        self, text: ValidationText, *, rank: int, world_size: int, share: int = 0, shares: int = 1, prefetch: int = 0
    ) -> None:
        self._text = text
        self._share = share
        self._own = share + shares * rank
        self._passes = shares * world_size
        self._prefetch = prefetch

    def __iter__(self) -> Generator[Batch, None, None]:
        with made_ahead(self._make(cuda_device()), self._prefetch) as batches:
            yield from batches

    def _make(self, device: int | None) -> Iterator[Batch]:
        at_once = self._text.rows_at_once
        text = iter(self._text)
        while rows := list(itertools.islice(text, self._passes * at_once)):
            if len(rows) <= self._share * at_once:
                return  # nothing is left for any rank of this share
            inputs, targets = empty_batch((at_once, self._text.sequence_len), device)
            own = rows[self._own * at_once : (self._own + 1) * at_once]
            into_inputs, into_targets = inputs.numpy(), targets.numpy()
            into_inputs[:], into_targets[:] = 0, IGNORED_TARGET
            for number, row in enumerate(own):
                into_inputs[number, : len(row) - 1] = row[:-1]
                into_targets[number, : len(row) - 1] = row[1:]
            yield Batch(inputs, targets, NO_DATA)
