"""The Flower app: a ServerApp around the round loop and a ClientApp around the trainer, the same in every runtime."""

from __future__ import annotations

from collections.abc import Callable

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


def server_app(loop: Callable[[Grid, Context], RoundLoop]) -> ServerApp:
    """Return a ServerApp that runs `loop(grid, context)` to its end."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = loop(grid, context)
        try:
            rounds.train()
        finally:
            rounds.board.close()

    return app
