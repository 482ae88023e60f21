from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.cli.build import build_fab_from_disk
from safetensors.torch import load_file

from nanofed.errors import ConfigError, DataError
from nanofed.federated.deploy import superlink
from nanofed.federated.deploy.process import kill_marked, marked
from nanofed.federated.federation import Federation, Start
from nanofed.federated.runtimes import simulation
from nanofed.federated.runtimes.connections import Resources
from nanofed.federated.runtimes.in_process import run_in_process
from nanofed.federated.wire.bundle import code_hash
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.run_options import START
from nanofed.training.summary import Summary
from tests.federated.tiny import federation
from tests.support import REPOSITORY, ended

BINARIES = Path(sys.executable).parent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of commands, with a mark by which the processes that they leave behind are found.

    Every command is started in a session of its own: what is left of a marked session is killed, and this one must not be.
    """
    mark = f"NANOFED_TEST={tmp_path}"
    for name, value in {
        "NANOFED_TEST": str(tmp_path),
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "FLWR_HOME": str(tmp_path / "flower"),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield dict(os.environ)
    left = marked(mark)
    kill_marked(mark)
    assert not left, "processes are left behind"


def config_file(config: Federation, path: Path) -> Path:
    path.write_text(config.parser.dump(config.config), encoding="utf-8")
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def sources_hash(bundle: bytes) -> str:
    """As `code_hash`, of the package in a bundle."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = [Path(name) for name in archive.namelist() if name.startswith("nanofed/") and name.endswith(".py")]
        for name in sorted(names):
            digest.update(name.relative_to("nanofed").as_posix().encode() + b"\0" + archive.read(name.as_posix()))
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
@pytest.mark.parametrize("of", ["checkout", "package"])
def test_the_bundle_carries_the_package_itself(of: str, tmp_path: Path) -> None:
    app = REPOSITORY
    if of == "package":
        app = tmp_path / "app"
        app.mkdir()
        superlink.write_app(app)
    bundle = build_fab_from_disk(app)
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = set(archive.namelist())
    assert sources_hash(bundle) == code_hash()
    assert {Path(name).suffix for name in names - {".info/CONTENT"}} <= {".py", ".toml"}
    assert not any(name.startswith(("tests/", "notebooks/", "bin/")) for name in names)
    assert len(bundle) < 2 << 20  # Flower takes 10 MB


