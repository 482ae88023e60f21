"""Bits per byte of the global weights: the server evaluates them itself, or the sites do and their sums are pooled."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.validation import tokens_of_share
from nanofed.errors import NanofedError
from nanofed.evaluation.bits_per_byte import BitsPerByte, bits_per_byte, evaluate_bits_per_byte
from nanofed.evaluation.core.bundle import Bundle
from nanofed.evaluation.core.score import CoreScore, evaluate_core
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.messenger import Messenger
from nanofed.federated.server.metrics import FederationMetrics
from nanofed.federated.server.policy import ClientPolicy
from nanofed.federated.server.scheduling import CLOCK_SLACK
from nanofed.federated.server.state import State
from nanofed.federated.server.validation import RefusedReply, ReplyMetrics, check_repeated
from nanofed.federated.wire.codec import CODECS, Weights, WireError, hash_arrays, payload_bytes
from nanofed.federated.wire.messages import Evaluate, Evaluation, Instructions
from nanofed.federated.wire.plain_text import plain
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.generation.text import SAMPLE_TOKENS, complete
from nanofed.model.loss import LOGIT_CAP
from nanofed.training.module import GPTModule
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Point

logger = logging.getLogger(__name__)

SHARE_OF_GRACE = 0.5  # of a round's grace, in which a site evaluates; the rest is for the reply's way back


@dataclass(frozen=True)
class _Wanted:
    """The point of the curve that is wanted of the weights after a round, without its figure, and the steps by then."""

    point: Point
    step: int


class RoundEvaluator(ABC):
    """Has the weights after a round evaluated, and writes the figure under that round whenever it comes.

    Attributes:
        round: The last round that was evaluated, or is being evaluated; -1 before the first.
    """

    def __init__(self, metrics: FederationMetrics, options: RunOptions) -> None:
        self._metrics = metrics
        self._options = options
        self.round = -1

    def begin(self, state: State) -> None:
        """Evaluate the first weights of a run, and those of a resumed round that has no figure yet."""
        number = state.clock.round
        if any(point.step == number for point in self._metrics.summary.curve):
            self.round = number
        elif number % self._options.eval_every == 0:
            self.start(state)

    @abstractmethod
    def start(self, state: State, *, last: bool = False) -> None:
        """Have the weights evaluated as they are; the last ones of a run at once."""

    def end(self, state: State) -> None:
        """Evaluate the last weights of a run, if they have no figure yet: its last round was an empty one."""
        if self.round != state.clock.round:
            self.start(state, last=True)

    def collect(self, state: State, *, wait: bool = False) -> None:  # noqa: B027  a kind overrides the hooks that it needs
        """Write a figure that is ready; with `wait`, also one that is under way."""

    def stop(self) -> None:  # noqa: B027
        """End what is under way."""

    def requests(self, instructions: Mapping[str, Instructions]) -> Mapping[str, Evaluate]:
        """Return what is sent to the clients of a round beside their instructions, by client."""
        return {}

    def take_reply(self, client: str, metrics: ReplyMetrics, elapsed: float, state: State) -> float:
        """Take what a client's reply says of its evaluation, and return the seconds that the client spent on it."""
        return 0.0

    def end_round(self, state: State, *, merged: bool) -> None:  # noqa: B027
        """Write what the clients of a round have measured, now that no more replies come.

        With `merged` they have changed since the round was sent, so that nobody can be asked for the old ones again.
        """

    def _wanted(self, state: State) -> _Wanted:
        clock, summary = state.clock, self._metrics.summary
        point = Point(clock.round, clock.tokens, round(summary.seconds, 3), math.nan, summary.bytes)
        return _Wanted(point, clock.step)


# --- the server evaluates


@dataclass(frozen=True)
class Measured:
    """What the server has measured of some weights."""

    bpb: float  # bits per byte
    samples: Mapping[str, str]  # prompt -> the prompt with the likeliest text after it
    seconds: float  # how long that took
    core: CoreScore | None  # CORE, where it was due


