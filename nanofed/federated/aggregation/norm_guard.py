"""How long an update may be: against what the recipe's steps can move, what sites have sent before, and the others of its round.

An update's length is measured for each parameter group by itself and in units of the recipe. Muon's steps have one length
whatever the gradients are, and AdamW's have a largest one; k steps move a weight by between sqrt(k) of them (steps that have
nothing in common) and k (steps that agree). The geometric mean of these two is the unit: honest updates of the group of
matrices are 0.5 to 0.8 long in it, of 1 step or of 16, at every rate of the schedule. So a length says something before any
other update is known, and where there are only two sites, of which neither is the majority.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nanofed.optim import Movement, Schedule

WINDOW = 8  # of a site's lengths, whose median is its vote
GROWTH = 1.25  # of what is usual, from one round to the next, at most
LEAST = 0.3  # that is taken for usual, however little was sent
NEAR_ZERO = 0.05  # honest updates are ten times as long in one group at least, from the very first step on
UNSUSPICIOUS = 2.0  # of what is usual: it is merged at once, before the others of its round are known
SLACK = 1.1  # over what steps can move: rounding of the update, in bf16 as well
ROUNDING = 1e-6  # of a weight: what fp32 may add to its update
MOST_OF_WEIGHTS = 10.0  # an update's norm over that of the weights
LARGEST = 1e30  # norm of any update: fp32 has to hold the weights after it, whatever else is allowed
POINTS = 1000  # at which the schedule is looked at: more steps of a round are spread over them

Lengths = dict[str, float]  # parameter group -> length, in the recipe's unit


class UnusualNorm(Exception):
    """An update that may not be merged for its length; the message says why."""

    def __init__(self, kind: Literal["small_norm", "large_norm"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Steps:
    """The learning rates of a round's steps, as multiples of the initial ones: their sum, and the root of the sum of squares."""

    linear: float
    quadrature: float

    @classmethod
    def of(cls, schedule: Schedule, steps: int, *, clock_tokens: int, step_tokens: int, horizon_tokens: int) -> Steps:
        """Return the rates of a client's first steps of a round.

        Args:
            schedule: the recipe's learning rate schedule.
            steps: the number of steps.
            clock_tokens: merged tokens of the run at the first step.
            step_tokens: tokens by which a step moves the schedule, those of all clients.
            horizon_tokens: tokens of the whole run.
        """
        at = np.linspace(0, steps - 1, min(steps, POINTS))
        rates = [schedule.lr_multiplier(min(1.0, (clock_tokens + float(k) * step_tokens) / horizon_tokens)) for k in at]
        squares = math.fsum(rate**2 for rate in rates) / len(rates)
        return cls(steps * math.fsum(rates) / len(rates), math.sqrt(steps * squares))


@dataclass(frozen=True)
class Length:
    """How long an update is: its L2 norm, and its length in every parameter group."""

    norm: float
    groups: Lengths


