"""Bits per byte at a site: its share of the validation text, measured by all of its ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor, nn

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.streams import Batch
from nanofed.errors import NanofedError
from nanofed.evaluation.bits_per_byte import BitsPerByte
from nanofed.federated.site.ranks import Ranks, SharedBatches, Turn
from nanofed.federated.wire.evaluation import Evaluate
from nanofed.training.loop import Stopwatch

NO_TARGET = -1  # counts nothing


class _Unnumbered(Turn):
    """A turn that hears of no micro-batches: these are no training."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def check(self) -> None:
        self._turn.check()


@torch.no_grad()
def measure(
    gpt: nn.Module,
    data: TokenDataModule,
    asked: Evaluate,
    *,
    device: torch.device,
    ranks: Ranks,
    turn: Turn,
    watch: Stopwatch,
) -> tuple[float, int]:
    """Return the sums of nats and of bytes over all ranks; the model's mode is left as it was.

    Args:
        gpt: with the weights, the same on all ranks.
        data: this site's shards and tokenizer.
        asked: which share of the text.
        device: of the model.
        ranks: all make this call.
        turn: lets whoever asked end it, between batches.
        watch: the same on all ranks, started.

    Raises:
        NanofedError: it took too long, or the loss is not finite: a part of the text would be another text's figure.
        DataError: the validation shard is damaged or too short.
        Exception: what `turn.check` raises; with several ranks `Agreed` in the place of all these.
    """
    metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes)).to(device)
    training = gpt.training
    gpt.eval()
    try:
        with closing(own_batches(data, asked, rank=ranks.number, ranks=ranks.size)) as batches:
            for number, batch in enumerate(SharedBatches(batches, _Unnumbered(turn), ranks)):
                if watch.elapsed() > asked.seconds:
                    ranks.agree(
                        NanofedError(
                            f"{number} batches took more than {asked.seconds:g} s, which is all that a round leaves for it: "
                            "lower data.eval_tokens at the server, or raise federation.grace_seconds or eval_every"
                        )
                    )
                there = batch.to(device)
                metric.update(gpt(there.inputs, there.targets, reduction="none"), there.targets)
                metric.sum_bytes.item()  # waits for the device: the watch is read in time
    finally:
        gpt.train(training)
    sums = ranks.gather((float(metric.sum_nats), int(metric.sum_bytes)))
    nats = math.fsum(part for part, _ in sums)
    if not math.isfinite(nats):
        ranks.agree(NanofedError(f"the loss on the validation text is {nats}"))
    return nats, sum(count for _, count in sums)


def own_batches(data: TokenDataModule, asked: Evaluate, *, rank: int, ranks: int) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches of a share: as many on every rank, the last one filled up with rows that do not count.

    Row r of the text is of share r mod `shares`, and the n-th row of the share of rank n mod `ranks`: so what shares are made
    of does not depend on anybody's ranks or batches. Every rank reads and tokenizes the whole text for that, which costs
    little beside the model.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    found, last = 0, None
    numbers = itertools.count()
    with closing(iter(data.validation_loader(batches=asked.batches, batch_rows=asked.batch_rows))) as text:
        for last in text:
            for inputs, targets in zip(last.inputs, last.targets, strict=True):
                if next(numbers) % asked.shares != asked.share:
                    continue
                if found % ranks == rank:
                    rows.append((inputs, targets))
                found += 1
                if found % (data.device_batch_size * ranks) == 0:
                    yield _filled(rows, data.device_batch_size, last)
                    rows = []
    if last is not None and found % (data.device_batch_size * ranks):
        yield _filled(rows, data.device_batch_size, last)


def _filled(rows: list[tuple[Tensor, Tensor]], size: int, last: Batch) -> Batch:
    """Return rows as one batch of `size`: of one shape, which is all that a compiled model knows."""
    empty = torch.zeros_like(last.inputs[0])
    none = torch.full_like(last.targets[0], NO_TARGET)
    rows = rows + [(empty, none)] * (size - len(rows))
    return Batch(torch.stack([i for i, _ in rows]), torch.stack([t for _, t in rows]), last.state)
