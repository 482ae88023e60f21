"""How far an optimizer step can move each parameter, whatever the gradients: the recipe's own measure of an update's length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanofed.optim.groups import ADAMW_BETAS
from nanofed.optim.muon import aspect_scale

# Newton–Schulz leaves singular values of 0.7 to 1.2 (`muon.orthogonalize`); a little more for bf16.
LARGEST_SINGULAR_VALUE = 1.25


@dataclass(frozen=True)
class Movement:
    """How far one optimizer step moves one parameter where the schedule multiplies rates by 1.

    Attributes:
        kind: the kind of the weight's group, `muon` or `adamw`.
        group: name of its group.
        step: L2 norm of a step in which every element (AdamW) or singular value (Muon) moves by the rate.
        decay: share of the parameter by which weight decay shrinks it.
    """

    kind: str
    group: str
    step: float
    decay: float

    def most(self, beta2: float) -> float:
        """Return the L2 norm that no step exceeds, without weight decay.

        AdamW moves an element by the rate times m / sqrt(v). By Cauchy and Schwarz, that ratio of two running means is at most
        (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2) for any gradients: 1.57 at 0.95, 7.5 at 0.998.

        Args:
            beta2: the decay of AdamW's second moments.
        """
        if self.kind == "muon":
            return LARGEST_SINGULAR_VALUE * self.step
        b1 = ADAMW_BETAS[0]
        ratio = (1 - b1) / math.sqrt(1 - beta2) / math.sqrt(1 - b1**2 / beta2) if b1**2 < beta2 else math.inf
        return max(1.0, ratio) * self.step


def movements(named: Iterable[tuple[str, Any]], groups: Iterable[Mapping[str, Any]]) -> dict[str, Movement]:
    """Return the movement of every parameter by name, in the order of the model.

    Args:
        named: names and parameters of the model; they may be on the meta device.
        groups: the optimizer's parameter groups.
    """
    names = {id(parameter): name for name, parameter in named}
    found = {}
    for group in groups:
        lr, kind = group["lr"], group["kind"]
        for parameter in group["params"]:
            if kind == "muon":
                step, decay = lr * aspect_scale(parameter.shape) * math.sqrt(min(parameter.shape)), 0.0
            else:
                step, decay = lr * math.sqrt(parameter.numel()), lr * group["weight_decay"]
            found[id(parameter)] = Movement(kind, group["name"], step, decay)
    return {name: found[key] for key, name in names.items()}