class NormGuard:
    """Decides what of an update is merged, by its length.

    What no steps of the recipe can have moved is refused, and so is what has hardly moved at all. Else the limit in every group
    of Muon's is `ratio` times what is usual: the lower median of one vote a site, each the median of what was merged of it lately
    and of its update of this round. Usual is never less than `LEAST` and grows by a quarter a round at most, so no site can
    bring the limit below what honest updates are, nor drive it up, where it has no majority. What was refused is no vote: the
    site is welcome again with its next update that fits.

    Groups of AdamW's have no usual length. Its second moments remember the large gradients of the first rounds, and those of a
    site that has joined later do not: its head moves at full rate where that of the others hardly moves (7 steps: 1.24 long
    against 0.05). What steps can move at most is the only limit there, 7 steps 1.6 and 256 steps 4 long.

    Args:
        ratio: largest length over what is usual; None for any length, also none at all.
        action: `clip` an update that is longer to the limit, or `reject` it.
        movements: weight -> how far a step of the recipe moves it, in the order of the weights.
    """

    def __init__(
        self, ratio: float | None, action: Literal["clip", "reject"], movements: Mapping[str, Movement]
    ) -> None:
        self._ratio = ratio
        self._action = action
        self._movements = movements
        self._groups = sorted({movement.group for movement in movements.values()})
        self._compared = sorted({movement.group for movement in movements.values() if movement.kind == "muon"})
        self._sites: dict[str, deque[Lengths]] = {}
        self._usual: Lengths = {}

    def measure(
        self, norms: Sequence[float], steps: Steps, weight_norm: Callable[[str], float] = lambda name: 0.0
    ) -> Length:
        """Return the length of an update.

        Args:
            norms: L2 norm of the update of every weight, in their order.
            steps: that it took.
            weight_norm: returns the norm of a weight of the model; asked for where weights decay, and of what seems wrong.

        Raises:
            UnusualNorm: no steps of the recipe can move a weight so far, or they would have moved the weights further.
        """
        norm = math.sqrt(math.fsum(value**2 for value in norms))
        if self._ratio is None:
            return Length(norm, {})
        squares = dict.fromkeys(self._groups, 0.0)
        units = dict.fromkeys(self._groups, 0.0)
        for (name, movement), moved in zip(self._movements.items(), norms, strict=True):
            decayed = movement.decay * weight_norm(name) if movement.decay else 0.0
            most = SLACK * steps.linear * (movement.most + decayed)
            if moved > most and moved > most + ROUNDING * weight_norm(name):
                raise UnusualNorm(
                    "large_norm",
                    f"its update of {name} is {moved:.3g} long, more than the limit of {most:.3g} that no steps of the "
                    "recipe exceed",
                )
            squares[movement.group] += moved**2
            units[movement.group] += movement.step**2
        unit = math.sqrt(steps.linear * steps.quadrature)
        groups = {g: math.sqrt(squares[g] / units[g]) / unit if unit else 0.0 for g in squares}
        if unit and max(groups.values()) < NEAR_ZERO and not self._is_rounded_away(unit, weight_norm):
            raise UnusualNorm(
                "small_norm",
                f"its update is {norm:.3g} long, {max(groups.values()):.2g} of what its steps move at least in one group of "
                f"weights, where {NEAR_ZERO:g} is the least: it has hardly trained",
            )
        return Length(norm, groups)

    def _is_rounded_away(self, unit: float, weight_norm: Callable[[str], float]) -> bool:
        """Tell whether steps are so short, at the very end of a long schedule, that fp32 need not hold them."""
        steps = math.sqrt(math.fsum(movement.step**2 for movement in self._movements.values()))
        weights = math.sqrt(math.fsum(weight_norm(name) ** 2 for name in self._movements))
        return NEAR_ZERO * unit * steps < ROUNDING * weights

    def is_unsuspicious(self, length: Length) -> bool:
        """Tell whether an update is certain to be within the limit, whatever the others of its round have sent."""
        if self._ratio is None:
            return length.norm <= LARGEST
        plain = min(self._ratio, UNSUSPICIOUS)
        return all(
            length.groups[group] <= max(self._ratio * LEAST, plain * self._usual.get(group, 0.0))
            for group in self._compared
        )

    def scale(self, length: Length, here: Mapping[str, Length], weights_norm: Callable[[], float]) -> float:
        """Return what an update is to be multiplied with: 1, or less where it is clipped.

        Args:
            length: of the update.
            here: client -> length of its update of this round, this one's too.
            weights_norm: returns the norm of the global weights.

        Raises:
            UnusualNorm: it is too long, and such updates are rejected, or it is longer than ten times the weights.
        """
        if self._ratio is None:
            return min(1.0, LARGEST / length.norm) if length.norm else 1.0
        if length.norm > MOST_OF_WEIGHTS * weights_norm() > 0:
            raise UnusualNorm(
                "large_norm",
                f"its update is {length.norm:.3g} long, more than the limit of {MOST_OF_WEIGHTS:g} times the weights' norm",
            )
        usual = self._usual_with({client: other.groups for client, other in here.items()})
        over = {group: length.groups[group] / (self._ratio * usual[group]) for group in self._compared}
        worst = max(over, key=lambda group: over[group], default=None)
        if worst is None or over[worst] <= 1:
            return 1.0
        if self._action == "reject":
            raise UnusualNorm(
                "large_norm",
                f"its update is {length.norm:.3g} long, in the group {worst} {over[worst]:.3g} times the limit, which is "
                f"{self._ratio:g} times what is usual among {len(self._sites.keys() | here.keys())} clients",
            )
        return 1 / over[worst]

    def accept(self, updates: Mapping[str, tuple[Length, float]]) -> None:
        """Count the updates of a round that was merged: client -> length, and what it was scaled by."""
        scaled = {
            client: {group: length.groups[group] * scale for group in self._compared}
            for client, (length, scale) in updates.items()
            if length.groups
        }
        if scaled:
            self._usual = self._usual_with(scaled)
        for client, groups in scaled.items():
            self._sites.setdefault(client, deque(maxlen=WINDOW)).append(groups)

    def _usual_with(self, here: Mapping[str, Lengths]) -> Lengths:
        """Return what is usual in every group, with the updates of a round among the votes."""
        votes = {
            client: [*self._sites.get(client, ()), *([here[client]] if client in here else [])]
            for client in self._sites.keys() | here.keys()
        }
        usual = {}
        for group in self._compared:
            found = statistics.median_low(
                [statistics.median(groups[group] for groups in vote) for vote in votes.values()]
            )
            if self._usual:
                found = min(found, GROWTH * self._usual[group])
            usual[group] = max(found, LEAST)
        return usual

    def state_dict(self) -> dict[str, Any]:
        """Return the lengths of every site and what is usual, as plain values."""
        return {
            "sites": {client: list(lengths) for client, lengths in self._sites.items()},
            "usual": self._usual.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved lengths; a checkpoint of a nanofed that counted no votes by site begins without."""
        sites: Mapping[str, Iterable[Lengths]] = state.get("sites", {})
        self._sites = {client: deque(lengths, maxlen=WINDOW) for client, lengths in sites.items()}
        self._usual = dict(state.get("usual", {}))
