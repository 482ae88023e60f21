"""However two ranks are launched, they are the same run: the same weights, the same words, the same exit codes."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from nanofed.training.checkpoint.format import find_checkpoint, read_manifest, read_weights
from tests.parity.test_paths import STEPS, corpus
from tests.ranks import TORCHRUN, Started, in_time, two_ranks

__all__ = ["corpus"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STANDALONE = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
FIT = ("-m", "nanofed", "fit")
# `nanofed`, and then a word of whether the process group was left before Python's end: its threads end the process otherwise.
LEAVES = """
import atexit, torch.distributed
atexit.register(lambda: print("in a process group:", torch.distributed.is_initialized()))
from nanofed.cli import main
raise SystemExit(main())
"""


def two_nodes(stack: ExitStack, arguments: list[str], logs: Path) -> list[Started]:
    """Start two of torchrun's agents with one rank each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *rendezvous, *FIT, *arguments]
    command += ["--trainer.devices=1", "--trainer.num_nodes=2"]
    return [stack.enter_context(Started(command, logs / f"node{node}")) for node in range(2)]


def test_every_launcher_ends_in_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    names = ["lightning", "torchrun", "nodes"]
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    for name, program in zip(names, [FIT, (*STANDALONE, str(script), "fit")], strict=False):
        with Started([*program, *two_ranks(corpus, tmp_path, name)], tmp_path / f"{name}.log") as run:
            assert run.wait(200) == 0, run.output
            run.assert_nothing_left(in_time(1))
            check_words(run.output, name)
    assert run.output.count("in a process group: False") == 2, run.output
    with ExitStack() as stack:
        nodes = two_nodes(stack, two_ranks(corpus, tmp_path, "nodes"), tmp_path)
        assert [node.wait(200) for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
        check_words(nodes[0].output + nodes[1].output, "nodes")

    assert all(read_manifest(find_checkpoint(tmp_path / name)).step == STEPS for name in names)
    reference, *others = [read_weights(find_checkpoint(tmp_path / name)) for name in names]
    for name, weights in zip(names[1:], others, strict=True):
        assert all(torch.equal(weights[key], reference[key]) for key in reference), name


def check_words(output: str, name: str) -> None:
    for once in ("step      0/8", "step      8/8", f"{name}: 0.00 M tokens in"):
        assert output.count(once) == 1, output
    assert "Traceback" not in output and "Warning" not in output, output


def test_a_rank_that_dies_on_one_node_ends_both(corpus: Path, tmp_path: Path) -> None:
    endless = ("--model.recipe.num_steps=1000000", "--eval_every=50")
    with ExitStack() as stack:
        nodes = two_nodes(stack, two_ranks(corpus, tmp_path, "nodes", *endless), tmp_path)
        first = nodes[0]
        first.wait_until(lambda: any("step     50/" in node.output for node in nodes), "step 50")
        dying = next(node for node in nodes if 1 in node.processes().values())
        os.kill(dying.rank(1), signal.SIGKILL)
        codes = [node.wait(in_time(10)) for node in nodes]
        assert 0 not in codes, codes
        for node in nodes:
            node.assert_nothing_left(in_time(1))
        said = "".join(node.output for node in nodes)
        assert said.count("all ranks end") == 1, said


@pytest.mark.parametrize("launcher", [(), STANDALONE], ids=["lightning", "torchrun"])
def test_a_wrong_option_is_said_once(corpus: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    arguments = two_ranks(corpus, tmp_path, "run", "--data.device_batch_size=7")
    with Started([*launcher, *FIT, *arguments], tmp_path / "log") as run:
        assert run.wait(100) == (1 if launcher else 2), run.output  # torchrun's own exit code is always 1
        assert run.output.count("nanofed fit: ") == 1, run.output
        run.assert_nothing_left(in_time(1))
    assert not (tmp_path / "run").exists()
