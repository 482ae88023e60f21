"""The parts without a place of their own: a casting linear layer, the norm, rotary position embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0
# So few rows are cheaper with the weight on the left, on a CPU in bf16: oneDNN copies a right-hand matrix into its own layout
# at every product, and a left-hand one not (measured with AMX: 1.3x to 1.7x up to 64 rows; with fp32 it makes no difference).
FEW_ROWS = 32


class Linear(nn.Linear):
    """A matrix without bias whose fp32 master weight is cast to the dtype of what comes in.

    The gradient arrives in fp32 by the cast's backward, so mixed precision needs no autocast.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (…, in_features) to (…, out_features) in `x.dtype`."""
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (…, in) by the transpose of a weight (out, in) that is cast to the dtype of `x`, to (…, out)."""
    weight = weight.to(x.dtype)
    rows = x.numel() // x.size(-1)
    if x.is_cpu and x.dtype is torch.bfloat16 and rows <= FEW_ROWS and not torch.is_grad_enabled():
        y = weight @ x.flatten() if rows == 1 else (weight @ x.reshape(rows, -1).mT).mT
        return y.reshape(*x.shape[:-1], -1)
    return F.linear(x, weight)


def norm(x: Tensor) -> Tensor:
    """Divide each vector of the last dimension by its root mean square, without parameters; eps is fp32's."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(
    length: int, head_dim: int, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of every position, each (length, 1, head_dim / 2) to broadcast over heads.

    Computed in fp32 and rounded once to `dtype`: nanochat keeps them in bf16 whatever the matmuls run in.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (ROTARY_BASE ** (channels / head_dim))
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (B, T, H, D) by their position, pairing channel i with i + D/2 (Su et al., arXiv:2104.09864).

    The angle's sign is nanochat's and the opposite of Llama's; transformers' NanoChat has it too.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1).to(x.dtype)
