"""How large an update may be: its norm against what accepted updates had."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from nanofed.federated.server.validation import Refused

WINDOW = 64  # accepted updates that the median is taken over
WARM_UP = 8  # of them before the median counts
WARM_UP_ROUNDS = 4  # and rounds: with a head that begins at zero, a first round of one step moves a tenth of the second
FIRST_RATIO = 10.0  # of an update's norm to the weights', before that
LARGEST = 1e30  # of any update: fp32 has to hold the weights after it, whatever else is allowed


class NormGuard:
    """Compares an update's L2 norm per root of its steps with the running median of accepted ones.

    Steps that were independent would move the weights by the root of their number. Clients of unlike speed differ by more
    than that where steps agree, so a limit has to be generous: it is there for a hundredfold update, not for a fourfold one.

    Only what was merged enters the median (`accept`, at the commit), and never with more than the limit; what was
    rejected enters with the limit: were it left out, a run whose updates grow would be held to its youth for ever.

    Args:
        ratio: largest norm over the median; None for no limit.
        action: `clip` a larger update to the limit, or `reject` it.
    """

    def __init__(self, ratio: float | None, action: Literal["clip", "reject"]) -> None:
        self._ratio = ratio
        self._action = action
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._rounds = 0

    @property
    def _is_warm(self) -> bool:
        return self._rounds >= WARM_UP_ROUNDS and len(self._norms) >= WARM_UP

    def limit(self, weights_norm: Callable[[], float]) -> float:
        """Return the largest norm per root of steps; in the warm-up a multiple of the weights' own norm, of all steps."""
        if self._ratio is None:
            return LARGEST
        if not self._is_warm:
            return min(LARGEST, FIRST_RATIO * weights_norm())
        return min(LARGEST, self._ratio * statistics.median(self._norms))

    def scale(self, norm: float, steps: int, weights_norm: Callable[[], float]) -> float:
        """Return what an update is to be multiplied with: 1, or less where it is clipped.

        Args:
            norm: L2 norm of the update.
            steps: that it took.
            weights_norm: returns that of the global weights; asked for in the warm-up only.

        Raises:
            Refused: it is too large, and such updates are rejected.
        """
        size, limit = norm / math.sqrt(steps), self.limit(weights_norm)
        if size <= limit:
            return 1.0
        if self._action == "reject" or limit == 0:
            if self._is_warm:
                self._norms.append(limit)
            raise Refused(
                "large_norm", f"its update is {size:.3g} long per root of steps, more than the limit of {limit:.3g}"
            )
        return limit / size

    def outliers(self, updates: Mapping[str, tuple[float, int]]) -> dict[str, Refused]:
        """Return who of a round's clients is out of all proportion to the others of the round, and why.

        For a merge that has all updates of a round before it: the median needs no earlier rounds then, and fewer than half of
        the clients cannot shift it beyond what the others span. Each update says how long another may honestly be: fewer steps
        make it shorter by the root of their ratio where they do not agree; more steps longer by its square where they grow, as
        the first ones of a head of zeros do and those of a rising learning rate.

        Args:
            updates: client -> the L2 norm of its update and its steps. Of fewer than three nobody is the odd one out.
        """
        if self._ratio is None or len(updates) < 3:
            return {}
        found = {}
        for client, (norm, steps) in updates.items():
            usual = statistics.median(
                other * max((steps / taken) ** 2, math.sqrt(steps / taken)) for other, taken in updates.values()
            )
            if norm > self._ratio * usual > 0:
                found[client] = Refused(
                    "large_norm",
                    f"its update is {norm:.3g} long where {usual:.3g} is usual for {steps} steps among the {len(updates)} of the "
                    f"round, more than {self._ratio:g} times that",
                )
        return found

    def accept(self, updates: Iterable[tuple[float, int]]) -> None:
        """Count the updates of a round that was merged: the norm of each as it was merged, and its steps."""
        self._norms.extend(norm / math.sqrt(steps) for norm, steps in updates)
        self._rounds += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that the median is of, and the rounds so far."""
        return {"norms": list(self._norms), "rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved norms."""
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._rounds = state["rounds"]
