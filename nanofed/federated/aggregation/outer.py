"""The outer optimizers: what the server does with the clients' mean pseudo-gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.aggregation.aggregator import PseudoGradient
from nanofed.federated.wire.blocks import BLOCK, flat, over_blocks
from nanofed.federated.wire.codec import Array, Weights

Outer = Literal["auto", "fedavg", "nesterov", "adam"]

# No element may be larger: with learning rates of 1e9 at most, nothing on the way of a step leaves fp32 then.
LARGEST = 1e18
PARTS = "parts"  # of a step, in the state of `DelayedNesterov`


class OuterOptimizer(ABC):
    """Steps the global weights along the clients' averaged pseudo-gradient.

    The mean pseudo-gradient g (global minus local weights, one array a parameter) is treated as an ordinary gradient
    (Reddi et al. 2021, arXiv:2003.00295), in its own precision, the weights in fp32. Each optimizer keeps `SLOTS` arrays of fp32
    a parameter.

    Attributes:
        lr: The outer learning rate; it may be set between two steps.
        momentum: The momentum, or the decay of a running mean of pseudo-gradients; it may be set between two steps.
    """

    SLOTS: ClassVar[tuple[str, ...]]

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr = lr
        self.momentum = momentum
        self._slots: dict[str, dict[str, Array]] = {}

    def step(self, weights: Weights, gradient: PseudoGradient, *, strength: float = 1.0, fraction: float = 1.0) -> None:
        """Step the weights in place, block by block: there is no second copy of them.

        All is checked before the first weight moves, so that a step is made as a whole or not at all.

        Args:
            weights: The global weights.
            gradient: The mean pseudo-gradient, fp64 or fp32.
            strength: How far this step is from plain averaging, in [0, 1]: at 1 it is the optimizer's own, at 0 the one of
                FedAvg, and between they are mixed linearly.
            fraction: How much of a full round it is: a round cut short by the horizon takes that share of what was gathered
                over full rounds.

        Raises:
            ValueError: The gradient or the state has other names or shapes than the weights, the gradient is not finite, or the
                step could carry a weight beyond fp32; nothing has changed then.
        """
        slots = {slot: self._slots.get(slot) or _zeros(weights) for slot in self._needed()}
        _check_shapes(weights, {"pseudo-gradient": gradient, **slots})
        names = list(weights)
        ws, gs = [flat(weights[name]) for name in names], [flat(gradient[name]) for name in names]
        states = [[flat(arrays[name]) for arrays in slots.values()] for name in names]

        def fits(index: int, part: slice) -> tuple[int, bool]:
            return index, all(_largest(t[part]) <= LARGEST for t in (gs[index], ws[index], *states[index]))

        for index, fitting in over_blocks([w.numel() for w in ws], lambda: fits):
            if not fitting:
                raise ValueError(
                    f"the pseudo-gradient of {names[index]} is not finite, or its step would leave the range of fp32"
                )
        kind = gs[0].dtype
        wide = kind == torch.float64  # else all is fp32, and weights and state are stepped where they are

        def worker() -> Callable[[int, slice], None]:
            buffers = torch.empty(2 + len(slots), BLOCK, dtype=kind)

            def step(index: int, part: slice) -> None:
                w, g, own = ws[index][part], gs[index][part], [state[part] for state in states[index]]
                buffer, wide_w, *wide_own = buffers[:, : g.numel()]
                new = [copy.copy_(state) for copy, state in zip(wide_own, own, strict=True)] if wide else own
                direction, rate = self._update(g, new, buffer, strength=strength, fraction=fraction)
                if wide:
                    for state, value in zip(own, new, strict=True):
                        state.copy_(value)
                    w.copy_(wide_w.copy_(w).sub_(direction, alpha=rate))
                else:
                    w.sub_(direction, alpha=rate)

            return step

        over_blocks([w.numel() for w in ws], worker)
        self._slots = slots

    def _needed(self) -> tuple[str, ...]:
        """Return the slots that the next step needs; the others are let go."""
        return self.SLOTS

    @abstractmethod
    def _update(
        self, g: Tensor, state: Sequence[Tensor], buffer: Tensor, *, strength: float, fraction: float
    ) -> tuple[Tensor, float]:
        """Bring a block's state forward in place, and return its direction, which may be in the buffer, and its rate."""

    def plan(self, clients: int, rounds: float) -> str:
        """Choose the rates of the next step, where they are not fixed, and return them in words.

        Args:
            clients: The clients whose updates are merged in it.
            rounds: The rounds that the run will have in all, at the tokens of those so far.
        """
        return f"outer step: learning rate {self.lr:.3g}, momentum {self.momentum:g}"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state, fp32: as in PyTorch's optimizers the tensors themselves, which steps change.

        They are called as the parameters where there is one slot, else `SLOT:parameter`.
        """
        return {
            name if len(self.SLOTS) == 1 else f"{slot}:{name}": torch.from_numpy(array)
            for slot, arrays in self._slots.items()
            for name, array in arrays.items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a saved state; that of another optimizer is passed over, and this one begins anew."""
        slots: dict[str, dict[str, Array]] = {}
        for key, tensor in state.items():
            slot, _, name = key.rpartition(":")
            slots.setdefault(slot if slot or len(self.SLOTS) > 1 else self.SLOTS[0], {})[name] = tensor.numpy().copy()
        self._slots = slots if slots.keys() == set(self.SLOTS) else {}


