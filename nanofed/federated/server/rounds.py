"""The round loop: who is here, lease, send, validate, fold, step, commit, evaluate, checkpoint."""

from __future__ import annotations

import logging
import random
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.serverapp import Grid

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.rows import RowPlan
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.board import Board
from nanofed.federated.server.evaluation import Evaluator
from nanofed.federated.server.exchange import POLL_SECONDS, exchange
from nanofed.federated.server.ledger import Ledger
from nanofed.federated.server.merge import Merger, make_merger, update_norm
from nanofed.federated.server.outer import OuterNesterov
from nanofed.federated.server.roster import Roster
from nanofed.federated.server.validation import Refused, Update
from nanofed.federated.wire.codec import CODECS, Array, hash_arrays, payload_bytes
from nanofed.federated.wire.messages import LEASE_TOO_SHORT, Hello, Instructions
from nanofed.training.checkpoint import (
    check_model,
    checkpoints,
    prune_checkpoints,
    read_manifest,
    read_state,
    read_weights,
    write_checkpoint,
)
from nanofed.training.module import GPTModule
from nanofed.training.options import RunOptions

logger = logging.getLogger(__name__)

MAX_MARGIN = 8.0  # of a lease over what a client should need
SPARE_ROWS = {"contiguous": 16, "best_fit": 160}  # rows a stream reads ahead, beyond what it trains on


