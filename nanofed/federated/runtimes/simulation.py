"""Flower's simulation engine: `nanofed federate --runtime simulation` starts it, waits, and reports what became of it."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

import nanofed
from nanofed import runtime
from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.run import Federation
from nanofed.federated.runtimes.connections import Resources, write_connections
from nanofed.federated.runtimes.processes import ended_on_sigterm, stop_marked, undisturbed
from nanofed.federated.runtimes.settings import DEFAULTS, Value
from nanofed.training.run import Summary

logger = logging.getLogger(__name__)

APP = "nanofed.federated.runtimes.flower_app"
LINK = "simulation"  # our own connection, in a Flower home of this run's own
LOG = "flower.log"
START_SECONDS = 120.0
COMMAND_SECONDS = 120.0
END_SECONDS = 30.0  # between the last line of a run's log and its final status
STOP_SECONDS = 5.0
LINE = re.compile(r"nanofed (DEBUG|INFO|WARNING|ERROR|CRITICAL): (.*)")  # flower_app.LOG_FORMAT
EXIT = re.compile(r"exit (\d+): (.*)")


def run_simulation(federation: Federation) -> Summary:
    """Run a federation under Flower's simulation engine, on this machine, and return what the run came to.

    A SuperLink of the run's own, on a free port, with a Flower home of its own: neither another SuperLink nor another run is
    touched, and all processes end with the run. Everything that they print is in the run's `flower.log`.

    Raises:
        ConfigError: Ray is not installed, or a wrong option.
        DataError: no shards or no tokenizer.
        NanofedError: the run failed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--runtime simulation needs Ray: pip install 'nanofed-lightning[simulation]' (or leave out --runtime: the "
            "in-process runtime needs nothing)"
        )
    _anchor(federation.config)
    run = federation.open()
    clients, cpus = federation.federation.clients, runtime.cpu_count()
    gpus = 0 if federation.config.fabric.accelerator == "cpu" else torch.cuda.device_count()
    on_cpu, on_gpu = Resources.of(clients, cpus, 0), Resources.of(clients, cpus, max(1, gpus))
    write_connections(runtime.flower_home(), {"local-simulation": on_cpu, "local-simulation-gpu": on_gpu})
    settings = {"run_dir": str(run.resolve()), "base_dir": str(runtime.base_dir().resolve())}
    with ended_on_sigterm():
        simulate(run / LOG, on_gpu if gpus else on_cpu, settings)
    return Summary.read(run)


def write_app(folder: Path) -> None:
    """Write the app that `flwr run` bundles: this package's sources and the least pyproject.toml that Flower takes."""
    sources = Path(nanofed.__file__).parent
    shutil.copytree(sources, folder / sources.name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in DEFAULTS.items())
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "nanofed-lightning"\nversion = "{nanofed.__version__}"\n'
        'description = "nanofed, as it runs here"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "nanofed"\n\n'
        f'[tool.flwr.app.components]\nserverapp = "{APP}:server"\nclientapp = "{APP}:client"\n\n'
        f"[tool.flwr.app.config]\n{settings}\n",
        encoding="utf-8",
    )


