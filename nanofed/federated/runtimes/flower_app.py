"""The app that `flwr run` starts: pyproject.toml names `server` and `client` of this module."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from flwr.app import Context
from flwr.serverapp import Grid

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.federation import Federation
from nanofed.federated.flower_settings import check, lr_note, to_args
from nanofed.federated.runtimes.app import flower_server_app, show_log
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.client import client_app
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.training.run_folder import RunFolder
from nanofed.training.run_lock import ROUNDS, RunLock

logger = logging.getLogger(__name__)

NODES_SECONDS = 60.0  # the engine registers its nodes while the server starts


def trainer(context: Context) -> FabricTrainer:
    """Return the trainer of this process: a Ray actor, which serves every client that is sent to it."""
    show_log()
    return _trainer(_args(context))


@contextmanager
def round_loop(grid: Grid, context: Context) -> Iterator[RoundLoop]:
    """Hold the run, and yield the server's round loop once all clients are there."""
    federation = Federation.from_args(_args(context))
    if note := lr_note(context.run_config):
        logger.info("%s", note)
    clients = federation.federation.clients
    deadline = time.monotonic() + NODES_SECONDS
    while (nodes := len(list(grid.get_node_ids()))) != clients:
        if nodes > clients or time.monotonic() > deadline:
            raise ConfigError(
                f"the run has {clients} clients (num_clients, federation.clients) and the connection simulates {nodes} "
                f'(num-supernodes): run it with --federation-config "num-supernodes={clients}"'
            )
        time.sleep(0.1)
    run = federation.folder
    if check(context.run_config)["run_dir"]:  # `nanofed federate` holds the run and has opened it
        with RunLock(run, ROUNDS):
            yield federation.loop(grid, run)
        return
    with RunFolder(run):
        federation.check()
        loop = federation.loop(grid, run)
        federation.write()
        yield loop


client = client_app(trainer)
server = flower_server_app(round_loop)


@cache
def _trainer(args: tuple[str, ...]) -> FabricTrainer:
    return Federation.from_args(args).trainer()


def _args(context: Context) -> tuple[str, ...]:
    settings = check(context.run_config)
    if settings["base_dir"]:
        runtime.use_base_dir(str(settings["base_dir"]))
    return tuple(to_args(settings, run_id=context.run_id, runs_dir=runtime.base_dir() / "runs"))
