"""AdamW's update for a list of parameters at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Move parameters in place by Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        params: Parameters of any shapes.
        grads: Their gradients, left as they are.
        states: Their states; empty ones get `step` (int), `exp_avg` and `exp_avg_sq` (as the gradient).
        lr: Learning rate of this step.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Share of `lr` by which parameters shrink first.
    """
    if not params:
        return
    for grad, state in zip(grads, states, strict=True):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
        state["step"] += 1
    exp_avgs = [state["exp_avg"] for state in states]
    exp_avg_sqs = [state["exp_avg_sq"] for state in states]
    beta1, beta2 = betas

    torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, [(1.0 - beta2 ** state["step"]) ** 0.5 for state in states])
    torch._foreach_add_(denominators, eps)
    if weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, [-lr / (1.0 - beta1 ** state["step"]) for state in states])