class OuterNesterov(OuterOptimizer):
    """Nesterov's momentum over pseudo-gradients: DiLoCo (Douillard et al. 2023, arXiv:2311.08105), MuLoCo (arXiv:2505.23725).

    With `lr=1, momentum=0` this is exactly FedAvg (McMahan et al. 2017, arXiv:1602.05629), which keeps no state. With one client
    it is the slow weights of SNOO (arXiv:2510.15830).

    A rate that is not given follows the number of clients and of planned rounds. Up to four clients learning rate and momentum
    are 0.7 and 0.6, the best of what was tried here (notebooks/LOG.md); from there they rise to 1.0 and 0.9 at sixteen (MuLoCo),
    where the mean of more updates is less noisy. Momentum gathers over 1 / (1 - momentum) rounds, at most half of the run's.
    """

    SLOTS: ClassVar[tuple[str, ...]] = ("momentum",)

    def __init__(self, lr: float | None = None, momentum: float | None = None) -> None:
        self._given = lr, momentum
        super().__init__(lr or 0.7, 0.6 if momentum is None else momentum)

    def plan(self, clients: int, rounds: float) -> str:
        """Choose the rates that are not given for so many clients and rounds in all."""
        lr, momentum = self._given
        if lr is not None and momentum is not None:
            return super().plan(clients, rounds)
        many = min(max(math.log2(clients / 4) / 2, 0.0), 1.0)
        most = 0.6 + 0.3 * many
        gathered = round(min(most, max(0.0, 1.0 - 2.0 / rounds)), 2)
        if lr is None:
            self.lr = 1.0 - (1.0 - (0.7 + 0.3 * many)) * gathered / most  # plain averaging where no momentum is left
        if momentum is None:
            self.momentum = gathered
        why = f"{clients} {'client' if clients == 1 else 'clients'}{' and few rounds' if gathered < most else ''}"
        return f"{super().plan(clients, rounds)}, chosen for {why}"

    def _needed(self) -> tuple[str, ...]:
        return self.SLOTS if self.momentum else ()

    def _rates(self, strength: float) -> tuple[float, float]:
        return strength * self.lr + (1.0 - strength), strength * self.momentum

    def _update(
        self, g: Tensor, state: Sequence[Tensor], buffer: Tensor, *, strength: float, fraction: float
    ) -> tuple[Tensor, float]:
        lr, momentum = self._rates(strength)
        if not state:
            return g, lr
        torch.add(g, state[0], alpha=momentum, out=state[0])
        return torch.add(g, state[0], alpha=fraction * momentum, out=buffer), lr


class OuterAdam(OuterOptimizer):
    """Adam over pseudo-gradients, without bias correction: FedAdam (Reddi et al. 2021, arXiv:2003.00295).

    A step moves each element by about lr, whatever the length of the pseudo-gradient.
    """

    SLOTS = ("mean", "square")
    DECAY = 0.99  # of the squares
    EPSILON = 1e-6  # far below the change of an element in a round

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__(lr, momentum)

    def _update(
        self, g: Tensor, state: Sequence[Tensor], buffer: Tensor, *, strength: float, fraction: float
    ) -> tuple[Tensor, float]:
        mean, square = state
        mean.mul_(self.momentum).add_(g, alpha=1.0 - self.momentum)
        square.mul_(self.DECAY).addcmul_(g, g, value=1.0 - self.DECAY)
        torch.sqrt(square, out=buffer).add_(self.EPSILON)
        torch.div(mean, buffer, out=buffer).mul_(strength * fraction * self.lr).add_(g, alpha=1.0 - strength)
        return buffer, 1.0


