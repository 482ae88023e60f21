"""The round loop: who is here, lease, send, validate, fold, step, commit, evaluate, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from flwr.serverapp import Grid

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.packing import most_pending
from nanofed.data.rows import RowPlan
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.aggregation import make_aggregator
from nanofed.federated.aggregation.aggregator import Aggregator
from nanofed.federated.aggregation.norm_guard import Steps, UnusualNorm
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.board import Board
from nanofed.federated.server.carriage import Carriage
from nanofed.federated.server.evaluation import Evaluator
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.exchange import Answer, Exchange
from nanofed.federated.server.figures import Merged, RoundFigures
from nanofed.federated.server.instructing import Instructor
from nanofed.federated.server.live import Live
from nanofed.federated.server.local_ledger import LocalLedger
from nanofed.federated.server.measuring import Measuring
from nanofed.federated.server.pooling import Pooling
from nanofed.federated.server.presence import Presence
from nanofed.federated.server.roster import Roster
from nanofed.federated.server.state import State, prune, saved_round
from nanofed.federated.server.tokens import check_tokens
from nanofed.federated.server.validation import RefusedReply, Update
from nanofed.federated.wire.codec import CODECS, Array, hash_arrays
from nanofed.federated.wire.messages import LEASE_TOO_SHORT, Hello, Instructions
from nanofed.training.checkpoint import SaveError
from nanofed.training.event_files import cut_events
from nanofed.training.gc_control import FrozenObjects
from nanofed.training.module import GPTModule
from nanofed.training.run_folder import Reached, reach
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import AT_HORIZON

logger = logging.getLogger(__name__)

FAILED_ROUNDS = 5  # in a row end a run on one machine, where nothing but the program can be at fault
MAX_PAUSE_SECONDS = 60.0  # between failed rounds across sites


class RoundLoop:
    """Trains a model over the clients of a grid.

    Args:
        grid: the connection to the clients.
        module: gives model, recipe and seed; the server evaluates with it.
        data: the shards, whose training rows are leased and whose validation rows the server reads.
        config: of the federation.
        options: of the run.
        run: the run's folder.
        board: where figures go.
        device: where the server evaluates.
        simulated: the clients share this machine: they may take turns, and one that is refused will not be another later.
        owners: returns node -> the client whose key it has; None where nodes have no keys.
        carriage: of the weights; in the messages by default.
    """

    def __init__(
        self,
        grid: Grid,
        module: GPTModule,
        data: TokenDataModule,
        config: FederationConfig,
        options: RunOptions,
        run: Path,
        board: Board,
        device: torch.device,
        *,
        simulated: bool = False,
        owners: Callable[[], Mapping[int, str]] | None = None,
        carriage: Carriage | None = None,
    ) -> None:
        if simulated and config.quorum > config.clients:
            raise ConfigError(f"federation.quorum={config.quorum} is more than the {config.clients} clients there are")
        self._simulated = simulated
        self._module = module
        self._data = data
        self._config = config
        self._options = options
        self._run = run
        self.board = board
        evaluator = Evaluator(module, data, device, shared=simulated)
        self._live = Live(run)
        local = config.sharding == "local"
        if not local:
            RowPlan.whole(data.dataset).check_streams(data.streams)
        self._shards = {shard.name: shard for shard in data.dataset.train}
        self._horizon = module.recipe.horizon(module.config)
        self._instructor = Instructor(module, data, config, simulated=simulated)
        self.state = State.new(module, data, config, run)
        evaluator.release()  # the state has the weights
        events = self.state.events
        self._exchange = Exchange(grid, events, carriage)
        hello = Hello.of("", module, data)
        self._roster = Roster(
            grid, hello, events, simulated=simulated, admit=self._admit, any_dataset=local, owners=owners
        )
        self._presence = Presence(self._roster, config, events, module.seed, simulated=simulated)
        self._measuring: Measuring | Pooling
        if config.evaluation == "sites":
            self._measuring = Pooling(
                self._exchange, self._there, data, config, board, every=options.eval_every, simulated=simulated
            )
        else:
            self._measuring = Measuring(evaluator, board, options, beside=not simulated)
        self._unsaved = False  # a checkpoint was due and could not be written

    @property
    def weights(self) -> Mapping[str, Array]:
        """The global weights."""
        return self.state.weights

    def resume(self, path: Path) -> None:
        """Take up a saved round.

        Raises:
            ConfigError: it is of the vanilla path, or of another model, tokenizer or text.
        """
        self.state.load(path, self._module, self._data, self.board.summary, force=self._options.force)

    def load_weights(self, path: Path) -> None:
        """Start from the weights of a checkpoint of either path."""
        self.state.load_weights(path)

    # --- the run

    def train(self) -> None:
        """Run rounds until the horizon or the last round, in a run's folder that is open and held by this process.

        Raises:
            NanofedError: on one machine, nobody can take part or no round succeeds.
            SaveError: the last checkpoint cannot be written.
        """
        clock = self.state.clock
        cut_events(self._run, clock.step if clock.round else -1)
        if clock.round:
            self.board.save()
        with self._live, FrozenObjects():
            self.board.bar.open(clock.tokens, self._horizon)
            try:
                self._rounds()
                rounds = f"federation.rounds={self._config.rounds} are done"
                at = f"at {clock.tokens:,} of {self._horizon:,} tokens"
                self.board.summary.ended = AT_HORIZON if clock.tokens >= self._horizon else f"{rounds} {at}"
            except BaseException as error:
                self.board.summary.ended = f"{type(error).__name__} after round {clock.round}: {error}"
                raise
            finally:
                self._measuring.stop()
                self.board.bar.close()

    def _rounds(self) -> None:
        failed, clock = 0, self.state.clock
        self._measuring.begin(self.state)
        while clock.tokens < self._horizon and clock.round < (self._config.rounds or 1 << 62):
            merged = self._round(clock.round + 1, failed)
            self._measuring.take(self.state)
            if merged is None:
                continue
            failed = 0 if merged else failed + 1
            limit = self._config.max_failed_rounds or (FAILED_ROUNDS if self._simulated else None)
            if limit is not None and failed >= limit:
                why = self._presence.why()
                raise NanofedError(f"{failed} rounds in a row brought no update that could be merged ({why})")
            if failed and not self._simulated:
                time.sleep(min(MAX_PAUSE_SECONDS, 2.0**failed))
        self._measuring.end(self.state)
        if self._unsaved or saved_round(self._run) != clock.round:
            self._save(last=True)

    def _round(self, number: int, attempt: int) -> bool | None:
        """Run one round and tell whether it changed the model; None if too few took part."""
        state, config = self.state, self._config
        started = time.monotonic()
        self._say("waiting", number)
        self._roster.round = number
        connected = self._presence.wait(number, lambda waiting: self._while_waiting(number, waiting))
        present = self._presence.draw(connected, number, attempt)
        for client in set(state.ledger.clients()) - set(present):
            state.ledger.release(client)  # who is not here gives back what is not merged
        if len(present) < config.quorum:
            logger.info("round %3d  %d of %d clients take part: nothing changes", number, len(present), config.quorum)
            state.events.add("quorum", SERVER, f"{len(present)} clients take part, {config.quorum} are needed", number)
            state.clock.round = number
            return None
        figures = RoundFigures(number, asked=len(present), wait=time.monotonic() - started)
        self._say("training", number, clients=sorted(present), merged=[])
        down, up = CODECS[config.down_codec], CODECS[config.up_codec]
        figures.bytes_down = len(present) * down.nbytes(state.weights)
        try:
            sent = SentWeights(state.weights, self._exchange.encode(state.weights, down), down, up)
            asked = self._instructor.instruct(number, list(present), state, hash_arrays(sent.payload))
            spool = self._run / "spool"
            with make_aggregator(config.merge, sent, spool, trim=config.trim) as aggregator:
                self._collect(present, asked, sent, aggregator, figures)
                self._compare(aggregator, figures)
                merged = len(figures.merged) >= config.quorum and self._commit(aggregator, asked, figures)
        except NanofedError as error:  # the disk on which weights or replies are kept is full
            state.events.add("disk", SERVER, error, number)
            logger.warning("round %d: %s", number, error)
            merged = False
        self._measuring.heard(state, merged=merged)
        if not merged:
            said = f"{len(figures.merged)} of {len(present)} updates could be merged, {config.quorum} are needed"
            logger.warning("round %d: %s; the model stays as it is", number, said)
            return False
        reach(self._run, Reached.STEP)
        rows = state.ledger.merged_rows()
        self.board.merged(figures, step=state.clock.step, tokens=state.clock.tokens, rows=rows, events=state.events)
        if number % self._options.eval_every == 0 or self._finished():
            self._measuring.start(state, last=self._finished())
        due = bool(self._options.save_every) and number % self._options.save_every == 0
        if due or self._unsaved or self._finished():
            self._save()
        return True

    def _finished(self) -> bool:
        return self.state.clock.tokens >= self._horizon or self.state.clock.round == self._config.rounds

    def _there(self) -> Mapping[str, int]:
        return self._presence.draw(self._roster.connected(), self.state.clock.round + 1, 0)

    def _admit(self, hello: Hello) -> None:
        if isinstance(self.state.ledger, LocalLedger):
            self.state.ledger.admit(hello.name, hello.shards)
        self.state.pace.devices[hello.name] = hello.devices

    # --- one round

    def _collect(
        self,
        present: Mapping[str, int],
        asked: Mapping[str, Instructions],
        sent: SentWeights,
        aggregator: Aggregator,
        figures: RoundFigures,
    ) -> None:
        """Send the round to its clients, and fold what they answer as it arrives, one at a time."""
        started, ttl = time.monotonic(), self._instructor.ttl(len(present))
        asks = self._measuring.ask(asked)
        answers = self._exchange.round(
            present,
            asked,
            sent,
            streams=self._data.streams,
            most_pending=most_pending(self._data.sequence_len),
            seconds=ttl,
            asks=asks,
        )
        for answer in answers:
            folding = time.monotonic()
            try:
                if isinstance(answer.result, RefusedReply):
                    self._refuse(answer.client, figures, answer.result)
                else:
                    figures.merged[answer.client] = self._fold(answer, answer.result, asked[answer.client], aggregator)
            except (RefusedReply, UnusualNorm) as refusal:
                self._refuse(answer.client, figures, refusal)
            figures.merge += time.monotonic() - folding
            self._say("training", figures.round, merged=sorted(figures.merged))
        figures.exchange = time.monotonic() - started - figures.merge
        while self._exchange.late:
            self.state.pace.hurry(self._exchange.late.pop(), self._config.round_seconds)

    def _fold(self, answer: Answer[Update], update: Update, asked: Instructions, aggregator: Aggregator) -> Merged:
        """Check an answer against what is known of its client, and fold it in, or hold it until the round's others are known.

        Raises:
            RefusedReply: it must not be merged.
            UnusualNorm: it is too long or too short.
        """
        client, state, steps = answer.client, self.state, update.report.steps
        if not self._simulated:
            state.pace.check(update.report, answer.seconds)
        if isinstance(state.ledger, LocalLedger):
            update = replace(update, report=state.ledger.believed(update.report))
        else:
            check_tokens(update.report, asked, self._shards, self._data.streams)
        length = state.norms.measure(update.norms, self.rates(asked, steps), state.weight_norm)
        if update.unwritten:
            state.events.add("disk", client, "its disk took no optimizer state: a restart would lose it", asked.round)
        by_tokens = self._config.weighting == "tokens"
        weight = float(state.pace.believed([update.report])[0].tokens) if by_tokens else 1.0
        if held := not state.norms.is_unsuspicious(length):
            aggregator.hold(client, update.arrays, weight)
        else:
            aggregator.fold(client, update.arrays, weight)
        self._roster.refused.pop(client, None)
        measuring = self._measuring.hear(client, answer.metrics, answer.seconds, state)
        kept = replace(update, arrays=[])  # what was folded in may go
        return Merged(kept, length, weight, 1.0, answer.seconds - measuring, held)

    def rates(self, asked: Instructions, steps: int) -> Steps:
        """Return the learning rates of a client's first steps of a round."""
        return Steps.of(
            self._module.recipe.schedule,
            steps,
            clock_tokens=asked.clock_tokens,
            step_tokens=asked.batch_tokens * asked.participants,
            horizon_tokens=asked.horizon_tokens,
        )

    def _compare(self, aggregator: Aggregator, figures: RoundFigures) -> None:
        """Clip or refuse what was held for its length, now that all updates of the round are known."""
        lengths = {client: part.length for client, part in figures.merged.items()}
        for client, part in [item for item in figures.merged.items() if item[1].held]:
            try:
                part.scale = self.state.norms.scale(part.length, lengths, self.state.weights_norm)
            except UnusualNorm as refusal:
                aggregator.drop(client)
                del figures.merged[client]
                self._refuse(client, figures, refusal)
                continue
            aggregator.release(client, part.scale)
            if part.scale < 1:
                reason = f"its update was {1 / part.scale:.1f} times as long as the longest allowed"
                self.state.events.add("clipped", client, reason, figures.round)
                logger.warning("round %d: client %s: %s", figures.round, client, reason)

    def _refuse(self, client: str, figures: RoundFigures, refusal: RefusedReply | UnusualNorm) -> None:
        logger.warning("round %d: client %s is not merged: %s", figures.round, client, refusal)
        silent = refusal.kind == "silent"
        figures.silent, figures.refused = figures.silent + silent, figures.refused + (not silent)
        self._roster.refused[client] = str(refusal)
        self.state.events.add(refusal.kind, client, refusal, figures.round)
        self.state.ledger.release(client)
        if LEASE_TOO_SHORT in str(refusal):
            self.state.pace.widen(client)

    def _commit(self, aggregator: Aggregator, asked: Mapping[str, Instructions], figures: RoundFigures) -> bool:
        """Step the weights, and enter the round in ledger, clock and what is known of the clients: all of it or nothing."""
        state, started = self.state, time.monotonic()
        self._say("merging", figures.round)
        parts = figures.merged.values()
        reports = state.pace.believed([part.update.report for part in parts])
        for part, report in zip(parts, reports, strict=True):
            part.update = replace(part.update, report=report)
        gradient = aggregator.result()
        figures.take(gradient, aggregator.cosines())
        try:
            state.outer.step(state.weights, gradient, fraction=self._instructor.fraction(reports, asked))
        except ValueError as error:  # finite updates of which no finite model can be made
            state.events.add("not_finite", SERVER, error, figures.round)
            logger.warning("round %d: %s", figures.round, error)
            return False
        for part in parts:
            report = part.update.report
            state.ledger.commit(report.client, report.data)
            state.pace.learn(report, None if self._simulated else part.seconds)
        state.norms.accept({client: (part.length, part.scale) for client, part in figures.merged.items()})
        state.clock.round = figures.round
        state.clock.tokens += sum(report.tokens for report in reports)
        state.clock.step += round(sum(report.steps for report in reports) / len(reports))
        figures.merge += time.monotonic() - started
        state.pace.learn_merge(time.monotonic() - started)
        return True

    # --- between rounds

    def _save(self, *, last: bool = False) -> None:
        """Write the round's checkpoint. Where there is no room the run goes on, and tries again after every round."""
        self._say("saving", self.state.clock.round)
        try:
            self.state.save(self._run, self._module, self._data, self.board.summary)
        except SaveError as error:
            if last:
                raise
            self._unsaved = True
            self.state.events.add("disk", SERVER, error, self.state.clock.round)
            logger.warning("round %d is not saved, the run goes on: %s", self.state.clock.round, error)
            return
        self._unsaved = False
        reach(self._run, Reached.CHECKPOINT)
        prune(self._run, self._options)

    def _while_waiting(self, number: int, waiting: str) -> None:
        self._measuring.take(self.state)
        self._say("waiting", number, waiting_for=waiting)

    def _say(self, phase: str, number: int, **figures: object) -> None:
        """Tell the terminal and `nanofed status` what is going on."""
        tokens, refused = self.state.clock.tokens, self._roster.refused
        self._live.say(phase=phase, round=number, tokens=tokens, horizon=self._horizon, refused=refused, **figures)
        self.board.bar.show(f"round {number}, {len(self._roster.clients)} clients, {phase}", tokens)