class ServerModel:
    """A model on the server that takes the global weights to be evaluated.

    Args:
        module: The GPTModule, which is configured here if it is not yet.
        data: The shards and the tokenizer.
        device: The device that evaluates.
        shared: The module's model is also that of a trainer in this process.
    """

    def __init__(self, module: GPTModule, data: TokenDataModule, device: torch.device, *, shared: bool) -> None:
        with torch.device(device):
            module.configure_model()
        self._gpt = module.gpt
        self._data = data
        self._device = device
        self._shared = shared
        self._metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes)).to(device)
        self.stopped = threading.Event()

    def load(self, weights: Weights) -> None:
        """Copy weights into the model, so that later changes of them are not measured."""
        parameters = self._gpt.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, array in weights.items():
                if self._shared:
                    parameters[name].copy_(torch.from_numpy(array))
                else:
                    parameters[name].data = torch.from_numpy(array).to(self._device, copy=True)

    def release(self) -> None:
        """Give back the memory of the model's weights until others are loaded; a shared model keeps them."""
        if not self._shared:
            for parameter in self._gpt.state_dict(keep_vars=True).values():
                parameter.data = torch.empty(0, device=self._device)

    def bits_per_byte(self) -> float:
        """Return bits per byte of the loaded weights on the validation shard."""
        with closing(self._batches()) as batches:
            return evaluate_bits_per_byte(self._gpt, batches, self._metric, self._device)

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        with closing(iter(self._data.validation_loader())) as text:  # an error leaves no thread that reads ahead
            for batch in text:
                self._check_stopped()
                yield batch.inputs, batch.targets

    def _check_stopped(self) -> None:
        if self.stopped.is_set():
            raise InterruptedError("the run has ended: the figure is not needed")

    def _samples(self, prompts: Sequence[str]) -> dict[str, str]:
        greedy = Sampling(temperature=0.0)
        texts = complete(Engine(self._gpt), self._data.tokenizer, prompts, greedy, max_tokens=SAMPLE_TOKENS)
        return {done.prompt: done.prompt + done.text for done in texts}

    def measure(self, prompts: Sequence[str], bundle: Bundle | None, examples: int) -> Measured:
        """Measure the loaded weights and release them.

        Args:
            prompts: The prompts of the text samples; without any, none is made.
            bundle: CORE's tasks; None measures no CORE.
            examples: How many examples of each task are asked; 0 asks all.
        """
        started, core = time.monotonic(), None
        try:
            bpb = self.bits_per_byte()
            samples = self._samples(prompts) if prompts else {}
            seconds = time.monotonic() - started
            if bundle is not None:
                core = evaluate_core(
                    self._gpt, self._data.tokenizer, bundle, examples=examples, on_batch=self._check_stopped
                )
            return Measured(bpb, samples, seconds, core)
        finally:
            self.release()


class ServerEvaluator(RoundEvaluator):
    """The server evaluates the weights, at once or beside the next round.

    Beside a round one copy of the weights is evaluated at a time, in a thread, and no other is queued: a round whose turn comes
    while another is being evaluated gets no figure, and the log says so.

    Args:
        beside: Whether the next round runs meanwhile. Where it does not, a run takes the same course each time.
    """

    def __init__(self, model: ServerModel, metrics: FederationMetrics, options: RunOptions, *, beside: bool) -> None:
        super().__init__(metrics, options)
        self._model = model
        self._beside = beside
        self._bundle = Bundle.read(options.core_data) if options.core_every else None
        self._pool = ThreadPoolExecutor(1, "evaluation")
        self._current: tuple[_Wanted, Future[Measured]] | None = None

    def start(self, state: State, *, last: bool = False) -> None:
        """Evaluate the weights as they are; the last ones of a run at once.

        Raises:
            NanofedError: the weights are evaluated at once and cannot be.
        """
        self.collect(state)
        every, wanted = self._options.sample_every, self._wanted(state)
        prompts = self._options.sample_prompts if every and state.clock.round % every == 0 else ()
        due = self._bundle is not None and state.clock.round % self._options.core_every == 0
        asked = prompts, self._bundle if due else None, self._options.core_examples
        if last or not self._beside:
            self.collect(state, wait=True)
            self._model.load(state.weights)
            self._write(wanted, self._model.measure(*asked))
        elif self._current is not None:
            logger.info(
                "round %3d  is not measured: the server is still measuring round %d",
                state.clock.round,
                self._current[0].point.step,
            )
        else:
            try:
                self._model.load(state.weights)
            except Exception as error:  # the device has no room for them
                self._model.release()
                self._fail(wanted, error, state)
                return
            self.round = state.clock.round
            self._current = wanted, self._pool.submit(self._model.measure, *asked)

    def collect(self, state: State, *, wait: bool = False) -> None:
        """Write a figure that is ready; with `wait`, also one that is under way."""
        if self._current is None or not (wait or self._current[1].done()):
            return
        (wanted, done), self._current = self._current, None
        if (error := done.exception()) is not None:  # of the model, the device or the data
            self._fail(wanted, error, state)
        else:
            self._write(wanted, done.result())

    def _fail(self, wanted: _Wanted, error: BaseException, state: State) -> None:
        logger.warning("round %d: bits per byte could not be measured: %s", wanted.point.step, error)
        state.events.add("evaluation", SERVER, repr(error), wanted.point.step)

    def _write(self, wanted: _Wanted, found: Measured) -> None:
        self.round = max(self.round, wanted.point.step)
        self._metrics.validation(replace(wanted.point, bpb=found.bpb), step=wanted.step, seconds=found.seconds)
        for prompt, sample in found.samples.items():
            self._metrics.text(prompt, sample, wanted.step)
        if found.core is not None:
            self._metrics.core(found.core, wanted.point, step=wanted.step)

    def stop(self) -> None:
        """End a measurement that is under way, at its next batch."""
        self._model.stopped.set()
        self._pool.shutdown()


