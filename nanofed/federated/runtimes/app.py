"""The ServerApp around the round loop, the same in every runtime; the ClientApp is `site.client.client_app`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from nanofed import runtime
from nanofed.federated.deploy.superlink import LOG_FORMAT
from nanofed.federated.outcome import Outcome
from nanofed.federated.server.rounds import RoundLoop

logger = logging.getLogger(__name__)
Rounds = Callable[[Grid, Context], AbstractContextManager[RoundLoop]]


def server_app(rounds: Rounds) -> ServerApp:
    """Return a ServerApp that runs the round loop of `rounds(grid, context)` to its end, inside of that context."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with rounds(grid, context) as loop:
            try:
                loop.train()
            finally:
                loop.metrics.close()

    return app


def flower_server_app(rounds: Rounds) -> ServerApp:
    """Return the same ServerApp for a process that Flower starts.

    An error is written as an `Outcome` for the command that submitted the run; where `flwr run` did, it is logged.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        show_log()
        try:
            server_app(rounds)(grid, context)
        except Exception as error:
            outcome = Outcome.of(error, context.run_id)
            if not context.run_config.get("run_dir"):
                logger.error("exit %d: %s", outcome.exit_code, outcome.reason)
                raise
            try:
                outcome.write(runtime.flower_home())
            except OSError:  # the disk is full
                logger.error("%s", outcome.reason)
            raise

    return app


def show_log() -> None:
    """Let this process print our log in the form that is picked out of Flower's and Ray's."""
    ours = logging.getLogger("nanofed")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
