"""A site's trainer that is killed, loses a rank or its disk: what it keeps is whole, and the next round is the right one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from nanofed.federated.site.ranks import Turn
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.messages import Evaluation, Report
from tests.faults import children
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.sites import NAME, RefusedByWorker, Rounds, Trainer, initial_weights, same, tiny_args
from tests.federated.test_worker import LONG, in_process
from tests.ranks import in_time

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class GivesUp(Turn):
    """A round that is not wanted any more after some micro-batches."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyError("enough")


def step(trainer: FabricTrainer, rounds: Rounds) -> None:
    rounds.merge(trainer.fit(rounds.weights, rounds.instructions()))


def abort(trainer: FabricTrainer, rounds: Rounds) -> None:
    with pytest.raises(KeyError):
        trainer.train(rounds.weights, rounds.instructions(max_steps=10), GivesUp(5))


def state_file(folder: Path, rounds: Rounds, number: int) -> Path:
    return folder / NAME / rounds.run / f"round_{number:08d}.pt"


@pytest.fixture(scope="module")
def args(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    accumulating = {"data.device_batch_size": 4}  # four micro-batches a step, two on each of two ranks
    return tiny_args(tiny_corpus, tmp_path_factory.mktemp("runs"), **accumulating)


@pytest.fixture
def rounds(args: list[str], tiny_corpus: Path) -> Rounds:
    return Rounds(tiny_corpus, initial_weights(args))


def test_a_killed_trainer_goes_on_from_disk_to_the_same_bits(
    args: list[str], rounds: Rounds, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Killed in training, it loses that round and nothing else."""
    kills = count(1, 10)
    expected, direct = rounds.copy(), in_process(args, tmp_path / "direct")
    for _ in range(1 + kills):
        step(direct, expected)
    with Trainer(args, tmp_path / "state") as trainer:
        trainer.train(rounds)
        for _ in range(kills):
            trainer.in_background(rounds, **LONG)
            trainer.wait_for_training(steps=2)
            trainer.kill()
            trainer.supernode.restart()
            state_file(tmp_path / "state" / "state", rounds, 1).with_name(".state.tmp").write_bytes(b"half a state")
            trainer.start()
            trainer.train(rounds)
    assert same(rounds.weights, expected.weights) and rounds.data == expected.data


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "foreign"])
def test_a_state_that_cannot_be_read_is_passed_over_for_the_one_before(
    args: list[str], rounds: Rounds, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = in_process(args, tmp_path)
    step(trainer, rounds)
    shutil.copytree(tmp_path / NAME, tmp_path / "before" / NAME)
    step(trainer, rounds)
    file = state_file(tmp_path, rounds, 2)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "foreign":
        content = bytearray(state_file(tmp_path, rounds, 1).read_bytes())
    file.write_bytes(content[: {"truncated": len(content) // 2, "emptied": 0}.get(damage, len(content))])
    damaged, expected = rounds.copy(), rounds.copy()
    step(in_process(args, tmp_path), damaged)
    assert "round_00000002.pt cannot be read and is passed over" in caplog.text
    step(in_process(args, tmp_path / "before"), expected)
    assert same(damaged.weights, expected.weights)


def test_a_run_and_a_client_have_states_of_their_own(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    other = Rounds(rounds.corpus, list(rounds.weights), run="b" * 32)
    trainer = in_process(args, tmp_path)
    for _ in range(2):
        step(trainer, rounds)
        step(trainer, other)
    assert same(rounds.weights, other.weights), "neither went on from the other's momentum"
    assert state_file(tmp_path, rounds, 2).exists() and state_file(tmp_path, other, 2).exists()


def bad_disk(args: list[str], corpus: Path, folder: Path, change: str) -> tuple[list[Any], int, list[str]]:
    """Train four rounds and an aborted one on a disk that fails from the third on; in a process of its own."""
    torch.set_num_threads(1)
    folder.mkdir()
    children.mount_disk(folder, "64m")
    rounds = Rounds(corpus, initial_weights(args))
    trainer = in_process(args, folder)
    step(trainer, rounds)
    step(trainer, rounds)
    if change == "ro":
        children.mount_disk(folder, "64m", "ro")
    else:
        (folder / "ballast").write_bytes(b"x" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
    step(trainer, rounds)
    abort(trainer, rounds)
    step(trainer, rounds)
    files = sorted(file.name for file in (folder / NAME / rounds.run).iterdir())
    return rounds.weights, trainer.states.unwritten, files


@pytest.mark.parametrize("change", ["full", "ro"])
def test_a_disk_without_room_stops_no_round(args: list[str], rounds: Rounds, tmp_path: Path, change: str) -> None:
    """Not even an aborted one costs anything then: the state of the round before it is kept in memory."""
    expected, direct = rounds.copy(), in_process(args, tmp_path / "direct")
    for _ in range(4):
        step(direct, expected)
    weights, unwritten, files = children.call(bad_disk, args, rounds.corpus, tmp_path / "disk", change)
    assert same(weights, expected.weights)
    # What is older than three rounds goes, which makes room on a full disk; a read-only one stays as it was.
    assert (unwritten, files) == {
        "ro": (2, ["round_00000001.pt", "round_00000002.pt"]),
        "full": (2, ["round_00000002.pt"]),
    }[change], (unwritten, files)


def test_an_aborted_round_leaves_what_is_kept(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    expected, clean = rounds.copy(), in_process(args, tmp_path / "clean")
    trainer = in_process(args, tmp_path / "state")
    abort(trainer, rounds)
    for _ in range(2):
        step(trainer, rounds)
        step(clean, expected)
        abort(trainer, rounds)
    assert same(rounds.weights, expected.weights) and rounds.data == expected.data


def test_an_aborted_round_leaves_no_thread_that_makes_batches(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    """Whoever holds the error, as a log or a debugger does, holds the frames that it came through."""
    before = set(threading.enumerate())
    trainer = in_process(args, tmp_path / "trainer")
    with pytest.raises(KeyError) as held:
        trainer.train(rounds.weights, rounds.instructions(max_steps=10), GivesUp(5))
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("nanofed-")] == []
    assert held.value.args == ("enough",)


@pytest.fixture(scope="module")
def pair(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer of two gloo ranks."""
    folder = tmp_path_factory.mktemp("pair")
    with Trainer(args, folder, ranks=2) as trainer:
        trainer.wait_until(lambda now: now["state"] == "idle", "start", 300)
        yield trainer, folder


def close(a: list[Any], b: list[Any]) -> bool:
    return all(float(np.abs(x - y).max()) < 1e-5 for x, y in zip(a, b, strict=True))


def test_two_ranks_train_as_one(args: list[str], rounds: Rounds, tmp_path: Path, pair: tuple[Trainer, Path]) -> None:
    """The same weights but for the order of sums, the same data; also where the leased rows end in mid-round."""
    trainer, folder = pair
    alone, one = rounds.copy(), in_process(args, tmp_path)
    short = rounds.instructions().lease[:3]
    step(one, alone)
    trainer.train(rounds)
    assert close(rounds.weights, alone.weights) and rounds.data == alone.data
    assert rounds.reports[-1].tokens == alone.reports[-1].tokens
    assert rounds.reports[-1].loss_first == pytest.approx(alone.reports[-1].loss_first, abs=1e-5)
    both = [
        trainer.ask(rounds.instructions(lease=short, max_steps=1000), rounds.weights)[1],
        one.fit(rounds.weights, rounds.instructions(lease=short, max_steps=1000))[1],
    ]
    assert both[0].exhausted and both[1].exhausted
    assert (both[0].steps, both[0].data) == (both[1].steps, both[1].data)

    # What two ranks have saved, one goes on from.
    resumed = rounds.copy()
    trained = in_process(args, folder / "state")
    step(trained, resumed)
    trainer.train(rounds)
    assert close(resumed.weights, rounds.weights)


def test_two_ranks_measure_as_one(args: list[str], rounds: Rounds, tmp_path: Path, pair: tuple[Trainer, Path]) -> None:
    """One share of the text, to the last bit; also when it takes too long, and the next round."""
    trainer, _ = pair
    rounds.run = "e" * 32
    one = in_process(args, tmp_path).evaluate(rounds.weights, rounds.evaluate())
    both = trainer.evaluate(rounds.evaluate(), rounds.weights)
    assert both.nats == one.nats and both.bytes == one.bytes > 0
    config = rounds.instructions().to_config() | rounds.evaluate(seconds=1e-9).to_config()
    _, metrics = trainer.call("train", config, rounds.weights)
    assert "took more than" in Evaluation.from_config(metrics).failure and Report.from_config(metrics).steps == 2
    with pytest.raises(RefusedByWorker, match="do not have the hash"):
        trainer.evaluate(rounds.evaluate(base_hash="0" * 64), rounds.weights)
    trainer.train(rounds)


def test_an_evaluation_ends_with_its_round(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    """Where nobody wants the round, it is no failure of the evaluation; a shard that is damaged is."""
    corpus = tmp_path / "corpus"
    shutil.copytree(rounds.corpus, corpus)
    trainer = in_process([*args, f"--data.path={corpus / 'data'}"], tmp_path / "state")
    with pytest.raises(KeyError, match="enough"):
        trainer.evaluate(rounds.weights, rounds.evaluate(), GivesUp(0))
    shard = trainer._data.dataset.validation.path
    shard.write_bytes(shard.read_bytes()[:100])
    found = trainer.evaluate(rounds.weights, rounds.evaluate())
    assert shard.name in found.failure and (found.nats, found.bytes) == (0.0, 0)
    step(trainer, rounds)


def test_two_ranks_abort_and_refuse_together(rounds: Rounds, args: list[str], pair: tuple[Trainer, Path]) -> None:
    trainer, _ = pair
    rounds.run = "c" * 32
    clean = rounds.copy()
    clean.run = "d" * 32
    for _ in range(2):
        trainer.train(clean)
    trainer.train(rounds)
    for changes, reason in (
        ({"lease": ()}, "lease: the leased rows hold too little text"),
        ({"base_hash": "0" * 64}, "do not have the hash"),
        ({**LONG, "deadline_seconds": 1.0}, "over at the server"),
        ({"client": "lab-b"}, "reached client 'lab-a'"),
    ):
        with pytest.raises(RefusedByWorker, match=reason):
            trainer.ask(rounds.instructions(**changes), rounds.weights)
    old = trainer.in_background(rounds, **LONG)
    trainer.wait_for_training()
    trainer.train(rounds)
    assert "a newer message arrived" in str(old.wait().error)
    assert same(rounds.weights, clean.weights), "also with ranks, an aborted round leaves no trace"
    report = trainer.train(rounds, max_steps=100_000, seconds=2.0)
    assert report.steps > 1 and report.seconds - 2.0 < in_time(2.0 * 2 / report.steps), report


def test_a_dead_rank_ends_all_and_the_next_trainer_goes_on(rounds: Rounds, pair: tuple[Trainer, Path]) -> None:
    """Last of the tests on this trainer: it kills it."""
    trainer, _ = pair
    rounds.run = "e" * 32
    clean = rounds.copy()
    clean.run = "f" * 32
    for _ in range(2):
        trainer.train(clean)
    trainer.train(rounds)
    lost = trainer.in_background(rounds, **LONG)
    trainer.wait_for_training()
    (victim,) = [pid for pid in ranks_of(trainer) if pid != trainer.figures()["pid"]]
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert trainer.process.wait(in_time(40)) == 1, "torchrun ends with its ranks"
    assert time.monotonic() - begin < in_time(40)
    assert lost.answer is None, "torchrun may end it before it says so: then the SuperNode does, which is not here"
    trainer.start()
    trainer.train(rounds)
    assert same(rounds.weights, clean.weights)


def ranks_of(trainer: Trainer) -> list[int]:
    """Return the process ids of a trainer's ranks: torchrun's children."""
    found = psutil.Process(trainer.process.pid).children()
    return [child.pid for child in found if "nanofed.federated.site.worker" in child.cmdline()]


def test_the_server_has_its_answer_before_the_disk_has_the_state(
    args: list[str], rounds: Rounds, tmp_path: Path
) -> None:
    trainer, asked = in_process(args, tmp_path), rounds.instructions()
    trainer.train(rounds.weights, asked)
    assert not state_file(tmp_path, rounds, 1).exists()
    trainer.save(asked)
    assert state_file(tmp_path, rounds, 1).exists()


@pytest.mark.parametrize("up_codec", ["fp32", "bf16"])
def test_weights_that_pass_through_staging_memory_are_the_same(
    args: list[str], rounds: Rounds, tmp_path: Path, up_codec: str
) -> None:
    def two_rounds(trainer: FabricTrainer, rounds: Rounds) -> list[list[Any]]:
        answers = []
        for _ in range(2):
            arrays, report = trainer.fit(rounds.weights, rounds.instructions(up_codec=up_codec))
            answers.append(arrays)
            rounds.number, rounds.data = report.round, report.data
        return answers

    staged = in_process(args, tmp_path / "staged")
    staged._pinned = {name: torch.full(tensor.shape, torch.nan) for name, tensor in staged._parameters.items()}
    expected = two_rounds(in_process(args, tmp_path / "direct"), rounds.copy())
    for arrays, others in zip(two_rounds(staged, rounds), expected, strict=True):
        assert same(arrays, others)  # the first answer, too, after the second round
