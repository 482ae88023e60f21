"""What each client is asked to do in a round: for how long, from where, on which rows; and what that is learnt from."""

from __future__ import annotations

import math
import secrets
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nanofed.data.datamodule import TokenDataModule
from nanofed.federated.aggregation.norm_guard import Steps
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.policy import ClientPolicy
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import Instructions, Report
from nanofed.optim import Schedule
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe

if TYPE_CHECKING:
    from nanofed.federated.server.state import State

MAX_MARGIN = 8.0  # of a lease over what a client should need
SPEED_MARGIN = 1.5  # of the tokens that a client claims over what its speed so far gives
DEVICE_MARGIN = 8.0  # of the tokens a device that are counted for a client over what others did in a round
SPEED_ROUNDS = 3  # merged rounds before a client's speed is known: the first ones compile
CLOCK_SLACK = 1.0  # seconds by which a client's clock may be ahead of the server's in a round
LEARN = 0.5  # weight of the newest round in a running mean
LEAST_SECONDS = 1e-3  # that a client's own clock moves in a round, where no other clock can be asked
LEAST_SHARE = 0.1  # of a round, for which a client trains however long its messages take
SPARE_ROWS = {"contiguous": 16, "best_fit": 160}  # rows that a stream reads ahead, beyond what it trains on
POINTS = 1000  # steps of a round at which the schedule is evaluated, at most
LEASE_OVER_RATE = 1.25  # tokens of a lease over those that a client trained on in its last round


@dataclass
class ClientSpeeds:
    """What the server has learnt of each client's speed, by client."""

    # Tokens a second of the client's last merged round, from its dispatch to the reply on the server's clock; on the client's own
    # clock where clients take turns.
    rate: dict[str, float] = field(default_factory=dict)
    # The highest rate of the client's merged rounds; what the client claims is held against it.
    fastest: dict[str, float] = field(default_factory=dict)
    # How many devices the client trains on, as its hello says; 1 where it is missing.
    devices: dict[str, int] = field(default_factory=dict)
    # Tokens that the client's last merged round brought for each of its devices.
    a_device: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)  # how often the client was merged
    tokens: dict[str, int] = field(default_factory=dict)  # how many tokens of the client were merged
    # Seconds of a round in which the client does not train: transfers, start of a process, others' turns.
    overhead: dict[str, float] = field(default_factory=dict)
    # How much more text the client is leased than it should need.
    margin: dict[str, float] = field(default_factory=dict)
    merge_seconds: float = 0.0  # seconds from the last reply to the commit; the same for all clients

    def budget(self, client: str, round_seconds: float) -> float:
        """Return the seconds that a client may train, so that the round ends when it should."""
        left = round_seconds - self.overhead.get(client, 0.0) - self.merge_seconds
        return max(left, LEAST_SHARE * round_seconds)

    def check(self, report: Report, elapsed: float, before: float = 0.0) -> None:
        """Refuse training that cannot have been done in the time that the client had.

        Args:
            report: What it says that it has done.
            elapsed: The seconds since the round was sent, on the server's clock.
            before: The seconds from the client's last reply until then, in which it may have trained ahead; infinite where this
                server has not seen that reply.

        Raises:
            RefusedReply: The report claims more seconds than have passed, or more tokens than 1.5 times its speed so far gives in
                these and one more: of a round of two seconds, messages may take one or hardly any.
        """
        client = report.client
        if report.seconds > elapsed + CLOCK_SLACK:
            raise RefusedReply(
                "tokens", f"it claims {report.seconds:.1f} s of training, {elapsed:.1f} s after it was asked"
            )
        if self.rounds.get(client, 0) < SPEED_ROUNDS:
            return
        elapsed += before if report.ahead else 0.0
        possible = SPEED_MARGIN * self.fastest[client] * (elapsed + CLOCK_SLACK)
        if report.tokens > possible:
            # An honest client on a new machine is believed some rounds later.
            self.fastest[client] *= SPEED_MARGIN
            raise RefusedReply(
                "tokens",
                f"it claims {report.tokens} tokens within {elapsed:.1f} s, {SPEED_MARGIN} times its speed so far give "
                f"{possible:.0f} in that time and {CLOCK_SLACK:g} s more",
            )

    def believed(self, reports: Sequence[Report]) -> list[Report]:
        """Return the reports of a round's merged clients with no more tokens, and steps of them, than the server counts.

        A site can say that it has read its lease to the end, and trained on it, at any speed. What is counted for it is at most
        `DEVICE_MARGIN` times what the others did a device: the median of the other sites, in this round where they took part in
        it, else in their last one. Nothing is cut where a site has always been alone.
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
            out.append(replace(report, tokens=possible, steps=steps, ahead=report.ahead * steps // report.steps))
        return out

    def learn(self, report: Report, elapsed: float | None, before: float = 0.0) -> None:
        """Take up a merged round; `elapsed` and `before` are as in `check`, `elapsed` None where clients take turns."""
        client = report.client
        worked = (report.seconds if elapsed is None else elapsed) + (before if report.ahead else 0.0)
        rate = report.tokens / max(worked, LEAST_SECONDS) or self.rate.get(client, 0.0)  # as before, if it is unknown
        self.rate[client] = rate
        self.a_device[client] = report.tokens / self.devices.get(client, 1)
        self.fastest[client] = max(rate, self.fastest.get(client, 0.0))
        self.rounds[client] = self.rounds.get(client, 0) + 1
        self.tokens[client] = self.tokens.get(client, 0) + report.tokens
        if elapsed is not None:
            new = max(0.0, elapsed - report.seconds)
            known = self.overhead.get(client, new)
            self.overhead[client] = known + LEARN * (new - known)
        if report.exhausted:
            self.widen(client)

    def hurry(self, client: str, round_seconds: float) -> None:
        """Leave a client whose reply came too late the least of a round for training; merged rounds give it more again."""
        self.overhead[client] = max(round_seconds, self.overhead.get(client, 0.0))

    def learn_merge(self, seconds: float) -> None:
        """Take up how long it took from the last reply to the commit."""
        self.merge_seconds += LEARN * (seconds - self.merge_seconds) if self.merge_seconds else seconds

    def widen(self, client: str) -> None:
        """Lease a client twice as much from now on: its lease ended before its round."""
        self.margin[client] = min(MAX_MARGIN, 2 * self.margin.get(client, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was saved."""
        vars(self).update(vars(ClientSpeeds(**state)))


