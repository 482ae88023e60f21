"""Bits per byte by the sites: each measures the global weights on text of its own, and the sums are pooled.

What is asked rides with the next round: the site measures the weights that it has just received, before it trains them, in
addition to its training's budget. So a figure is there one round later, and costs no second copy of the model on the wire.
Only the last weights of a run are sent for that alone.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.validation import tokens_of_share
from nanofed.errors import NanofedError
from nanofed.evaluation.bits_per_byte import bits_per_byte
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.board import Board
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.exchange import Exchange, Metrics
from nanofed.federated.server.measuring import Measurement
from nanofed.federated.server.pace import CLOCK_SLACK
from nanofed.federated.server.state import State
from nanofed.federated.server.validation import REPEATED, RefusedReply
from nanofed.federated.wire.codec import CODECS, WireError, hash_arrays
from nanofed.federated.wire.evaluation import Evaluate, Evaluation
from nanofed.federated.wire.messages import Instructions
from nanofed.federated.wire.plain import plain
from nanofed.model.loss import LOGIT_CAP
from nanofed.training.summary import Point

logger = logging.getLogger(__name__)

SHARE_OF_GRACE = 0.5  # of a round's grace; the rest is for the answer's way back


class Pooling:
    """Has sites measure rounds and writes down what comes of it, under the round that it is of; as `Measuring` does here.

    Args:
        exchange: for the last weights.
        there: returns client -> node of those that can be asked now.
        data: the tokenizer, how much text is to be read, and the pinned validation shard.
        config: of the federation.
        board: where figures go.
        every: rounds between two measurements.
        simulated: clients may take turns.
    """

    def __init__(
        self,
        exchange: Exchange,
        there: Callable[[], Mapping[str, int]],
        data: TokenDataModule,
        config: FederationConfig,
        board: Board,
        *,
        every: int,
        simulated: bool,
    ) -> None:
        self._exchange = exchange
        self._there = there
        self._data = data
        self._config = config
        self._board = board
        self._every = every
        self._turns = simulated
        self._waiting: list[Measurement] = []  # of rounds that ended with the weights as they are now
        self._asks: dict[str, Evaluate] = {}
        self._sums: dict[str, Evaluation] = {}
        self.round = -1  # the last one measured, or to be measured

    def begin(self, state: State) -> None:
        """Have the first weights measured, and those of a resumed round that the server did not live to see measured."""
        number = state.clock.round
        if any(point.step == number for point in self._board.summary.curve):
            self.round = number
        elif number % self._every == 0:
            self.start(state)

    def start(self, state: State, *, last: bool = False) -> None:
        """Have the weights as they are measured with the next round; the last ones of a run at once."""
        clock = state.clock
        if clock.round not in [wanted.round for wanted in self._waiting]:
            seconds = self._board.summary.seconds
            self._waiting.append(Measurement(clock.round, clock.step, clock.tokens, seconds))
        self.round = clock.round
        if last:
            self._ask_alone(state)

    def end(self, state: State) -> None:
        """Have the last weights measured, if they are not yet."""
        if self.round != state.clock.round or self._waiting:
            self.start(state, last=True)

    def take(self, state: State, *, wait: bool = False) -> None:
        """Do nothing: figures come with rounds."""

    def stop(self) -> None:
        """Do nothing: nothing is under way."""

    # --- with a round

    def ask(self, instructions: Mapping[str, Instructions]) -> Mapping[str, Evaluate]:
        """Return what goes with the instructions of a round, by client: nothing where nothing is to be measured."""
        self._asks, self._sums = {}, {}
        if self._waiting:
            names = sorted(instructions)
            for index, client in enumerate(names):
                told = instructions[client]
                self._asks[client] = self._request(
                    index, len(names), told.run, told.round, client, told.nonce, told.base_hash
                )
        return self._asks

    def _request(
        self, index: int, clients: int, run: str, number: int, client: str, nonce: str, base_hash: str
    ) -> Evaluate:
        # Text that only a site has is all its own to measure. The pinned shard is divided: the sums of all shares are the
        # server's own figure, to the last bit on the same hardware and in the same dtype, at 1/n of the work each.
        # A site that does not answer leaves its share out of the figure, which is then of a little less text, and says so.
        share = (0, 1) if self._config.sharding == "local" else (index, clients)
        return Evaluate(
            run=run,
            round=number,
            client=client,
            nonce=nonce,
            base_hash=base_hash,
            down_codec=self._config.down_codec,
            eval_tokens=self._data.eval_tokens,
            share=share[0],
            shares=share[1],
            seconds=self._config.grace_seconds * SHARE_OF_GRACE,
        )

    def hear(self, client: str, metrics: Metrics, elapsed: float, state: State) -> float:
        """Take what a client says of the weights that it was sent, and return the seconds that it spent on that.

        Args:
            client: its name.
            metrics: all that came beside its weights; whatever it holds, the worst of it is one event.
            elapsed: seconds since it was asked.
            state: of the run, for the event.
        """
        asked = self._asks.get(client)
        if asked is None:
            return 0.0
        try:
            found = self._check(metrics, asked, elapsed)
            if not found.failure:
                self._check_sums(found, asked)
                self._sums[client] = found
                return found.seconds
        except RefusedReply as refusal:
            self._lost(client, refusal, state, asked.round)
            return 0.0
        self._lost(client, found.failure, state, asked.round)
        return found.seconds

    @staticmethod
    def _check(metrics: Metrics, asked: Evaluate, elapsed: float) -> Evaluation:
        if Evaluation.key not in metrics:
            raise RefusedReply("evaluation", "it was asked for one, and its answer says nothing of it")
        try:
            found = Evaluation.from_config(metrics)
        except WireError as error:
            raise RefusedReply("evaluation", str(error)) from error
        for name in REPEATED:
            if getattr(found, name) != getattr(asked, name):
                raise RefusedReply(
                    "evaluation", f"it is for {name} {getattr(found, name)!r}, not {getattr(asked, name)!r}"
                )
        if not 0 <= found.seconds <= elapsed + CLOCK_SLACK:
            raise RefusedReply("evaluation", f"it claims {found.seconds:.1f} s, {elapsed:.1f} s after it was asked")
        return found

    def _check_sums(self, found: Evaluation, asked: Evaluate) -> None:
        """Refuse sums that no text of this length and no model of ours can have."""
        lengths = self._data.tokenizer.token_bytes
        most = tokens_of_share(self._data.sequence_len, asked.eval_tokens, asked.shares) * max(lengths)
        if self._config.sharding != "local":
            most = min(most, self._data.dataset.validation.text_bytes)
        if not (1 if asked.shares == 1 else 0) <= found.bytes <= most:
            raise RefusedReply("evaluation", f"it claims {found.bytes} bytes, of {most} at most")
        # Soft-capped logits lie within +-cap: no target costs more than this, and each has a byte at least.
        worst = found.bytes * (2 * LOGIT_CAP + math.log(len(lengths)))
        if not (0 < found.nats <= worst or found.nats == found.bytes == 0):
            raise RefusedReply(
                "evaluation", f"it claims {found.nats:g} nats for {found.bytes} bytes, of {worst:g} at most"
            )

    def heard(self, state: State, *, merged: bool) -> None:
        """Write down what a round's sites have said; where they have said nothing, there is no figure.

        Args:
            state: of the run.
            merged: the weights have changed since: nobody will measure those that were asked for any more.
        """
        if not self._waiting or not self._asks:
            return
        found = self._sums
        count = sum(part.bytes for part in found.values())
        if count:
            bpb = bits_per_byte(math.fsum(part.nats for part in found.values()), count)
            seconds = max(part.seconds for part in found.values())
            sites = {name: bits_per_byte(part.nats, part.bytes) for name, part in sorted(found.items()) if part.bytes}
            state.evaluations |= {name: {"round": self.round, "bpb": own} for name, own in sites.items()}
            for wanted in self._waiting:
                point = Point(wanted.round, wanted.tokens, round(wanted.train_seconds, 3), bpb)
                self._board.validation(
                    point, step=wanted.step, seconds=seconds, sites=sites, silent=len(self._asks) - len(found)
                )
        elif merged:
            self._none(state, f"none of the {len(self._asks)} sites that were asked gave a figure")
        if count or merged:
            self._waiting = []
        self._asks, self._sums = {}, {}

    # --- alone

    def _ask_alone(self, state: State) -> None:
        nodes = self._there()
        if not nodes:
            self._none(state, "no site is there to be asked")
            return
        codec = CODECS[self._config.down_codec]
        number = state.clock.round
        try:
            payload = self._exchange.encode(state.weights, codec)
        except NanofedError as error:  # the disk on which they are kept is full
            self._none(state, str(error))
            return
        base_hash = hash_arrays(payload)
        self._asks, self._sums = (
            {
                client: self._request(index, len(nodes), state.run_id, number, client, secrets.token_hex(16), base_hash)
                for index, client in enumerate(sorted(nodes))
            },
            {},
        )
        seconds = self._config.grace_seconds * (len(nodes) if self._turns else 1)
        for answer in self._exchange.evaluation(nodes, self._asks, payload, seconds=seconds):
            if isinstance(answer.result, RefusedReply):
                self._lost(answer.client, answer.result, state, number)
            else:
                self.hear(answer.client, answer.metrics, answer.seconds, state)
        self.heard(state, merged=True)  # nobody will be asked again

    def _lost(self, client: str, reason: object, state: State, number: int) -> None:
        logger.warning("round %d: client %s gives no bits per byte: %s", number, client, plain(reason))
        state.events.add("evaluation", client, reason, number)

    def _none(self, state: State, reason: str) -> None:
        for wanted in self._waiting:
            logger.warning("round %d: no bits per byte: %s", wanted.round, reason)
            state.events.add("evaluation", SERVER, reason, wanted.round)
        self._waiting = []