# --- the sites evaluate


class SiteEvaluator(RoundEvaluator):
    """Every site evaluates the weights on text of its own, or on a share of the pinned text, and the sums are pooled.

    The request goes with the next round: a site evaluates the weights that it has just received, before it trains them, in
    addition to its training's budget. So a figure comes one round later, and costs no second copy of the weights on the wire.
    Only the last weights of a run are sent for that alone.

    Args:
        messenger: It sends the last weights.
        there: It returns client -> node of those that can be asked now.
    """

    def __init__(
        self,
        messenger: Messenger,
        there: Callable[[], Mapping[str, int]],
        data: TokenDataModule,
        config: FederationConfig,
        metrics: FederationMetrics,
        options: RunOptions,
        policy: ClientPolicy,
    ) -> None:
        super().__init__(metrics, options)
        self._messenger = messenger
        self._there = there
        self._data = data
        self._config = config
        self._policy = policy
        self._waiting: list[_Wanted] = []  # of rounds that ended with the weights as they are now
        self._asked: dict[str, Evaluate] = {}
        self._sums: dict[str, Evaluation] = {}

    def start(self, state: State, *, last: bool = False) -> None:
        """Have the weights as they are evaluated with the next round; the last ones of a run at once."""
        if state.clock.round not in [wanted.point.step for wanted in self._waiting]:
            self._waiting.append(self._wanted(state))
        self.round = state.clock.round
        if last:
            self._ask_alone(state)

    def end(self, state: State) -> None:
        """Have the last weights evaluated, if they are not yet."""
        if self.round != state.clock.round or self._waiting:
            self.start(state, last=True)

    def requests(self, instructions: Mapping[str, Instructions]) -> Mapping[str, Evaluate]:
        """Return what goes with the instructions of a round, by client: nothing where no figure is wanted."""
        told = {client: asked.described() for client, asked in instructions.items()}
        return self._begin_requests(told if self._waiting else {})

    def _begin_requests(self, told: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Evaluate]:
        # Text that only a site has is evaluated whole by that site. The pinned shard is divided: the sums of all shares are
        # the server's own figure, to the last bit on the same hardware and in the same dtype, at 1/n of the work each.
        # A site that does not answer leaves its share out of the figure, which is then of a little less text, and says so.
        own_text = self._config.sharding == "local"
        self._sums = {}
        self._asked = {
            client: Evaluate(
                **told[client],
                eval_tokens=self._data.eval_tokens,
                share=0 if own_text else index,
                shares=1 if own_text else len(told),
                seconds=self._config.grace_seconds * SHARE_OF_GRACE,
            )
            for index, client in enumerate(sorted(told))
        }
        return self._asked

    def take_reply(self, client: str, metrics: ReplyMetrics, elapsed: float, state: State) -> float:
        """Take what a client's reply says of its evaluation, and return the seconds that the client spent on it.

        The metrics are all that came beside the client's weights, `elapsed` seconds after it was asked. Whatever they hold, it
        costs no more than the figure and one event.
        """
        asked = self._asked.get(client)
        if asked is None:
            return 0.0
        try:
            found = _checked(metrics, asked, elapsed)
            if not found.failure:
                self._check_sums(found, asked)
                self._sums[client] = found
        except RefusedReply as refusal:
            self._lost(client, refusal, state)
            return 0.0
        if found.failure:
            self._lost(client, found.failure, state)
        return found.seconds

    def _check_sums(self, found: Evaluation, asked: Evaluate) -> None:
        """Refuse sums that no text of this length and no model of this kind can have."""
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

    def end_round(self, state: State, *, merged: bool) -> None:
        """Write what a round's sites have measured; where they have measured nothing, there is no figure."""
        if not self._waiting or not self._asked:
            return
        found = self._sums
        count = sum(part.bytes for part in found.values())
        if count:
            bpb = bits_per_byte(math.fsum(part.nats for part in found.values()), count)
            seconds = max(part.seconds for part in found.values())
            sites = {name: bits_per_byte(part.nats, part.bytes) for name, part in sorted(found.items()) if part.bytes}
            state.evaluations |= {name: {"round": self.round, "bpb": own} for name, own in sites.items()}
            silent = len(self._asked) - len(found)
            for wanted in self._waiting:
                self._metrics.validation(
                    replace(wanted.point, bpb=bpb), step=wanted.step, seconds=seconds, sites=sites, silent=silent
                )
            self._waiting = []
        elif merged:
            self._none(state, f"none of the {len(self._asked)} sites that were asked gave a figure")
        self._asked, self._sums = {}, {}

    def _ask_alone(self, state: State) -> None:
        nodes = self._there()
        if not nodes:
            self._none(state, "no site is there to be asked")
            return
        whole = CODECS[self._config.down_codec].whole  # beside the rounds: what the sites hold stays as it is
        try:
            payload = self._messenger.transport.encode(state.weights, whole)
        except NanofedError as error:  # the disk on which they are kept is full
            self._none(state, str(error))
            return
        self._metrics.summary.bytes += len(nodes) * payload_bytes(payload)
        told = {"run": state.run_id, "round": state.clock.round, "base_hash": hash_arrays(payload)}
        told |= {"down_codec": whole.name, "changed_from": ""}
        self._begin_requests({name: {**told, "client": name, "nonce": secrets.token_hex(16)} for name in nodes})
        seconds = self._policy.time_limit(self._config.grace_seconds, len(nodes))
        self._messenger.send_evaluation(nodes, self._asked, payload, seconds=seconds)
        for reply in self._messenger.replies(state.clock.round):
            if isinstance(reply.result, RefusedReply):
                self._lost(reply.client, reply.result, state)
            else:
                self.take_reply(reply.client, reply.result, reply.seconds, state)
        self.end_round(state, merged=True)  # nobody will be asked again

    def _lost(self, client: str, reason: object, state: State) -> None:
        number = self._asked[client].round
        logger.warning("round %d: client %s gives no bits per byte: %s", number, client, plain(reason))
        state.events.add("evaluation", client, reason, number)

    def _none(self, state: State, reason: str) -> None:
        for wanted in self._waiting:
            logger.warning("round %d: no bits per byte: %s", wanted.point.step, reason)
            state.events.add("evaluation", SERVER, reason, wanted.point.step)
        self._waiting = []


def _checked(metrics: ReplyMetrics, asked: Evaluate, elapsed: float) -> Evaluation:
    """Return the evaluation that a client's reply holds; refuse one of another round, or of more time than has passed."""
    if Evaluation.key not in metrics:
        raise RefusedReply("evaluation", "it was asked for one, and its answer says nothing of it")
    try:
        found = Evaluation.from_config(metrics)
    except WireError as error:
        raise RefusedReply("evaluation", str(error)) from error
    check_repeated(found, asked, kind="evaluation")
    if not 0 <= found.seconds <= elapsed + CLOCK_SLACK:
        raise RefusedReply("evaluation", f"it claims {found.seconds:.1f} s, {elapsed:.1f} s after it was asked")
    return found
