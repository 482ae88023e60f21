"""How large an update may be: its norm against what accepted updates had."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from nanofed.federated.server.validation import Refused

WINDOW = 64  # accepted updates that the median is taken over
WARM_UP = 8  # of them before there is a limit


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

    @property
    def limit(self) -> float:
        """The largest norm per root of steps; infinite during warm-up."""
        if self._ratio is None or len(self._norms) < WARM_UP:
            return math.inf
        return self._ratio * statistics.median(self._norms)

    def scale(self, norm: float, steps: int) -> float:
        """Return what an update is to be multiplied with: 1, or less where it is clipped.

        Raises:
            Refused: it is too large, and such updates are rejected.
        """
        size, limit = norm / math.sqrt(steps), self.limit
        if size <= limit:
            return 1.0
        if self._action == "reject" or not limit > 0:
            self._norms.append(limit)
            raise Refused(
                "large_norm",
                f"its update is {size:.3g} long per root of steps, {size / limit if limit else math.inf:.1f} times the limit of "
                f"{limit:.3g}",
            )
        return limit / size

    def accept(self, norm: float, steps: int) -> None:
        """Count the norm of an update that was merged."""
        self._norms.append(min(norm / math.sqrt(steps), self.limit))

    def state_dict(self) -> list[float]:
        """Return the norms that the median is of."""
        return list(self._norms)

    def load_state_dict(self, state: list[float]) -> None:
        """Take up saved norms."""
        self._norms = deque(state, maxlen=WINDOW)
