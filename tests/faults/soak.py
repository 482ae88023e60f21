"""Many short rounds, and something killed again and again: `python -m tests.faults.soak --folder F --rounds 500 --seed 1`.

A kill hits one process at a random moment; then the federation has to commit a round before the next one. Whatever lives for long
is watched, and at the end all checkpoints must follow from each other. What happens is logged with the seed that chose it.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nanofed.federated.deploy.keys import init
from tests.faults.chain import check_chain, row_lengths
from tests.faults.deployment import Deployment, config, deployment
from tests.faults.growth import Growth, Watch
from tests.federated.tiny import make_corpus

logger = logging.getLogger("tests.faults.soak")  # the module itself may be __main__

# Processes of a server and of a site, by a word of their command lines.
SERVER = {"flwr-serverapp": "round loop", "superlink_process": "SuperLink", "flower-superexec": "launcher"}
SITE = {"site.worker": "worker", "deploy.supernode": "SuperNode"}
LIVING = {"server": [*SERVER], "site": [*SITE]}
RECOVERY_SECONDS = 240.0
SAMPLE_SECONDS = 2.0
LEAST_ROUNDS = 300  # of a life that is judged: a worker's memory still settles until then, and not after (LOG.md)


class Soak:
    """Kills and watches a federation with its server and sites: whom when, by the seed; victims are words of command lines."""

    def __init__(self, federation: Deployment, seed: int, victims: Sequence[str] | None = None) -> None:
        self._federation = federation
        self._random = random.Random(seed)
        self._victims = [
            (name, word)
            for name in sorted(federation.processes)
            for word in (SERVER if name == "server" else SITE)
            if victims is None or word in victims
        ]
        self._sampled = 0.0
        self.watch = Watch()
        self.kills: Counter[str] = Counter()
        self.recovery: list[tuple[float, str]] = []

    def run(self, rounds: int, every: float) -> None:
        """Go on for so many rounds, with a kill every so many on average; 0 for none."""
        federation = self._federation
        goal = federation.round() + rounds
        following = federation.round() + self._pause(every)
        while (now := federation.round()) < goal:
            if every and now >= following:
                self.kill()
                following = federation.round() + self._pause(every)
            self._look(now)
            federation.until(lambda now=now: self._look(federation.round()) > now, "next round", RECOVERY_SECONDS)  # type: ignore[misc]

    def _pause(self, every: float) -> float:
        return self._random.expovariate(1 / every) if every else 0.0

    def kill(self) -> None:
        """Kill something, at some moment of a round, and wait for the next round that is committed."""
        federation = self._federation
        name, word = self._random.choice(self._victims)
        time.sleep(self._random.uniform(0.0, 2.0))
        what = f"{(SERVER | SITE)[word]} of {name}"
        federation.until(lambda: bool(federation.processes[name].pids(word)), what, RECOVERY_SECONDS)
        before, started = federation.round(), time.monotonic()
        try:
            pid = self._random.choice(federation.processes[name].kill(word))
        except AssertionError:  # it has just ended by itself
            return
        expected = f"round after the end of the {what}"
        federation.until(lambda: self._look(federation.round()) > before, expected, RECOVERY_SECONDS)
        seconds = time.monotonic() - started
        self.kills[what] += 1
        self.recovery.append((seconds, what))
        logger.info("round %d: killed the %s (%d); the next round after %.1f s", before, what, pid, seconds)

    def _look(self, now: int) -> int:
        """Take a sample where it is time, and return the round."""
        if time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sampled = time.monotonic()
            self.watch.sample(now, self.living())
        return now

    def living(self) -> dict[int, str]:
        """Return the processes that are to live long, with what they are."""
        found = {}
        for name, process in self._federation.processes.items():
            found[process.process.pid] = f"supervisor of {name}"
            for word in LIVING["server" if name == "server" else "site"]:
                found |= dict.fromkeys(process.pids(word), f"{(SERVER | SITE)[word]} of {name}")
        return found


def leaks(growths: Sequence[Growth], memory: float, handles: float) -> list[str]:
    """Return who grew by more MB or file handles than that in 100 rounds."""
    return [str(g) for g in growths if g.memory_per_100_rounds > memory or g.handles_per_100_rounds > handles]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="a new one, for everything")
    add("--rounds", type=int, default=500)
    add("--every", type=float, default=8.0, help="rounds between two kills, on average; 0: none")
    add("--seed", type=int, default=random.randrange(1 << 32))
    add("--round_seconds", type=float, default=0.5)
    add("--grace_seconds", type=float, default=30.0, help="a killed client costs its round so much")
    add("--seconds", type=float, default=float("inf"), help="after which it ends, however many rounds there were")
    add("--memory", type=float, default=2.0, help="MB that a process may grow by in 100 rounds")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    folder = args.folder.absolute()
    folder.mkdir(parents=True)
    corpus = make_corpus(folder / "corpus", 6000)
    keys = init(folder / "keys", ["localhost"], ["lab-a", "lab-b"]).folder
    changes = {
        "federation.round_seconds": args.round_seconds,
        "federation.grace_seconds": args.grace_seconds,
        "keep_checkpoints": 0,
    }
    with deployment(folder, config(corpus, folder, **{**changes, "eval_every": 10}), keys) as federation:
        federation.serve()
        for name in ("lab-a", "lab-b"):
            federation.site(name)
        federation.reach(3, 300)
        soak = Soak(federation, args.seed)
        logger.info("seed %d: %d rounds, a kill every %g", args.seed, args.rounds, args.every)
        first, started = federation.round(), time.monotonic()
        while (done := federation.round() - first) < args.rounds and time.monotonic() - started < args.seconds:
            soak.run(min(10, args.rounds - done), args.every)
        done, seconds = federation.round() - first, time.monotonic() - started
        each, killed = seconds / max(1, done), dict(soak.kills)
        logger.info("%d rounds in %.0f s, %.2f s each; killed %s", done, seconds, each, killed)
        growths = soak.watch.growths(min(LEAST_ROUNDS, done // 2))
        for growth in growths:
            logger.info("%s", growth)
        for name in list(federation.processes):
            code = federation.processes.pop(name).stop()
            logger.info("%s ended with exit code %d", name, code)
        logger.info("%d checkpoints follow from each other", check_chain(federation.run, row_lengths(corpus)))
    if soak.recovery:
        seconds, what = max(soak.recovery)
        logger.info("longest way back to a committed round: %.1f s, after the end of the %s", seconds, what)
    grown = leaks(growths, args.memory, 1.0)
    for line in grown:
        logger.error("grows: %s", line)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
