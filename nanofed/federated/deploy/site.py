"""The service around a SuperNode: `nanofed site` keeps it and the worker going, whatever dies or hangs."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from filelock import FileLock, Timeout

from nanofed import runtime
from nanofed.errors import ConfigError, DataError
from nanofed.federated.deploy.process import SupervisedProcess, ended_by_signals, kill_marked, undisturbed
from nanofed.federated.flower import flower_environment, free_port, toml
from nanofed.federated.site.options import SiteOptions, WorkerOptions
from nanofed.federated.site.progress import Page
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
SILENT_SECONDS = 30.0  # a worker says how far it is every half a second; silent for so long, it hangs
IMPORT_SECONDS = 300.0  # longest silence before its first word: PyTorch is imported, on a busy machine perhaps slowly
START_SECONDS = 1800.0  # longest time in which a worker starts, or compiles for its first step
MARK = "NANOFED_SITE"


def run_site(options: SiteOptions, arguments: Sequence[str]) -> None:
    """Keep a site going until this process is told to stop.

    Args:
        options: The site's name, keys and folder, and the address of its server.
        arguments: The command-line arguments of `nanofed federate`, which the worker parses.

    Raises:
        ConfigError: the worker refuses its configuration; the site runs on this machine already.
        DataError: the worker finds no data.
    """
    with ended_by_signals(), closing(Site(options, arguments)) as site:
        while True:
            site.watch()
            time.sleep(WATCH_SECONDS)


class Site:
    """A site's SuperNode and worker, which `watch` starts and keeps going and `close` ends; arguments are `run_site`'s."""

    def __init__(self, options: SiteOptions, arguments: Sequence[str]) -> None:
        folder = runtime.make_folder(options.folder, mode=0o700).resolve()
        self.name = options.name
        self._options = replace(options, folder=folder)
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"the site {self.name!r} is running already (it holds {folder}): two of one name cannot take part"
            ) from None
        (folder / "flower").mkdir(exist_ok=True)
        self._page = Page(folder)
        self._ready = self._was_ready = False
        self._unwritten = 0  # states that the worker could not write so far
        told = WorkerOptions(
            **vars(self._options),
            supernode=f"127.0.0.1:{free_port()}",
            progress=self._page.path,
            supervisor=os.getpid(),
        )
        write_atomically(told.secret, secrets.token_hex(32), mode=0o600)
        # PYTHONSAFEPATH: torchrun's ranks have no -P.
        own = {"PYTHONSAFEPATH": "1"} | ({} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)})
        self._worker = self._process("worker", _worker_command(told, arguments), own)
        self._supernode = self._process("SuperNode", _supernode_command(told), {})

    def _process(self, name: str, command: Sequence[str], own: dict[str, str]) -> SupervisedProcess:
        folder, log = self._options.folder, name.lower()
        mark = f"{folder}:{log}"
        kill_marked(f"{MARK}={mark}")  # what a site that was killed has left behind
        return SupervisedProcess(
            f"{name} of {self.name}",
            command,
            flower_environment(folder / "flower", **{MARK: mark}, **own),
            MARK,
            folder / f"{log}.log",
            outcomes=folder if name == "worker" else None,
        )

    def figures(self) -> Mapping[str, Any] | None:
        """Return how far the worker is, as its `Progress` says; None where it is being started."""
        return self._page.read(since=self._worker.started) if self._worker.running else None

    def watch(self) -> None:
        """Start what is not there, and replace a worker that hangs."""
        ended = self._worker.keep()
        if ended is not None:
            self._ready = False
            # What ends a worker that had worked before may pass: a GPU that is being reset, a network disk that is away.
            if not self._was_ready and ended.exit_code in (ConfigError.exit_code, DataError.exit_code):
                raise replace(ended, reason=f"the worker cannot start: {ended.reason}").error()
        self._supernode.keep()
        if self._worker.running:
            self._check_worker()

    def _check_worker(self) -> None:
        now = time.monotonic()
        figures = self._page.read(since=self._worker.started)
        if figures is None or now - figures["at"] > SILENT_SECONDS:
            limit = IMPORT_SECONDS if figures is None else SILENT_SECONDS
            silent = now - (self._worker.started if figures is None else figures["at"])
            if silent > limit:
                self._replace(f"has said nothing for {silent:.0f} s")
            return
        if figures["unwritten"] > self._unwritten:
            logger.warning(
                "the optimizer state cannot be written to %s: a restart of the worker would lose it",
                self._options.folder / "state",
            )
        self._unwritten = figures["unwritten"]
        if figures["state"] != "starting" and not self._ready:
            self._ready = self._was_ready = True
            logger.info("the %s is ready after %.1f s", self._worker.name, now - self._worker.started)
        # A first step may compile for minutes.
        stall = self._options.stall_seconds
        limit = stall if figures["warm"] else max(START_SECONDS, stall)
        if figures["quiet_seconds"] > limit:
            self._replace(f"is {figures['state']} and has done nothing for {figures['quiet_seconds']:.0f} s")

    def _replace(self, reason: str) -> None:
        self._worker.replace(reason)
        self._ready = False

    def close(self) -> None:
        """End both, the SuperNode first: it says good-bye to its server."""
        with undisturbed():
            self._supernode.stop()
            self._worker.stop()
        self._page.close()
        self._lock.release()


def _worker_command(options: WorkerOptions, arguments: Sequence[str]) -> list[str]:
    python = runtime.python("-m")
    if options.devices > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.devices}", "-m"]
    return [*python, options.worker, options.to_json(), *arguments]


def _supernode_command(options: WorkerOptions) -> list[str]:
    secure = ["--insecure"] if options.authority is None else ["--root-certificates", str(options.authority)]
    if options.key is not None:
        secure += ["--auth-supernode-private-key", str(options.key)]
    host, port = options.supernode.split(":")
    where = ["--superlink", options.superlink, "--host", host, "--port", port]
    worker = ["--isolation", "process", "--superexec-auth-secret-file", str(options.secret)]
    name = ["--node-config", f"name={toml(options.name)}"]
    return runtime.python("-m", "nanofed.federated.deploy.supernode", *where, *worker, *secure, *name)
