"""Whole federations of a tiny real model in one process, with clients that misbehave on purpose."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanofed.data.writing import write_shards
from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.client import client_app
from nanofed.federated.site.trainer import LocalTrainer
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Evaluate, Evaluation, Hello, Instructions, Report
from nanofed.tokenizer.training import train_tokenizer
from tests.support import tiny_model

Fit = Callable[[Any, Instructions], tuple[Arrays, Report]]


def make_corpus(folder: Path, documents: int = 160, vocab_size: int = 300) -> Path:
    generator = np.random.default_rng(0)
    texts = [
        " ".join(generator.choice(["alpha", "beta", "gamma", "delta", "of", "the"], int(generator.integers(10, 60))))
        for _ in range(documents)
    ]
    write_shards(texts, folder / "data", num_shards=4, rows_per_group=16)
    train_tokenizer(texts, vocab_size=vocab_size).save(folder / "tokenizer")
    return folder


def federation(corpus: Path, runs: Path, name: str, **federation: Any) -> Federation:
    """Parse a federation; keys without a dot are of `federation`."""
    return Federation.from_args(arguments(corpus, runs, name, **federation))


def arguments(corpus: Path, runs: Path, name: str, **federation: Any) -> list[str]:
    given = tiny_model(corpus) | {"name": name, "runs_dir": runs, "eval_every": 100, "save_every": 1}
    given |= {"keep_checkpoints": 0, "model.recipe.num_steps": 1000, "fabric.accelerator": "cpu"}
    own = {"clients": 2, "rounds": 2, "round_steps": 1, **federation}
    given |= {
        key
        if "." in key or key in given or key in ("ckpt_path", "init_from", "sample_every", "seed_everything")
        else f"federation.{key}": value
        for key, value in own.items()
    }
    return [f"--{key}={value}" for key, value in given.items()]


@dataclass
class Site(LocalTrainer):
    """The real trainer behind a hook, and a record of what was asked and answered."""

    real: LocalTrainer
    hook: Callable[[Fit, Sequence[Any], Instructions], tuple[Arrays, Report]] = lambda fit, arrays, i: fit(arrays, i)
    greet: Callable[[Hello], Hello] = lambda hello: hello
    judge: Callable[[Evaluation], Evaluation] = lambda evaluation: evaluation
    measured: list[Evaluate] = field(default_factory=list)
    asked: list[Instructions] = field(default_factory=list)
    answered: MutableSequence[tuple[Arrays, Report]] = field(default_factory=list)  # with all their weights

    def hello(self, client: str) -> Hello:
        return self.greet(self.real.hello(client))

    def evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        self.measured.append(asked)
        return self.judge(self.real.evaluate(arrays, asked))

    def fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        self.asked.append(instructions)
        answer = self.hook(self.real.fit, arrays, instructions)
        self.answered.append(answer)
        return answer


def train(config: Federation, names: Sequence[str] | None = None, **behaviour: Any) -> tuple[RoundLoop, Site]:
    """Run a federation to its end."""
    loop, site = prepare(config, names, **behaviour)
    try:
        loop.train()
    finally:
        loop.metrics.close()
    return loop, site


def prepare(config: Federation, names: Sequence[str] | None = None, **behaviour: Any) -> tuple[RoundLoop, Site]:
    config.open()
    site = Site(config.trainer(), **behaviour)
    names = names or config.federation.client_names
    speeds = (config.federation.client_speeds or [1.0] * len(names)) if config.federation.asynchronous else None
    grid = InProcessGrid(client_app(lambda context: site), names, speeds)
    return config.loop(grid), site


def same_bits(a: RoundLoop, b: RoundLoop) -> bool:
    ours, theirs = a.state.weights, b.state.weights
    return all(torch.equal(torch.from_numpy(ours[name]), torch.from_numpy(theirs[name])) for name in ours)
