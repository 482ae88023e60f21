"""The trainer at a site: one model on its devices, driven by rounds, and what each client keeps between them."""

from __future__ import annotations

import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning import Fabric
from torch import Tensor

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.rows import RowPlan, RowRange
from nanofed.data.streams import DataState
from nanofed.errors import NanofedError
from nanofed.evaluation.bits_per_byte import BitsPerByte
from nanofed.federated.site.optimizer_states import Saved, StateFolder
from nanofed.federated.site.ranks import Agreed, Ranks, SharedStopwatch, Turn
from nanofed.federated.wire.blocks import l2_norm
from nanofed.federated.wire.changes import changed
from nanofed.federated.wire.codec import CODECS, Arrays, WireError, hash_arrays, pack_with_feedback
from nanofed.federated.wire.messages import (
    MAX_FAILURE,
    Evaluate,
    Evaluation,
    Hello,
    Instructions,
    Report,
    WeightsMessage,
)
from nanofed.federated.wire.plain_text import SAFE_NAME
from nanofed.training.loop import LoopResult, Stopwatch, train_steps
from nanofed.training.module import GPTModule
from nanofed.training.recipe import accumulation_steps
from nanofed.training.strategy import send_weights

logger = logging.getLogger(__name__)

OTHER_HASH = "the weights that arrived do not have the hash that was announced"

# What codecs have rounded off and is still to be sent, of each weight; empty where nothing is.
Residual = dict[str, Tensor]