def client_batch_tokens(config: FederationConfig, recipe: Recipe, data: TokenDataModule, clients: int) -> int:
    """Return the tokens of an optimizer step of each of so many clients: the recipe's, or its share of one batch of them all."""
    if config.global_batch_tokens is None:
        return recipe.batch_tokens
    micro = data.device_batch_size * data.sequence_len
    return max(micro, config.global_batch_tokens // clients // micro * micro)


def steps_taken(schedule: Schedule, asked: Instructions, steps: int) -> Steps:
    """Return the rates and the memory with which a client takes its first steps of a round."""
    step_tokens = asked.batch_tokens * asked.participants  # the steps of all clients move the schedule
    run = {"step_tokens": step_tokens, "horizon_tokens": asked.horizon_tokens}
    at = np.linspace(0, steps - 1, min(steps, POINTS))
    rates = [schedule.multiplier(asked.clock_tokens + float(k) * step_tokens, **run) for k in at]
    squares = math.fsum(rate**2 for rate in rates) / len(rates)
    return Steps(steps * math.fsum(rates) / len(rates), math.sqrt(steps * squares), schedule.beta2(asked.batch_tokens))


class Scheduler:
    """Leases rows and writes the instructions of a round."""

    def __init__(
        self, module: GPTModule, data: TokenDataModule, config: FederationConfig, policy: ClientPolicy
    ) -> None:
        self._recipe = module.recipe
        self._horizon = module.recipe.horizon(module.config)
        self._data = data
        self._config = config
        self._policy = policy

    def instruct(
        self,
        number: int,
        clients: Sequence[str],
        state: State,
        base_hash: str,
        changed_from: Mapping[str, str],
        among: Sequence[str] | None = None,
    ) -> dict[str, Instructions]:
        """Return the instructions of a round by client, and enter their leases in the ledger.

        Args:
            number: The round.
            clients: Those who are to be instructed.
            state: The state after the round before.
            base_hash: The hash of the weights that the clients will have.
            changed_from: Client -> the hash of the weights that it holds and will be sent the changes of.
            among: All clients that train at the same time, in their order; by default those who are to be instructed.
        """
        among = clients if among is None else among
        config, clock = self._config, state.clock
        round_steps = config.steps_at(self._progress(clock.tokens))
        round_seconds = config.seconds_at(self._progress(clock.tokens))
        batch_tokens = client_batch_tokens(config, self._recipe, self._data, len(among))
        left = -(-(self._horizon - clock.tokens) // (batch_tokens * len(among)))
        max_steps = min(left, round_steps) if round_steps else left
        out = {}
        for client in clients:
            ledger = state.ledger.of(client)
            tokens, margin = max_steps * batch_tokens, state.speeds.margin.get(client, 1.0)
            seconds = None
            if round_steps is None:
                seconds = round_seconds
                if not self._policy.one_machine:
                    seconds = state.speeds.budget(client, round_seconds)
                rate = state.speeds.rate.get(client)  # not known before the first round: then an equal share of all
                share = ledger.share(1 if state.ledger.own_text else len(among))
                tokens = int(min(tokens, rate * round_seconds * LEASE_OVER_RATE if rate else share))
                # The client's speed is its own claim where clients take turns: an epoch is the most it is leased.
                epoch = max(batch_tokens, ledger.share(1))
                margin = min(margin, max(1.0, epoch / max(1, tokens)))
                tokens = min(tokens, epoch)
            deadline = None
            if not self._policy.one_machine:
                deadline = self.time_limit(clock.tokens) - state.speeds.overhead.get(client, 0.0) / 2
            spare = SPARE_ROWS[self._data.packing]
            stride = (among.index(client), len(among)) if config.sharding == "full" else None
            if config.overlap:
                margin *= 2  # for as many steps again while the next round is on its way
            lease = ledger.lease(client, int(tokens * margin), spare_rows=int(spare * margin), stride=stride)
            out[client] = Instructions(
                run=state.run_id,
                round=number,
                client=client,
                nonce=secrets.token_hex(16),
                base_hash=base_hash,
                down_codec=config.down_codec,
                changed_from=changed_from.get(client, ""),
                up_codec=config.up_codec,
                max_steps=max_steps,
                seconds=seconds,
                deadline_seconds=deadline,
                participants=len(among),
                batch_tokens=batch_tokens,
                clock_step=clock.step,
                clock_tokens=clock.tokens,
                horizon_tokens=self._horizon,
                lease=lease,
                data=ledger.data(client),
                overlap=config.overlap,
            )
        return out

    def fraction(self, reports: Sequence[Report], asked: Mapping[str, Instructions]) -> float:
        """Return how much of a full round was trained: less than all only where the horizon cut it short."""
        first = asked[reports[0].client]
        if round_steps := self._config.steps_at(self._progress(first.clock_tokens)):
            return first.max_steps / round_steps
        if all(report.steps == first.max_steps for report in reports):
            return min(1.0, max(report.training_seconds / (asked[report.client].seconds or 1.0) for report in reports))
        return 1.0

    def time_limit(self, tokens: int, clients: int = 1) -> float:
        """Return the seconds after which a client is given up in a round that begins after so many tokens.

        Args:
            tokens: The tokens merged so far.
            clients: How many take part; on one machine they take turns.
        """
        seconds = self._config.seconds_at(self._progress(tokens))
        return self._policy.time_limit(seconds + self._config.grace_seconds, clients)

    def _progress(self, tokens: int) -> float:
        return tokens / self._horizon
