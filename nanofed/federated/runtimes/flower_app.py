"""The app that Flower runs for `flwr run`, for `nanofed federate --runtime simulation` and for `nanofed server`.

pyproject.toml names `server` and `client` of this module. Where nanofed has started Flower, a `Start` is in Flower's home, and
names the run; where a person has, the settings of the Flower run say what is to be trained.
"""

from __future__ import annotations

# ruff: noqa: E402
from nanofed.training.lightning_import import import_lightning

import_lightning()  # before the modules that import it themselves: this one is imported by a process of its own

import functools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.deploy.registration import read_owners
from nanofed.federated.deploy.superlink import FOLDER, LOG_FORMAT, NODES, WEIGHTS
from nanofed.federated.federation import Federation, Start
from nanofed.federated.flower_patches import ask_again_soon
from nanofed.federated.flower_settings import check, lr_note, to_args
from nanofed.federated.outcome import Outcome
from nanofed.federated.server.policy import SITES
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.client import client_app
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.weight_store import WeightStore
from nanofed.training.run_folder import KILLED_SECONDS, has_saved, hold_run
from nanofed.training.run_lock import ROUNDS, RunLock

logger = logging.getLogger(__name__)

NODES_SECONDS = 60.0  # the engine registers its nodes while the server starts
_trainers: dict[int, FabricTrainer] = {}  # by Flower's number of the run


def trainer(context: Context) -> FabricTrainer:
    """Return the trainer of this process: a Ray actor, which serves every client that is sent to it."""
    _show_log()
    if context.run_id not in _trainers:
        _trainers[context.run_id] = _federation(context, Start.read(runtime.flower_home())).trainer(shared=True)
    return _trainers[context.run_id]


client = client_app(trainer)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the round loop to its end; an error is written for the command that has started Flower, or logged."""
    _show_log()
    home = runtime.flower_home()
    start = Start.read(home)
    try:
        with round_loop(grid, context, start) as loop:
            try:
                loop.train()
            finally:
                loop.metrics.close()
    except Exception as error:
        outcome = Outcome.of(error, context.run_id)
        if start is None:
            logger.error("exit %d: %s", outcome.exit_code, outcome.reason)
            raise
        try:
            outcome.write(home)
        except OSError:  # the disk is full
            logger.error("%s", outcome.reason)
        raise


@contextmanager
def round_loop(grid: Grid, context: Context, start: Start | None) -> Iterator[RoundLoop]:
    """Hold the run's rounds, and yield the server's round loop."""
    federation = _federation(context, start)
    run = federation.folder
    if start is None:
        if note := lr_note(context.run_config):
            logger.info("%s", note)
        _wait_for_clients(grid, federation.federation.clients)
        with hold_run(run):
            federation.check()
            loop = federation.loop(grid)
            federation.write()
            yield loop
    elif federation.config.runtime == "simulation":
        _wait_for_clients(grid, federation.federation.clients)
        with RunLock(run, ROUNDS):
            yield federation.loop(grid)
    else:
        ask_again_soon(http_grid)
        if has_saved(run):  # it has crashed since it was started
            federation.config.ckpt_path = "last"
        owners = functools.partial(read_owners, run / FOLDER / NODES) if start.keys else None
        with RunLock(run, ROUNDS, patience=KILLED_SECONDS):
            loop = federation.loop(grid, policy=SITES, owners=owners, transport=WeightStore(run / FOLDER / WEIGHTS))
            runtime.return_freed_memory()  # its model, which only evaluates, has just asked for the contrary
            yield loop


def _federation(context: Context, start: Start | None) -> Federation:
    if start is not None:
        return Federation.started(start)
    settings = check(context.run_config)
    if settings["base_dir"]:
        runtime.use_base_dir(str(settings["base_dir"]))
    return Federation.from_args(to_args(settings, run_id=context.run_id, runs_dir=runtime.base_dir() / "runs"))


def _wait_for_clients(grid: Grid, clients: int) -> None:
    deadline = time.monotonic() + NODES_SECONDS
    while (nodes := len(list(grid.get_node_ids()))) != clients:
        if nodes > clients or time.monotonic() > deadline:
            raise ConfigError(
                f"the run has {clients} clients (num_clients, federation.clients) and the connection simulates {nodes} "
                f'(num-supernodes): run it with --federation-config "num-supernodes={clients}"'
            )
        time.sleep(0.1)


def _show_log() -> None:
    """Let this process print our log in the form that is picked out of Flower's and Ray's."""
    ours = logging.getLogger("nanofed")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
