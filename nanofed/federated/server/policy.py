"""What a round loop may assume of its clients: they share this machine, or they are sites with machines of their own."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAUSE_SECONDS = 60.0  # between failed rounds across sites


@dataclass(frozen=True)
class ClientPolicy:
    """How the server treats the clients of a runtime; every runtime names one of the two policies below."""

    # The clients share this machine and train one after another. The server's clock then says nothing of one client's speed, a
    # round's seconds are training time, and a time limit counts for each client's turn. A client that is refused will be refused
    # for ever, so that nobody waits for it. The server's model is that of a trainer in the same process, and is evaluated between
    # rounds; elsewhere it is evaluated while the next round runs.
    one_machine: bool
    # The seconds for which a client that has just come and has not said who it is holds up a round.
    hello_patience: float
    # The failed rounds in a row that end the run where the config sets no limit; None for no limit.
    max_failed_rounds: int | None

    def time_limit(self, seconds: float, clients: int) -> float:
        """Return the seconds after which the last of some clients is given up, if each may take `seconds`."""
        return seconds * clients if self.one_machine else seconds

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after so many failed rounds in a row."""
        return min(MAX_PAUSE_SECONDS, 2.0 ** min(failed, 10)) if failed and not self.one_machine else 0.0


# Runs of one seed take the same course each time: every client is waited for and nothing happens beside a round. A fresh Ray
# actor imports torch before it answers, and nothing but the program can be at fault where rounds fail.
ONE_MACHINE = ClientPolicy(one_machine=True, hello_patience=120.0, max_failed_rounds=5)
# Sites come and go: the run goes on with those that are there, and waits for those that come back.
SITES = ClientPolicy(one_machine=False, hello_patience=15.0, max_failed_rounds=None)
