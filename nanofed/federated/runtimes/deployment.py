"""The app of a deployment: `nanofed server` submits it, anew after every crash; a site answers with a trainer of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context
from flwr.serverapp import Grid
from flwr.superlink.grid import http_grid

from nanofed import runtime
from nanofed.federated.deploy.nodes import FOLDER, WEIGHTS, owners
from nanofed.federated.federation import Federation
from nanofed.federated.flower_patches import ask_again_soon
from nanofed.federated.flower_settings import check, to_args
from nanofed.federated.runtimes.app import flower_server_app
from nanofed.federated.server.policy import SITES
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.wire.weight_store import WeightStore
from nanofed.training.run_folder import KILLED_SECONDS, has_saved
from nanofed.training.run_lock import ROUNDS, RunLock

ask_again_soon(http_grid)


@contextmanager
def round_loop(grid: Grid, context: Context, *, keys: bool = False) -> Iterator[RoundLoop]:
    """Hold the run's rounds, and yield the server's round loop, from the run's last checkpoint where it has saved one.

    Args:
        grid: Flower's connection to the nodes.
        context: Flower's context of the run, which holds its settings.
        keys: Whether sites have keys: a client's name must then be that of its node's key.
    """
    settings = check(context.run_config)
    runtime.use_base_dir(str(settings["base_dir"]))
    federation = Federation.from_args(to_args(settings, run_id=context.run_id, runs_dir=runtime.base_dir() / "runs"))
    run = federation.folder
    if has_saved(run):
        federation.config.ckpt_path = "last"
    known = (lambda: owners(run)) if keys else None
    with RunLock(run, ROUNDS, patience=KILLED_SECONDS):
        loop = federation.loop(grid, run, policy=SITES, owners=known, transport=WeightStore(run / FOLDER / WEIGHTS))
        runtime.return_freed_memory()  # its model, which only evaluates, has just asked for the contrary
        yield loop


server = flower_server_app(round_loop)
server_with_keys = flower_server_app(functools.partial(round_loop, keys=True))
