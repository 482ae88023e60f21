"""The worker process of a site, as its supervisor and its SuperNode see it; its wall clock jumps all the time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from lightning import Fabric

from nanofed.errors import ConfigError
from nanofed.federated.config import Arguments
from nanofed.federated.site import worker
from nanofed.federated.site.inbox import ACQUIRE
from nanofed.federated.site.options import WorkerOptions
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.codec import CODECS
from nanofed.federated.wire.messages import Evaluation, Hello, Report
from nanofed.optim import Schedule
from tests.federated.sites import NAME, RefusedByWorker, Rounds, Trainer, initial_weights, same, tiny_args
from tests.ranks import in_time
from tests.support import BATCH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG: dict[str, Any] = {"max_steps": 100_000, "seconds": 1000.0}


@pytest.fixture(scope="module")
def args(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_args(tiny_corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def running(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(args, tmp_path_factory.mktemp("site"), module="tests.federated.jumping_clock") as trainer:
        trainer.wait_until(lambda now: now["state"] == "idle", "start", 300)
        yield trainer


@pytest.fixture
def trainer(running: Trainer) -> Trainer:
    """The running worker, which the test before has left idle."""
    running.wait_until(lambda now: now["state"] == "idle", "end of the test before")
    return running


@pytest.fixture
def rounds(args: list[str], tiny_corpus: Path, request: pytest.FixtureRequest) -> Rounds:
    """A run of its own for each test."""
    return Rounds(tiny_corpus, initial_weights(args), run=request.node.name.replace("[", "-").replace("]", "")[:64])


def in_process(args: list[str], folder: Path) -> FabricTrainer:
    module, data = Arguments.from_args(args).build()
    return FabricTrainer(module, data, Fabric(accelerator="cpu", devices=1), folder)


def trained_here(args: list[str], folder: Path, rounds: Rounds, number: int) -> Rounds:
    """Return where as many rounds in this process end."""
    here, direct = rounds.copy(), in_process(args, folder)
    for _ in range(number):
        here.merge(direct.fit(here.weights, here.instructions()))
    return here


def test_a_client_remembers_by_its_own_tokens_and_not_by_those_of_all(
    rounds: Rounds, args: list[str], tmp_path: Path
) -> None:
    direct = in_process(args, tmp_path)
    for participants in (1, 4):
        rounds.merge(direct.fit(rounds.weights, rounds.instructions(participants=participants)))
        groups = [group for group in direct._optimizer.param_groups if group["kind"] == "adamw"]
        assert [group["betas"][1] for group in groups] == [Schedule(adamw_beta2="auto").beta2(BATCH)] * 2
    assert direct._module.clock.step_tokens == 4 * BATCH


def test_rounds_over_flowers_messages_are_those_in_process(
    trainer: Trainer, rounds: Rounds, args: list[str], tmp_path: Path
) -> None:
    expected = trained_here(args, tmp_path, rounds, 2)
    for _ in range(2):
        trainer.train(rounds)
    assert same(rounds.weights, expected.weights) and rounds.data == expected.data
    now = trainer.figures()
    assert (now["state"], now["round"], now["steps"], now["quiet_seconds"]) == ("idle", 2, 2, 0.0)
    assert now["pid"] == trainer.process.pid and now["tokens_per_second"] > 0 and now["warm"]
    hello = Hello.from_config(trainer.call("get_properties", {})[1])
    assert hello.name == NAME and hello.devices == 1 and hello.tokens_per_second


def test_a_lossy_answer_is_an_update_of_what_arrived(
    trainer: Trainer, rounds: Rounds, args: list[str], tmp_path: Path
) -> None:
    module, _ = Arguments.from_args(args).build()
    module.configure_model()
    like = {name: tensor.detach().numpy() for name, tensor in module.gpt.state_dict().items()}
    codec = CODECS["bf16"]
    rounds.weights = codec.encode(like)
    asked = rounds.instructions(down_codec="bf16", up_codec="bf16")
    arrays, _ = trainer.ask(asked, rounds.weights)
    base = codec.decode(rounds.weights, like)
    reference = Rounds(rounds.corpus, [base[name] for name in like], run=rounds.run)
    local: list[Any] = in_process(args, tmp_path).fit(reference.weights, reference.instructions())[0]
    assert same(arrays, codec.pack(dict(zip(like, local, strict=True)), base))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lease": ()}, "lease: the leased rows hold too little text"),
        ({"base_hash": "0" * 64}, "do not have the hash that was announced"),
        ({"run": "../elsewhere"}, "the run is '../elsewhere', no plain word"),
        ({"client": "lab-b"}, "instructions for 'lab-b' reached client 'lab-a'"),
        ({"batch_tokens": 100}, "is no multiple of"),
        ({"deadline_seconds": 0.0}, "it is over at the server"),
    ],
    ids=["lease", "hash", "run", "client", "batch", "deadline"],
)
def test_what_cannot_be_trained_is_refused_and_the_next_round_is_clean(
    trainer: Trainer, rounds: Rounds, args: list[str], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RefusedByWorker, match=f"site lab-a: .*{reason}"):
        trainer.ask(rounds.instructions(**changes), rounds.weights)
    expected = trained_here(args, tmp_path, rounds, 1)
    trainer.train(rounds)
    assert same(rounds.weights, expected.weights)


def test_foreign_words_are_refused(trainer: Trainer, rounds: Rounds) -> None:
    with pytest.raises(RefusedByWorker, match="must be one JSON string"):
        trainer.call("train", {"nanofed": 3}, rounds.weights)


def test_a_round_that_was_over_when_it_arrived_is_not_trained(trainer: Trainer, rounds: Rounds) -> None:
    long_ago = time.time() - 1e9
    with pytest.raises(RefusedByWorker, match=r"round 1 arrived \d+ s after it was sent: it is over"):
        trainer.call("train", rounds.instructions().to_config(), rounds.weights, sent=long_ago)


def test_an_app_of_another_nanofed_is_refused(trainer: Trainer, rounds: Rounds) -> None:
    ours, trainer.supernode.bundle = trainer.supernode.bundle, b"no bundle"
    try:
        with pytest.raises(RefusedByWorker, match="the bundle cannot be read"):
            trainer.train(rounds)
    finally:
        trainer.supernode.bundle = ours
    trainer.train(rounds)


@pytest.mark.parametrize("how", ["newer", "gone"])
def test_an_aborted_round_leaves_no_trace(
    trainer: Trainer, rounds: Rounds, args: list[str], tmp_path: Path, how: str
) -> None:
    """Neither in the momentum that is kept, nor in the data position; and it ends at once."""
    expected = trained_here(args, tmp_path, rounds, 2)
    trainer.train(rounds)
    old = trainer.in_background(rounds, **LONG)
    trainer.wait_for_training()
    if how == "gone":
        trainer.supernode.restart()
        begin = time.monotonic()
        trainer.wait_until(lambda now: now["state"] == "idle", "end of the round")
        assert time.monotonic() - begin < in_time(5)
        assert "aborted: its SuperNode is gone" in trainer.output
    trainer.train(rounds)
    if how == "newer":
        assert "the round was aborted: a newer message arrived" in str(old.wait().error)
    assert same(rounds.weights, expected.weights) and rounds.data == expected.data


def test_a_message_whose_content_never_comes_holds_up_no_later_one(trainer: Trainer, rounds: Rounds) -> None:
    """Of a run that ended while the SuperNode received it."""
    content = RecordDict({"getpropertiesins.config": ConfigRecord({"a": 1})})
    trainer.supernode.send("get_properties", content, whole=False)
    time.sleep(1.0)
    trainer.train(rounds)
    assert "a message could not be taken" in trainer.output


@pytest.mark.parametrize("secret", [None, b"another"], ids=["without", "wrong"])
def test_nobody_else_on_the_machine_takes_a_message(trainer: Trainer, secret: bytes | None) -> None:
    known = [] if secret is None else [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})]
    stranger = RuntimeHttpClient.from_server_address(trainer.options.supernode, True, None, known)
    with closing(stranger), pytest.raises(httpx.HTTPStatusError, match="401"):
        stranger.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))


def test_a_round_of_seconds_ends_within_its_budget(trainer: Trainer, rounds: Rounds) -> None:
    trainer.train(rounds)
    begin = time.monotonic()
    report = trainer.train(rounds, max_steps=100_000, seconds=2.0, deadline_seconds=60.0)
    took = time.monotonic() - begin
    assert report.steps > 2 and not report.exhausted
    assert report.seconds < 2.0 * (1 + 2 / report.steps), "at most the last step is longer than those before it"
    assert report.seconds > 1.0 and took < 2.0 + in_time(3)


def test_weights_are_measured_before_they_are_trained(
    trainer: Trainer, rounds: Rounds, args: list[str], tmp_path: Path
) -> None:
    """In one message, or alone: the figure is that of a trainer in this process, and the training is what it would be."""
    asked = rounds.evaluate()
    measured = in_process(args, tmp_path / "measured").evaluate(rounds.weights, asked)
    assert measured.nats > 0 and measured.bytes > 0 and not measured.failure
    expected = trained_here(args, tmp_path, rounds, 1)
    alone = trainer.evaluate(asked, rounds.weights)
    assert alone.bytes == measured.bytes
    arrays, more = trainer.call("train", rounds.instructions().to_config() | asked.to_config(), rounds.weights)
    for found in (alone, Evaluation.from_config(more)):
        assert replace(found, seconds=0.0) == replace(measured, seconds=0.0) and found.seconds > 0
    rounds.merge((arrays, Report.from_config(more)))
    assert same(rounds.weights, expected.weights) and rounds.data == expected.data
    with pytest.raises(RefusedByWorker, match="reached client 'lab-a'"):
        trainer.evaluate(rounds.evaluate(client="lab-b"), rounds.weights)
    with pytest.raises(RefusedByWorker, match="do not have the hash"):
        trainer.evaluate(rounds.evaluate(base_hash="0" * 64), rounds.weights)


def test_the_budget_runs_from_the_end_of_an_evaluation(trainer: Trainer, rounds: Rounds) -> None:
    trainer.train(rounds)
    told = rounds.instructions(max_steps=100_000, seconds=1.0, deadline_seconds=60.0)
    slow = rounds.evaluate(eval_tokens=1_000_000, share=0, shares=1)
    begin = time.monotonic()
    _, metrics = trainer.call("train", told.to_config() | slow.to_config(), rounds.weights)
    took = time.monotonic() - begin
    report, found = Report.from_config(metrics), Evaluation.from_config(metrics)
    assert not found.failure and 0.5 < report.seconds < 1.0 * (1 + 2 / report.steps)
    assert took > found.seconds + report.seconds


def test_an_evaluation_that_takes_too_long_costs_the_figure_alone(trainer: Trainer, rounds: Rounds) -> None:
    asked = rounds.evaluate(seconds=1e-9)
    config = rounds.instructions().to_config() | asked.to_config()
    _, metrics = trainer.call("train", config, rounds.weights)
    found = Evaluation.from_config(metrics)
    assert (found.nats, found.bytes) == (0.0, 0) and "0 batches took more than 1e-09 s" in found.failure
    assert Report.from_config(metrics).steps == 2


def test_a_hard_limit_ends_a_round_that_is_over_at_the_server(trainer: Trainer, rounds: Rounds) -> None:
    begin = time.monotonic()
    with pytest.raises(RefusedByWorker, match=r"it is over at the server, 0\.5 s after it arrived"):
        trainer.ask(rounds.instructions(**{**LONG, "deadline_seconds": 0.5}), rounds.weights)
    assert time.monotonic() - begin < in_time(5)


def test_a_wrong_config_ends_the_worker_with_its_exit_code(args: list[str], tmp_path: Path) -> None:
    with Trainer([*args, "--data.tokenizer=/nowhere"], tmp_path) as broken:
        assert broken.process.wait(300) == 3, broken.output
        assert "there is no folder /nowhere" in broken.output


def test_whatever_ends_the_worker_is_one_line_of_its_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(args: object) -> None:
        raise RuntimeError("the device is lost\nmore")

    monkeypatch.setattr(WorkerOptions, "from_json", broken)
    assert worker.main([""]) == 1
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("nanofed")]
    assert ours == ["the device is lost"]


def test_a_worker_ends_with_its_supervisor(args: list[str], tmp_path: Path) -> None:
    supervisor = subprocess.Popen(["sleep", "1000"])
    with Trainer(args, tmp_path) as orphan:
        orphan.kill()
        orphan.options = replace(orphan.options, supervisor=supervisor.pid)
        orphan.start()
        orphan.figures()
        supervisor.kill()
        supervisor.wait()
        assert orphan.process.wait(in_time(30)) == 1
        assert "the process that started this worker is gone" in orphan.output


def test_the_workers_options_are_one_argument() -> None:
    site = ("host:2", "a", None, Path("k"), Path("f"))
    options = WorkerOptions(*site, supernode="127.0.0.1:1", progress="p", supervisor=3)
    assert WorkerOptions.from_json(options.to_json()) == options
    for wrong in ("", "[]", "{}", '{"name": "a"}', '{"nobody": 1}'):
        with pytest.raises(ConfigError, match="options of a site's worker"):
            WorkerOptions.from_json(wrong)


def test_a_worker_that_hangs_says_nothing(trainer: Trainer, rounds: Rounds) -> None:
    old = trainer.in_background(rounds, **{**LONG, "seconds": 3.0})
    trainer.wait_for_training()
    assert trainer.figures()["quiet_seconds"] < in_time(5)
    os.kill(trainer.process.pid, signal.SIGSTOP)
    time.sleep(0.1)
    stopped = time.monotonic()
    time.sleep(1.5)
    assert trainer.page.read(since=stopped) is None
    os.kill(trainer.process.pid, signal.SIGCONT)
    assert old.wait().answer is not None
