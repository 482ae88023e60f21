"""A federated run from a config: parse, build what is missing of the demo data, and run it in one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from lightning import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.federated.config import FederationConfig
from nanofed.federated.runtimes.app import client_app, server_app
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server.board import Board
from nanofed.federated.server.outer import OuterNesterov
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.training.checkpoint import check_model, find_checkpoint, read_manifest
from nanofed.training.config import link_model_and_data, run_options
from nanofed.training.fitting import Place
from nanofed.training.module import GPTModule
from nanofed.training.options import RunOptions
from nanofed.training.parsing import parse
from nanofed.training.preflight import check_start
from nanofed.training.run import SUMMARY, Summary, check_unused, open_run, resume_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class FabricOptions:
    """Where a client trains.

    Attributes:
        accelerator: `auto`, `cpu` or `cuda`.
        devices: devices of one client: 1 in process and in simulation.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        """Refuse a client on any other number of devices: several need a launcher, which a site's trainer is to have."""
        if self.devices < 1:
            raise ConfigError(f"fabric.devices must be at least 1, not {self.devices}")
        if self.devices > 1:
            raise ConfigError(
                f"fabric.devices={self.devices}: in process and in simulation a client trains on one device; set it to 1"
            )


def build_parser() -> ArgumentParser:
    """Return the parser of `nanofed federate`: the sections of `nanofed fit`, with `federation` and `fabric` for `trainer`."""
    parser = ArgumentParser(prog="nanofed federate", exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file in YAML")
    parser.add_argument(
        "--runtime", type=Literal["in-process", "simulation"], default="in-process", help="what runs server and clients"
    )
    parser.add_argument("--seed_everything", type=int, default=42, help="seed of weights and draws")
    parser.add_class_arguments(RunOptions, None, as_group=False)
    parser.set_defaults({"eval_every": 1, "save_every": 1})  # rounds: a killed server loses at most the one it was in
    parser.add_class_arguments(GPTModule, "model")
    parser.add_class_arguments(TokenDataModule, "data")
    parser.add_class_arguments(FederationConfig, "federation")
    parser.add_class_arguments(FabricOptions, "fabric")
    link_model_and_data(parser)
    return parser


@dataclass
class Federation:
    """A parsed configuration, and the objects it describes."""

    parser: ArgumentParser
    config: Namespace

    @classmethod
    def from_args(cls, args: Sequence[str]) -> Federation:
        """Parse command-line arguments.

        Raises:
            ConfigError: a wrong key or value.
        """
        parser = build_parser()
        return cls(parser, parse(parser, args))

    @property
    def options(self) -> RunOptions:
        """The options of the run."""
        return run_options(self.config)

    @property
    def federation(self) -> FederationConfig:
        """The options of the federation."""
        return FederationConfig(**vars(self.config.federation))

    def fabric(self) -> Fabric:
        """Return the Fabric that a client trains with."""
        options = FabricOptions(**vars(self.config.fabric))
        try:
            return Fabric(accelerator=options.accelerator, devices=options.devices)
        except (MisconfigurationException, RuntimeError) as error:  # devices that are not there
            raise ConfigError(f"fabric: {str(error).strip().splitlines()[0]}") from error

    def build(self) -> tuple[GPTModule, TokenDataModule]:
        """Return a module and its data, not shared with anybody."""
        built = self.parser.instantiate(self.config)
        return built.model, built.data

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.options.folder

    def open(self) -> Path:
        """Make the run's folder and save the resolved config in it, when all else has been checked."""
        options, config = self.options, self.federation
        check_unused(options)
        module, data = self.build()
        batch_tokens = module.recipe.batch_tokens
        if config.global_batch_tokens is not None:
            batch_tokens, rest = divmod(config.global_batch_tokens, config.clients)
            if rest:
                raise ConfigError(
                    f"federation.global_batch_tokens={config.global_batch_tokens:,} is no multiple of {config.clients} clients"
                )
        OuterNesterov(config.outer_lr, config.outer_momentum)
        resolved = self.parser.dump(self.config, skip_link_targets=False)
        place = Place(self.fabric().device, clients=config.clients)  # they take turns on one model, on one device
        check_start(module, data, options, kind="federated", batch_tokens=batch_tokens, config=resolved, place=place)
        return open_run(options, resolved)

    def trainer(self) -> FabricTrainer:
        """Return the trainer of this process, for every client that runs in it."""
        module, data = self.build()
        config = self.federation
        names = {client_name(index): config.speed(index) for index in range(config.clients)}
        return FabricTrainer(module, data, self.fabric(), self.folder / "clients", lambda name: names.get(name, 1.0))

    def loop(self, grid: Grid, run: Path) -> RoundLoop:
        """Return the server's round loop, resumed or started from other weights where that is asked for."""
        module, data = self.build()
        options = self.options
        resume = resume_checkpoint(run, options.ckpt_path)
        known = resume is not None and (run / SUMMARY).is_file()
        board = Board(run, Summary.read(run) if known else Summary(options.name, "federated"))
        device = self.fabric().device
        loop = RoundLoop(grid, module, data, self.federation, options, run, board, device, simulated=True)
        if resume is not None:
            loop.resume(resume)
        elif options.init_from:
            path = find_checkpoint(options.init_from)
            check_model(read_manifest(path), module.config, path)
            loop.load_weights(path)
        return loop


def client_name(index: int) -> str:
    """Return the name of the n-th client in one process, from 0: that of the n-th partition in a simulation."""
    return f"client-{index}"


def run_in_process(federation: Federation) -> Summary:
    """Run clients and server in this process, clients one after another, and return what the run came to."""
    run = federation.open()
    trainer = federation.trainer()
    names = [client_name(index) for index in range(federation.federation.clients)]
    grid = InProcessGrid(client_app(lambda context: trainer), names)
    loop = federation.loop(grid, run)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server_app(lambda grid, context: loop)(grid, context)
    return loop.board.summary
