"""What each client of a round is told: how long, from where, and which rows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from nanofed.data.datamodule import TokenDataModule
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.state import State
from nanofed.federated.wire.messages import Instructions, Report
from nanofed.training.module import GPTModule

SPARE_ROWS = {"contiguous": 16, "best_fit": 160}  # rows a stream reads ahead, beyond what it trains on
LEASE_OVER_RATE = 1.25  # leased over what a client did in its last round


class Instructor:
    """Leases rows and writes the instructions of a round.

    Args:
        module: gives the recipe.
        data: the shards.
        config: of the federation.
        simulated: clients have no clock of their own: a round's seconds are theirs alone, and nothing is ever late.
    """

    def __init__(self, module: GPTModule, data: TokenDataModule, config: FederationConfig, *, simulated: bool) -> None:
        self._recipe = module.recipe
        self._horizon = module.recipe.horizon(module.config)
        self._data = data
        self._config = config
        self._simulated = simulated

    def instruct(self, number: int, clients: Sequence[str], state: State, base_hash: str) -> dict[str, Instructions]:
        """Return the instructions of a round by client, and enter their leases in the ledger.

        Args:
            number: of the round.
            clients: who takes part.
            state: of the run.
            base_hash: of the weights that will be sent along.
        """
        config, clock = self._config, state.clock
        batch_tokens = self._recipe.batch_tokens
        if config.global_batch_tokens is not None:
            micro = self._data.device_batch_size * self._data.sequence_len
            batch_tokens = max(micro, config.global_batch_tokens // len(clients) // micro * micro)
        left = -(-(self._horizon - clock.tokens) // (batch_tokens * len(clients)))
        max_steps = min(left, config.round_steps) if config.round_steps else left
        out = {}
        for index, client in enumerate(clients):
            tokens = max_steps * batch_tokens
            if config.round_steps is None:
                rate = state.pace.rate.get(client)  # not known before the first round: then an equal share of all
                share = state.ledger.share(client, len(clients))
                tokens = int(min(tokens, rate * config.round_seconds * LEASE_OVER_RATE if rate else share))
            margin = state.pace.margin.get(client, 1.0)
            if config.round_steps is None:  # the client's speed is a claim of its own where clients take turns
                epoch = max(batch_tokens, state.ledger.share(client, 1))
                margin = min(margin, max(1.0, epoch / max(1, tokens)))
                tokens = min(tokens, epoch)
            spare = SPARE_ROWS[self._data.packing]
            stride = (index, len(clients)) if config.sharding == "full" else None
            lease = state.ledger.lease(client, int(tokens * margin), spare_rows=int(spare * margin), stride=stride)
            out[client] = Instructions(
                run=state.run_id,
                round=number,
                client=client,
                nonce=secrets.token_hex(16),
                base_hash=base_hash,
                down_codec=config.down_codec,
                up_codec=config.up_codec,
                max_steps=max_steps,
                seconds=self._seconds(client, state),
                deadline_seconds=None if self._simulated else self.ttl() - state.pace.overhead.get(client, 0.0) / 2,
                participants=len(clients),
                batch_tokens=batch_tokens,
                clock_step=clock.step,
                clock_tokens=clock.tokens,
                horizon_tokens=self._horizon,
                lease=lease,
                data=state.ledger.data(client),
            )
        return out

    def _seconds(self, client: str, state: State) -> float | None:
        if self._config.round_steps:
            return None
        if self._simulated:
            return self._config.round_seconds
        return state.pace.budget(client, self._config.round_seconds)

    def fraction(self, reports: Sequence[Report], asked: Mapping[str, Instructions]) -> float:
        """Return how much of a full round was trained: less than all only where the horizon cut it short."""
        first = asked[reports[0].client]
        if self._config.round_steps:
            return first.max_steps / self._config.round_steps
        if all(report.steps == first.max_steps for report in reports):
            return min(1.0, max(report.seconds / (asked[report.client].seconds or 1.0) for report in reports))
        return 1.0

    def ttl(self, clients: int = 1) -> float:
        """Return the seconds after which a client is given up; where clients take turns, the last one's turn counts."""
        seconds = self._config.round_seconds + self._config.grace_seconds
        return seconds * clients if self._simulated else seconds
