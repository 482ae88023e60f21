"""Muon's update for a list of matrices: momentum, then the nearest orthogonal matrix by Newton–Schulz."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Quintic with the steepest slope at zero that still stays bounded (Jordan, https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
STACK_ELEMENTS = 2**26  # matrices orthogonalised at once: bounds the temporaries of a large model, fills a GPU anyway


def orthogonalize(matrices: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Return matrices with the same singular vectors and all singular values near 1 (roughly 0.7 to 1.2).

    Args:
        matrices: One matrix (rows, columns) or a stack (N, rows, columns) of them, each treated on its own.
        steps: Newton–Schulz iterations.
        dtype: What the iterations run in; bf16 is enough.

    Returns:
        The stack in `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(dtype)
    if tall:
        x = x.mT  # the Gram matrix is then of the short side
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # One graph a shape of stack; rate and momentum stay outside of it, so no schedule ever recompiles.
    return torch.compile(orthogonalize, dynamic=False, fullgraph=True)


def aspect_scale(shape: torch.Size) -> float:
    """Return √max(1, rows / columns): a tall orthogonal matrix changes its outputs less, so it may step further."""
    return math.sqrt(max(1.0, shape[0] / shape[1]))


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    ns_steps: int,
    ns_dtype: torch.dtype,
    compiled: bool = False,
) -> None:
    """Move matrices in place by orthogonalized Nesterov momentum; equals `torch.optim.Muon` without weight decay.

    Args:
        params: Matrices of any shapes.
        grads: Their gradients, left as they are.
        states: Their states; empty ones are filled with `momentum_buffer`.
        lr: Learning rate of this step, before the factor of each shape.
        momentum: Decay of the running mean of gradients.
        ns_steps: Newton–Schulz iterations.
        ns_dtype: What they run in.
        compiled: Run them compiled: on a GPU it fuses cast, norm and division; on a CPU it is all matrix products anyway.
    """
    if not params:
        return
    for grad, state in zip(grads, states, strict=True):
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
    buffers = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(buffers, grads, 1.0 - momentum)

    iterate = _compiled() if compiled else orthogonalize
    for indices in equal_stacks(params):
        nesterov = torch._foreach_lerp([grads[i] for i in indices], [buffers[i] for i in indices], momentum)
        updates = iterate(torch.stack(nesterov), steps=ns_steps, dtype=ns_dtype)
        for i, update in zip(indices, updates, strict=True):
            params[i].add_(update, alpha=-lr * aspect_scale(params[i].shape))


def equal_stacks(params: list[Tensor]) -> Iterator[list[int]]:
    """Yield the positions of equally shaped matrices, at most `STACK_ELEMENTS` of elements together, in even parts."""
    same_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        same_shape[param.shape].append(i)
    for shape, indices in same_shape.items():
        parts = math.ceil(len(indices) / max(1, STACK_ELEMENTS // shape.numel()))
        size = math.ceil(len(indices) / parts)  # at most two sizes a shape, so few graphs to compile
        yield from (indices[start : start + size] for start in range(0, len(indices), size))