def test_how_a_run_is_started_is_carried_beside_its_config(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    asked = federation(tiny_corpus, tmp_path, "run")
    asked.open()
    asked.config.force, asked.config.init_from = True, str(tmp_path / "other")
    asked.start(keys=True).write(tmp_path)
    start = Start.read(tmp_path)
    assert start is not None and start.keys
    told = Federation.started(start)
    assert told.folder == tmp_path / "run"
    assert told.options.force and told.options.init_from == str(tmp_path / "other")
    assert told.parser.dump(told.config) == asked.parser.dump(asked.config)
    assert not set(START) & set(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert Start.read(tmp_path / "run") is None, "a person's `flwr run`"


def test_without_ray_it_says_what_to_install(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'nanofed-lightning\[simulation\]'"):
        simulation.run_simulation(federation(tiny_corpus, tmp_path, "no-ray"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_simulation_ends_in_the_weights_of_the_in_process_run(
    tiny_corpus: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    runs = tmp_path / "runs"
    settings: dict[str, Any] = {"eval_every": 1, "federation.outer_momentum": 0.5, "federation.down_codec": "int8"}
    alone = federation(tiny_corpus, runs, "alone", **settings)
    expected = run_in_process(alone)
    config = config_file(federation(tiny_corpus, runs, "simulated", **settings), tmp_path / "config.yaml")
    command: list[str | Path] = [BINARIES / "nanofed", "federate", "--config", config, "--runtime", "simulation"]
    done = ended(command, env=environment, cwd=tmp_path, start_new_session=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round   2  2 of 2 clients" in done.stdout
    run = runs / "simulated"
    assert same_weights(run, runs / "alone")
    summary = Summary.read(run)
    assert [point.bpb for point in summary.curve] == [point.bpb for point in expected.curve]
    assert summary.tokens == expected.tokens > 0 and summary.curve[-1].bpb < summary.curve[0].bpb

    def files(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if "tfevents" not in path.name}

    assert files(run) == files(runs / "alone") | {"flower.log"}
    assert len(list(run.glob("*tfevents*"))) == 1
    assert "local-simulation-gpu" in (tmp_path / "flower" / "config.toml").read_text()
    assert not (tmp_path / "flower" / "apps").exists(), "the run had a Flower home of its own"


@pytest.mark.slow
def test_flwr_run_takes_its_settings_from_the_run_config(
    tiny_corpus: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    from nanofed.federated.runtimes.connections import write_connections

    runs = tmp_path / "runs"
    alone = federation(tiny_corpus, runs, "alone", eval_every=1, **{"model.recipe.lr_scale": 2.0})
    run_in_process(alone)
    home = tmp_path / "flower"
    write_connections(home, {"local-simulation": Resources(2, 1, 0)})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment |= {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BINARIES}:{environment['PATH']}",
    }
    overrides = (
        f"--data.tokenizer={tiny_corpus / 'tokenizer'} --data.eval_tokens=512 --model.compile=false "
        "--model.compute_dtype=float32 --model.recipe.num_steps=1000 --keep_checkpoints=0 --fabric.accelerator=cpu"
    )
    settings = (
        f'model_type="d1" dataset_name="{tiny_corpus / "data"}" num_rounds=2 round_steps=1 lr=0.04 batch_size=8 '
        f'max_length=32 gradient_accumulation_steps=2 name="flwr" runs_dir="{runs}" overrides="{overrides}"'
    )

    def flwr(*args: str) -> str:
        done = ended([BINARIES / "flwr", *args], env=environment, cwd=tmp_path, start_new_session=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    superlink = None
    try:
        log = flwr("run", str(REPOSITORY), "local-simulation", "--run-config", settings, "--stream")
        superlink = marked(f"FLWR_HOME={home}", "flower-superlink")[0]
        listed = flwr("list", "local-simulation", "--format", "json")
    finally:  # Flower leaves its SuperLink running, for the next run
        if superlink is not None:
            superlink.terminate()
        deadline = time.monotonic() + 20
        while marked(f"FLWR_HOME={home}") and time.monotonic() < deadline:
            time.sleep(0.2)
    (row,) = json.loads(listed[listed.index("{") :])["runs"]
    assert row["status"] == "finished:completed", log
    assert same_weights(runs / "flwr", runs / "alone")


@pytest.mark.slow
def test_a_run_that_fails_says_why(tiny_corpus: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    absent, run = tmp_path / "absent", tmp_path / "runs" / "failing"
    run.mkdir(parents=True)
    failing = federation(tiny_corpus, tmp_path / "runs", "failing", **{"data.tokenizer": absent})
    failing.config.runtime = "simulation"
    config_file(failing, run / "config.yaml")
    with pytest.raises(DataError, match=f"data.tokenizer: there is no folder {absent}"):
        simulation.simulate(tmp_path / "flower.log", Resources(2, 1, 0), failing.start())
    assert "Simulation raised an exception" in (tmp_path / "flower.log").read_text(), "the whole story is in the log"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_no_processes(
    number: signal.Signals, code: int, tiny_corpus: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    endless = federation(tiny_corpus, tmp_path / "runs", "stopped", rounds=10_000, eval_every=1)
    config = config_file(endless, tmp_path / "config.yaml")
    command: list[str | Path] = [BINARIES / "nanofed", "federate", "--config", config, "--runtime", "simulation"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        # One signal while clients train, the other already while the engine starts.
        if line.startswith("round   1 " if number == signal.SIGINT else "Flower's"):
            process.send_signal(number)
            break
    seen.append(process.stdout.read())
    process.stdout.close()
    assert process.wait(60) == code, "".join(seen)