@dataclass
class Clock:
    """Where the run is: rounds committed, tokens merged, and optimizer steps along one client's path."""

    round: int = 0
    tokens: int = 0
    step: int = 0


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
    ) -> None:
        self._simulated = simulated
        self._grid = grid
        self._module = module
        self._data = data
        self._config = config
        self._options = options
        self._run = run
        self.board = board
        self._evaluator = Evaluator(module, data, device)
        RowPlan.whole(data.dataset).check_streams(data.streams)
        self._ledger = Ledger(data.dataset.train, data.streams)
        self._outer = OuterNesterov(config.outer_lr, config.outer_momentum)
        self._clock = Clock()
        self._horizon = module.recipe.horizon(module.config)
        self._rates: dict[str, float] = {}  # client -> tokens a second, as measured in its last round
        self._margin: dict[str, float] = {}  # client -> how much more it is leased than it should need
        self._refusals = 0
        self._last_bpb: float | None = None
        self._evaluated = -1  # the round of the last evaluation
        self.run_id = uuid.uuid4().hex
        self.weights: dict[str, Array] = {
            name: tensor.detach().cpu().numpy().copy() for name, tensor in module.gpt.state_dict().items()
        }
        self._roster = Roster(grid, Hello.of("", module, data))

    # --- the run

    def train(self) -> None:
        """Run rounds until the horizon or the last round."""
        failed = 0
        if self._clock.round == 0:
            self._evaluate()
        while self._clock.tokens < self._horizon and self._clock.round < (self._config.rounds or 1 << 62):
            merged = self._round(self._clock.round + 1, failed)
            if merged is None:
                continue
            failed = 0 if merged else failed + 1
            if failed >= (self._config.max_failed_rounds or 5):
                raise NanofedError(f"{failed} rounds in a row brought no update that could be merged ({self._why()})")
        if self._evaluated != self._clock.round:
            self._evaluate()  # the last round was an empty one
        if self._saved_round() != self._clock.round:
            self._save()

    def _round(self, number: int, attempt: int) -> bool | None:
        """Run one round and tell whether it changed the model; None if nobody took part."""
        started = time.monotonic()
        present = self._available(self._wait_for_clients(), number, attempt)
        for client in set(self._ledger.clients()) - set(present):
            self._ledger.release(client)  # who is not here gives back what is not merged
        if not present:
            logger.info("round %3d  nobody takes part", number)
            self._clock.round = number
            return None
        instructions = self._instruct(number, list(present))
        down, up = CODECS[self._config.down_codec], CODECS[self._config.up_codec]
        sent = down.encode(self.weights)
        merger = make_merger("mean", self.weights, sent, down, up, self._run / "spool")
        accepted: dict[str, Update] = {}
        norms: dict[str, float] = {}
        for update in self._updates(present, instructions):
            client = update.report.client
            weight = 1.0 if self._config.weighting == "uniform" else float(update.report.tokens)
            arrays = list(update.weights.values())
            norms[client] = update_norm(arrays, self.weights, sent, down, up)
            merger.fold(client, arrays, weight)
            accepted[client] = replace(update, weights={})  # folded: the arrays may go
        if not accepted:
            logger.warning("round %d: no client's update could be merged; the model stays as it is", number)
            return False
        self._commit(number, merger, accepted, instructions)
        self.board.merged(
            accepted,
            norms,
            round_number=number,
            step=self._clock.step,
            tokens=self._clock.tokens,
            figures={
                "fed/clients_asked": len(present),
                "fed/refused_total": self._refusals,
                "fed/bytes_down": len(present) * payload_bytes(list(self.weights.values())),
                "fed/round_seconds": time.monotonic() - started,
                "fed/rows_merged": self._ledger.merged_rows(),
            },
        )
        if number % self._options.eval_every == 0 or self._finished():
            self._evaluate()
        if (self._options.save_every and number % self._options.save_every == 0) or self._finished():
            self._save()
        return True

    def _finished(self) -> bool:
        return self._clock.tokens >= self._horizon or self._clock.round == self._config.rounds

    def _wait_for_clients(self) -> dict[str, int]:
        """Return the clients connected now; where there is none, wait for one as long as for a message."""
        deadline = time.monotonic() + self._config.grace_seconds
        while not (connected := self._roster.connected()):
            if self._simulated and self._roster.refused:
                raise NanofedError(f"no client can take part ({self._why()})")
            if time.monotonic() > deadline:
                raise NanofedError(
                    f"no client was there for {self._config.grace_seconds:.0f} s ({self._why()}); the run goes on from "
                    "its last checkpoint with --ckpt_path last"
                )
            time.sleep(POLL_SECONDS)
        return connected

    def _why(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self._roster.refused.items()) or "none was refused"

    def _available(self, connected: Mapping[str, int], number: int, attempt: int) -> dict[str, int]:
        """Draw who takes part: each with its chance, the same draw for the same seed, round, attempt and name."""
        chance = self._config.availability
        return {
            name: node
            for name, node in connected.items()
            if chance >= 1 or random.Random(f"{self._module.seed}/{number}.{attempt}/{name}").random() < chance
        }

    # --- one round

    def _instruct(self, number: int, clients: list[str]) -> dict[str, Instructions]:
        config, recipe = self._config, self._module.recipe
        batch_tokens = recipe.batch_tokens
        if config.global_batch_tokens is not None:
            micro = self._data.device_batch_size * self._data.sequence_len
            batch_tokens = max(micro, config.global_batch_tokens // len(clients) // micro * micro)
        left = -(-(self._horizon - self._clock.tokens) // (batch_tokens * len(clients)))
        max_steps = min(left, config.round_steps) if config.round_steps else left
        base = hash_arrays(CODECS[config.down_codec].encode(self.weights))
        out = {}
        for client in clients:
            tokens = max_steps * batch_tokens
            if config.round_steps is None:
                rate = self._rates.get(client)  # not known before the first round: then an equal share of all there is
                share = int(self._ledger.total_tokens / len(clients))
                tokens = int(min(tokens, rate * config.round_seconds * 1.25 if rate else share))
            margin = self._margin.get(client, 1.0)
            spare = SPARE_ROWS[self._data.packing]
            lease = self._ledger.lease(client, int(tokens * margin), spare_rows=int(spare * margin))
            out[client] = Instructions(
                run=self.run_id,
                round=number,
                client=client,
                base_hash=base,
                nonce=secrets.token_hex(16),
                down_codec=config.down_codec,
                up_codec=config.up_codec,
                max_steps=max_steps,
                seconds=None if config.round_steps else config.round_seconds,
                deadline_seconds=None if self._simulated else config.round_seconds + config.grace_seconds,
                participants=len(clients),
                batch_tokens=batch_tokens,
                clock_step=self._clock.step,
                clock_tokens=self._clock.tokens,
                horizon_tokens=self._horizon,
                lease=lease,
                data=self._ledger.data(client),
            )
        return out

    def _updates(self, nodes: Mapping[str, int], instructions: Mapping[str, Instructions]) -> Iterator[Update]:
        """Send the round to its clients and yield accepted updates as they arrive, one at a time."""
        number = next(iter(instructions.values())).round
        budget = self._config.round_seconds + self._config.grace_seconds
        budget *= len(nodes) if self._simulated else 1  # the last answer comes after all the others' turns
        for client, answer in exchange(
            self._grid, nodes, instructions, self.weights, streams=self._data.streams, seconds=budget
        ):
            if isinstance(answer, Refused):
                self._refuse(client, number, str(answer))
            else:
                self._roster.refused.pop(client, None)
                yield answer

    def _refuse(self, client: str, number: int, reason: str) -> None:
        logger.warning("round %d: client %s is not merged: %s", number, client, reason)
        self._roster.refused[client] = reason
        self._refusals += 1
        self._ledger.release(client)
        if LEASE_TOO_SHORT in reason:
            self._widen(client)

    def _widen(self, client: str) -> None:
        self._margin[client] = min(MAX_MARGIN, 2 * self._margin.get(client, 1.0))

    def _commit(
        self,
        number: int,
        merger: Merger,
        accepted: Mapping[str, Update],
        instructions: Mapping[str, Instructions],
    ) -> None:
        reports = [update.report for update in accepted.values()]
        asked = next(iter(instructions.values()))
        fraction = 1.0
        if self._config.round_steps:
            fraction = asked.max_steps / self._config.round_steps  # below 1 only where the horizon cut the round short
        elif all(report.steps == asked.max_steps for report in reports):
            fraction = min(1.0, max(report.seconds for report in reports) / self._config.round_seconds)
        self._outer.step(self.weights, merger.result(), fraction=fraction)
        for report in reports:
            self._ledger.commit(report.client, report.data)
            self._rates[report.client] = report.tokens / report.seconds if report.seconds > 0 else 0.0
            if report.exhausted:
                self._widen(report.client)
        self._clock.round = number
        self._clock.tokens += sum(report.tokens for report in reports)
        self._clock.step += round(sum(report.steps for report in reports) / len(reports))

    # --- between rounds

    def _evaluate(self) -> None:
        self._evaluated = self._clock.round
        bpb = self._evaluator.bits_per_byte(self.weights)
        self._last_bpb = bpb
        number, step, tokens = self._clock.round, self._clock.step, self._clock.tokens
        self.board.validation(round_number=number, step=step, tokens=tokens, bpb=bpb)
        logger.info("round %3d  %21.2f M tokens  val %.4f bits per byte", number, tokens / 1e6, bpb)
        if self._options.sample_every and number % self._options.sample_every == 0:
            for prompt in self._options.sample_prompts:
                self.board.text(prompt, self._evaluator.sample(self.weights, prompt), step)

    def _saved_round(self) -> int | None:
        found = checkpoints(self._run)
        return int(found[-1].name.removeprefix("round_")) if found else None

    def _save(self) -> None:
        write_checkpoint(
            self._run / "checkpoints" / f"round_{self._clock.round:08d}",
            kind="federated",
            weights={name: torch.from_numpy(array) for name, array in self.weights.items()},
            state={
                "run": self.run_id,
                "clock": vars(self._clock).copy(),
                "outer": self._outer.state_dict(),
                "ledger": self._ledger.state_dict(),
                "rates": self._rates,
                "margin": self._margin,
            },
            config=self._module.config,
            tokenizer=self._data.tokenizer,
            step=self._clock.step,
            tokens=self._clock.tokens,
            metrics={} if self._last_bpb is None else {"val/bpb": self._last_bpb},
        )
        prune_checkpoints(self._run, self._options.keep_checkpoints, self._options.keep_every)

    def resume(self, path: Path) -> None:
        """Take up a saved round: weights, outer state, ledger and clock.

        Raises:
            ConfigError: it is of the vanilla path, or of another model.
        """
        manifest = read_manifest(path)
        check_model(manifest, self._module.config, path)
        if manifest.kind != "federated":
            raise ConfigError(f"{path} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        state = read_state(path)
        self.load_weights(path)
        self._outer.load_state_dict(state["outer"])
        self._ledger.load_state_dict(state["ledger"])
        self._clock = Clock(**state["clock"])
        self._rates, self._margin = dict(state["rates"]), dict(state["margin"])
        self.run_id = state["run"]
        logger.info("resuming after round %d from %s", self._clock.round, path)

    def load_weights(self, path: Path) -> None:
        """Take the global weights from a checkpoint of either path."""
        saved = read_weights(path)
        self.weights = {name: saved[name].numpy().copy() for name in self.weights}  # stepped in place, the file stays
