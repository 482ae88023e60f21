"""Bits per byte: the loss by which runs with different tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from nanofed.errors import DataError

# Losses are summed as multiples of this, in nats: one ulp of an fp32 loss between 2 and 4. Such sums are exact in fp64 up to
# 2^31 nats (190 million targets of 11 nats), so that no order of adding, on a device or over ranks and sites, changes a bit.
QUANTUM = 2.0**-22


def bits_per_byte(nats: float, count: int) -> float:
    """Return the bits per byte of a text of `count` bytes, more than 0, whose targets cost `nats` together."""
    return nats / (math.log(2) * count)


class BitsPerByte(torchmetrics.Metric):
    """Sum of losses over sum of bytes, each over all batches and ranks, never a mean of means.

    Targets of no bytes (special tokens) and ignored ones (-1) count in neither sum. Both sums are exact: how targets are
    divided over batches and ranks, and the order in which these are added, change no bit.

    Args:
        token_bytes: UTF-8 length of every token (vocab,), 0 for special tokens.
        **kwargs: For `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    token_bytes: Tensor
    sum_nats: Tensor
    sum_bytes: Tensor

    def __init__(self, token_bytes: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("token_bytes", token_bytes.to(torch.int64), persistent=False)
        self.add_state("sum_nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, targets: Tensor) -> None:
        """Add losses in nats (N,) and their targets, of N elements; nothing waits for the device."""
        targets = targets.flatten()
        lengths = self.token_bytes[targets.clamp(min=0)] * (targets >= 0)
        # where, not a product: a loss that is not finite must not leak out of a position that does not count
        counted = torch.where(lengths > 0, nats.detach().flatten().double(), 0.0)
        self.sum_nats += (counted / QUANTUM).round().sum() * QUANTUM
        self.sum_bytes += lengths.sum()

    def compute(self) -> Tensor:
        """Return bits per byte, a float64 scalar on the CPU, over all ranks.

        Raises:
            DataError: no byte was counted, on any rank.
        """
        if not self.sum_bytes:
            raise DataError("evaluation: there is no text to score; check the validation shard and data.eval_tokens")
        return torch.tensor(bits_per_byte(float(self.sum_nats), int(self.sum_bytes)), dtype=torch.float64)


@torch.no_grad()
def evaluate_bits_per_byte(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    metric: BitsPerByte,
    device: torch.device | str,
) -> float:
    """Score a model on batches, over all ranks where there are several, and leave its training mode as it was.

    Args:
        model: Called as `model(inputs, targets, reduction="none")`.
        batches: Pairs of inputs and targets (B, T), a finite number of them.
        metric: Is reset first and holds the sums afterwards.
        device: Where model, batches and metric go together.

    Raises:
        DataError: there was no byte to score.
    """
    metric.to(device)
    metric.reset()
    training = model.training
    model.eval()
    try:
        for inputs, targets in batches:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            metric.update(model(inputs, targets, reduction="none"), targets)
    finally:
        model.train(training)
    if not metric.update_called:  # a rank without batches still has to meet the others in compute()
        metric.update(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device))
    return float(metric.compute())
