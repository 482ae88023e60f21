"""Marks in the processes of a round, ours and Flower's: every call of `CALLS` becomes a line of a file, with its times.

A process loads it as its `sitecustomize`, before anything else, and only where its environment names the file. It watches
imports and wraps the functions as their modules are loaded: Flower's processes come and go, and each has to be seen from
inside to tell what it waits for. The clock is CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FILE = "NANOFED_BENCH_TRACE"  # names the file
CALLS = {  # module -> function -> name of its mark
    "flwr.superlink.grid.http_grid": {"HttpGrid.push_messages": "push", "HttpGrid.pull_messages": "pull"},
    "flwr.supercore.inflatable.inflatable_utils": {
        "pull_objects": "pull objects",
        "push_object_contents_from_iterable": "push objects",
    },
    "flwr.supernode.start_client_internal": {"_pull_and_store_message": "download", "_push_messages": "upload"},
    "flwr.supernode.runtime.run_clientapp": {
        "run_clientapp": "client",
        "pull_task_input": "client pull",
        "push_message": "client push",
    },
    "flwr.clientapp.client_app": {"ClientApp.__call__": "app"},
    "flwr.serverapp.strategy.fedavg": {"FedAvg.aggregate_train": "outer"},
    "nanofed.federated.wire.weights_client": {"WeightsClient.fetch": "fetch", "WeightsClient.deliver": "deliver"},
    "nanofed.federated.server.validation": {"check_reply": "validate"},
    "nanofed.federated.aggregation.aggregator": {"Aggregator.fold": "fold"},
    "nanofed.federated.aggregation.outer": {"OuterNesterov.step": "outer"},
    "nanofed.training.checkpoint.format": {"write_checkpoint": "checkpoint"},
    "nanofed.training.loop": {"train_steps": "train"},
}
AT_BEGIN = {"client"}  # these never return: the process ends in them
IF_ANY = {"pull", "download"}  # polls: only those that brought something


def record(name: str, start: float, end: float, info: object = None) -> None:
    """Append a mark; a line of a few hundred bytes is appended whole."""
    line = json.dumps([name, os.getpid(), start, end, info]) + "\n"
    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@contextmanager
def marked(name: str) -> Iterator[None]:
    """Mark a block."""
    start = time.monotonic()
    yield
    record(name, start, time.monotonic())


def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its calls marked."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        if name in AT_BEGIN:
            record(name, start, start)
            return function(*args, **kwargs)
        sizes: list[int] = []
        if name == "push":  # of one round: its messages may come one call each
            args = (args[0], list(args[1] if len(args) > 1 else kwargs.pop("messages")))
        elif name == "push objects":
            args = (_counted(args[0], sizes), *args[1:])
        result = function(*args, **kwargs)
        if not (name in IF_ANY and not result):
            record(name, start, time.monotonic(), _info(name, args, result, sizes))
        return result

    return wrapper


def _info(name: str, args: Sequence[Any], result: Any, sizes: Sequence[int]) -> object:
    if name == "push":
        return [[m.metadata.message_type, m.metadata.group_id] for m in args[1][:1]]
    if name in ("fetch", "deliver"):
        return sum(array.nbytes for array in (result if name == "fetch" else args[2]))
    return sum(map(len, result.values())) if name == "pull objects" else sum(sizes)


def _counted(objects: Iterable[tuple[str, bytes]], sizes: list[int]) -> Iterator[tuple[str, bytes]]:
    for name, content in objects:
        sizes.append(len(content))
        yield name, content


class Finder:
    """Finds the modules of `CALLS` as the other finders do, and wraps their functions once they are executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in CALLS:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                loader: Any = spec.loader
                loader.exec_module = functools.partial(self._execute, loader.exec_module, name)
                return spec
        return None

    @staticmethod
    def _execute(execute: Callable[[ModuleType], None], name: str, module: ModuleType) -> None:
        execute(module)
        for path, mark in CALLS[name].items():
            *owners, attribute = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, attribute, wrap(mark, getattr(owner, attribute)))


def install() -> None:
    """Watch this process, if its environment says so."""
    if FILE not in os.environ:
        return
    now = time.monotonic()
    file = os.open("/proc/self/cmdline", os.O_RDONLY)  # sys.argv is not there yet
    try:
        command = os.read(file, 600).decode(errors="replace").replace("\0", " ")
    finally:
        os.close(file)
    record("process", now, now, [os.getppid(), command])
    sys.meta_path.insert(0, Finder())
