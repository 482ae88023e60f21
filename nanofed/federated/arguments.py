"""The arguments of a federation, the same for its server and its sites: parse them, and build what they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.federated.config import FederationConfig
from nanofed.ranges import Range, check_numbers
from nanofed.training.config_errors import parse
from nanofed.training.lightning_cli import KINDS, link_model_and_data, run_options
from nanofed.training.module import GPTModule
from nanofed.training.run_options import RunOptions


@dataclass
class FabricOptions:
    """Where a client trains.

    Attributes:
        accelerator: `auto`, `cpu` or `cuda`.
        devices: devices of one client: 1 in process and in simulation; of this machine, at a site.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Annotated[int, Range(1, 1024)] = 1

    def __post_init__(self) -> None:
        """Refuse what is no number of devices."""
        check_numbers(self, "fabric.")


def build_parser() -> ArgumentParser:
    """Return the parser of `nanofed federate`: the sections of `nanofed fit`, with `federation` and `fabric` for `trainer`."""
    parser = ArgumentParser(prog="nanofed federate", exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file in YAML")
    parser.add_argument(
        "--runtime",
        type=Literal["in-process", "simulation", "deployment"],
        default="in-process",
        help="what runs server and clients",
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
class Arguments:
    """A parsed configuration, and the objects it describes."""

    parser: ArgumentParser
    config: Namespace

    @classmethod
    def from_args(cls, args: Sequence[str]) -> Self:
        """Parse command-line arguments.

        Raises:
            ConfigError: a wrong key or value.
        """
        parser = build_parser()
        return cls(parser, parse(parser, args, {**KINDS, "federation": FederationConfig, "fabric": FabricOptions}))

    @property
    def options(self) -> RunOptions:
        """The options of the run."""
        return run_options(self.config)

    @property
    def federation(self) -> FederationConfig:
        """The options of the federation."""
        return FederationConfig(**vars(self.config.federation))

    @property
    def fabric_options(self) -> FabricOptions:
        """Where a client trains."""
        return FabricOptions(**vars(self.config.fabric))

    def build(self) -> tuple[GPTModule, TokenDataModule]:
        """Return a module and its data, not shared with anybody."""
        if self.config.deterministic:
            runtime.be_deterministic()
        built = self.parser.instantiate(self.config)
        return built.model, built.data