class DelayedNesterov(OuterNesterov):
    """Nesterov's momentum over updates that come one at a time (Liu et al. 2024, arXiv:2401.09135, algorithm 3 with c = 0).

    The update of one of N clients moves the weights by its N-th part as soon as it is there. Momentum is brought forward and
    applied with every N-th update only, for momentum that follows each single update swings too far. So N updates move the
    weights as one step of `OuterNesterov` along their mean does. N may change: what counts is when the parts add up to one.
    """

    SLOTS = ("momentum", "gathered")

    def __init__(self, lr: float | None = None, momentum: float | None = None) -> None:
        super().__init__(lr, momentum)
        self._part = 1.0  # of one step, which the next update is
        self._parts = 0.0  # gathered since momentum was applied
        self._whole = True  # the next update makes the parts a whole

    def plan(self, clients: int, rounds: float) -> str:
        """Choose the rates for so many clients that train at the same time and so many updates in all."""
        self._part = 1.0 / clients
        return super().plan(clients, rounds / clients)

    def step(self, weights: Weights, gradient: PseudoGradient, *, strength: float = 1.0, fraction: float = 1.0) -> None:
        """Step the weights along one client's pseudo-gradient; arguments and errors are those of `OuterOptimizer.step`."""
        parts = self._parts + self._part
        self._whole = parts > 1.0 - 1e-6  # ten tenths are a little less than one
        super().step(weights, gradient, strength=strength, fraction=fraction)
        self._parts = 0.0 if self._whole else parts

    def _update(
        self, g: Tensor, state: Sequence[Tensor], buffer: Tensor, *, strength: float, fraction: float
    ) -> tuple[Tensor, float]:
        lr, momentum = self._rates(strength)
        if state:
            velocity, gathered = state
            gathered.add_(g, alpha=self._part)
            if self._whole:
                torch.add(gathered, velocity, alpha=momentum, out=velocity)
                gathered.zero_()
                return torch.mul(g, self._part, out=buffer).add_(velocity, alpha=fraction * momentum), lr
        return g, lr * self._part

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state, fp32, with the parts that were gathered."""
        return {**super().state_dict(), PARTS: torch.tensor(self._parts, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a saved state; that of another optimizer is passed over, and this one begins anew."""
        super().load_state_dict({key: tensor for key, tensor in state.items() if key != PARTS})
        self._parts = float(state[PARTS]) if PARTS in state else 0.0


def make_outer(
    kind: Outer, lr: float | None = None, momentum: float | None = None, *, asynchronous: bool = False
) -> OuterOptimizer:
    """Return an outer optimizer with its own rates, or those that are given in their place.

    Args:
        kind: The rule of its steps.
        lr: The outer learning rate.
        momentum: The outer momentum.
        asynchronous: It is stepped along one client's update at a time; `adam` cannot be.
    """
    if kind == "adam":
        return OuterAdam(0.01 if lr is None else lr, 0.9 if momentum is None else momentum)
    own = {"fedavg": (1.0, 0.0), "nesterov": (0.7, 0.6), "auto": (None, None)}[kind]
    optimizer = DelayedNesterov if asynchronous else OuterNesterov
    return optimizer(own[0] if lr is None else lr, own[1] if momentum is None else momentum)


def damping(age: int, clients: int) -> float:
    """Return the factor on an update that was trained from weights `age` merges old.

    Of N clients of one speed each trains while the N - 1 others are merged: at that age nothing is damped, as all are late alike.
    What is later counts in rounds of N merges, s: the factor is 1 / sqrt(1 + s), the polynomial of FedBuff (Nguyen et al. 2022,
    arXiv:2106.06639), which counts merges from the first on.

    Args:
        age: The merges since the client was sent its weights, its own not among them.
        clients: How many clients train at the same time.
    """
    return 1.0 / math.sqrt(1.0 + max(0, age - clients + 1) / clients)


def outer_strength(progress: float, warmdown: float) -> float:
    """Return how far the outer step is from plain averaging: 1 until the last part `warmdown` of the run, then down to 0.

    Outer momentum that is still there when the inner learning rate has gone moves the weights away from where training has
    brought them. So it goes with the rate, and the last rounds are averages.

    Args:
        progress: The merged share of the horizon, this round included.
        warmdown: The last part of the run, in [0, 1], over which the strength falls.
    """
    left = max(0.0, 1.0 - progress)
    return 1.0 if left >= warmdown else left / warmdown


def _zeros(weights: Weights) -> dict[str, Array]:
    return {name: np.zeros(array.shape, np.float32) for name, array in weights.items()}


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)  # both are NaN where one element is
    return max(abs(float(low)), abs(float(high)))


def _check_shapes(weights: Weights, others: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
    for what, arrays in others.items():
        if list(arrays) != list(weights):
            raise ValueError(f"the {what} names {sorted(set(arrays) ^ set(weights))} differently")
        for name, old in weights.items():
            if arrays[name].shape != old.shape:
                raise ValueError(f"the {what} of {name} has shape {arrays[name].shape}, the weights {old.shape}")
    for name, old in weights.items():
        if old.dtype != np.float32 or not old.flags.c_contiguous or not old.flags.writeable:
            raise ValueError(f"{name} cannot be stepped in place: it must be a contiguous, writable fp32 array")
