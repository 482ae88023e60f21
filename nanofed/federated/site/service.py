"""The trainer process of a site: it outlives Flower's messages and keeps the compiled model, optimizer state and data at hand.

    python -m nanofed.federated.site.service --name lab-a --socket S --state FOLDER [--supervisor PID] ARGUMENTS OF FEDERATE

or under `torchrun --nproc_per_node N -m …` for N devices; without torchrun, `--fabric.devices N` starts the other ranks itself.
The first rank owns the socket. It answers before torch is imported: that a trainer is starting is worth knowing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from nanofed import runtime, streams
from nanofed.errors import ConfigError, NanofedError, in_one_line
from nanofed.federated.site.listener import Listener
from nanofed.federated.site.progress import Progress

logger = logging.getLogger("nanofed.federated.site.service")  # the module itself is __main__

LAUNCHER_POLL = 1.0  # seconds between two looks for the processes without which this one is an orphan
LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
OWN = ("--name", "--socket", "--state", "--supervisor")


def main(args: Sequence[str]) -> int:
    """Serve rounds until the process is ended; return an exit code if it cannot."""
    streams.secure(lasting=True)
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    logging.getLogger("nanofed").setLevel(logging.INFO)
    try:
        own, rest = split_arguments(args)
        threading.Thread(target=_end_with_launcher, args=(own.supervisor,), name="nanofed-orphan", daemon=True).start()
        if not runtime.is_first_rank():
            from nanofed.federated.site.worker import Worker

            Worker(own.name, own.state, rest).follow()
            return 0
        progress = Progress(own.name)
        with Listener(own.socket, progress.answers()) as listener:
            progress.abort = listener.abort
            from nanofed.federated.site.worker import Worker

            worker = Worker(own.name, own.state, rest)
            progress.ready(worker.hello, worker.ranks)
            logger.info("the trainer of %s is ready: %d devices, socket %s", own.name, worker.ranks, own.socket)
            worker.lead(listener, progress)
    except Exception as error:
        time.sleep(runtime.seconds_to_hold_back())
        code = getattr(error, "exit_code", NanofedError.exit_code)
        logger.error("exit %d: %s", code, in_one_line(error), exc_info=not isinstance(error, NanofedError))
        return int(code)
    return 0


def split_arguments(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the service's own arguments, which come first, and those of `nanofed federate`, which has a `--name` too.

    Raises:
        ConfigError: one is missing or wrong.
    """
    rest = list(args)
    own: dict[str, str] = {}
    while rest and (key := rest[0].partition("=")[0]) in OWN and key not in own:
        _, equals, value = rest.pop(0).partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{key} needs a value")
            value = rest.pop(0)
        own[key] = value
    missing = [key for key in OWN[:3] if not own.get(key)]
    if missing:
        raise ConfigError(
            f"the trainer of a site needs {' and '.join(missing)}, before the arguments of nanofed federate"
        )
    try:
        supervisor = int(own.get("--supervisor", "0"))
    except ValueError:
        raise ConfigError(f"--supervisor is the id of a process, not {own['--supervisor']}") from None
    return argparse.Namespace(
        name=own["--name"],
        socket=runtime.user_path(own["--socket"]).absolute(),
        state=runtime.user_path(own["--state"]).absolute(),
        supervisor=supervisor,
    ), rest


def _end_with_launcher(supervisor: int) -> None:
    """End this rank when torchrun's agent, the first rank, or the process that watches the trainer is gone."""
    while not runtime.launcher_is_gone() and _lives(supervisor):
        time.sleep(LAUNCHER_POLL)
    logger.error("the process that started this trainer is gone: it ends")
    os._exit(1)  # the main thread may stand in a collective


def _lives(pid: int) -> bool:
    try:
        if pid:
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def run() -> Any:
    """Run the command line's trainer."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
