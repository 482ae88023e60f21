"""`nanofed federate --runtime deployment`: a server and its sites as processes of one command, which leaves none behind."""

from __future__ import annotations

import errno
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy import local_deployment
from nanofed.federated.deploy.process import SupervisedProcess
from nanofed.federated.federation import Federation
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_manifest, read_state
from nanofed.training.summary import Summary
from tests.federated.tiny import arguments
from tests.ranks import Started
from tests.support import BATCH

STEPS = 3
TOKENS = 2 * 2 * STEPS * BATCH  # of two clients in two rounds


def options(corpus: Path, runs: Path, **more: Any) -> list[str]:
    given = {"round_steps": STEPS, "quorum": 2, "model.recipe.num_steps": 4 * STEPS, **more}
    return [*arguments(corpus, runs, "run", **given), "--runtime=deployment"]


def start(args: list[str], log: Path) -> Started:
    return Started(["-P", "-m", "nanofed", "federate", *args], log)


def test_whatever_ends_a_site_is_said_with_its_name(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state")

    monkeypatch.setattr(SupervisedProcess, "start", full)
    federation = Federation.from_args(options(tiny_corpus, tmp_path, clients=1, quorum=1))
    said = "site client-0: state: No space left on device"
    with pytest.raises(NanofedError, match=said), local_deployment._sites(federation, tmp_path, "127.0.0.1:1"):
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_in_a_round_it_leaves_no_process_behind_and_goes_on_to_its_end(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    write_shards(["zeta eta theta " * (20 + n % 20) for n in range(160)], own, num_shards=4, rows_per_group=16)
    texts = {"sharding": "local", "client_data": json.dumps([str(tiny_corpus / "data"), str(own)])}
    run, args = (
        tmp_path / "run",
        options(tiny_corpus, tmp_path, evaluation="sites", eval_every=1, sample_every=0, **texts),
    )
    with start([*args, "--federation.round_steps=1000000"], tmp_path / "first.log") as federate:
        federate.wait_until(lambda: "training" in said(run), "round")
        names = ("superlink_process", "flwr-serverapp", "deploy.supernode", "site.worker")
        assert [len(federate.processes(name)) for name in names] == [1, 1, 2, 2]
        federate.process.send_signal(signal.SIGTERM)
        assert federate.wait(60) == 143
        federate.assert_nothing_left(1)
    assert not checkpoints(run)

    with start([*args, "--ckpt_path=last"], tmp_path / "second.log") as federate:
        assert federate.wait(240) == 0
        assert "run: 0.01 M tokens" in federate.output.splitlines()[-1]
        federate.assert_nothing_left(1)
    newest = checkpoints(run)[-1]
    assert (newest.name, read_manifest(newest).tokens) == ("round_00000002", TOKENS)
    state = read_state(newest)
    assert state["pace"]["rounds"] == {"client-0": 2, "client-1": 2}
    curve = Summary.read(run).curve
    assert [(point.step, point.tokens) for point in curve] == [(0, 0), (1, TOKENS // 2), (2, TOKENS)]
    assert curve[2].bpb < curve[1].bpb < curve[0].bpb, "measured by the sites"
    first, second = (state["evaluations"][client]["bpb"] for client in ("client-0", "client-1"))
    assert abs(first - second) > 0.1, "each has text of its own"
    with pytest.raises(ConfigError, match="already holds a run: go on with --ckpt_path last"):
        local_deployment.run_deployment(Federation.from_args(args))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_while_it_starts_leaves_no_process_behind(tiny_corpus: Path, tmp_path: Path) -> None:
    with start(options(tiny_corpus, tmp_path), tmp_path / "log") as federate:
        federate.wait_until(lambda: bool(federate.processes("site.worker")), "worker")
        federate.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        federate.process.send_signal(signal.SIGINT)  # impatient
        assert federate.wait(60) == 130
        assert federate.output.splitlines()[-1] == "nanofed federate: interrupted"
        federate.assert_nothing_left(1)


def test_a_site_that_runs_already_ends_the_run(tiny_corpus: Path, tmp_path: Path) -> None:
    federation = Federation.from_args(options(tiny_corpus, tmp_path, clients=1, quorum=1))
    folder = tmp_path / local_deployment.CLIENTS / "client-0"
    folder.mkdir(parents=True)
    said = r"^the site 'client-0' is running already"
    with (
        FileLock(folder / ".lock"),
        pytest.raises(ConfigError, match=said),
        local_deployment._sites(federation, tmp_path, "127.0.0.1:1"),
    ):
        pass


def said(run: Path) -> str:
    """Return the phase in which the run's server is."""
    try:
        return str(json.loads((run / "server.json").read_text())["phase"])
    except (OSError, ValueError):
        return ""
