"""Processes that tests kill, limit or give a disk of their own: forked from a server that has done the imports."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # of unshare(2)
_PRIVATE, _REMOUNT, _READ_ONLY = 0x00044000, 0x20, 0x1  # of mount(2); the first is MS_REC | MS_PRIVATE
_LIBC = ctypes.CDLL(None, use_errno=True)


class NoDiskError(Exception):
    """This machine lets the process have no mounts of its own."""


def start(function: Callable[..., None], *args: object) -> BaseProcess:
    """Start a function in a process of its own."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "nanofed.training.lightning_cli",
            "nanofed.training.fit",
            "tests.faults.probe",
            "tests.faults.children",
            "tests.faults.saves",
        ]
    )
    process: BaseProcess = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def call(function: Callable[..., Any], *args: object, seconds: float = 240.0) -> Any:
    """Run a function in a process of its own and return what it returns; what fails there fails here."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = start(_call, send, function, *args)
    send.close()
    try:
        assert receive.poll(seconds), f"{function.__name__} does not end"
        outcome, value = receive.recv()
    except EOFError:
        process.join(10)
        pytest.fail(f"{function.__name__} ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    if outcome == "no disk":
        pytest.skip(f"needs a disk of its own: {value}")
    assert outcome == "done", value
    return value


def _call(send: Connection, function: Callable[..., Any], *args: object) -> None:
    try:
        send.send(("done", function(*args)))
    except NoDiskError as error:
        send.send(("no disk", str(error)))
    except BaseException:
        send.send(("failed", traceback.format_exc()))


def mount_disk(folder: Path, size: str, change: str = "") -> None:
    """Mount an empty disk of a size, in bytes or with a letter behind it, for this process only: it ends with it.

    A `change` of `ro` makes the disk that is there read-only, anything else gives it the size.

    Raises:
        NoDiskError: neither a privileged process nor one of a user namespace may mount here.
    """
    if change:
        _mount("tmpfs", folder, "tmpfs", _REMOUNT | (_READ_ONLY if change == "ro" else 0), f"size={size}")
        return
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_MOUNTS) != 0:
        if _LIBC.unshare(_NEW_MOUNTS | _NEW_USER) != 0:
            raise NoDiskError(f"unshare: {os.strerror(ctypes.get_errno())}")
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), "none", _PRIVATE, "")
    _mount("tmpfs", folder, "tmpfs", 0, f"size={size}")


def _mount(source: str, folder: Path, kind: str, flags: int, options: str) -> None:
    if _LIBC.mount(source.encode(), str(folder).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()) != 0:
        raise NoDiskError(f"mount: {os.strerror(ctypes.get_errno())}")
