"""Who takes part in a round: whoever is connected, once there are enough of them."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping

from nanofed.errors import NanofedError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.events import SERVER, Events
from nanofed.federated.server.roster import Roster

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
SAY_SECONDS = 60.0


class Presence:
    """Waits for a quorum, and draws who is available where that is simulated.

    Args:
        roster: the clients.
        config: quorum, how long to wait for it, and availability.
        events: where rounds that could not begin are counted.
        seed: of the draws.
        simulated: the clients share this machine: who is refused will not be another later, so waiting for it is in vain.
    """

    def __init__(self, roster: Roster, config: FederationConfig, events: Events, seed: int, *, simulated: bool) -> None:
        self._roster = roster
        self._config = config
        self._events = events
        self._seed = seed
        self._simulated = simulated

    def wait(self, number: int, meanwhile: Callable[[str], None] = lambda waiting: None) -> dict[str, int]:
        """Return client -> node of those connected, once they are a quorum.

        Across sites the wait has no end, since sites come back: it is said at once, then every minute, for how many and whom
        it is; after every `quorum_seconds` it is a warning and an event.

        Args:
            number: of the round that is to begin.
            meanwhile: called twice a second with what is waited for.

        Raises:
            NanofedError: the clients are simulated, and too few of them can take part.
        """
        config = self._config
        started = said = time.monotonic()
        warned = 0
        first = True
        while len(connected := self._roster.connected()) < config.quorum:
            now = time.monotonic()
            waiting = f"{config.quorum - len(connected)} more clients of {config.quorum} ({self._who(connected)})"
            in_vain = bool(self._roster.refused) or now - started > config.quorum_seconds
            if self._simulated and in_vain:
                raise NanofedError(
                    f"round {number} needs {config.quorum} clients, {len(connected)} can take part ({self.why()}); "
                    "the run goes on from its last checkpoint with --ckpt_path last"
                )
            if now - started > config.quorum_seconds * (warned + 1):
                warned += 1
                reason = f"it cannot begin for {now - started:.0f} s: it needs {waiting}"
                logger.warning("round %d: %s", number, reason)
                self._events.add("quorum", SERVER, reason, number)
                said = now
            elif first or now - said >= SAY_SECONDS:
                logger.info("round %3d  waiting for %s", number, waiting)
                first, said = False, now
            meanwhile(waiting)
            time.sleep(LOOK_SECONDS)
        return connected

    def draw(self, connected: Mapping[str, int], number: int, attempt: int) -> dict[str, int]:
        """Draw who is available: each with its chance, the same draw for the same seed, round, attempt and name."""
        chance = self._config.availability
        return {
            name: node
            for name, node in connected.items()
            if chance >= 1 or random.Random(f"{self._seed}/{number}.{attempt}/{name}").random() < chance
        }

    def why(self) -> str:
        """Return who is refused, and why."""
        refused = "; ".join(f"{name}: {reason}" for name, reason in self._roster.refused.items())
        return refused or "none was refused"

    def _who(self, connected: Mapping[str, int]) -> str:
        now = time.monotonic()
        away = [
            f"{name} was here {(now - seen) / 60:.0f} min ago"
            for name, seen in sorted(self._roster.seen.items())
            if name not in connected
        ]
        parts = [f"here: {', '.join(connected) or 'nobody'}", *away]
        return "; ".join([*parts, f"refused: {self.why()}"] if self._roster.refused else parts)
