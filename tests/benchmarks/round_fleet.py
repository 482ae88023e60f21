"""The processes of a federation on loopback, ours and Flower's stock one: started, watched to their end, and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nanofed.errors import NanofedError
from nanofed.federated.deploy.keys import init
from nanofed.federated.deploy.process import kill_marked
from nanofed.federated.deploy.superlink import SuperLink
from nanofed.federated.flower import flower_environment, free_port, toml
from nanofed.model import GPT, GPTConfig
from nanofed.training.checkpoint.folder import checkpoints
from tests.benchmarks import round_probe, stock_app
from tests.benchmarks.machine import ROOT
from tests.benchmarks.round_memory import Sampler
from tests.benchmarks.round_phases import Trace, medians

MARK = "NANOFED_BENCH"
STOP_SECONDS = 20.0
NAME = "bench"


class Network:
    """Where the sites are: here, on loopback, where nothing slows them down."""

    listen = "127.0.0.1"

    def server(self, site: int) -> str:
        """Return the address at which a site reaches the server."""
        return self.listen

    def at(self, site: int, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command where a site is."""
        return list(command)

    def relays(self, port: int, folder: Path) -> AbstractContextManager[object]:
        """Run what stands between the sites and the server's port while the block lasts."""
        return nullcontext()


@dataclass(frozen=True)
class Fleet:
    """What to run."""

    config: GPTConfig
    args: Sequence[str]  # of `nanofed federate`, for server and sites
    sites: int
    rounds: int  # that count; one more is run, whose begin ends the last one
    train: bool  # with the real worker; otherwise one that trains nothing
    secure: bool  # TLS and keys
    environment: Mapping[str, str]  # changes to that of all processes
    seconds: float  # after which a run is given up
    network: Network = Network()  # noqa: RUF009 (it has no state)


class FleetError(RuntimeError):
    """A process failed; the message ends with its log."""


