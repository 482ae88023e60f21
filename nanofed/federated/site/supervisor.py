"""The service around a SuperNode: `nanofed site` keeps it and the trainer going, whatever dies or hangs."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanofed import runtime
from nanofed.errors import ConfigError, DataError
from nanofed.federated.flower import flower_environment, free_port, toml
from nanofed.federated.processes import Child, end_marked, ended_by_signals, last_error, undisturbed
from nanofed.federated.site.channel import ChannelError, call
from nanofed.federated.site.code import Code
from nanofed.federated.site.options import SiteOptions
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
PING_SECONDS = 30.0  # a trainer answers at any time, from its first second on; silent for so long, it hangs
START_SECONDS = 1800.0  # longest silence of a trainer that starts, or compiles for its first step
MARK = "NANOFED_SITE"
CLIENT = "flwr-clientapp"


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
        self.trainer = Child(
            f"trainer of {options.name}",
            trainer,
            runtime.environment(**{MARK: marks["trainer"]}, PYTHONSAFEPATH="1", **cores),  # torchrun's ranks have no -P
            self._folder / "trainer.log",
            self._marks[0],
        )
        self._write_launchers()
        environment = flower_environment(
            home,
            PATH=os.pathsep.join(
                [
                    str(self._folder / "bin"),
                    *(
                        path
                        for path in runtime.environment().get("PATH", "").split(os.pathsep)
                        if not _has_client(path)
                    ),
                ]
            ),
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
            **{MARK: marks["supernode"]},
        )
        self.supernode = Child(
            f"SuperNode of {options.name}",
            self._supernode_command(),
            environment,
            self._folder / "supernode.log",
            self._marks[1],
        )

    def _trainer_command(self, arguments: Sequence[str]) -> list[str]:
        options = self._options
        python = runtime.python("-m")
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
        given = {"name": options.name, "trainer": self._socket, "server": options.superlink}
        given |= {"authority": options.authority, "key": options.key}
        config = " ".join(f"{name}={toml(str(value))}" for name, value in given.items() if value is not None)
        where = ["--superlink", options.superlink, "--host", "127.0.0.1", "--port", str(free_port())]
        return runtime.python("-m", "nanofed.federated.site.supernode", *where, *secure, "--node-config", config)

    def _write_launchers(self) -> None:
        """Write the commands that the SuperNode starts, where they are not there: one looks for messages, one takes each of them.

        It finds them by name, and finds no other of that name: Flower's own would run what a message brings.
        """
        folder = self._folder / "bin"
        client = runtime.python("-m", "nanofed.federated.site.bundle")
        if self._code is not None:
            client += [f"--code={self._code.folder}", f"--trust={self._code.trusted}"]
        superexec = [str(Path(sys.executable).with_name("flower-superexec"))]
        for name, command in ((CLIENT, client), ("flower-superexec", superexec)):
            launcher, text = folder / name, f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
            if not launcher.is_file() or launcher.read_text() != text:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(launcher, text, mode=0o700)

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
        self._write_launchers()  # somebody may have removed them
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


def _has_client(folder: str) -> bool:
    """Tell whether a folder of commands has Flower's own client in it."""
    return not folder or (Path(folder) / CLIENT).exists()


def socket_path(folder: Path) -> Path:
    """Return where a site's trainer listens: a socket's path has room for about 100 characters, a site's folder may be longer."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return runtime.short_lived_dir() / f"nanofed-{os.getuid()}-{name}" / "trainer.sock"
