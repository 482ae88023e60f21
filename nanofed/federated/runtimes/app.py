"""The Flower app: a ServerApp around the round loop and a ClientApp around the trainer, the same in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.client import TrainerClient, client_name
from nanofed.federated.site.trainer import LocalTrainer


def client_app(trainer: Callable[[Context], LocalTrainer]) -> ClientApp:
    """Return a ClientApp whose NumPyClient drives `trainer(context)`."""

    def client_fn(context: Context) -> Client:
        return TrainerClient(trainer(context), client_name(context)).to_client()

    return ClientApp(client_fn=client_fn)


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
