"""Bits per byte at a site: its share of the validation text, measured by all of its ranks."""

from __future__ import annotations

import math
from contextlib import closing

import torch
from torch import nn

from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import NanofedError
from nanofed.evaluation.bits_per_byte import BitsPerByte
from nanofed.federated.site.ranks import Ranks, SharedBatches, Turn
from nanofed.federated.wire.messages import Evaluate
from nanofed.training.loop import Stopwatch


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
        gpt: The model with the weights to be measured, the same on all ranks.
        data: The site's shards and tokenizer.
        asked: The share of the validation text to be measured.
        device: The device of the model.
        ranks: The ranks, all of which make this call.
        turn: The caller's view, which may end the evaluation between batches.
        watch: A running stopwatch that reads the same on all ranks.

    Raises:
        NanofedError: The evaluation took too long, or the loss is not finite: a part of the text would be another text's figure.
        DataError: the validation shard is damaged or too short.
        Exception: `turn.check` raises it; several ranks raise `Agreed` in the place of all these.
    """
    text = data.validation_loader(
        rank=ranks.number, world_size=ranks.size, share=asked.share, shares=asked.shares, eval_tokens=asked.eval_tokens
    )
    metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes)).to(device)
    training = gpt.training
    gpt.eval()
    try:
        with closing(iter(text)) as batches:
            for number, batch in enumerate(SharedBatches(batches, ranks, turn.check)):
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
