"""Flower's own FedAvg as its users write it, over arrays of a model's shapes: what `bin/bench round --against stock` times.

The client trains nothing. It adds a constant to its weights: Flower does not send an object again that the SuperLink still
has, and a client that returned them unchanged would send nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from tests.benchmarks.round_probe import marked

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content.array_records["arrays"]
    weights = {name: array.numpy() for name, array in arrays.items()}
    with marked("train"):
        for name in weights:
            weights[name] = weights[name] + np.float32(1e-3)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(weight) for name, weight in weights.items()}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content=content, reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    sites, rounds = int(context.run_config["sites"]), int(context.run_config["rounds"])
    shapes: dict[str, Any] = json.loads(Path(str(context.run_config["shapes"])).read_text(encoding="utf-8"))
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    random = np.random.default_rng(0)
    arrays = {name: Array(random.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    # Without its federated evaluation, which sends the weights out once more a round.
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=rounds)
