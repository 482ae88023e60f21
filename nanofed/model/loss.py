"""The head: from the last hidden state to soft-capped logits or to the loss; nothing else sees the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_CAP = 15.0
IGNORED_TARGET = -1


def capped_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return fp32 logits (…, vocab) of hidden states (…, n_embd), squeezed smoothly into ±15 (Gemma 2's soft cap).

    The product runs in the hidden states' dtype; the cap in fp32.
    """
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy in nats of the targets under the capped logits.

    Args:
        hidden: Normed hidden states (B, T, n_embd).
        head: The head's weight (vocab, n_embd).
        targets: Token ids (B, T); -1 marks positions that do not count.
        reduction: "mean" over the positions that count (NaN if none does), "sum" of them, or "none".

    Returns:
        A scalar, or with "none" one loss a position (B·T,), 0 where the target is -1.
    """
    # Holds all (B·T, vocab) logits at once; a chunked, fused head replaces this body and keeps the signature.
    logits = capped_logits(hidden, head).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)
