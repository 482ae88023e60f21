"""The options of a federation, the same for its server and its sites: parse them, and build what they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.federated.aggregation.outer import Outer
from nanofed.ranges import Count, Range, Seconds, Share, check_numbers
from nanofed.training.config_errors import parse
from nanofed.training.lightning_cli import KINDS, link_model_and_data, run_options
from nanofed.training.module import GPTModule
from nanofed.training.run_options import RunOptions

N = TypeVar("N", int, float)

# What goes with `asynchronous`. An update that is merged by itself has no others to be compared or weighed with, the clients have
# no weights in common of which a change could be sent, and there is no round to be absent from or to measure weights in.
ASYNCHRONOUS: Mapping[str, tuple[object, ...]] = {
    "merge": ("mean",),
    "weighting": ("uniform",),
    "outer": ("auto", "nesterov", "fedavg"),
    "overlap": (False,),
    "availability": (1.0,),
    "evaluation": ("server",),
    "down_codec": ("fp32", "bf16"),
}


@dataclass
class FederationConfig:
    """How clients and server train together.

    Attributes:
        clients: number of clients (in process and in simulation).
        rounds: rounds at most; by default as many as the recipe's horizon takes.
        round_seconds: length of a round by each client's clock; where clients have clocks of their own, from dispatch to commit.
            Where a federation is to begin with short rounds, that is a list such as `[[0.05, 20], [1, 300]]`: each length holds
            for the rounds that begin before that share of the horizon.
        round_steps: optimizer steps of a round instead, or a list of them; two runs of one seed then end in the same weights,
            but for `overlap`.
        quorum: clients that a round needs: with fewer connected the server waits, with fewer answers the round changes nothing.
        quorum_seconds: how long to wait for them before saying that the round cannot begin; then the wait goes on.
        grace_seconds: beyond a round's seconds, until a client that has not answered is given up.
        availability: chance that a client takes part in a round (Bernoulli).
        client_speeds: how fast each client is, 1 being this machine; in process, a client of 0.5 does half the steps in a
            round of seconds, and with `asynchronous` takes twice as long for an update of so many steps.
        client_data: the folder of each client's own shards, in the place of `data.path`, with `sharding: local` on one machine;
            across sites each site names its own as `data.path`. The tokenizer is that of `data`.
        evaluation: who measures bits per byte every `eval_every` rounds: the `server`, on its validation shard and beside the
            next round; or the `sites`, each on its own validation shard with `sharding: local`, else on a share of the pinned
            one, pooled by bytes. They measure the weights that a round brings them before they train, in addition to
            `round_seconds`, for at most half of `grace_seconds`.
        sharding: what a client may read: `shards` leases it stretches of the least-progressed shard, `full` disjoint strides
            over the whole set, `local` rows of the shards that only its site has.
        weighting: `uniform` or `tokens`: a client's share in the mean.
        merge: `mean`, or coordinate by coordinate `median` or `trimmed_mean` of the clients' updates, all weighing the same.
        trim: share of the values that `trimmed_mean` cuts off on either side.
        max_norm_ratio: largest update, in every parameter group, over what is usual: the median of one vote a client, for as
            many steps at the same learning rate. An update that no steps of the recipe can have moved is refused in any case, and
            so is one that has moved next to nothing. None switches all of this off.
        on_large_norm: `clip` a larger update to that, or `reject` it.
        outer: what the server does with the mean update. `auto` takes Nesterov's momentum with rates for the number of clients
            and of planned rounds, `nesterov` and `adam` their own rates, `fedavg` none.
        outer_lr: outer learning rate, in the place of the one that `outer` takes.
        outer_momentum: outer momentum, in the place of the one that `outer` takes.
        outer_warmdown: the last part of the horizon, in which the outer step goes over to plain averaging, as the inner learning
            rate falls.
        global_batch_tokens: split one batch over the clients of a round, in whole micro-batches, instead of
            `model.recipe.batch_tokens` each. Where clients come and go, steps that stay the same lose less.
        overlap: Sites train on while their update goes up, the others' are merged and the new weights come down. What these steps
            have changed is added to the new weights, from which the site goes on. Clients of one machine take turns and cannot.
        asynchronous: An update is merged when it comes, and its client is sent the newest weights at once: nobody waits.
            Each merge counts as a round, of one client; `round_seconds` or `round_steps` is what a client trains for one update.
            An update that is late counts for less. The server keeps each version of the weights from which a client still trains.
            Rounds of seconds wait for no slow client either, and end better at equal tokens (notebooks/LOG.md): prefer them.
        down_codec: how weights travel to the clients: whole, in fp32 or bf16; or as what changed since the last round, in int8 or
            int4, and whole in bf16 to a client that did not answer that round.
        up_codec: how they come back.
        max_failed_rounds: rounds in a row in which clients answered and nothing could be merged, after which the run ends with an
            error; by default 5 on one machine, and never across sites, where the server tries again less and less often.
    """

    clients: Annotated[int, Range(1, 1 << 20)] = 2
    rounds: Count | None = None
    round_seconds: Seconds | list[tuple[Share, Seconds]] = 300.0
    round_steps: Count | list[tuple[Share, Count]] | None = None
    quorum: Annotated[int, Range(1, 1 << 20)] = 1
    quorum_seconds: Seconds = 600.0
    grace_seconds: Seconds = 300.0
    availability: Annotated[float, Range(0, 1, above=True)] = 1.0
    client_speeds: list[Annotated[float, Range(0, 1e9, above=True)]] | None = None
    client_data: list[str] | None = None
    evaluation: Literal["server", "sites"] = "server"
    sharding: Literal["shards", "full", "local"] = "shards"
    weighting: Literal["uniform", "tokens"] = "uniform"
    merge: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim: Annotated[float, Range(0, 0.5, below=True)] = 0.2
    max_norm_ratio: Annotated[float, Range(1, 1e9, above=True)] | None = 5.0
    on_large_norm: Literal["clip", "reject"] = "clip"
    outer: Outer = "auto"
    outer_lr: Annotated[float, Range(0, 1e9, above=True)] | None = None
    outer_momentum: Annotated[float, Range(0, 1, below=True)] | None = None
    outer_warmdown: Share = 0.4
    global_batch_tokens: Count | None = None
    overlap: bool = False
    asynchronous: bool = False
    down_codec: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    up_codec: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    max_failed_rounds: Count | None = None

    def __post_init__(self) -> None:
        """Refuse what no federation can run with."""
        check_numbers(self, "federation.")
        if self.client_speeds is not None and len(self.client_speeds) != self.clients:
            raise ConfigError(
                f"federation.client_speeds names {len(self.client_speeds)} speeds for {self.clients} clients"
            )
        if self.client_data is not None and len(self.client_data) != self.clients:
            raise ConfigError(
                f"federation.client_data names {len(self.client_data)} folders for {self.clients} clients"
            )
        if self.client_data is not None and self.sharding != "local":
            raise ConfigError(
                f"federation.client_data gives each client text of its own: set federation.sharding to local, not {self.sharding}"
            )
        for name in ("round_seconds", "round_steps"):
            if isinstance(lengths := getattr(self, name), list):
                shares = [share for share, _ in lengths]
                if not shares or shares != sorted(set(shares)) or shares[0] == 0 or shares[-1] != 1:
                    raise ConfigError(
                        f"federation.{name} is a list of [share of the horizon, length of a round until then]: the shares must "
                        f"rise to 1, not {shares}"
                    )
        if self.outer == "fedavg" and (self.outer_lr or 1, self.outer_momentum or 0) != (1, 0):
            raise ConfigError(
                "federation.outer=fedavg has no outer_lr and no outer_momentum: leave them out, or take nesterov"
            )
        for name, fitting in ASYNCHRONOUS.items() if self.asynchronous else ():
            if (value := getattr(self, name)) not in fitting:
                raise ConfigError(
                    f"federation.asynchronous=true merges every update by itself, and federation.{name}={value} does not go with "
                    f"that: set federation.{name} to {' or '.join(map(str, fitting))}, or federation.asynchronous to false"
                )
        if self.merge != "mean" and self.weighting != "uniform":
            raise ConfigError(
                f"federation.merge={self.merge} weighs all clients the same: set federation.weighting to uniform"
            )

    def seconds_at(self, progress: float) -> float:
        """Return the seconds of a round that begins at this share of the horizon."""
        return _at(self.round_seconds, progress)

    def steps_at(self, progress: float) -> int | None:
        """Return the optimizer steps of a round that begins at this share of the horizon, None where rounds have seconds."""
        return None if self.round_steps is None else _at(self.round_steps, progress)

    @property
    def client_names(self) -> list[str]:
        """The names of the clients in one process: those of a simulation's partitions."""
        return [f"client-{index}" for index in range(self.clients)]


def _at(lengths: N | list[tuple[float, N]], progress: float) -> N:
    """Return the length that holds at a share of the horizon; the last one also beyond it."""
    if not isinstance(lengths, list):
        return lengths
    return next((length for share, length in lengths if progress < share), lengths[-1][1])


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
    plan = "--plan FILE (such as configs/sites.yaml) trains nothing: it says how long rounds should be, and which codecs to take."
    parser = ArgumentParser(prog="nanofed federate", epilog=plan, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file in YAML")
    parser.add_argument(
        "--runtime",
        type=Literal["in-process", "simulation", "deployment"],
        default="in-process",
        help="what runs server and clients",
    )
    parser.add_argument("--seed_everything", type=int, default=42, help="seed of weights and draws")
    parser.add_class_arguments(RunOptions, None, as_group=False)
    # Rounds: a killed server loses at most the one it was in and the one before.
    parser.set_defaults({"eval_every": 1, "save_every": 1})
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
