"""Which parameter is moved by what, and how fast: the October recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from nanofed.errors import ConfigError

ADAMW_BETAS = (0.8, 0.95)  # where a run begins; `Schedule.beta2` sets the second one
TUNED_WIDTH = 768  # AdamW's rates were tuned at this width and scale with 1/√width from there


def parameter_groups(
    model: nn.Module,
    *,
    embedding_lr: float = 0.2,
    head_lr: float = 0.004,
    matrix_lr: float = 0.02,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split a GPT's parameters into the groups that `MuonAdamW` takes.

    Head and embedding go to AdamW, at rates × (width / 768)^-0.5; every matrix of the blocks goes to Muon, which itself
    scales each by √max(1, rows / columns). Source: karpathy/nanochat at 2e93853.

    Args:
        model: A model with a GPT's parameter names.
        embedding_lr: Of `transformer.wte`, at width 768.
        head_lr: Of `lm_head`, at width 768.
        matrix_lr: Of the blocks' matrices.
        weight_decay: Decoupled decay of the AdamW groups; Muon's have none.

    Raises:
        ConfigError: a parameter fits no group, or a group stays empty.
    """
    head, embedding, matrices = [], [], []
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight":
            head.append(parameter)
        elif name == "transformer.wte.weight":
            embedding.append(parameter)
        elif name.startswith("transformer.h.") and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            raise ConfigError(f"optimizer: parameter {name} {tuple(parameter.shape)} belongs to no group of the recipe")
    if not (head and embedding and matrices):
        raise ConfigError("optimizer: the model lacks lm_head, transformer.wte or transformer.h of its own")

    width_scale = (embedding[0].size(1) / TUNED_WIDTH) ** -0.5
    adamw = {"kind": "adamw", "betas": ADAMW_BETAS, "eps": 1e-10, "weight_decay": weight_decay}
    return [
        {"name": "head", "params": head, "lr": head_lr * width_scale, **adamw},
        {"name": "embedding", "params": embedding, "lr": embedding_lr * width_scale, **adamw},
        {"name": "matrices", "params": matrices, "lr": matrix_lr, "kind": "muon"},
    ]
