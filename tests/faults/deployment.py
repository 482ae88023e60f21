"""A federation of real processes on loopback: a server, sites, and what tests do to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from nanofed.data.shards import open_dataset
from nanofed.federated.deploy.process import marked
from nanofed.federated.flower import free_port
from nanofed.federated.site.options import WorkerOptions
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest, read_state, read_weights
from tests.ranks import in_time
from tests.support import REPOSITORY

MARK = "NANOFED_TEST_DEPLOYMENT"
GRACE = in_time(22.0)  # seconds beyond a round's three until a site is given up
NANOFED = [sys.executable, "-P", "-m", "nanofed"]


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
        "federation": {"round_seconds": 3.0, "grace_seconds": GRACE},
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
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return " ".join(process.cmdline()) or process.status()
    return "ended since"


def worker_options(pid: int) -> WorkerOptions:
    """Return what a site's worker was told when it was started."""
    return WorkerOptions.from_json(next(word for word in psutil.Process(pid).cmdline() if word.startswith("{")))


@dataclass
class Process:
    """A command of nanofed and all that it starts."""

    name: str
    command: Sequence[str]
    folder: Path
    before: Sequence[str] = ()  # what starts it
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
                [*self.before, *NANOFED, *self.command],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self, word: str) -> list[int]:
        """Return its processes whose command line holds `word`."""
        return [process.pid for process in marked(f"{MARK}={self.mark}", word)]

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
        left = [f"{pid} ({command_line(pid)})" for pid in self.pids("")]
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
    """A server and its sites in one folder, with a folder of keys for TLS or without one over plain loopback."""

    def __init__(self, folder: Path, config: Path, keys: Path | None = None) -> None:
        self.folder = folder
        self.config = config
        self.keys = keys
        self.port = free_port()
        self.run = folder / "runs" / "run"
        self.processes: dict[str, Process] = {}

    def serve(self, *more: str, before: Sequence[str] = ()) -> Process:
        """Start the server."""
        keys = ["--keys", str(self.keys)] if self.keys else []
        where = ["--config", str(self.config), "--listen", f"127.0.0.1:{self.port}"]
        return self._start("server", ["server", *where, *keys, *more], before)

    def site(self, name: str, *more: str, port: int | None = None, before: Sequence[str] = ()) -> Process:
        """Start a site."""
        keys = ["--keys", str(self.keys / "handout" / name)] if self.keys else []
        where = ["--config", str(self.config), "--superlink", f"localhost:{port or self.port}"]
        own = ["--name", name, "--state", str(self.folder / name)]
        return self._start(name, ["site", *where, *own, *keys, *more], before)

    def _start(self, name: str, command: Sequence[str], before: Sequence[str]) -> Process:
        self.processes[name] = Process(name, command, self.folder, before)
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
            log for name in ("runs/*/server/*", "*/worker", "*/supernode") for log in self.folder.glob(f"{name}.log")
        ]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())

    def manifest(self) -> Any:
        return read_manifest(find_checkpoint(self.run))

    def state(self) -> Any:
        """Return what the last checkpoint holds beside the weights; the server may remove it while it is read."""
        for _ in range(3):
            with contextlib.suppress(OSError, CheckpointError):
                return read_state(self.run / "checkpoints" / f"round_{self.round():08d}")
        raise AssertionError(f"the last checkpoint cannot be read\n{self.tails()}")

    def merged(self, client: str) -> int:
        """Return how many rounds of a client the last checkpoint counts as merged."""
        return int(self.state()["pace"]["rounds"].get(client, 0))

    def merged_rows(self) -> int:
        """Return how many rows of text the last checkpoint counts as merged."""
        ledger = self.state()["ledger"]
        merged = sum(int(length) for _, _, runs in ledger["rows"] for value, length in runs if value == 2)
        opened = {(name, int(epoch)) for epoch, name, _ in ledger["rows"]}
        data = open_dataset(self.folder / "corpus" / "data")
        sizes = {shard.name: sum(shard.row_group_rows) for shard in data.train}
        closed = ((name, n) for name, epoch in ledger["epoch"].items() for n in range(int(epoch)))
        return merged + sum(sizes[name] for name, n in closed if (name, n) not in opened)

    def no_row_is_merged_twice(self) -> None:
        """Check the last checkpoint: its hashes, its ledger, and that all its tokens are those of merged rounds."""
        state = self.state()
        assert self.manifest().kind == "federated"
        rows = state["ledger"]["rows"]
        assert rows
        for _, _, runs in rows:
            assert {value for value, _ in runs} <= {0, 1, 2}
        assert sum(state["pace"]["tokens"].values()) == state["clock"]["tokens"]

    def events(self, client: str = "", since: float = 0.0, kind: str = "") -> list[dict[str, Any]]:
        """Return what went wrong: with one client or all, since a time, of one kind or all."""
        path = self.run / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [
            event
            for event in lines
            if client in ("", event["client"]) and kind in ("", event["kind"]) and event["when"] >= since
        ]

    def unusual_events(self, *usual: str) -> list[dict[str, Any]]:
        """Return the events that neither a kill explains nor a busy machine, on which a site's speed changes."""
        kinds = {"failed", "silent", "late", "quorum", *usual}
        return [e for e in self.events() if e["kind"] not in kinds and "times its speed so far" not in e["reason"]]

    def takes_part(self, client: str, seconds: float = 180.0) -> float:
        """Wait until one more round of a client is merged."""
        before, last = self.merged(client), self.round()
        return self.until(
            lambda: self.round() > last and self.merged(client) > before, f"merged round of {client}", in_time(seconds)
        )

    def is_training(self, name: str) -> bool:
        """Look what a site's worker says of itself."""
        for pid in self.processes[name].pids("site.worker"):
            with contextlib.suppress(OSError, ValueError, StopIteration, psutil.Error):
                return bool(json.loads(Path(str(worker_options(pid).progress)).read_bytes())["state"] == "training")
        return False

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


__all__ = ["Deployment", "Process", "config", "deployment", "read_weights", "worker_options"]
