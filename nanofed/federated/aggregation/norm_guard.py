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

from nanofed.optim import Movement

# A site's vote is the median of its last WINDOW merged lengths. The usual length is never below LEAST, and grows by the factor
# GROWTH from one round to the next at most.
WINDOW = 8
LEAST = 0.3
GROWTH = 1.25
# An update that is shorter than this in every group has hardly trained: honest ones are ten times as long in one group at least.
NEAR_ZERO = 0.05
# An update of up to this multiple of the usual length is merged at once. A longer one waits for the others of its round.
UNSUSPICIOUS = 2.0
# Rounding may add a tenth to what the steps move, and 1e-6 of a weight's own norm: bf16 on the wire, fp32 in the optimizer.
SLACK = 1.1
ROUNDING = 1e-6
# No update may be longer than ten times the weights. With max_norm_ratio null the limit is what the outer step can bear.
MOST_OF_WEIGHTS = 10.0
LARGEST = 1e15

Lengths = dict[str, float]  # parameter group -> length, in the recipe's unit


class UnusualNorm(Exception):
    """An update that may not be merged for its length; the message says why."""

    def __init__(self, kind: Literal["small_norm", "large_norm"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Steps:
    """The rates and the memory with which a client takes the steps of a round."""

    linear: float  # the sum of their learning rates, as multiples of the initial ones
    quadrature: float  # the root of the sum of their squares
    beta2: float  # the decay of AdamW's second moments


@dataclass(frozen=True)
class Length:
    """How long an update is: its L2 norm, and its length in every parameter group."""

    norm: float
    groups: Lengths


class NormGuard:
    """Decides what of an update is merged, by its length.

    An update is refused where no steps of the recipe can have moved a weight so far, and where it has hardly moved at all.

    In every parameter group that Muon steps, an update may also be `ratio` times the usual length at most. The usual length is
    the lower median of one vote a site; the vote is the median of the site's last merged lengths and of its update of this
    round. It has a floor and grows by a quarter a round at most. So a site without a majority can neither bring the limit below
    honest updates nor drive it up. A refused update is no vote, and the site's next update is judged anew.

    In the groups that AdamW steps there is no usual length. AdamW's second moments remember the large gradients of the first
    rounds, but those of a site that joins later do not: over 7 steps its head moves 1.24 units where the heads of the others
    move 0.05. The only limit there is what the steps can move: at a beta2 of 0.95, 1.6 units over 7 steps and 4 over 256.

    Args:
        ratio: largest length over the usual length. With None every length passes, also zero.
        action: what happens to a longer update: `clip` scales it down to the limit, `reject` refuses it.
        movements: How far one step of the recipe moves each weight, in the order of the weights.
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
            norms: L2 norm of the update of every weight, in the order of the weights.
            steps: the learning rates of the steps that the client took.
            weight_norm: It returns the L2 norm of a global weight by name, where weights decay and before a refusal.

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
            most = SLACK * steps.linear * (movement.most(steps.beta2) + decayed)
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
        """Tell whether an update is within the limit whatever the other clients of the round have sent."""
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
            length: The length of the update.
            here: The length of the update of every client of the round, this one included.
            weights_norm: It returns the L2 norm of all global weights together.

        Raises:
            UnusualNorm: the update is too long and `action` is `reject`, or it is longer than ten times the weights.
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
        """Count the updates of a merged round as votes: for every client its length, and its factor from `scale`."""
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
        """Return the usual length of every group that Muon steps, with the updates of a round among the votes."""
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
        """Return the merged lengths of every site and the usual lengths, as plain values."""
        return {
            "sites": {client: list(lengths) for client, lengths in self._sites.items()},
            "usual": self._usual.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved lengths. Checkpoints from before votes were counted by site have none, and start empty."""
        sites: Mapping[str, Iterable[Lengths]] = state.get("sites", {})
        self._sites = {client: deque(lengths, maxlen=WINDOW) for client, lengths in sites.items()}
        self._usual = dict(state.get("usual", {}))
