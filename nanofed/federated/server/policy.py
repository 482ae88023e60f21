"""What a round loop may assume of its clients: they share this machine, or they are sites with machines of their own."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAUSE_SECONDS = 60.0  # between failed rounds across sites


@dataclass(frozen=True)
class ClientPolicy:
    """How the server treats the clients of a runtime; every runtime names one of the two policies below.

    Attributes:
        in_turns: clients share this machine and train one after another. The server's clock then says nothing of one
            client's speed, a round's seconds are training time, and a time limit counts for each client's turn.
        hello_patience: seconds for which a round is held up by a client that has just come and has not said who it is.
        waits_in_vain: a client that is refused will be refused for ever, so that waiting for it would never end.
        max_failed_rounds: failed rounds in a row that end the run where the config sets no limit; None for no limit.
        evaluates_beside: the server evaluates while the next round runs, so that figures come when they are ready.
        shares_model: the server's model is that of a trainer in the same process.
    """

    in_turns: bool
    hello_patience: float
    waits_in_vain: bool
    max_failed_rounds: int | None
    evaluates_beside: bool
    shares_model: bool

    def time_limit(self, seconds: float, clients: int) -> float:
        """Return the seconds after which the last of some clients is given up, if each may take `seconds`."""
        return seconds * clients if self.in_turns else seconds

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after so many failed rounds in a row."""
        return min(MAX_PAUSE_SECONDS, 2.0**failed) if failed and not self.in_turns else 0.0


# Runs of one seed take the same course each time: every client is waited for and nothing happens beside a round.
ONE_MACHINE = ClientPolicy(
    in_turns=True,
    hello_patience=120.0,  # a fresh Ray actor imports torch before it answers
    waits_in_vain=True,
    max_failed_rounds=5,  # nothing but the program can be at fault
    evaluates_beside=False,
    shares_model=True,
)
# Sites come and go: the run goes on with those that are there, and waits for those that come back.
SITES = ClientPolicy(
    in_turns=False,
    hello_patience=15.0,
    waits_in_vain=False,
    max_failed_rounds=None,
    evaluates_beside=True,
    shares_model=False,
)
