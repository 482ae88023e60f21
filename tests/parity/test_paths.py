"""The one idea, proven: Trainer.fit, a Fabric loop, and any cut into rounds end in the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Fabric
from torch import Tensor

from nanofed import api
from nanofed.data.writing import write_shards
from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import run_in_process
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.checkpoint.format import find_checkpoint, read_weights
from nanofed.training.lightning_cli import FitCLI
from nanofed.training.loop import train_steps
from nanofed.training.recipe import accumulation_steps

STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards that eight steps run through more than once, so that the cuts fall into shard and epoch ends too."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = [" ".join(generator.choice(["alpha", "beta", "gamma", "delta", "of", "the"], 40)) for _ in range(64)]
    write_shards(words, folder / "data", num_shards=3, rows_per_group=8)
    train_tokenizer(words, vocab_size=300).save(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True, scope="module")  # as fixtures of a module need it too: bits may depend on threads
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(corpus: Path, runs: Path, name: str, packing: str) -> list[str]:
    return [
        f"--name={name}",
        f"--runs_dir={runs}",
        "--eval_every=100",
        "--save_every=0",
        "--model.depth=2",
        "--model.sequence_len=32",
        "--model.compile=false",
        "--model.compute_dtype=float32",
        "--model.recipe.batch_tokens=512",
        f"--model.recipe.num_steps={STEPS}",
        f"--data.path={corpus / 'data'}",
        f"--data.tokenizer={corpus / 'tokenizer'}",
        "--data.device_batch_size=8",  # accumulation 2
        f"--data.packing={packing}",
        "--data.eval_tokens=512",
    ]


def trained_by_trainer(args: list[str], runs: Path) -> dict[str, Tensor]:
    api.fit(args=[*args, "--trainer.accelerator=cpu"])
    return read_weights(find_checkpoint(runs / "trainer"))


def trained_by_loop(args: list[str]) -> dict[str, Tensor]:
    cli = FitCLI([*args, "--trainer.accelerator=cpu"])
    module, data = cli.model, cli.datamodule
    fabric = Fabric(accelerator="cpu", devices=1)
    module.configure_model()
    fabric_module, optimizer = fabric.setup(module, module.configure_optimizers())
    accumulation = accumulation_steps(512, device_batch_size=8, sequence_len=32, world_size=1)
    assert accumulation == 2
    train_steps(
        fabric, fabric_module, optimizer, data.loader(), accumulation=accumulation, step_tokens=512, num_steps=STEPS
    )
    return {name: tensor.detach().clone() for name, tensor in module.gpt.state_dict().items()}


def trained_by_rounds(args: list[str], runs: Path, name: str, rounds: int) -> dict[str, Tensor]:
    federation = Federation.from_args(
        [
            *args,
            "--federation.clients=1",
            f"--federation.round_steps={STEPS // rounds}",
            "--federation.outer_lr=1",
            "--federation.outer_momentum=0",
            "--fabric.accelerator=cpu",
        ]
    )
    summary = run_in_process(federation)
    assert summary.tokens == STEPS * 512
    return read_weights(find_checkpoint(runs / name))


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_all_ways_of_driving_end_in_the_same_bits(corpus: Path, tmp_path: Path, packing: str) -> None:
    ways = {
        "trainer": trained_by_trainer(arguments(corpus, tmp_path, "trainer", packing), tmp_path),
        "fabric loop": trained_by_loop(arguments(corpus, tmp_path, "loop", packing)),
    }
    for rounds in (1, 2, 4):
        name = f"rounds{rounds}"
        ways[name] = trained_by_rounds(arguments(corpus, tmp_path, name, packing), tmp_path, name, rounds)
    reference = ways["trainer"]
    untrained = FitCLI([*arguments(corpus, tmp_path, "fresh", packing), "--trainer.accelerator=cpu"]).model
    untrained.configure_model()
    moved = [n for n, t in untrained.gpt.state_dict().items() if not torch.equal(t, reference[n])]
    assert moved == list(untrained.gpt.state_dict()), "the comparison below would prove nothing"
    for way, weights in ways.items():
        assert weights.keys() == reference.keys(), way
        difference = max(float((weights[name] - reference[name]).abs().max()) for name in reference)
        assert difference == 0.0, f"{way} differs from Trainer.fit by {difference}"


def test_the_environment_is_ours() -> None:
    assert "WORLD_SIZE" not in os.environ
