"""The round loop: wait for clients, lease rows, send, validate, fold, step, commit, evaluate, checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from flwr.serverapp import Grid

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.packing import most_pending
from nanofed.data.rows import RowPlan
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.aggregation import make_aggregator
from nanofed.federated.aggregation.aggregator import Aggregator
from nanofed.federated.aggregation.norm_guard import UnusualNorm
from nanofed.federated.aggregation.outer import damping, outer_strength
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.config import FederationConfig
from nanofed.federated.planning import TARGET
from nanofed.federated.server.clients import Clients
from nanofed.federated.server.downlink import Downlink
from nanofed.federated.server.evaluation import RoundEvaluator, ServerEvaluator, ServerModel, SiteEvaluator
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.messenger import Messenger
from nanofed.federated.server.metrics import FederationMetrics, MergedUpdate, RoundMetrics
from nanofed.federated.server.policy import ONE_MACHINE, ClientPolicy
from nanofed.federated.server.scheduling import SPEED_ROUNDS, Scheduler, steps_taken
from nanofed.federated.server.state import State, saved_round
from nanofed.federated.server.status import StatusFile
from nanofed.federated.server.validation import RefusedReply, Update
from nanofed.federated.wire.blocks import l2_norm
from nanofed.federated.wire.codec import payload_bytes
from nanofed.federated.wire.messages import Hello, Instructions
from nanofed.federated.wire.weight_transport import WeightTransport
from nanofed.training.checkpoint.atomic import SaveError
from nanofed.training.checkpoint.folder import prune_checkpoints, set_aside_later
from nanofed.training.event_files import cut_events
from nanofed.training.gc_control import FrozenObjects
from nanofed.training.module import GPTModule
from nanofed.training.run_folder import Reached, reach
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import AT_HORIZON

logger = logging.getLogger(__name__)

LOW = 0.9  # share of a round in training, below which the log says what would make it more


class RoundLoop:
    """Trains a model over the clients of a grid.

    Args:
        module: It gives model, recipe and seed; the server evaluates with its model.
        data: The shards, whose training rows are leased and whose validation rows the server reads.
        run: The run's folder.
        device: The device on which the server evaluates.
        policy: Whether the clients share this machine or are sites with machines of their own.
        owners: It returns node -> the client whose key the node has; None where nodes have no keys.
        transport: It moves the weights; by default they are in the messages.
    """

    def __init__(
        self,
        grid: Grid,
        module: GPTModule,
        data: TokenDataModule,
        config: FederationConfig,
        options: RunOptions,
        run: Path,
        metrics: FederationMetrics,
        device: torch.device,
        *,
        policy: ClientPolicy = ONE_MACHINE,
        owners: Callable[[], Mapping[int, str]] | None = None,
        transport: WeightTransport | None = None,
    ) -> None:
        if policy.one_machine and config.quorum > config.clients:
            raise ConfigError(f"federation.quorum={config.quorum} is more than the {config.clients} clients there are")
        if policy.one_machine and config.overlap:
            raise ConfigError(
                "federation.overlap: clients of one machine take turns, and have nothing to wait for; set it to false"
            )
        if config.sharding != "local":
            RowPlan.whole(data.dataset).check_streams(data.streams)
        self._policy = policy
        self._module = module
        self._data = data
        self._config = config
        self._options = options
        self._run = run
        self.metrics = metrics
        self._horizon = module.recipe.horizon(module.config)
        self.status = StatusFile(run)
        self._scheduler = Scheduler(module, data, config, policy)
        model = ServerModel(module, data, device, shared=policy.one_machine)
        self.state = State.new(module, data, config, run)
        model.release()  # the state has the weights
        events = self.state.events
        limits = {"streams": data.streams, "most_pending": most_pending(data.sequence_len)}
        self._messenger = Messenger(grid, events, transport, **limits)
        self._downlink = Downlink(config, self._messenger.transport)
        hello = Hello.of("", module, data)
        self.clients = Clients(grid, hello, config, events, policy, seed=module.seed, admit=self._admit, owners=owners)
        self._evaluator: RoundEvaluator
        if config.evaluation == "sites":
            self._evaluator = SiteEvaluator(self._messenger, self._there, data, config, metrics, options, policy)
        else:
            self._evaluator = ServerEvaluator(model, metrics, options, beside=not policy.one_machine)
        self._due: tuple[int, Callable[[], None]] | None = None  # a round, and what writes its checkpoint
        self._unsaved = False  # a checkpoint could not be written
        self._told: set[str] = set()  # of the rates in use
        self._replied: dict[str, float] = {}  # client -> when its last reply was here, on the monotonic clock
        self._merged_rounds = 0  # of this start

    # --- the run

    def train(self) -> None:
        """Run rounds until the horizon or the last round, in a run's folder that is open and held by this process.

        Raises:
            NanofedError: On one machine, nobody can take part or no round succeeds.
            SaveError: The last checkpoint cannot be written.
        """
        clock, summary = self.state.clock, self.metrics.summary
        summary.ended = None
        if (resumed := self.state.path(self._run)).exists():
            set_aside_later(resumed)
        cut_events(self._run, clock.step if clock.round else -1)
        self.metrics.describe()
        if clock.round:
            self.metrics.save()
        with self.status, FrozenObjects():
            try:
                self._rounds()
                rounds = f"federation.rounds={self._config.rounds} are done"
                at = f"at {clock.tokens:,} of {self._horizon:,} tokens"
                summary.ended = AT_HORIZON if clock.tokens >= self._horizon else f"{rounds} {at}"
            except BaseException as error:
                summary.ended = f"{type(error).__name__} after round {clock.round}: {error}"
                self._save()
                raise
            finally:
                self._evaluator.stop()

    def _rounds(self) -> None:
        state, failed = self.state, 0
        limit = self._config.max_failed_rounds or self._policy.max_failed_rounds
        self._evaluator.begin(state)
        while not self._finished():
            merged = self._round(state.clock.round + 1, failed)
            self._evaluator.collect(state)
            if merged is None:
                continue
            failed = 0 if merged else failed + 1
            if limit is not None and failed >= limit:
                why = self.clients.why()
                raise NanofedError(f"{failed} rounds in a row brought no update that could be merged ({why})")
            time.sleep(self._policy.pause(failed))
        self._evaluator.end(state)
        if self._due or self._unsaved or saved_round(self._run) != state.clock.round:
            self._save_later()
            self._save(last=True)

    def _finished(self) -> bool:
        clock, rounds = self.state.clock, self._config.rounds
        return clock.tokens >= self._horizon or (rounds is not None and clock.round >= rounds)

    def _round(self, number: int, attempt: int) -> bool | None:
        """Run one round and tell whether it changed the model; None if too few took part."""
        state, config = self.state, self._config
        started = time.monotonic()
        present = self._participants(number, attempt)
        for client in set(state.ledger.clients()) - set(present) - self._messenger.waiting_for:
            state.ledger.of(client).miss(client)
        if len(present) < config.quorum:
            logger.info("round %3d  %d of %d clients take part: nothing changes", number, len(present), config.quorum)
            state.events.add("quorum", SERVER, f"{len(present)} clients take part, {config.quorum} are needed", number)
            state.clock.round = number
            return None
        figures = RoundMetrics(number, asked=len(present), wait=time.monotonic() - started)
        self._say("training", number, clients=sorted(present), merged=[])
        merged = self._train_and_merge(present, figures)
        self.metrics.summary.bytes += figures.bytes_down + figures.bytes_up
        self._evaluator.end_round(state, merged=merged)
        if not merged:
            said = f"{len(figures.merged)} of {len(present)} updates could be merged, {config.quorum} are needed"
            logger.warning("round %d: %s; the model stays as it is", number, said)
            return False
        reach(self._run, Reached.STEP)
        rows, clock = state.ledger.merged_rows(), state.clock
        self.metrics.merged(figures, step=clock.step, tokens=clock.tokens, rows=rows, events=state.events)
        last = self._finished()
        if number % self._options.eval_every == 0 or last:
            self._say("validating", number)
            if last:
                self._save_later()  # its round is not lost where the weights cannot be measured
            self._evaluator.start(state, last=last)
        due = bool(self._options.save_every) and number % self._options.save_every == 0
        if due or self._unsaved:
            self._save_later()
        self._tell_utilisation(figures)
        return True

    # --- who takes part

    def _participants(self, number: int, attempt: int) -> dict[str, int]:
        """Wait for a quorum, and return the clients that take part, with their nodes."""
        self._say("waiting", number)
        self.clients.round = number

        def meanwhile(waiting: str) -> None:
            self._save()
            self._evaluator.collect(self.state)
            self._say("waiting", number, waiting_for=waiting)

        return self.clients.draw(self.clients.wait(number, meanwhile), number, attempt)

    def _there(self) -> Mapping[str, int]:
        return self.clients.draw(self.clients.connected(), self.state.clock.round + 1, 0)

    def _admit(self, hello: Hello) -> None:
        self.state.ledger.admit(hello.name, hello.shards)
        self.state.speeds.devices[hello.name] = hello.devices
        self._downlink.holders.discard(hello.name)  # it has been started again

    # --- from the global weights to updates

    def _train_and_merge(self, present: Mapping[str, int], figures: RoundMetrics) -> bool:
        """Have the clients train, merge their updates, and tell whether the model changed."""
        state, config, number, started = self.state, self._config, figures.round, time.monotonic()
        try:
            sent, base = self._downlink.encode(state, present), self._downlink.base_hash
            asked = self._scheduler.instruct(number, list(present), state, base, sent.changed_from)
            self._tell_batch(first := next(iter(asked.values())))
            seconds = None if first.seconds is None else config.seconds_at(first.clock_tokens / self._horizon)
            self._say("training", number, began=time.time(), seconds=seconds, steps=first.max_steps)
            figures.encode = time.monotonic() - started
            with make_aggregator(config.merge, sent, self._run / "spool", trim=config.trim) as aggregator:
                self._collect(present, asked, sent, aggregator, figures)
                self._compare(aggregator, figures)
                return len(figures.merged) >= config.quorum and self._commit(aggregator, asked, figures)
        except NanofedError as error:  # the disk on which weights or replies are kept is full
            state.events.add("disk", SERVER, error, number)
            logger.warning("round %d: %s", number, error)
            return False

    def _collect(
        self,
        present: Mapping[str, int],
        asked: Mapping[str, Instructions],
        sent: SentWeights,
        aggregator: Aggregator,
        figures: RoundMetrics,
    ) -> None:
        """Send the round to its clients, and fold their replies in as they arrive, one at a time."""
        started = time.monotonic()

        def meanwhile() -> None:
            self._save()
            self._say("training", figures.round)

        seconds = self._scheduler.time_limit(self.state.clock.tokens, len(present))
        self._messenger.send(present, asked, sent, seconds=seconds, requests=self._evaluator.requests(asked))
        figures.client_bytes_down = {client: payload_bytes(sent.payload_for(client)) for client in present}
        figures.client_bytes_up = sent.up.nbytes(sent.weights)
        for reply in self._messenger.replies(figures.round, meanwhile):
            folding = time.monotonic()
            try:
                if isinstance(reply.result, RefusedReply):
                    self._refuse(reply.client, figures, reply.result)
                else:
                    self._downlink.holders.add(reply.client)
                    instructions = asked[reply.client]
                    self._fold(reply.result, instructions, reply.seconds, aggregator, figures)
            except (RefusedReply, UnusualNorm) as refusal:
                self._refuse(reply.client, figures, refusal)
            figures.merge += time.monotonic() - folding
            self._say("training", figures.round, merged=sorted(figures.merged))
        figures.exchange = time.monotonic() - started - figures.merge
        self._hurry_late()

    def _hurry_late(self) -> None:
        """Have those whose answers came too late train for less."""
        while self._messenger.late:
            seconds = self._config.seconds_at(self.state.clock.tokens / self._horizon)
            self.state.speeds.hurry(self._messenger.late.pop(), seconds)

    def _fold(
        self, update: Update, asked: Instructions, seconds: float, aggregator: Aggregator, figures: RoundMetrics
    ) -> None:
        """Check an update against what is known of its client, and fold it in, or hold it until the round's others are known."""
        client, state = asked.client, self.state
        now = time.monotonic()
        before = now - seconds - self._replied.get(client, -math.inf)
        self._replied[client] = now
        if not self._policy.one_machine:
            state.speeds.check(update.report, seconds, before)
        report = state.ledger.of(client).believed(update.report, asked)
        steps = steps_taken(self._module.recipe.schedule, asked, update.report.steps)
        length = state.norms.measure(update.norms, steps, lambda name: l2_norm([state.weights[name]]))
        if report.unwritten:
            state.events.add("disk", client, "its disk took no optimizer state: a restart would lose it", asked.round)
        by_tokens = self._config.weighting == "tokens"
        weight = float(state.speeds.believed([report])[0].tokens) if by_tokens else 1.0
        age = figures.round - asked.round
        damped = damping(age, figures.in_flight)
        if held := not state.norms.is_unsuspicious(length):
            aggregator.hold(client, update.arrays, weight)
        else:
            aggregator.fold(client, update.arrays, weight, damped)
        self.clients.refused.pop(client, None)
        evaluating = self._evaluator.take_reply(client, update.metrics, seconds, state)
        figures.merged[client] = MergedUpdate(
            report, length, weight, seconds=seconds - evaluating, before=before, held=held, age=age, damping=damped
        )

    def _compare(self, aggregator: Aggregator, figures: RoundMetrics) -> None:
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
            aggregator.release(client, part.scale * part.damping)
            if part.scale < 1:
                reason = f"its update was {1 / part.scale:.1f} times as long as the longest allowed"
                self.state.events.add("clipped", client, reason, figures.round)
                logger.warning("round %d: client %s: %s", figures.round, client, reason)

    def _refuse(self, client: str, figures: RoundMetrics, refusal: RefusedReply | UnusualNorm) -> None:
        logger.warning("round %d: client %s is not merged: %s", figures.round, client, refusal)
        figures.silent += refusal.kind == "silent"
        self.clients.refused[client] = str(refusal)
        self.state.events.add(refusal.kind, client, refusal, figures.round)
        self.state.ledger.of(client).miss(client)
        if refusal.kind == "lease":
            self.state.speeds.widen(client)

    # --- from updates to the next global weights

    def _commit(self, aggregator: Aggregator, asked: Mapping[str, Instructions], figures: RoundMetrics) -> bool:
        """Step the weights, and enter the round in ledger, clock and what is known of the clients: all of it or nothing."""
        state, started = self.state, time.monotonic()
        self._say("merging", figures.round)
        parts = figures.merged.values()
        reports = state.speeds.believed([part.report for part in parts])
        for part, report in zip(parts, reports, strict=True):
            part.report = report
        gradient = aggregator.result()
        figures.merged_norm = l2_norm(list(gradient.values()))
        for client, cosine in aggregator.cosines().items():
            figures.merged[client].cosine = cosine
        tokens = state.clock.tokens + sum(report.tokens for report in reports)
        rounds = min(self._horizon / tokens * figures.round, self._config.rounds or math.inf)
        self._tell(figures.round, state.outer.plan(len(reports) * figures.in_flight, rounds))
        strength = outer_strength(tokens / self._horizon, self._config.outer_warmdown)
        fraction = self._scheduler.fraction(reports, asked)
        try:
            state.outer.step(state.weights, gradient, strength=strength, fraction=fraction)
        except ValueError as error:  # finite updates of which no finite model can be made
            state.events.add("not_finite", SERVER, error, figures.round)
            logger.warning("round %d: %s", figures.round, error)
            return False
        for part, report in zip(parts, reports, strict=True):
            state.ledger.of(report.client).commit(report.client, report.data)
            state.speeds.learn(report, None if self._policy.one_machine else part.seconds, part.before)
        state.norms.accept({client: (part.length, part.scale) for client, part in figures.merged.items()})
        state.clock.round = figures.round
        state.clock.tokens = tokens
        steps = round(sum(report.steps for report in reports) / len(reports))
        # Of n clients in flight each brings an n-th of its steps, in whole ones.
        state.clock.step += (
            steps * figures.round // figures.in_flight - steps * (figures.round - 1) // figures.in_flight
        )
        figures.merge += time.monotonic() - started
        state.speeds.learn_merge(time.monotonic() - started)
        return True

    def _save_later(self) -> None:
        """Have the checkpoint of the last round written when its clients train the next one, or are waited for.

        A server that dies before that loses this round as well; the clients keep what they need to train it again.
        """
        write = self.state.checkpoint(self._run, self._module, self._data, self.metrics.summary)
        self._due = (self.state.clock.round, write)

    def _save(self, *, last: bool = False) -> None:
        """Write the checkpoint that is due. Where there is no room the run goes on, and tries again after every round."""
        if self._due is None:
            return
        number, write = self._due
        self._say("saving", number)
        try:
            write()
        except SaveError as error:
            self._due, self._unsaved = None, True
            if last:
                raise
            self.state.events.add("disk", SERVER, error, number)
            logger.warning("round %d is not saved, the run goes on: %s", number, error)
            return
        self._due, self._unsaved = None, False
        reach(self._run, Reached.CHECKPOINT)
        prune_checkpoints(self._run, self._options.keep_checkpoints, self._options.keep_every)

    def _tell(self, number: int, rates: str) -> None:
        """Log the rates that a round is trained or merged with, where they are new to this run."""
        if rates not in self._told:
            self._told.add(rates)
            logger.info("round %3d  %s", number, rates)

    def _tell_batch(self, asked: Instructions) -> None:
        """Log what follows from the tokens of a step, of one client and of all, and what the seconds of a round mean."""
        schedule = self._module.recipe.schedule
        self._tell(asked.round, schedule.explain_scale(asked.batch_tokens * asked.participants, self._horizon))
        self._tell(asked.round, schedule.explain_beta2(asked.batch_tokens))
        if self._policy.one_machine and asked.participants > 1:
            self._tell(
                asked.round,
                "clients take turns on this machine: seconds are counted as if they trained at the same time",
            )

    def _tell_utilisation(self, figures: RoundMetrics) -> None:
        """Log once, when the first rounds of this start are over, which part of their seconds sites train."""
        self._merged_rounds += 1
        if self._policy.one_machine or self._config.asynchronous or self._merged_rounds != SPEED_ROUNDS:
            return
        share = figures.utilisation
        length = math.ceil((1 - share) * figures.seconds / (1 - TARGET))
        more = f"; federation.round_seconds={length} would make it {TARGET:.0%}" if share < LOW else ""
        logger.info(
            "round %3d  sites trained for %.0f%% of its %.1f s%s", figures.round, 100 * share, figures.seconds, more
        )

    def _say(self, phase: str, number: int, **figures: object) -> None:
        """Tell the terminal and `nanofed status` what is going on."""
        tokens, refused = self.state.clock.tokens, dict(self.clients.refused)
        self.status.say(phase=phase, round=number, tokens=tokens, horizon=self._horizon, refused=refused, **figures)
