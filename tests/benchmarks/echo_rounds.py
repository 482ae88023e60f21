"""The rounds of a trainer that trains nothing: same codecs, hashes and report, so that a round's cost is that of its ways.

It holds the weights in fp32, as a model would, reads the text of one optimizer step, and answers with weights that have moved
a little, each part of them otherwise, so that nothing on the way can be spared. Run as a module it is the worker of a site:

python -m tests.benchmarks.echo_rounds OPTIONS ARGUMENTS OF FEDERATE
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from nanofed.data.rows import RowPlan
from nanofed.federated.config import Arguments
from nanofed.federated.site.inbox import Inbox, Task
from nanofed.federated.site.options import WorkerOptions
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.worker import lead
from nanofed.federated.wire.changes import changed
from nanofed.federated.wire.codec import CODECS, Array, WireError, hash_arrays
from nanofed.federated.wire.messages import Evaluate, Evaluation, Hello, Instructions, Report
from nanofed.model import GPT
from nanofed.training.recipe import accumulation_steps
from tests.benchmarks.round_probe import marked

CHANGE = 1e-3
NOISE = 1_000_003  # numbers of noise, laid end to end over a weight from another start each time


class EchoTrainer:
    """Answers rounds of `nanofed federate` with the weights that came, moved a little."""

    task: Task | None = None
    broken: Exception | None = None

    def __init__(self, args: Sequence[str]) -> None:
        self.idle = threading.Event()
        self._module, self._data = Arguments.from_args(args).build()
        with torch.device("meta"):
            shapes = {n: tuple(t.shape) for n, t in GPT(self._module.config).state_dict().items()}
        self._weights: dict[str, Array] = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
        self._held: list[Any] = []
        self._random = np.random.default_rng(0)
        self._noise = CHANGE * self._random.standard_normal(NOISE, dtype=np.float32)

    def hello(self, client: str) -> Hello:
        """Return what the site says of itself."""
        return Hello.of(client, self._module, self._data)

    def fit(self, arrays: Sequence[Any], instructions: Instructions) -> tuple[list[Any], Report]:
        """Answer one round."""
        sent, up = CODECS[instructions.down_codec], CODECS[instructions.up_codec]
        down = sent.whole
        if instructions.changed_from:
            arrays = changed(self._held, list(arrays), sent, self._weights, out=self._held)
        if hash_arrays(arrays) != instructions.base_hash:
            raise WireError("the weights that arrived do not have the hash that was announced")
        if down is not sent:
            self._held = list(arrays)
        out = {name: torch.from_numpy(weight) for name, weight in self._weights.items()}
        down.write_to(out, arrays, self._weights)
        with marked("train"):
            start = time.monotonic()
            for weight in self._weights.values():
                self._move(weight)
            state = self._read(instructions)
            seconds = time.monotonic() - start
        payload: list[Any] = up.pack(self._weights, down.parts(arrays, self._weights))
        asked: dict[str, Any] = {n: getattr(instructions, n) for n in ("run", "round", "client", "nonce", "base_hash")}
        done: dict[str, Any] = {"steps": 1, "tokens": instructions.batch_tokens, "seconds": seconds, "data": state}
        figures: dict[str, Any] = {
            "loss_first": 1.0,
            "loss_last": 1.0,
            "exhausted": False,
            "unwritten": False,
            "ahead": 0,
        }
        return payload, Report(**asked, **done, **figures, payload_hash=hash_arrays(payload))

    def evaluate(self, arrays: Sequence[Any], asked: Evaluate) -> Evaluation:
        """Refuse to evaluate: a benchmark's server does it."""
        raise WireError("an echo evaluates nothing")

    def end(self, error: BaseException) -> None:
        """Raise what has ended the messages."""
        raise error

    def _move(self, weight: Array) -> None:
        flat, at = weight.reshape(-1), -int(self._random.integers(NOISE))
        while at < flat.size:
            part = flat[max(0, at) : at + NOISE]
            part += self._noise[max(0, -at) :][: part.size]
            at += NOISE

    def _read(self, instructions: Instructions) -> Any:
        """Read the text of one optimizer step and return where the streams stand after it."""
        data = self._data
        count = accumulation_steps(
            instructions.batch_tokens,
            device_batch_size=data.device_batch_size,
            sequence_len=data.sequence_len,
            world_size=1,
        )
        loader = data.loader(RowPlan(instructions.lease, data.dataset.train, repeat=False), state=instructions.data)
        *_, last = itertools.islice(loader, count)
        return last.state


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    options = WorkerOptions.from_json(sys.argv[1])
    progress = Progress(options.progress)
    trainer = EchoTrainer(sys.argv[2:])
    progress.say(state="idle", ranks=1)
    lead(options, Inbox(options.supernode, options.secret.read_bytes()), cast(Any, trainer))
