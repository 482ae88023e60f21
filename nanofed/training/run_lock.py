"""One process at a time on one run: a lock beside the run's folder that dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from nanofed.errors import ConfigError, NanofedError

logger = logging.getLogger(__name__)

COMMAND = ""  # what a person has started: nanofed fit, federate or server
ROUNDS = "rounds."  # the process of the round loop, which may outlive a command that was killed
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
POLL = 0.1


class RunLock:
    """An exclusive hold on a run, as a context manager.

    The lock is a file beside the run's folder (beside what the folder links to, where it is a link), so that it stays when
    the folder is replaced. The kernel gives it back when the process has died. The file holds the process id, the host and
    the time, for the message to whoever comes second; it is removed at the end.

    Args:
        run: the run's folder, which need not be there yet.
        part: COMMAND or ROUNDS.
        patience: seconds to wait for a holder that is about to end.

    Raises:
        ConfigError: on entering, if another process holds the run; it is named.
        NanofedError: on entering, if the file cannot be written.
    """

    def __init__(self, run: Path, part: str = COMMAND, *, patience: float = 0.0) -> None:
        self._run = run
        self._part = part
        self._patience = patience
        self._descriptor: int | None = None
        self._process = 0
        self._made: list[Path] = []  # folders that were not there before, innermost first

    def __enter__(self) -> Self:
        try:
            real = self._run.resolve()
            path = real.parent / f".{real.name}.{self._part}lock"
            self._made = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take(path)
        except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
            reason = getattr(error, "strerror", None) or error
            raise NanofedError(
                f"the run folder {self._run} cannot be written: {reason}; choose another --runs_dir"
            ) from error
        self._path, self._process = path, os.getpid()
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the run back; in a process that was forked from the holder this does nothing."""
        if self._descriptor is None or self._process != os.getpid():
            return
        try:
            self._path.unlink(missing_ok=True)  # while it is held: whoever opened it looks again
        except OSError as error:
            logger.debug("%s stays: %s", self._path, error)
        with suppress(OSError):  # a run is in it
            for folder in self._made:
                folder.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, path: Path) -> int:
        end = time.monotonic() + self._patience
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            with ExitStack() as closing:
                closing.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    if time.monotonic() < end:
                        time.sleep(POLL)
                        continue
                    holder = _holder(descriptor)
                    raise ConfigError(
                        f"{self._run} is in use by {holder}: end it first, or choose another --name"
                    ) from error
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    no_locks = (
                        "%s: its file system has no locks (%s), so a second start on this run would not be noticed"
                    )
                    logger.warning(no_locks, self._run, error.strerror)
                with suppress(FileNotFoundError):  # its holder has just removed it
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, json.dumps(said).encode(), 0)
                        closing.pop_all()
                        return descriptor


def _holder(descriptor: int) -> str:
    """Return in words who holds a lock."""
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(said["since"]))
        return f"process {int(said['pid'])} on {str(said['host'])[:64]} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