def _anchor(config: Any) -> None:
    """Make the config's paths absolute: the run's processes have another working directory."""
    config.runs_dir = _absolute(config.runs_dir)
    config.data.path = config.data.path if config.data.path in ("demo", "fineweb-edu") else _absolute(config.data.path)
    if config.data.tokenizer not in (None, "gpt2"):
        config.data.tokenizer = _absolute(config.data.tokenizer)
    if config.ckpt_path not in (None, "last"):
        config.ckpt_path = _absolute(config.ckpt_path)
    if config.init_from is not None:
        config.init_from = _absolute(config.init_from)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def simulate(log: Path, resources: Resources, settings: Mapping[str, Value]) -> None:
    """Run the app to its end with settings over the defaults of `[tool.flwr.app.config]`.

    Args:
        log: file to which everything printed is appended.
        resources: of the simulation and of each client.
        settings: by name.

    Raises:
        NanofedError: the run failed: the server's own error where it gave one, else Flower's reason.
    """
    with tempfile.TemporaryDirectory(prefix="nf-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        app, overrides = folder / "app", folder / "settings.toml"
        app.mkdir()
        write_app(app)
        overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        flower = _Flower(folder, log)
        with flower.superlink():
            run_id = flower.start(app, overrides, resources.federation_config())
            logger.info("Flower's simulation engine is starting; its own log is %s", log)
            failure = flower.follow(run_id)
            status, details = flower.status(run_id)
        if status != "finished:completed":
            raise_failure(failure, f"the simulation ended as {status}: {details or 'no reason given'}; see {log}")


def raise_failure(failure: str, otherwise: str) -> NoReturn:
    """Raise what the server said of its end, as the error that it was there."""
    if match := EXIT.fullmatch(failure):
        kinds = {kind.exit_code: kind for kind in (NanofedError, ConfigError, DataError)}
        raise kinds.get(int(match[1]), NanofedError)(match[2])
    raise NanofedError(otherwise)


class _Flower:
    """Flower's commands against a SuperLink of our own.

    Args:
        folder: for what is needed while the run goes.
        log: where the SuperLink and what it starts print.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self._nowhere = folder / "nowhere"  # Ray puts the working directory first on sys.path
        self._home = folder / "home"
        self._nowhere.mkdir()
        self._home.mkdir()
        self._log = log
        binaries = str(Path(sys.executable).parent)
        ray = str(folder) if len(str(folder)) < 40 else None  # a socket's path has room for about 100 characters
        self._environment = runtime.environment(
            PATH=f"{binaries}:{runtime.environment().get('PATH', '')}",
            PYTHONUNBUFFERED="1",
            FLWR_HOME=str(self._home),
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            FLWR_DISABLE_UPDATE_CHECK="1",
            FLWR_TELEMETRY_ENABLED="0",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_COLOR_PREFIX="0",
            RAY_ADDRESS=None,  # never another cluster
            RAY_TMPDIR=ray,
            OMP_NUM_THREADS=str(torch.get_num_threads()),  # as in this process; else Ray sets the client's cores
        )

    @contextmanager
    def superlink(self) -> Iterator[None]:
        """Start a SuperLink, and stop it and everything it has started at the end."""
        port = _free_port()
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        options = [
            "--insecure",
            "--simulation",
            "--isolation",
            "subprocess",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [self._binary("flower-superlink"), *options],
                cwd=self._nowhere,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: the run is stopped in order
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NanofedError(f"Flower's SuperLink did not start on port {port}; see {self._log}")
                time.sleep(0.2)
            yield
        finally:
            with undisturbed():
                stop_marked(process, f"FLWR_HOME={self._home}", STOP_SECONDS)

    def start(self, app: Path, settings: Path, federation_config: str) -> int:
        """Submit the run and return its id."""
        options = ["--federation-config", federation_config, "--run-config", str(settings), "--format", "json"]
        answer = _json(self.command("run", str(app), LINK, *options))
        if not answer.get("success"):
            raise NanofedError(f"Flower did not take the run: {answer.get('error-message', answer)}")
        return int(answer["run-id"])

    def follow(self, run_id: int) -> str:
        """Pass on our lines of the run's log until it ends, and return the last error among them."""
        failure = ""
        with (
            self._log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                [self._binary("flwr"), "log", str(run_id), LINK, "--stream"],
                env=self._environment,
                cwd=self._nowhere,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    if match := LINE.search(line):
                        if EXIT.fullmatch(match[2]):
                            failure = match[2]
                        else:
                            logger.log(logging.getLevelNamesMapping()[match[1]], "%s", match[2])
            finally:
                process.kill()
        return failure

    def status(self, run_id: int) -> tuple[str, str]:
        """Return what became of a run, and Flower's reason; waits while it is still ending."""
        deadline = time.monotonic() + END_SECONDS
        while True:
            (row,) = _json(self.command("list", LINK, "--run-id", str(run_id), "--format", "json"))["runs"]
            if row["status"].startswith("finished") or time.monotonic() > deadline:
                return row["status"], row["status-details"]
            time.sleep(1)

    def command(self, *args: str, check: bool = True) -> str:
        """Run `flwr` and return what it prints."""
        done = subprocess.run(
            [self._binary("flwr"), *args],
            cwd=self._nowhere,
            env=self._environment,
            text=True,
            capture_output=True,
            timeout=COMMAND_SECONDS,
            check=False,
            start_new_session=True,
        )
        if check and done.returncode != 0:
            said = " ".join((done.stderr + done.stdout).split())
            raise NanofedError(f"`flwr {args[0]}` failed with exit code {done.returncode}: {said[-500:]}")
        return done.stdout

    @staticmethod
    def _binary(name: str) -> str:
        return str(Path(sys.executable).parent / name)


def _json(text: str) -> Any:
    """Return the JSON object at the end of what `flwr --format json` prints."""
    start = text.find("{")
    try:
        return json.loads(text[start:])
    except ValueError as error:
        raise NanofedError(f"`flwr` answered with something else than JSON: {text[:200]!r}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
