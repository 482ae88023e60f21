"""AdamW's update for a list of parameters at once, in torch's fused kernel."""

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

    One pass over memory instead of the eight of separate operations: 3 times faster on a CPU (`bin/bench optimizer`).

    Args:
        params: Dense parameters of any shapes, on one device.
        grads: Their gradients, left as they are.
        states: Their states; empty ones get `step` (int), `exp_avg` and `exp_avg_sq` (as the parameter).
        lr: Learning rate of this step.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Share of `lr` by which parameters shrink first.
    """
    if not params:
        return
    for param, state in zip(params, states, strict=True):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _laid_out_as(param, state[name])
    torch._fused_adamw_(
        params,
        [_laid_out_as(param, grad) for param, grad in zip(params, grads, strict=True)],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        # filled on the device: a copy from the host would wait for it
        [torch.full((), float(state["step"]), device=p.device) for p, state in zip(params, states, strict=True)],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    # The kernel walks memory and does not look at strides, on CPU without a word.
    return tensor if tensor.stride() == param.stride() else torch.empty_like(param).copy_(tensor)
