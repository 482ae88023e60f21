"""The outer optimizer: what the server does with the clients' mean pseudo-gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nanofed.errors import ConfigError
from nanofed.federated.server.merge import PseudoGradient
from nanofed.federated.wire.codec import Array, Weights


class OuterNesterov:
    """Step the global weights along the clients' averaged pseudo-gradient.

    The mean pseudo-gradient g (global minus local weights, one array a parameter) is treated as an ordinary gradient
    (Douillard et al. 2023, arXiv:2311.08105; with Muon inside, MuLoCo, arXiv:2505.23725), in fp64, the weights in fp32.
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
        self._velocity: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def step(self, weights: Weights, gradient: PseudoGradient, *, fraction: float = 1.0) -> dict[str, Array]:
        """Return the new global weights; the old ones stay as they are.

        Args:
            weights: the global weights.
            gradient: the mean pseudo-gradient.
            fraction: how much of a full round it is: a round cut short by the horizon takes that share of the momentum,
                which was gathered over full rounds.

        Raises:
            ValueError: the gradient has other names or shapes than the weights.
        """
        if list(gradient) != list(weights):
            raise ValueError(f"the pseudo-gradient names {sorted(set(gradient) ^ set(weights))} differently")
        new: dict[str, Array] = {}
        velocities = dict(self._velocity)
        for name, old in weights.items():
            g = gradient[name]
            if g.shape != old.shape:
                raise ValueError(f"the pseudo-gradient of {name} has shape {g.shape}, the weights {old.shape}")
            update = g
            if self.momentum:
                velocity = self._velocity.get(name, np.zeros(old.shape, np.float32)) * np.float64(self.momentum) + g
                update = g + fraction * self.momentum * velocity
                velocities[name] = velocity.astype(np.float32)
            new[name] = (old - self.lr * update).astype(np.float32)
        self._velocity = velocities  # only now: a gradient that is refused leaves none behind
        return new

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the momentum, fp32, by parameter."""
        return {name: torch.from_numpy(array) for name, array in self._velocity.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a saved momentum."""
        self._velocity = {name: tensor.numpy().copy() for name, tensor in state.items()}
