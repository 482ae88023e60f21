"""Everything that a federated run is at the end of a round: saved and taken up as one."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.federated.aggregation.norm_guard import NormGuard
from nanofed.federated.aggregation.outer import OuterOptimizer, make_outer
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.events import Events
from nanofed.federated.server.ledger import Ledger, make_ledger
from nanofed.federated.server.scheduling import ClientSpeeds
from nanofed.federated.wire.blocks import l2_norm
from nanofed.federated.wire.codec import Array, Arrays
from nanofed.training.checkpoint.folder import FOLDER, checkpoints, set_aside
from nanofed.training.checkpoint.format import read_manifest, read_state, read_weights, write_checkpoint
from nanofed.training.module import GPTModule
from nanofed.training.preflight import check_identity
from nanofed.training.summary import Point, Summary

logger = logging.getLogger(__name__)

# What a checkpoint calls the parts of a state that save themselves.
PARTS = {"outer": "outer", "ledger": "ledger", "norms": "norms", "pace": "speeds", "events": "events"}
HELD = "held"
NEEDED = {"run", "clock", "seconds", "curve", *PARTS}


@dataclass
class RoundClock:
    """Where the run is: rounds committed, tokens merged, and optimizer steps along one client's path."""

    round: int = 0
    tokens: int = 0
    step: int = 0


@dataclass
class State:
    """The global weights and all that decides what the next round does with them."""

    # The global weights by name, fp32; they are stepped in place. A state that is only checked has none.
    weights: dict[str, Array]
    ledger: Ledger  # who may read which rows
    outer: OuterOptimizer  # the outer optimizer with its momentum
    norms: NormGuard  # the usual norms of accepted updates
    events: Events  # what went wrong
    speeds: ClientSpeeds = field(default_factory=ClientSpeeds)  # how fast each client is
    clock: RoundClock = field(default_factory=RoundClock)  # where the run is
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # the run's id, which stays over resumes
    # Client -> `round` and `bpb` of the last weights that the client evaluated, where sites evaluate.
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    # The weights that the clients of the last round held, in bf16, where they are sent what changed; None elsewhere. It is
    # replaced and never written to.
    held: Arrays | None = None

    @classmethod
    def new(
        cls, module: GPTModule, data: TokenDataModule, config: FederationConfig, run: Path, *, weights: bool = True
    ) -> State:
        """Return the state before the first round, with the initial weights of a module that is configured, or without."""
        named = module.gpt.state_dict() if weights else {}
        return cls(
            weights={name: tensor.detach().cpu().numpy().copy() for name, tensor in named.items()},
            ledger=make_ledger(config, data),
            outer=make_outer(config.outer, config.outer_lr, config.outer_momentum, asynchronous=config.asynchronous),
            norms=NormGuard(config.max_norm_ratio, config.on_large_norm, module.movements()),
            events=Events(run),
        )

    def path(self, run: Path) -> Path:
        """Return where the checkpoint of this round is, or would be."""
        return run / FOLDER / f"round_{self.clock.round:08d}"

    def checkpoint(self, run: Path, module: GPTModule, data: TokenDataModule, summary: Summary) -> Callable[[], None]:
        """Return a function that writes the checkpoint of this round, all of it or nothing.

        Everything is as it is now, but weights and outer momentum, of which there is no copy: it has to be called before the
        next step. Once it has written the checkpoint, it does nothing.

        The function raises:
            SaveError: The checkpoint cannot be written; those before it are whole.
        """
        path = self.path(run)
        write = partial(
            write_checkpoint,
            path,
            kind="federated",
            weights={name: torch.from_numpy(array) for name, array in self.weights.items()},
            state={
                "run": self.run_id,
                "clock": vars(self.clock).copy(),
                **{name: getattr(self, part).state_dict() for name, part in PARTS.items()},
                "evaluations": {client: figures.copy() for client, figures in self.evaluations.items()},
                "seconds": summary.seconds,
                "bytes": summary.bytes,
                "curve": [vars(point).copy() for point in summary.curve],
                **({} if self.held is None else {HELD: [torch.from_numpy(a).view(torch.bfloat16) for a in self.held]}),
            },
            config=module.config,
            tokenizer=data.tokenizer,
            step=self.clock.step,
            tokens=self.clock.tokens,
            metrics={} if summary.bpb_end is None else {"val/bpb": summary.bpb_end},
            data=data.dataset.identity,
        )

        written = False

        def save() -> None:
            nonlocal written
            if not written:
                set_aside(path)
                write()
                written = True

        return save

    def load(
        self, path: Path, module: GPTModule, data: TokenDataModule, summary: Summary, *, force: bool = False
    ) -> None:
        """Take up a saved round: weights, outer momentum, ledger, clocks, norms, events and the curve so far.

        Raises:
            ConfigError: It is of the vanilla path, of another model, tokenizer or text, or of a nanofed that saved less.
        """
        training = not self.ledger.own_text
        check_identity(path, read_manifest(path), module, data, "resume", force=force, training=training)
        saved = self.load_without_weights(path)
        self.load_weights(path)
        # The summary beside it may be ahead, of rounds that were lost, or lost itself.
        known = [point for point in summary.curve if point.step <= self.clock.round]
        summary.tokens, summary.seconds, summary.bytes = self.clock.tokens, saved["seconds"], saved.get("bytes", 0)
        summary.curve = []
        for point in sorted([*known, *(Point(**point) for point in saved["curve"])], key=lambda point: point.step):
            summary.add(point)
        logger.info("resuming after round %d from %s", self.clock.round, path)

    def load_without_weights(self, path: Path) -> dict[str, Any]:
        """Take up everything of a saved round but its weights, which is all that can be refused; return what was saved.

        Raises:
            ConfigError: The checkpoint is of the vanilla path, or lacks something that a round is made of.
        """
        manifest = read_manifest(path)
        if manifest.kind != "federated":
            raise ConfigError(f"{path} is a {manifest.kind} checkpoint: start from its weights with --init_from")
        saved: dict[str, Any] = read_state(path)
        if missing := NEEDED - set(saved):
            raise ConfigError(
                f"{path} was saved by an older nanofed and lacks {', '.join(sorted(missing))}: start from its weights with "
                "--init_from"
            )
        for name, part in PARTS.items():
            getattr(self, part).load_state_dict(saved[name])
        self.clock = RoundClock(**saved["clock"])
        self.run_id = saved["run"]
        self.evaluations = saved.get("evaluations", {})
        held = saved.get(HELD)
        self.held = None if held is None else [tensor.view(torch.uint16).numpy() for tensor in held]
        return saved

    def weights_norm(self) -> float:
        """Return the L2 norm of the global weights."""
        return l2_norm(list(self.weights.values()))

    def load_weights(self, path: Path) -> None:
        """Take the global weights from a checkpoint of either path."""
        saved = read_weights(path)
        self.weights = {name: saved[name].numpy().copy() for name in self.weights}  # stepped in place, the file stays


def saved_round(run: Path) -> int | None:
    """Return the round of a run's newest checkpoint, None if there is none."""
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("round_")) if found else None
