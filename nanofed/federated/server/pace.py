"""What the server learns of each client: how fast it trains, what its messages take, and how much text it needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import Report

MAX_MARGIN = 8.0  # of a lease over what a client should need
SPEED_MARGIN = 1.5  # of what a client claims over what it has done so far
DEVICE_MARGIN = 8.0  # of the tokens a device that are counted of a client, over what others did in a round
SPEED_ROUNDS = 3  # accepted before a client's speed is known: the first ones compile
CLOCK_SLACK = 1.0  # seconds by which a client's clock may be ahead of ours in a round
LEARN = 0.5  # weight of the newest round in a running mean
LEAST_SECONDS = 1e-3  # by which a client's own clock moves in a round, where there is no other to ask
LEAST_SHARE = 0.1  # of a round, which a client trains however long its messages take


@dataclass
class Pace:
    """Speeds, overheads and margins by client.

    Attributes:
        rate: tokens a second of a client's last merged round, from its dispatch to the answer on the server's clock; on the
            client's own clock where clients take turns.
        fastest: the highest rate of its merged rounds; what it claims is held against it.
        devices: of every client, as its hello says; 1 where it is missing.
        a_device: tokens that a client's last merged round brought for each of its devices.
        rounds: how often it was merged.
        tokens: that were merged of it.
        overhead: seconds a round that a client is not training: transfers, start of a process, waiting for others' turns.
        margin: how much more text a client is leased than it should need.
        merge_seconds: from the last answer to the commit.
    """

    rate: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, float] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)
    a_device: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    overhead: dict[str, float] = field(default_factory=dict)
    margin: dict[str, float] = field(default_factory=dict)
    merge_seconds: float = 0.0

    def budget(self, client: str, round_seconds: float) -> float:
        """Return the seconds that a client may train, so that the round ends when it should."""
        left = round_seconds - self.overhead.get(client, 0.0) - self.merge_seconds
        return max(left, LEAST_SHARE * round_seconds)

    def check(self, report: Report, elapsed: float) -> None:
        """Refuse training that cannot have been done since the round was sent.

        Args:
            report: of a client with a clock of its own.
            elapsed: seconds since the dispatch, on ours.

        Raises:
            RefusedReply: it claims more seconds than have passed, or more tokens than 1.5 times its speed so far.
        """
        client = report.client
        if report.seconds > elapsed + CLOCK_SLACK:
            raise RefusedReply(
                "tokens", f"it claims {report.seconds:.1f} s of training, {elapsed:.1f} s after it was asked"
            )
        if self.rounds.get(client, 0) < SPEED_ROUNDS:
            return
        possible = SPEED_MARGIN * self.fastest[client] * max(elapsed, CLOCK_SLACK)
        if report.tokens > possible:
            # An honest client on a new machine is believed some rounds later.
            self.fastest[client] *= SPEED_MARGIN
            raise RefusedReply(
                "tokens",
                f"it claims {report.tokens} tokens within {elapsed:.1f} s, {SPEED_MARGIN} times its speed so far give "
                f"{possible:.0f}",
            )

    def believed(self, reports: Sequence[Report]) -> list[Report]:
        """Return the reports of a round with no more tokens, and steps of them, than the server counts.

        A site can say that it has read its lease to the end, and trained on it, at any speed. What is counted of it is at most
        `DEVICE_MARGIN` times what the others did a device: the median of the other sites, in this round where they took part in
        it, else in their last one. Nothing is cut where a site has always been alone.

        Args:
            reports: of the clients that are merged.
        """
        here = {report.client: report.tokens / self.devices.get(report.client, 1) for report in reports}
        known = self.a_device | here
        out = []
        for report in reports:
            others = [tokens for client, tokens in known.items() if client != report.client]
            possible = report.tokens
            if others:
                usual = statistics.median_low(others) * self.devices.get(report.client, 1)
                possible = min(possible, max(1, int(DEVICE_MARGIN * usual)))
            steps = max(1, possible * report.steps // report.tokens)
            out.append(replace(report, tokens=possible, steps=steps))
        return out

    def learn(self, report: Report, elapsed: float | None) -> None:
        """Take up a merged round; `elapsed` as in `check`, None where clients take turns."""
        client = report.client
        rate = report.tokens / max(report.seconds if elapsed is None else elapsed, LEAST_SECONDS)
        self.rate[client] = rate
        self.a_device[client] = report.tokens / self.devices.get(client, 1)
        self.fastest[client] = max(rate, self.fastest.get(client, 0.0))
        self.rounds[client] = self.rounds.get(client, 0) + 1
        self.tokens[client] = self.tokens.get(client, 0) + report.tokens
        if elapsed is not None:
            self._mean(self.overhead, client, max(0.0, elapsed - report.seconds))
        if report.exhausted:
            self.widen(client)

    def hurry(self, client: str, round_seconds: float) -> None:
        """Leave a client the least of a round for training: its answer came too late. Rounds that are merged give more again."""
        self.overhead[client] = max(round_seconds, self.overhead.get(client, 0.0))

    def learn_merge(self, seconds: float) -> None:
        """Take up how long it took from the last answer to the commit."""
        self.merge_seconds += LEARN * (seconds - self.merge_seconds) if self.merge_seconds else seconds

    def widen(self, client: str) -> None:
        """Lease a client twice as much from now on: its lease ended before its round."""
        self.margin[client] = min(MAX_MARGIN, 2 * self.margin.get(client, 1.0))

    @staticmethod
    def _mean(values: dict[str, float], client: str, new: float) -> None:
        values[client] = values[client] + LEARN * (new - values[client]) if client in values else new

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
