"""The outer optimizer: what the server does with the clients' mean pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.federated.aggregation.aggregator import PseudoGradient
from nanofed.federated.wire.blocks import BLOCK, flat, over_blocks
from nanofed.federated.wire.codec import Array, Weights

LARGEST = float(np.finfo(np.float32).max)


class OuterNesterov:
    """Step the global weights along the clients' averaged pseudo-gradient.

    The mean pseudo-gradient g (global minus local weights, one array a parameter) is treated as an ordinary gradient
    (Douillard et al. 2023, arXiv:2311.08105; with Muon inside, MuLoCo, arXiv:2505.23725), in its own precision, the weights in
    fp32.
    With `lr=1, momentum=0` this is exactly FedAvg (McMahan et al. 2017, arXiv:1602.05629).

    Args:
        lr: outer learning rate.
        momentum: Nesterov momentum.

    Raises:
        ConfigError: lr is not positive or momentum not in [0, 1).
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.6) -> None:
        if not lr > 0 or not 0 <= momentum < 1:
            raise ConfigError(
                f"federation: outer_lr must be positive and outer_momentum in [0, 1), not {lr}, {momentum}"
            )
        self.lr = lr
        self.momentum = momentum
        self._velocity: dict[str, Array] = {}

    def step(self, weights: Weights, gradient: PseudoGradient, *, fraction: float = 1.0) -> None:
        """Step the weights in place, block by block: there is no second copy of them.

        All is checked before the first weight moves, so that a step is made as a whole or not at all.

        Args:
            weights: the global weights.
            gradient: the mean pseudo-gradient, fp64 or fp32.
            fraction: how much of a full round it is: a round cut short by the horizon takes that share of the momentum,
                which was gathered over full rounds.

        Raises:
            ValueError: the gradient or the momentum has other names or shapes than the weights, the gradient is not finite,
                or the step could carry a weight beyond fp32; nothing has changed then.
        """
        share = fraction * self.momentum
        velocity = self._velocity
        if self.momentum and not velocity:
            velocity = {name: np.zeros(array.shape, np.float32) for name, array in weights.items()}
        _check_shapes(weights, gradient, velocity if self.momentum else {})
        names = list(weights)
        ws, gs = [flat(weights[name]) for name in names], [flat(gradient[name]) for name in names]
        vs = [flat(velocity[name]) for name in names] if self.momentum else []
        self._check_values(names, ws, gs, vs, share)

        kind = gs[0].dtype
        wide = kind == torch.float64  # else all is fp32, and weights and momentum are stepped where they are

        def worker() -> Callable[[int, slice], None]:
            buffers = torch.empty(3, BLOCK, dtype=kind)

            def step(index: int, part: slice) -> None:
                w, g = ws[index][part], gs[index][part]
                update, wide_v, wide_w = buffers[:, : g.numel()]
                if self.momentum:
                    v = vs[index][part]
                    new = wide_v.copy_(v) if wide else v
                    torch.add(g, new, alpha=self.momentum, out=new)
                    torch.add(g, new, alpha=share, out=update)
                    if wide:
                        v.copy_(new)
                    g = update
                if wide:
                    w.copy_(wide_w.copy_(w).sub_(g, alpha=self.lr))
                else:
                    w.sub_(g, alpha=self.lr)

            return step

        over_blocks([w.numel() for w in ws], worker)
        self._velocity = velocity

    def _check_values(
        self, names: list[str], ws: list[Tensor], gs: list[Tensor], vs: list[Tensor], share: float
    ) -> None:
        """Refuse a step that could end in a weight or momentum that fp32 does not hold, by the largest values of each block."""

        def largest(tensor: Tensor) -> float:
            low, high = torch.aminmax(tensor)  # both are NaN where one element is
            return max(abs(float(low)), abs(float(high)))

        def reach(index: int, part: slice) -> tuple[int, float]:
            g = largest(gs[index][part])
            velocity = self.momentum * largest(vs[index][part]) + g if vs else 0.0
            update = g + share * velocity
            return index, max(velocity, update, largest(ws[index][part]) + self.lr * update)

        for index, bound in over_blocks([w.numel() for w in ws], lambda: reach):
            if not bound <= LARGEST:
                raise ValueError(
                    f"the pseudo-gradient of {names[index]} is not finite, or its step would leave the range of fp32"
                )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the momentum, fp32, by parameter: as in PyTorch's optimizers the tensors themselves, which steps change."""
        return {name: torch.from_numpy(array) for name, array in self._velocity.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a saved momentum."""
        self._velocity = {name: tensor.numpy().copy() for name, tensor in state.items()}


def _check_shapes(weights: Weights, gradient: PseudoGradient, velocity: Weights) -> None:
    for what, arrays in (("pseudo-gradient", gradient), ("momentum", velocity)):
        if what == "momentum" and not velocity:
            continue
        if list(arrays) != list(weights):
            raise ValueError(f"the {what} names {sorted(set(arrays) ^ set(weights))} differently")
        for name, old in weights.items():
            if arrays[name].shape != old.shape:
                raise ValueError(f"the {what} of {name} has shape {arrays[name].shape}, the weights {old.shape}")
    for name, old in weights.items():
        if old.dtype != np.float32 or not old.flags.c_contiguous or not old.flags.writeable:
            raise ValueError(f"{name} cannot be stepped in place: it must be a contiguous, writable fp32 array")
