"""The service around a SuperNode: `nanofed site` keeps it and the trainer going, whatever dies or hangs."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanofed import runtime
from nanofed.errors import ConfigError, DataError
from nanofed.federated.flower import flower_environment, free_port
from nanofed.federated.processes import end_marked, ended_by_signals, stop_marked, undisturbed
from nanofed.federated.site.channel import ChannelError, call
from nanofed.federated.site.code import Code
from nanofed.federated.site.options import SiteOptions

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
PING_SECONDS = 30.0  # a trainer answers at any time, from its first second on; silent for so long, it hangs
START_SECONDS = 1800.0  # longest silence of a trainer that starts, or compiles for its first step
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0  # who lived so long starts again with the first pause
STOP_SECONDS = 5.0
MARK = "NANOFED_SITE"


class _Child:
    """A process that is started again when it ends, later each time that it did not live long."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path, marker: str) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._log = log
        self._marker = marker
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = FIRST_PAUSE
        self._due = 0.0
        self.started = 0.0

    def keep(self) -> int | None:
        """Start it where it is not there and its pause is over; return the exit code of one that has just ended."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            lived = time.monotonic() - self.started
            self._pause = FIRST_PAUSE if lived > STEADY_SECONDS else min(LONGEST_PAUSE, 2 * self._pause)
            self.stop()  # what it has started may still be there
            self._due = time.monotonic() + self._pause
            logger.warning(
                "the %s ended with exit code %d after %.0f s; starting it again in %.0f s (%s)",
                self.name, code, lived, self._pause, self._log,
            )  # fmt: skip
            return code
        if time.monotonic() >= self._due:
            self._start()
        return None

    def _start(self) -> None:
        self.started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def replace(self, reason: str) -> None:
        """Kill it; the next `keep` starts it at once."""
        logger.warning("the %s %s: it is started anew", self.name, reason)
        self.stop(0.0)
        self._due = 0.0

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End it and what it has started."""
        if self._process is not None:
            stop_marked(self._process, self._marker, seconds)
            self._process = None

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._process is not None and self._process.poll() is None


def run_site(options: SiteOptions, arguments: Sequence[str], alive: Callable[[], bool] = lambda: True) -> Path | None:
    """Keep a site's SuperNode and trainer going until this process is told to stop.

    Args:
        options: of the site.
        arguments: of `nanofed federate`, for the trainer.
        alive: asked every second; False ends the site.

    Returns:
        The folder of another nanofed, to be put first on the path: the site has ended to go on with that. None if `alive` ended
        it.

    Raises:
        ConfigError: the trainer refuses its configuration; the site runs on this machine already.
        DataError: the trainer finds no data.
    """
    runtime.make_folder(options.folder, mode=0o700)
    lock = FileLock(options.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"the site {options.name!r} is running already (it holds {options.folder}): two of one name cannot take part"
        ) from None
    site = _Site(options, arguments)
    with ended_by_signals(), lock:
        site.end_left()
        try:
            while alive():
                site.watch()
                if following := site.following():
                    return following
                time.sleep(WATCH_SECONDS)
        finally:
            with undisturbed():
                site.stop()
    return None