class ClientFailure(NanofedError):
    """A round cannot be trained for a reason that the server can do something about; `kind` is that of a `Failure`."""

    def __init__(self, kind: Literal["lease", "weights"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class LocalTrainer(Protocol):
    """What a NumPyClient needs: a direct call in process and in simulation."""

    def hello(self, client: str) -> Hello:
        """Say who the client is and what it runs."""

    def fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        """Train one round from the weights in `arrays`."""

    def evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        """Measure the weights in `arrays`."""


@dataclass(frozen=True)
class HeldWeights:
    """Weights in bf16, to which what changed in them is added."""

    hash: str
    arrays: Arrays


@dataclass(frozen=True)
class ClientState:
    """The optimizer state of a client after round `round` of a run."""

    run: str
    round: int
    optimizer: defaultdict[Tensor, Any]
    residual: Residual


@dataclass(frozen=True)
class Ahead:
    """The steps that were taken after a round and before the next one's weights were there."""

    asked: Instructions  # the round after which they were taken
    start: DataState  # where the streams stood at its end, as it was reported
    change: dict[str, Tensor]  # what the steps have changed of the weights, by name
    result: LoopResult
    data: DataState  # where the streams stand now
    residual: Residual  # what codecs had rounded off by its end

    def are_of(self, asked: Instructions) -> bool:
        """Tell whether these steps are the first of a round: what came before them is merged, and the rows go on the same."""
        before = self.asked
        return (
            (before.client, before.run, before.batch_tokens) == (asked.client, asked.run, asked.batch_tokens)
            and self.start == asked.data
            and self.result.steps < asked.max_steps
            and _goes_on(before.lease, asked.lease)
        )


def _goes_on(before: Sequence[RowRange], after: Sequence[RowRange]) -> bool:
    """Tell whether a lease has all rows of an earlier one in the same order, but for ranges that have left its front."""
    left = list(before)
    while left and after and replace(left[0], stop=0) != replace(after[0], stop=0):
        left.pop(0)
    if not left or len(left) > len(after):
        return False
    *whole, last = left
    end = after[len(whole)]
    return whole == list(after[: len(whole)]) and last == replace(end, stop=last.stop) and last.stop <= end.stop


class FabricTrainer:
    """Trains with Fabric, for one client or for several that take turns on the same model.

    Weights and data position come with every message, so clients in one process share the model and each keeps only its
    optimizer state: in memory, and on disk so that a stopped run goes on exactly and a Ray actor finds what another left. A
    round that fails or is aborted leaves what is kept as it was.

    With several ranks each has a trainer, and all train the same round at the same time.

    Args:
        module: The GPTModule, not yet configured.
        data: The shards and the tokenizer.
        fabric: A Fabric that is launched; with several devices it has a FabricShardedStrategy.
        folder: The folder of the clients' states.
        speed: A function from a client's name to its speed; 1 is this machine's own.
        client_data: The shards of clients that have text of their own, by name; the others train on `data`.
        durable: Whether a state counts as saved only when the disk has confirmed it.
        shared: Whether other processes train the same clients: the weights that a client holds are saved with its state then.

    Attributes:
        ranks: The ranks that train together.
        states: The saved optimizer states, which the first rank writes and reads.
    """

    def __init__(
        self,
        module: GPTModule,
        data: TokenDataModule,
        fabric: Fabric,
        folder: Path,
        speed: Callable[[str], float] = lambda client: 1.0,
        *,
        client_data: Mapping[str, TokenDataModule] = MappingProxyType({}),
        durable: bool = False,
        shared: bool = False,
    ) -> None:
        with fabric.init_module():
            module.configure_model()
        module.fabric = fabric
        self.ranks = Ranks()
        self.states = StateFolder(folder, durable=durable)
        self._module = module
        self._data = data
        self._client_data = client_data
        self._fabric = fabric
        self._speed = speed
        self._optimizer = module.configure_optimizers()
        self._fabric_module, self._fabric_optimizer = fabric.setup(module, self._optimizer)
        self._parameters: dict[str, Tensor] = dict(module.gpt.state_dict(keep_vars=True))
        # Names and shapes alone: arrays of no memory.
        self._like = {n: np.broadcast_to(np.float32(0), tuple(p.shape)) for n, p in self._parameters.items()}
        self._pinned: dict[str, Tensor] | None = None
        self._kept: dict[str, ClientState] = {}
        self._trained: tuple[Instructions, Report] | None = (
            None  # the last round, while the weights are those at its end
        )
        self._ahead: Ahead | None = None
        self._shared = shared
        self._held: HeldWeights | None = None  # by all clients that train here, on the first rank
        self._residual: Residual = {}  # of the client whose turn it is, on the first rank
        self._pace: dict[str, float] = {}
        self._unwritten = 0  # states, when the last report was made

    def hello(self, client: str) -> Hello:
        """Say who the client is and what it runs."""
        data, pace = self._data_of(client), self._pace.get(client)
        return Hello.of(client, self._module, data, devices=self.ranks.size, tokens_per_second=pace)

    def _data_of(self, client: str) -> TokenDataModule:
        return self._client_data.get(client, self._data)

    def is_sound(self, error: Exception) -> bool:
        """Tell whether the device is of use after an error: one of its own stays with it."""
        return self._fabric.device.type == "cpu" or isinstance(error, torch.OutOfMemoryError)

    def fit(self, arrays: Arrays, instructions: Instructions, turn: Turn | None = None) -> tuple[Arrays, Report]:
        """Train one round and save the optimizer state; arguments, result and errors are those of `train`."""
        answer = self.train(arrays, instructions, turn)
        self.save(instructions)
        return answer

    def train(self, arrays: Arrays, instructions: Instructions, turn: Turn | None = None) -> tuple[Arrays, Report]:
        """Train one round and return the local weights and the report; `save` keeps the optimizer state on disk.

        They are two steps so that the server need not wait for this machine's disk.

        Args:
            arrays: the weights, on the first rank; the others take them from it, and return none.
            instructions: What to do; they are equal on all ranks.
            turn: The caller's view of the round: it follows the progress and may end it.

        Raises:
            WireError: the weights are not the ones that the instructions describe.
            ClientFailure: the server has to send a longer lease, or whole weights.
            NanofedError: the training cannot be done (a batch that does not divide, a loss that is not finite).
            Exception: `turn.check` raises it.
            Agreed: Where there are several ranks, all of them raise it in the place of all these.
        """
        turn = turn or Turn()
        ranks, module = self.ranks, self._module
        ahead = self._take_ahead(instructions)
        with ranks.together():
            if ranks.first:
                arrays = self._take_weights(arrays, instructions)
        if ranks.size > 1:
            send_weights(module.gpt)
        if ahead is None:
            self._optimizer.state = self._state_before(instructions)
        else:
            self._residual = ahead.residual
            for name, parameter in self._parameters.items():
                parameter.detach().add_(ahead.change.pop(name))
        arrived = ranks.from_first(turn.arrived)
        own = Stopwatch(self._speed(instructions.client)) if arrived is None else Stopwatch(start=arrived)
        watch = SharedStopwatch(ranks, own)
        before = 0.0 if arrived is None else watch.elapsed()
        taken = 0 if ahead is None else ahead.result.steps
        result = self._steps(
            instructions,
            turn,
            after=taken,
            start=instructions.data if ahead is None else ahead.data,
            num_steps=instructions.max_steps - taken,
            seconds=instructions.seconds,
            watch=watch,
        )
        if ahead is not None:
            result = ahead.result.followed_by(result)
        losses = ranks.mean(result.losses)
        payload: Arrays = []
        with ranks.together():
            if result.steps == 0 or module.data_state is None:
                raise ClientFailure("lease", "the leased rows hold too little text for one optimizer step")
            if not np.isfinite(losses).all():
                step = int(np.argmin(np.isfinite(losses)))
                raise NanofedError(f"the training loss is {losses[step]} at step {step + 1} of the round")
            if ranks.first:
                payload = self._local_weights(arrays, instructions)
                turn.check()
        self._kept[instructions.client] = ClientState(
            instructions.run, instructions.round, self._optimizer.state, self._residual
        )
        unwritten = self.states.unwritten > self._unwritten
        self._unwritten = self.states.unwritten
        report = Report(
            **instructions.repeated(),
            payload_hash=hash_arrays(payload),
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.seconds - before,
            loss_first=losses[0],
            loss_last=losses[-1],
            exhausted=result.exhausted,
            data=DataState.merge(ranks.gather(module.data_state)),
            unwritten=unwritten,
            ahead=taken,
        )
        self._trained = (instructions, report)
        self._pace[instructions.client] = report.tokens_per_second
        return payload, report

    def ahead_steps(self) -> int:
        """Return how many steps may be taken before the next round's weights are there.

        They are no more than the last round had, so that a server that is gone does not make a site drift away, and leave one for
        the next round where that is no shorter.
        """
        if self._trained is None:
            return 0
        asked, report = self._trained
        more = asked.overlap and self._module.clock.tokens < asked.horizon_tokens
        return min(report.steps, asked.max_steps - 1) if more else 0

    def train_ahead(self, watch: Stopwatch, turn: Turn) -> None:
        """Train on from the local weights of the last round, which is saved, until the watch shows more than 0 seconds.

        The next round begins with these steps: what they have changed is added to the weights that it brings. So the others'
        updates arrive late, and a client's own does not ("eager updates", arXiv:2502.12996). Where the next round does not go on
        from there, the steps are thrown away.

        Raises:
            Exception: `turn.check` raises it, or the training does; these steps are lost then.
        """
        assert self._trained is not None
        num_steps, (asked, report), self._trained = self.ahead_steps(), self._trained, None
        # The steps change the optimizer state in place: a round without them takes the saved one.
        residual = self._kept.pop(asked.client).residual
        with self.ranks.together():  # there may be no room for one more copy of the model
            change = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        shared = SharedStopwatch(self.ranks, watch)
        result = self._steps(
            asked, turn, after=report.steps, start=report.data, num_steps=num_steps, seconds=0.0, watch=shared
        )
        state = self._module.data_state
        if result.steps == 0 or state is None or not np.isfinite(self.ranks.mean(result.losses)).all():
            return
        for name, parameter in self._parameters.items():
            torch.sub(parameter.detach(), change[name], out=change[name])
        self._ahead = Ahead(asked, report.data, change, result, DataState.merge(self.ranks.gather(state)), residual)

    def _take_ahead(self, instructions: Instructions) -> Ahead | None:
        """Return the steps that were taken before this round, if they are its first ones, with what they have changed."""
        ahead, self._ahead, self._trained = self._ahead, None, None
        return ahead if ahead is not None and ahead.are_of(instructions) else None

    def _steps(
        self,
        asked: Instructions,
        turn: Turn,
        *,
        after: int,
        start: DataState | None,
        num_steps: int,
        seconds: float | None,
        watch: Stopwatch,
    ) -> LoopResult:
        """Train on the rows of a round.

        Args:
            asked: The round.
            turn: It follows the progress and may end it.
            after: The steps that were taken since the weights of the round.
            start: Where the streams stand.
            num_steps: The steps to take at most.
            seconds: The budget on the watch.
            watch: It is the same on all ranks.
        """
        ranks, data, module = self.ranks, self._data_of(asked.client), self._module
        with ranks.together():
            accumulation = accumulation_steps(
                asked.batch_tokens,
                device_batch_size=data.device_batch_size,
                sequence_len=data.sequence_len,
                world_size=ranks.size,
            )
            plan = RowPlan(asked.lease, data.dataset.train, repeat=False)
            loader = data.loader(plan, state=start, rank=ranks.number, world_size=ranks.size)
        clock = module.clock
        clock.step_tokens, clock.participants = asked.batch_tokens * asked.participants, asked.participants
        clock.step, clock.tokens = asked.clock_step + after, asked.clock_tokens + after * clock.step_tokens
        clock.horizon_tokens = asked.horizon_tokens
        module.data_state = start

        def begun(number: int) -> None:
            turn.progress(after + (number - 1) // accumulation)

        with closing(iter(loader)) as batches:  # a round that is stopped leaves no thread that makes more
            return train_steps(
                self._fabric,
                self._fabric_module,
                self._fabric_optimizer,
                ranks.batches(batches, turn.check, begun),
                accumulation=accumulation,
                step_tokens=asked.batch_tokens,
                num_steps=num_steps,
                seconds=seconds,
                stopwatch=watch,
            )

    def save(self, instructions: Instructions) -> None:
        """Save the optimizer state that `train` ended with: on the first rank, to which the others send their shards."""
        state = self._optimizer.state_dict()
        if self.ranks.first:
            if self._residual:
                state["residual"] = self._residual
            if self._shared and self._held is not None:
                state["held"] = [torch.from_numpy(array).view(torch.bfloat16) for array in self._held.arrays]
            self.states.save(instructions.client, instructions.run, instructions.round, state)

    def evaluate(self, arrays: Arrays, asked: Evaluate, turn: Turn | None = None) -> Evaluation:
        """Measure weights on this site's validation text; nothing that the client keeps is touched.

        What goes wrong in it is said in the answer and costs the figure only: the round that it rides with is trained.

        Args:
            arrays: the weights, on the first rank; the others take them from it.
            asked: What to measure; it is equal on all ranks.
            turn: The caller's view of the evaluation: it may end it.

        Raises:
            WireError: the weights are not the ones that the request describes.
            ClientFailure: the server has to send whole weights.
            Exception: `turn.check` raises it.
            Agreed: Where there are several ranks, all of them raise it in the place of all these.
        """
        turn = turn or Turn()
        ranks = self.ranks
        self._trained = None  # other weights take the place of those
        watch = SharedStopwatch(ranks, Stopwatch())
        with ranks.together():
            if ranks.first:
                self._take_weights(arrays, asked)
        if ranks.size > 1:
            send_weights(self._module.gpt)
        nats, count, failure = 0.0, 0, ""
        try:
            nats, count = self._measure(asked, turn, watch)
        except Exception as error:
            if ranks.size > 1 and not isinstance(error, Agreed):
                raise  # the others wait for this rank
            with ranks.together():
                if ranks.first:
                    turn.check()  # where nobody wants the round any more, it ends here
            failure = str(error) if isinstance(error, NanofedError) else f"{type(error).__name__}: {error}"
            logger.warning("client %s, round %d: not evaluated: %s", asked.client, asked.round, failure)
        return Evaluation(
            **asked.repeated(), nats=nats, bytes=count, seconds=watch.elapsed(), failure=failure[:MAX_FAILURE]
        )

    @torch.no_grad()
    def _measure(self, asked: Evaluate, turn: Turn, watch: Stopwatch) -> tuple[float, int]:
        """Return the sums of nats and of bytes over all ranks.

        Raises:
            NanofedError: The evaluation took too long, or the loss is not finite: of a part of the text there is no figure.
        """
        ranks, data, gpt, device = self.ranks, self._data_of(asked.client), self._module.gpt, self._fabric.device
        share = {"share": asked.share, "shares": asked.shares, "eval_tokens": asked.eval_tokens}
        text = data.validation_loader(rank=ranks.number, world_size=ranks.size, **share)
        metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes)).to(device)
        training = gpt.training
        gpt.eval()
        try:
            with closing(iter(text)) as batches:
                for number, batch in enumerate(ranks.batches(batches, turn.check)):
                    if watch.elapsed() > asked.seconds:
                        ranks.agree(
                            NanofedError(
                                f"{number} batches took more than {asked.seconds:g} s, which is all that a round leaves for "
                                "it: lower data.eval_tokens at the server, or raise federation.grace_seconds or eval_every"
                            )
                        )
                    there = batch.to(device)
                    metric.update(gpt(there.inputs, there.targets, reduction="none"), there.targets)
                    metric.sum_bytes.item()  # waits for the device: the watch is read in time
        finally:
            gpt.train(training)
        sums = ranks.gather((float(metric.sum_nats), int(metric.sum_bytes)))
        nats = math.fsum(part for part, _ in sums)
        if not math.isfinite(nats):
            ranks.agree(NanofedError(f"the loss on the validation text is {nats}"))
        return nats, sum(count for _, count in sums)

    def _take_weights(self, arrays: Arrays, instructions: WeightsMessage) -> Arrays:
        """Give the model the weights that a message describes, and return them in the codec of whole weights."""
        for name, text in (("run", instructions.run), ("client", instructions.client)):
            if not SAFE_NAME.fullmatch(text):  # each names a folder
                raise WireError(f"the {name} is {text[:80]!r}, no plain word")
        down = CODECS[instructions.down_codec]
        if down.whole is not down:
            arrays = self._hold(arrays, instructions)
        elif hash_arrays(arrays) != instructions.base_hash:
            raise WireError(OTHER_HASH)
        staged = self._staged()
        down.whole.write_to(staged, arrays, self._like)
        for name, parameter in self._parameters.items():
            if staged[name] is not parameter:
                parameter.detach().copy_(staged[name], non_blocking=True)
        return arrays

    def _hold(self, arrays: Arrays, asked: WeightsMessage) -> Arrays:
        """Hold the weights that a message describes, and return them."""
        down, held = CODECS[asked.down_codec], self._held
        if held is not None and held.hash == asked.base_hash:
            return held.arrays  # they came with an evaluation, or for another client that trains here
        if not asked.changed_from:
            down.whole.check(arrays, self._like)
            # Changes are added in place, and what lies in a message of Flower's is for reading only.
            arrays = [np.require(array, requirements=["C", "W"]) for array in arrays]
        else:
            if held is None or held.hash != asked.changed_from:
                held = self._held_elsewhere(asked)
            self._held = None  # until what is made of them is known to be right
            arrays = changed(held.arrays, arrays, down, self._like, out=held.arrays)
        if hash_arrays(arrays) != asked.base_hash:
            raise WireError(OTHER_HASH)
        self._held = HeldWeights(asked.base_hash, arrays)
        return arrays

    def _held_elsewhere(self, asked: WeightsMessage) -> HeldWeights:
        """Return the weights that were changed from the client's last state, which another process may have saved."""
        saved = self.states.load(asked.client, asked.run, asked.round) if self._shared else None
        arrays: Arrays = [tensor.view(torch.uint16).numpy() for tensor in saved.get("held", [])] if saved else []
        if not arrays or hash_arrays(arrays) != asked.changed_from:
            lost = "the weights that were changed are not held here any more: they have to be sent whole"
            raise ClientFailure("weights", lost)
        return HeldWeights(asked.changed_from, arrays)

    def _local_weights(self, arrays: Arrays, instructions: Instructions) -> Arrays:
        down, up = CODECS[instructions.down_codec].whole, CODECS[instructions.up_codec]
        staged = self._staged()
        for name, parameter in self._parameters.items():
            if staged[name] is not parameter:
                staged[name].copy_(parameter.detach(), non_blocking=True)
        if self._fabric.device.type == "cuda":
            torch.cuda.current_stream(self._fabric.device).synchronize()
        # A lossless codec sends the weights themselves, which the next round changes.
        local = {name: (t.detach().clone() if up.lossless else t.detach()).numpy() for name, t in staged.items()}
        if not math.isfinite(l2_norm(list(local.values()))):
            raise NanofedError("the weights are no longer finite after the last step of the round")
        base = {} if up.lossless else down.parts(arrays, self._like)
        if not up.feedback:
            self._residual = {}
            return up.pack(local, base)
        for name, weight in local.items():
            self._residual.setdefault(name, torch.zeros(weight.size))
        return pack_with_feedback(up, local, base, self._residual)

    def _staged(self) -> dict[str, Tensor]:
        """Return memory of this machine for each weight: on a CPU the weight itself, else page-locked memory that stays.

        From and to pageable memory a device copies at a fraction of its speed, and the host waits for every copy. What is in it
        is valid until the next call of a method that moves weights.
        """
        if self._pinned is None:
            self._pinned = {
                name: parameter
                if parameter.device.type == "cpu"
                else torch.empty(parameter.shape, pin_memory=parameter.is_cuda)
                for name, parameter in self._parameters.items()
            }
        elif self._fabric.device.type == "cuda":
            torch.cuda.current_stream(self._fabric.device).synchronize()  # a copy out of it may be under way
        return self._pinned

    def _state_before(self, instructions: Instructions) -> defaultdict[Tensor, Any]:
        """Return the newest state from before this round: in memory, on disk, or a fresh one."""
        client, run, number = instructions.client, instructions.run, instructions.round
        kept = self._kept.pop(client, None)  # training changes it in place: a failed round must not leave it behind
        saved: Saved | None = None
        with self.ranks.together():
            if self.ranks.first:
                newest = self.states.newest(client, run, number)
                if kept is not None and (kept.run != run or not newest <= kept.round < number):
                    kept = None
                saved = self.states.load(client, run, number) if kept is None else None
                if kept is None and saved is None and self.states.newest(client, run, sys.maxsize):
                    older = f"round {number}: the server has gone back, and no optimizer state from before that is kept"
                    logger.warning("client %s, %s: its momentum begins anew", client, older)
        self._residual = kept.residual if kept is not None else saved.pop("residual", {}) if saved else {}
        if self.ranks.from_first(kept is not None):
            assert kept is not None
            return kept.optimizer
        if saved is not None:
            saved.pop("held", None)
        saved = self._send_state(saved)
        if saved is None:
            return defaultdict(dict)
        self._optimizer.state = defaultdict(dict)
        self._optimizer.load_state_dict(saved)
        return self._optimizer.state

    def _send_state(self, saved: Saved | None) -> Saved | None:
        """Give all ranks the first one's saved state, a parameter at a time."""
        rest = self.ranks.from_first({**saved, "state": None} if saved else None)
        if rest is None:
            return None
        indices = self.ranks.from_first(list(saved["state"]) if saved else [])
        return {**rest, "state": {i: self.ranks.from_first(saved["state"][i] if saved else None) for i in indices}}
