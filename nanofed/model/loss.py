"""The head: from the last hidden state to soft-capped logits or to the loss; nothing else sees the vocabulary.

The loss reads the logits in chunks of rows and makes each chunk's gradients at once, while its logits are there: no
tokens × vocabulary matrix is ever held, and nothing is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed.model.layers import linear

LOGIT_CAP = 15.0
IGNORED_TARGET = -1
# Logits held at once. On CPU the chunk should stay near the caches, but its matmuls need some hundred rows; on a GPU it
# has to fill the device. Measured on CPU: tests/benchmarks/results.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}
CHUNK_ROWS = 256  # at least so many, for the matmuls; what lies between them goes by CHUNK_ELEMENTS


def capped_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return fp32 logits (…, vocab) of hidden states (…, n_embd), squeezed smoothly into ±15 (Gemma 2's soft cap).

    The product runs in the hidden states' dtype; the cap in fp32.
    """
    logits = linear(hidden, head).float()
    return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy in nats of the targets under the capped logits.

    Args:
        hidden: Normed hidden states (B, T, n_embd).
        head: The head's weight (vocab, n_embd), fp32.
        targets: Token ids (B, T); -1 marks positions that do not count.
        reduction: "mean" over the positions that count (NaN if none does), "sum" of them, or "none" (not differentiable).

    Returns:
        A scalar, or with "none" one loss a position (B·T,), 0 where the target is -1.
    """
    rows, targets = hidden.flatten(0, -2), targets.flatten()
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    total, losses, _, _ = _losses(
        rows, head, targets, differentiate and reduction != "none", torch.compiler.is_compiling()
    )
    if reduction == "none":
        return cast(Tensor, losses)
    return cast(Tensor, total if reduction == "sum" else total / (targets != IGNORED_TARGET).sum())


def chunk_rows(rows: int, vocab_size: int, device: torch.device | str) -> int:
    """Return how many of `rows` rows a matmul works on at once: equal chunks, so that a compiled kernel sees one shape."""
    return _equal(rows, max(CHUNK_ROWS, _fused_rows(vocab_size, device)))


def fused_rows(rows: int, vocab_size: int, device: torch.device | str) -> int:
    """Return how many rows of a chunk go from logits to gradients at once."""
    return _equal(chunk_rows(rows, vocab_size, device), _fused_rows(vocab_size, device))


def _fused_rows(vocab_size: int, device: torch.device | str) -> int:
    elements = CHUNK_ELEMENTS.get(torch.device(device).type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // vocab_size)


def _equal(rows: int, most: int) -> int:
    """Return the size of the parts, at most `most`, that `rows` split into evenly."""
    return -(-rows // -(-rows // most)) if rows else 1


def _chunk_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (rows,) of one chunk; its raw logits (rows, vocab) become their gradients, in place."""
    # tanh by one exponential; the cap bounds the logits, so that their exponentials need no maximum subtracted.
    squeezed = 1.0 - 2.0 / (torch.exp(logits.float() * (2.0 / LOGIT_CAP)) + 1.0)
    exponentials = torch.exp(LOGIT_CAP * squeezed)
    sums = exponentials.sum(-1, keepdim=True)
    counted = (targets != IGNORED_TARGET).unsqueeze(-1)
    index = targets.clamp(min=0).unsqueeze(-1)
    losses = torch.log(sums) - LOGIT_CAP * squeezed.gather(-1, index)
    hit = torch.arange(logits.size(-1), device=logits.device) == index
    slope = 1.0 - squeezed * squeezed  # of the cap
    logits.copy_(torch.where(counted, (exponentials / sums - hit.float()) * slope, 0.0))
    return torch.where(counted, losses, 0.0).squeeze(-1)


def _chunk_losses_eager(logits: Tensor, targets: Tensor) -> Tensor:
    """Do the same without a compiler, in as few passes over as little memory as may be."""
    squeezed = logits.float().mul_(1.0 / LOGIT_CAP).tanh_()
    exponentials = torch.mul(squeezed, LOGIT_CAP).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    counted = (targets != IGNORED_TARGET).unsqueeze(-1)
    index = targets.clamp(min=0).unsqueeze(-1)
    losses = torch.log(sums) - LOGIT_CAP * squeezed.gather(-1, index)
    exponentials.mul_(counted / sums)
    exponentials.scatter_add_(-1, index, -counted.to(exponentials.dtype))
    slope = torch.sub(1.0, squeezed.square_(), out=squeezed)  # of the cap
    torch.mul(exponentials, slope, out=logits if logits.dtype == slope.dtype else slope)
    if logits.dtype != slope.dtype:
        logits.copy_(slope)
    return torch.where(counted, losses, 0.0).squeeze(-1)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_chunk_losses, dynamic=False)


@torch.library.custom_op("nanofed::head_loss", mutates_args=())
def _losses(
    hidden: Tensor, head: Tensor, targets: Tensor, differentiate: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses of N rows, the losses (N,), and the sum's gradients: (N, n_embd), and the head's in fp32.

    Without `differentiate` the gradients are empty. `compiled` fuses what happens to a chunk of logits.
    """
    losses = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
    weight = head.to(hidden.dtype)
    kernel = _compiled() if compiled else _chunk_losses_eager
    grad_hidden = torch.empty_like(hidden) if differentiate else hidden.new_empty(0)
    grad_head = torch.zeros_like(head) if differentiate else head.new_empty(0)
    step = chunk_rows(hidden.size(0), head.size(0), hidden.device)
    block = fused_rows(hidden.size(0), head.size(0), hidden.device)
    workspace = hidden.new_empty(min(step, hidden.size(0)), head.size(0))  # one for all chunks: it may be large
    for begin in range(0, hidden.size(0), step):
        rows = slice(begin, begin + step)
        logits = torch.mm(hidden[rows], weight.mT, out=workspace[: hidden.size(0) - begin])
        if not differentiate:
            losses[rows] = _chunk_values(logits, targets[rows])
            continue
        for part in range(0, logits.size(0), block):
            inner = slice(part, part + block)
            losses[rows][inner] = kernel(logits[inner], targets[rows][inner])
        # The logits are their gradients now.
        torch.mm(logits, weight, out=grad_hidden[rows])
        if hidden.dtype == head.dtype:
            grad_head.addmm_(logits.mT, hidden[rows])
        else:
            grad_head += logits.mT @ hidden[rows]  # rounded once a chunk, summed in fp32
    return losses.sum(), losses, grad_hidden, grad_head


def _chunk_values(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (rows,) of one chunk alone."""
    capped = LOGIT_CAP * logits.float().mul_(1.0 / LOGIT_CAP).tanh_()
    return F.cross_entropy(capped, targets, ignore_index=IGNORED_TARGET, reduction="none")


@_losses.register_fake
def _(
    hidden: Tensor, head: Tensor, targets: Tensor, differentiate: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
    gradients = (torch.empty_like(hidden), torch.empty_like(head))
    return losses.sum(), losses, *(gradients if differentiate else (hidden.new_empty(0), head.new_empty(0)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _total, losses, grad_hidden, grad_head = output
    ctx.mark_non_differentiable(losses, grad_hidden, grad_head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_head)


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_head = ctx.saved_tensors
    return (grad_hidden * grad).to(grad_hidden.dtype), grad_head * grad, None, None, None


_losses.register_autograd(_differentiate, setup_context=_keep)
