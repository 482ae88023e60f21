"""A SuperLink of our own and Flower's commands against it: start, submit a run, follow its log, ask what became of it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nanofed
from nanofed import runtime
from nanofed.errors import NanofedError
from nanofed.federated.deploy.process import SupervisedProcess, last_line, undisturbed
from nanofed.federated.flower import flower_environment, free_port
from nanofed.federated.outcome import Outcome
from nanofed.federated.wire.bundle import installed

logger = logging.getLogger(__name__)

APP = "nanofed.federated.runtimes.flower_app"
FOLDER = "server"  # of a run's folder: what its SuperLink keeps, which is Flower's home, the log, and the following
DATABASE = "superlink.db"
NODES = "nodes.json"  # which node is whose
WEIGHTS = "weights"
LINK = "nanofed"  # our own connection, in a Flower home of the run's own
FLWR = runtime.python("-m", "flwr.cli.app")
PROGRAM = runtime.python("-m", "nanofed.federated.deploy.superlink_process")
START_SECONDS = 120.0
COMMAND_SECONDS = 120.0
END_SECONDS = 30.0  # between the last line of a run's log and its final status
LOG_FORMAT = "nanofed %(levelname)s: %(message)s"  # our lines among Flower's and Ray's
LINE = re.compile(r"nanofed (DEBUG|INFO|WARNING|ERROR|CRITICAL): (.*)")


def write_app(folder: Path) -> Path:
    """Write the app that `flwr run` bundles into a folder, in the place of what is there, and return the folder.

    It is this package's sources and the least pyproject.toml that Flower takes. A site never loads its ClientApp.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in installed().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "nanofed-lightning"\nversion = "{nanofed.__version__}"\n'
        'description = "nanofed, as it runs here"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "nanofed"\n\n'
        f'[tool.flwr.app.components]\nserverapp = "{APP}:server"\nclientapp = "{APP}:client"\n',
        encoding="utf-8",
    )
    return folder


class SuperLink:
    """A SuperLink on loopback, and Flower's commands against it.

    Args:
        folder: The folder that holds Flower's home and the empty working directory that Ray puts first on sys.path.
        log: file to which everything that it prints is appended.
        environment: changes to its environment.
        program: what runs the SuperLink; the options follow it.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *,
        environment: Mapping[str, str | None] | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.folder = folder
        self.log = log
        self._nowhere = folder / "nowhere"
        self.home = folder / "home"
        self._environment = flower_environment(self.home, **(environment or {}))
        self._program = program
        self.port = 0
        self._process: SupervisedProcess | None = None

    @property
    def marker(self) -> str:
        """What only this SuperLink's processes have in their environment."""
        return f"FLWR_HOME={self.home}"

    @contextmanager
    def running(self, options: Sequence[str]) -> Iterator[None]:
        """Start it, and stop it and everything it has started at the end."""
        try:
            self.start(options)
            yield
        finally:
            self.stop()

    def start(self, options: Sequence[str], port: int | None = None) -> None:
        """Start it with options beside its address, and wait until it answers."""
        for made in (self._nowhere, self.home):
            made.mkdir(parents=True, exist_ok=True)  # also where somebody has removed them meanwhile
        self.port = port or free_port()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        address = ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(self.port)]
        command = [*self._program, *address, *options]
        self._process = SupervisedProcess(
            "SuperLink", command, self._environment, "FLWR_HOME", self.log, folder=self._nowhere
        )
        self._process.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                raise NanofedError(
                    f"Flower's SuperLink did not start on port {self.port}: {last_line(self.log)}; see {self.log}"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it and everything that it has started."""
        if self._process is not None:
            with undisturbed():
                self._process.stop()

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.running

    def submit(self, app: Path, *options: str) -> int:
        """Submit a run of an app with options of `flwr run`, and return its id."""
        Outcome.clear(self.home)
        answer = _json(self.command("run", str(app), LINK, *options, "--format", "json"))
        if not answer.get("success"):
            raise NanofedError(f"Flower did not take the run: {answer.get('error-message', answer)}")
        return int(answer["run-id"])

    def follow(self, run_id: int) -> None:
        """Pass on our lines of the run's log until it ends."""
        with subprocess.Popen(
            [*FLWR, "log", str(run_id), LINK, "--stream"],
            env=self._environment,
            cwd=self._nowhere,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    # The disk may be full: what people are told below has to go on, and so has the run.
                    with suppress(OSError), self.log.open("a", encoding="utf-8") as log:
                        log.write(line)
                    if match := LINE.search(line):
                        logger.log(logging.getLevelNamesMapping()[match[1]], "%s", match[2])
            finally:
                process.kill()

    def check(self, run_id: int) -> None:
        """Wait while a run is still ending, and look whether it is complete.

        Raises:
            NanofedError: The run failed, and this is the error of its ServerApp or else Flower's; or the SuperLink does not know.
        """
        deadline = time.monotonic() + END_SECONDS
        while True:
            answer = _json(self.command("list", LINK, "--run-id", str(run_id), "--format", "json"))
            if len(rows := answer.get("runs", [])) != 1:
                raise NanofedError(f"Flower does not say what became of the run: {answer.get('error-message', answer)}")
            status, details = rows[0]["status"], rows[0]["status-details"]
            if status.startswith("finished") or time.monotonic() > deadline:
                break
            time.sleep(1)
        if status != "finished:completed":
            reason = f"the run ended as {status}: {details or 'no reason given'}; see {self.log}"
            raise (Outcome.read(self.home, run_id) or Outcome(NanofedError.exit_code, reason)).error()

    def command(self, *args: str, check: bool = True) -> str:
        """Run `flwr` and return what it prints."""
        done = subprocess.run(
            [*FLWR, *args],
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

    def _answers(self) -> bool:
        url = f"http://127.0.0.1:{self.port}/health"
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=1) as reply:
            return bool(reply.status == 200)
        return False


def _json(text: str) -> Any:
    """Return the JSON object at the end of what `flwr --format json` prints."""
    start = text.find("{")
    try:
        return json.loads(text[start:])
    except ValueError as error:
        raise NanofedError(f"`flwr` answered with something else than JSON: {text[:200]!r}") from error