class _Site:
    def __init__(self, options: SiteOptions, arguments: Sequence[str]) -> None:
        self._options = options
        self._folder = options.folder.resolve()
        self._socket = socket_path(self._folder)
        self._ready = False
        self._silent = 0.0  # since when the trainer has not answered
        self._states = self._folder / "state"
        self._unwritten = 0  # states that its trainer could not write so far
        self._code = None if options.trust is None else Code(self._folder / "code", options.trust)
        home = self._folder / "flower"
        home.mkdir(exist_ok=True)
        marks = {name: f"{self._folder}:{name}" for name in ("trainer", "supernode")}
        trainer = self._trainer_command(arguments)
        self._marks = [f"{MARK}={mark}" for mark in marks.values()]
        cores = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
        self.trainer = _Child(
            f"trainer of {options.name}",
            trainer,
            runtime.environment(**{MARK: marks["trainer"]}, PYTHONSAFEPATH="1", **cores),  # torchrun's ranks have no -P
            self._folder / "trainer.log",
            self._marks[0],
        )
        environment = flower_environment(
            home,
            PATH=f"{self._write_launcher()}:{Path(sys.executable).parent}:{runtime.environment().get('PATH', '')}",
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
            **{MARK: marks["supernode"]},
        )
        self.supernode = _Child(
            f"SuperNode of {options.name}",
            self._supernode_command(),
            environment,
            self._folder / "supernode.log",
            self._marks[1],
        )

    def _trainer_command(self, arguments: Sequence[str]) -> list[str]:
        options = self._options
        python = [sys.executable, "-P", "-m"]
        if options.devices > 1:
            python += ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.devices}", "-m"]
        own = ["--name", options.name, "--socket", str(self._socket), "--state", str(self._states)]
        own += ["--supervisor", str(os.getpid())]
        return [*python, options.trainer, *own, *arguments, f"--fabric.devices={options.devices}"]

    def _supernode_command(self) -> list[str]:
        options = self._options
        secure = ["--insecure"] if options.authority is None else ["--root-certificates", str(options.authority)]
        if options.key is not None:
            secure += ["--auth-supernode-private-key", str(options.key)]
        config = f'name="{options.name}" trainer="{self._socket}" server="{options.superlink}"'
        if options.authority is not None:
            config += f' authority="{options.authority}"'
        if options.key is not None:
            config += f' key="{options.key}"'
        where = ["--superlink", options.superlink, "--host", "127.0.0.1", "--port", str(free_port())]
        return [
            sys.executable,
            "-P",
            "-m",
            "nanofed.federated.site.supernode",
            *where,
            *secure,
            "--node-config",
            config,
        ]

    def _write_launcher(self) -> Path:
        """Write the command that the SuperNode starts for each message; it finds it by name, first on its PATH."""
        folder = self._folder / "bin"
        folder.mkdir(exist_ok=True)
        launcher = folder / "flwr-clientapp"
        command = [sys.executable, "-P", "-m", "nanofed.federated.site.bundle"]
        if self._code is not None:
            command += [f"--code={self._code.folder}", f"--trust={self._code.trusted}"]
        launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        launcher.chmod(0o700)
        return folder

    def end_left(self) -> None:
        """End what a site that was killed has left behind."""
        for mark in self._marks:
            end_marked(mark)
        if self._code is not None:
            self._code.begin()

    def following(self) -> Path | None:
        """Return the folder of the nanofed to go on with, where a trusted key has signed another than this one."""
        folder = self._code.following() if self._code is not None else None
        if folder is not None:
            logger.info("the site starts anew with the signed nanofed in %s", folder)
        return folder

    def watch(self) -> None:
        """Start what is not there, and replace a trainer that hangs."""
        code = self.trainer.keep()
        if code is not None:
            self._ready = False
            if code in (ConfigError.exit_code, DataError.exit_code):
                kind = ConfigError if code == ConfigError.exit_code else DataError
                raise kind(f"the trainer cannot start: {last_error(self._folder / 'trainer.log')}")
        self.supernode.keep()
        if self.trainer.running:
            self._check_trainer()

    def _check_trainer(self) -> None:
        now = time.monotonic()
        try:
            state = self._ping()
        except ChannelError:
            self._silent = self._silent or now
            if now - self._silent > PING_SECONDS:
                self._replace(f"has not answered for {now - self._silent:.0f} s")
            return
        self._silent = 0.0
        if state["unwritten"] > self._unwritten:
            logger.warning(
                "the optimizer state cannot be written to %s: a restart of the trainer would lose it", self._states
            )
        self._unwritten = state["unwritten"]
        if state["state"] != "starting" and not self._ready:
            self._ready = True
            logger.info("the %s is ready after %.1f s", self.trainer.name, now - self.trainer.started)
        # A first step may compile for minutes.
        limit = self._options.stall_seconds if state["warm"] else max(START_SECONDS, self._options.stall_seconds)
        if state["quiet_seconds"] > limit:
            self._replace(f"is {state['state']} and has done nothing for {state['quiet_seconds']:.0f} s")

    def _ping(self) -> dict[str, Any]:
        _, _, state = call(self._socket, "ping", {}, wait=1.0)
        return state

    def _replace(self, reason: str) -> None:
        self.trainer.replace(reason)
        self._ready, self._silent = False, 0.0

    def stop(self) -> None:
        """End both, the SuperNode first: it says good-bye to its server."""
        self.supernode.stop()
        self.trainer.stop()


def socket_path(folder: Path) -> Path:
    """Return where a site's trainer listens: a socket's path has room for about 100 characters, a site's folder may be longer."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"nanofed-{os.getuid()}-{name}" / "trainer.sock"


def last_error(log: Path) -> str:
    """Return the last error in a trainer's log: what it said when it ended, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.partition(": exit ")[2].partition(": ")[2] for line in lines if " ERROR: exit " in line]
    return (said or lines or ["it said nothing"])[-1]
