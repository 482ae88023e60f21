"""A federation of real processes on loopback: a server, sites, and what tests do to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nanofed.federated.processes import marked_sessions, members
from nanofed.training.checkpoint import find_checkpoint, read_manifest, read_weights
from tests.ranks import REPOSITORY

MARK = "NANOFED_TEST_DEPLOYMENT"
NANOFED = [sys.executable, "-P", "-m", "nanofed"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(corpus: Path, folder: Path, **options: Any) -> Path:
    """Write the configuration of a tiny federation; dotted keys go over it."""
    content: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(folder / "runs"),
        "eval_every": 1,
        "save_every": 1,
        "model": {
            "depth": 1,
            "sequence_len": 32,
            "compile": False,
            "compute_dtype": "float32",
            "recipe": {"batch_tokens": 512, "num_steps": 1_000_000},
        },
        "data": {
            "path": str(corpus / "data"),
            "tokenizer": str(corpus / "tokenizer"),
            "device_batch_size": 8,
            "eval_tokens": 512,
        },
        "federation": {"round_seconds": 3.0, "grace_seconds": 60.0},
        "fabric": {"accelerator": "cpu"},
    }
    for key, value in options.items():
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command_line(pid: int) -> str:
    """Return how a process was started, and its state where it has ended already."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return command or Path(f"/proc/{pid}/stat").read_text().split(" ", 4)[2]
    return "ended since"


@dataclass
class Process:
    """A command of nanofed and all that it starts."""

    name: str
    command: Sequence[str]
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.out"

    @property
    def mark(self) -> str:
        return f"{self.folder}:{self.name}"

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", MARK: self.mark}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*NANOFED, *self.command], cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def pids(self, word: str) -> list[int]:
        """Return its processes whose command line holds `word`."""
        found = []
        for pid in members(marked_sessions(f"{MARK}={self.mark}")):
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self, word: str, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to those processes, of which there must be one, and return them."""
        pids = self.pids(word)
        assert pids, f"{self.name} has no process {word!r}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def stop(self) -> int:
        """End it as an operator does and return its exit code; nothing of it may be left."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=90)
        left = [f"{pid} ({command_line(pid)})" for pid in self.pids("") if pid != os.getpid()]
        assert not left, f"{self.name} left {', '.join(left)} behind"
        return code

    def end(self) -> None:
        """Kill all that is left of it."""
        self.process.kill()
        self.process.wait()
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Deployment:
    """A server and its sites in one folder.

    Args:
        folder: for everything.
        config: of the federation.
        keys: folder of keys for TLS; None for plain loopback.
    """

    def __init__(self, folder: Path, config: Path, keys: Path | None = None) -> None:
        self.folder = folder
        self.config = config
        self.keys = keys
        self.port = free_port()
        self.run = folder / "runs" / "run"
        self.processes: dict[str, Process] = {}

    def serve(self, *more: str) -> Process:
        """Start the server."""
        keys = ["--keys", str(self.keys)] if self.keys else []
        where = ["--config", str(self.config), "--listen", f"127.0.0.1:{self.port}"]
        return self._start("server", ["server", *where, *keys, *more])

    def site(self, name: str, *more: str, port: int | None = None) -> Process:
        """Start a site."""
        keys = ["--keys", str(self.keys / "handout" / name)] if self.keys else []
        where = ["--config", str(self.config), "--superlink", f"localhost:{port or self.port}"]
        return self._start(name, ["site", *where, "--name", name, "--state", str(self.folder / name), *keys, *more])

    def _start(self, name: str, command: Sequence[str]) -> Process:
        self.processes[name] = Process(name, command, self.folder)
        return self.processes[name]

    # --- what the run has come to

    def round(self) -> int:
        """Return the number of the last committed round."""
        found = sorted((self.run / "checkpoints").glob("round_*"))
        return int(found[-1].name.removeprefix("round_")) if found else 0

    def reach(self, number: int, seconds: float = 120.0) -> float:
        """Wait until a round is committed and return the seconds that it took."""
        return self.until(lambda: self.round() >= number, f"round {number}", seconds)

    def more(self, rounds: int = 1, seconds: float = 120.0) -> float:
        """Wait until so many more rounds are committed."""
        return self.reach(self.round() + rounds, seconds)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 120.0) -> float:
        """Wait until something holds and return the seconds that it took."""
        started = time.monotonic()
        while not holds():
            assert time.monotonic() - started < seconds, f"no {what} within {seconds} s\n{self.tails()}"
            time.sleep(0.1)
        return time.monotonic() - started

    def tails(self) -> str:
        logs = [process.log for process in self.processes.values()]
        logs += [
            *self.folder.glob("runs/*/server/*.log"),
            *self.folder.glob("*/trainer.log"),
            *self.folder.glob("*/supernode.log"),
        ]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())

    def weights_hash(self) -> str:
        path = find_checkpoint(self.run)
        return str(read_manifest(path).files["model.safetensors"]["sha256"])

    def manifest(self) -> Any:
        return read_manifest(find_checkpoint(self.run))

    def bits_per_byte(self) -> list[float]:
        return [point["bpb"] for point in json.loads((self.run / "summary.json").read_text())["curve"]]

    def close(self) -> None:
        for process in self.processes.values():
            process.end()


@contextlib.contextmanager
def deployment(folder: Path, config: Path, keys: Path | None = None) -> Iterator[Deployment]:
    made = Deployment(folder, config, keys)
    try:
        yield made
    finally:
        made.close()


__all__ = ["Deployment", "Process", "config", "deployment", "read_weights"]
