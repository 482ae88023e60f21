"""The ServerApp around the round loop, the same in every runtime; the ClientApp is `site.client.client_app`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from nanofed.federated.server.rounds import RoundLoop


def server_app(rounds: Callable[[Grid, Context], AbstractContextManager[RoundLoop]]) -> ServerApp:
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