@contextmanager
def _traced(fleet: Fleet, folder: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the environment of processes to be measured, and a dictionary that holds the figures when the block ends."""
    watching = folder / "watching"
    watching.mkdir(parents=True)
    (watching / "sitecustomize.py").write_text(
        "from tests.benchmarks import round_probe\n\nround_probe.install()\n", encoding="utf-8"
    )
    mark, trace = uuid.uuid4().hex, folder / "trace.jsonl"
    changes = {MARK: mark, round_probe.FILE: str(trace), "PYTHONPATH": f"{watching}:{ROOT}", **fleet.environment}
    figures: dict[str, Any] = {}
    with patch.dict(os.environ, changes):
        try:
            with Sampler(f"{MARK}={mark}") as memory:
                yield dict(os.environ), figures
        finally:  # Flower's SuperNode leaves its client, and a supervisor that is told twice at once what it has started
            kill_marked(f"{MARK}={mark}")
        figures |= medians(Trace(trace).rounds(), memory)


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str], stop_seconds: float = STOP_SECONDS
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process while the block lasts; it stops what it has started when it is asked to end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), cwd=ROOT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours(fleet: Fleet, folder: Path) -> dict[str, Any]:
    """Run `nanofed server` and as many `nanofed site` as there are sites, and return the figures.

    Raises:
        FleetError: a process failed, or the run took too long.
    """
    port, network, names = free_port(), fleet.network, [f"site-{index}" for index in range(fleet.sites)]
    address = f"{network.listen}:{port}"
    rounds = ["--federation.rounds", str(fleet.rounds + 1), "--federation.quorum", str(fleet.sites)]
    python = [sys.executable, "-P", "-m"]
    server = [*python, "nanofed", "server", "--listen", address, "--name", NAME, "--runs_dir", str(folder / "runs")]
    site = [*python, "nanofed", "site"] if fleet.train else [*python, "tests.benchmarks.echo_site"]
    keys: dict[str, list[str]] = {name: [] for name in names}
    if fleet.secure:
        made = init(folder / "keys", [network.server(index) for index in range(fleet.sites)], names)
        server += ["--keys", str(made.folder)]
        keys = {name: ["--keys", str(made.handout(name))] for name in names}
    with _traced(fleet, folder) as (environment, figures), ExitStack() as stack:
        log = folder / "server.log"
        service = stack.enter_context(running([*server, *fleet.args, *rounds], log, environment))
        stack.enter_context(network.relays(port, folder))
        sites = {}
        for index, name in enumerate(names):
            own = ["--superlink", f"{network.server(index)}:{port}", "--name", name, "--state", str(folder / name)]
            command, site_log = network.at(index, [*site, *own, *keys[name], *fleet.args]), folder / f"{name}.log"
            sites[name] = stack.enter_context(running(command, site_log, environment)), site_log
        _wait(service, log, sites, fleet.seconds)
    committed = int(checkpoints(folder / "runs" / NAME)[-1].name.removeprefix("round_"))
    if committed != fleet.rounds + 1:
        raise FleetError(f"{committed} rounds were committed, not {fleet.rounds + 1}: {tail(folder / 'server.log')}")
    return figures


def _wait(
    service: subprocess.Popen[bytes],
    log: Path,
    sites: Mapping[str, tuple[subprocess.Popen[bytes], Path]],
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while service.poll() is None:
        for name, (process, site_log) in sites.items():
            if process.poll() is not None:
                raise FleetError(f"{name} ended with exit code {process.returncode}: {tail(site_log)}")
        if time.monotonic() > deadline:
            raise FleetError(f"the run has taken {seconds:.0f} s: {tail(log)}")
        time.sleep(0.2)
    if service.returncode != 0:
        raise FleetError(f"nanofed server ended with exit code {service.returncode}: {tail(log)}")


def stock(fleet: Fleet, folder: Path) -> dict[str, Any]:
    """Run Flower's FedAvg in fp32 over a SuperLink and SuperNodes as Flower sets them up, and return the figures.

    Raises:
        FleetError: the run failed or took too long.
    """
    app = folder / "app"
    app.mkdir(parents=True)
    source = Path(stock_app.__file__)
    (app / source.name).write_bytes(source.read_bytes())
    (app / "pyproject.toml").write_text(
        '[project]\nname = "stock"\nversion = "1.0.0"\ndescription = "FedAvg"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "nanofed"\n\n[tool.flwr.app.components]\n'
        f'serverapp = "{source.stem}:server"\nclientapp = "{source.stem}:client"\n\n'
        f"[tool.flwr.app.config]\nsites = {fleet.sites}\nrounds = {fleet.rounds + 1}\n"
        f"shapes = {toml(str(folder / 'shapes.json'))}\n",
        encoding="utf-8",
    )
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in GPT(fleet.config).state_dict().items()}
    (folder / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    log = folder / "flower.log"
    with _traced(fleet, folder) as (_, figures), ExitStack() as stack:
        settings_of_ours = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
        own: dict[str, str | None] = dict.fromkeys(settings_of_ours)
        program = [str(Path(sys.executable).with_name("flower-superlink")), "--insecure"]
        link = SuperLink(folder, log, environment=own, program=program)
        database = ["--database", str(folder / "superlink.db")]
        listen = ["--host", fleet.network.listen]  # the last one counts
        stack.enter_context(link.running([*database, *listen, "--disable-runtime-dependency-installation"]))
        stack.enter_context(fleet.network.relays(link.port, folder))
        for index in range(fleet.sites):
            command = [str(Path(sys.executable).with_name("flower-supernode")), "--insecure"]
            command += ["--superlink", f"{fleet.network.server(index)}:{link.port}"]
            command += ["--host", "127.0.0.1", "--port", str(free_port())]
            home = folder / f"site-{index}"
            home.mkdir()
            supernode = flower_environment(home, **own)
            at_site = fleet.network.at(index, command)
            stack.enter_context(running(at_site, folder / f"site-{index}.log", supernode))
        run_id = link.submit(app)
        follower = threading.Thread(target=link.follow, args=(run_id,), daemon=True)
        follower.start()
        follower.join(fleet.seconds)
        if follower.is_alive():
            raise FleetError(f"the stock run has taken {fleet.seconds:.0f} s: {tail(log)}")
        try:
            link.check(run_id)
        except NanofedError as error:
            raise FleetError(f"the stock run failed: {error}{tail(log)}") from error
    return figures


def tail(log: Path) -> str:
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
