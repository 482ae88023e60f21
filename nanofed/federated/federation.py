"""A federation: from parsed options to the objects that every runtime needs, and the checks before it begins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from flwr.serverapp import Grid
from lightning import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.federated.config import Arguments
from nanofed.federated.server.asynchronous import AsynchronousLoop
from nanofed.federated.server.metrics import FederationMetrics
from nanofed.federated.server.policy import ONE_MACHINE, ClientPolicy
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.state import State
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.weight_transport import WeightTransport
from nanofed.files import write_atomically
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest
from nanofed.training.config_errors import resolved
from nanofed.training.lightning_errors import lightning_errors
from nanofed.training.memory import Place
from nanofed.training.preflight import check_identity, check_start
from nanofed.training.recipe import accumulation_steps
from nanofed.training.run_folder import check_usable, open_run, resume_checkpoint
from nanofed.training.summary import CONFIG, SUMMARY, Summary

logger = logging.getLogger(__name__)

START_FILE = "nanofed-start.json"
PASSED_ON = ("force", "ckpt_path", "init_from")  # of the options of a start; `overwrite` is done once the run is open


@dataclass(frozen=True)
class Start:
    """What holds for one start of a run and is no part of its saved config, for the processes that Flower starts.

    Attributes:
        run: The run's folder, which holds the saved config.
        base_dir: The folder of everything that is kept between runs (`NANOCHAT_BASE_DIR`).
        force: Whether to start where the memory does not seem to be enough, or where the config of a resumed run differs.
        ckpt_path: The checkpoint that the run goes on from, as `RunOptions.ckpt_path` names it.
        init_from: The checkpoint whose weights a new run starts with, as `RunOptions.init_from` names it.
        keys: Whether sites have keys, so that a client's name has to be that of its node's key.
    """

    run: str
    base_dir: str
    force: bool = False
    ckpt_path: str | None = None
    init_from: str | None = None
    keys: bool = False

    def write(self, home: Path) -> None:
        """Write this into Flower's home, which its processes find in their environment."""
        write_atomically(home / START_FILE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, home: Path) -> Self | None:
        """Return what was written into Flower's home, None where a person has started Flower."""
        path = home / START_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


class Federation(Arguments):
    """The options of a federation, and the objects that every runtime needs."""

    @classmethod
    def started(cls, start: Start) -> Self:
        """Return the federation of a run's saved config, started in the way that `start` says."""
        runtime.use_base_dir(start.base_dir)
        federation = cls.from_args(["--config", str(Path(start.run) / CONFIG)])
        for name in PASSED_ON:
            federation.config[name] = getattr(start, name)
        return federation

    def anchor(self) -> None:
        """Make the config's paths absolute: Flower's processes have another working directory."""
        config = self.config
        config.runs_dir = _absolute(config.runs_dir)
        for section, name, words in (
            (config.data, "path", ("demo", "fineweb-edu")),
            (config.data, "tokenizer", ("gpt2",)),
            (config, "ckpt_path", ("last",)),
            (config, "init_from", ()),
            (config, "core_data", ()),
        ):
            if section[name] is not None and section[name] not in words:
                section[name] = _absolute(section[name])
        if (folders := config.federation.client_data) is not None:
            config.federation.client_data = [_absolute(folder) for folder in folders]

    def fabric(self) -> Fabric:
        """Return the Fabric that a client trains with."""
        options = self.fabric_options
        if options.devices > 1 and self.config.runtime != "deployment":
            raise ConfigError(
                f"fabric.devices={options.devices}: in process and in simulation a client trains on one device; set it to 1"
            )
        runtime.warn_of_unused_gpu(options.accelerator)
        with lightning_errors("fabric", building=True):  # devices that are not there
            return Fabric(accelerator=options.accelerator, devices=1, plugins=[LightningEnvironment()])

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.options.folder

    def open(self) -> Path:
        """Check everything, then make the run's folder and save the resolved config in it; whoever calls holds the run."""
        self.check()
        return self.write()

    def write(self) -> Path:
        """Make the run's folder and save the resolved config in it, when all else has been checked."""
        open_run(self.options, "federated", resolved(self.parser, self.config))
        return self.folder

    def start(self, *, keys: bool = False) -> Start:
        """Return how this command starts the run, once it has opened it."""
        passed_on = {name: self.config[name] for name in PASSED_ON}
        return Start(str(self.folder), str(runtime.base_dir().resolve()), keys=keys, **passed_on)

    def check(self) -> None:
        """Refuse what can be refused before anything is written: options, data, memory, and the state to be resumed.

        Raises:
            ConfigError: a value, a folder or a checkpoint that does not fit.
            DataError: no shards or no tokenizer.
            CheckpointError: the checkpoint is damaged.
        """
        options, config = self.options, self.federation
        if config.evaluation == "sites" and options.sample_every:
            raise ConfigError(
                f"--sample_every {options.sample_every}: text samples are taken where the server measures the weights; set it to "
                "0, or federation.evaluation to server"
            )
        if config.evaluation == "sites" and options.core_every:
            raise ConfigError(
                f"--core_every {options.core_every}: CORE is measured where the server measures the weights; set it to 0, or "
                "federation.evaluation to server"
            )
        check_usable(options)
        module, data = self.build()
        batch_tokens = module.recipe.batch_tokens
        if config.global_batch_tokens is not None:
            accumulation_steps(
                config.global_batch_tokens,
                device_batch_size=data.device_batch_size,
                sequence_len=data.sequence_len,
                world_size=config.clients,
                option="federation.global_batch_tokens",
                of="clients",
            )
            batch_tokens = config.global_batch_tokens // config.clients
        for own in self.client_data(data).values():
            next(iter(own.validation_loader()))
            next(own.loader().take(1))
        place = Place(self.fabric().device, clients=config.clients)  # they take turns on one model, on one device
        text = resolved(self.parser, self.config)
        check_start(
            module,
            data,
            options,
            kind="federated",
            batch_tokens=batch_tokens,
            config=text,
            place=place,
            training=config.sharding != "local",
        )
        if (resume := resume_checkpoint(options.folder, options.ckpt_path)) is not None:
            State.new(module, data, config, options.folder, weights=False).load_without_weights(resume)

    def client_data(self, data: TokenDataModule) -> dict[str, TokenDataModule]:
        """Return the data of each client that has text of its own, by name, with the tokenizer of `data`."""
        found = {}
        for name, folder in zip(self.federation.client_names, self.federation.client_data or (), strict=False):
            config = self.config.clone()
            config.data.path = folder
            found[name] = self.parser.instantiate(config).data
            found[name].tokenizer = data.tokenizer
        return found

    def trainer(self, *, shared: bool = False) -> FabricTrainer:
        """Return the trainer of this process, for every client that runs in it; `shared` as of `FabricTrainer`."""
        module, data = self.build()
        config = self.federation
        names = dict(zip(config.client_names, config.client_speeds or [1.0] * config.clients, strict=True))
        speed, folder = (lambda name: names.get(name, 1.0)), self.folder / "clients"
        return FabricTrainer(
            module, data, self.fabric(), folder, speed, client_data=self.client_data(data), shared=shared
        )

    def loop(
        self,
        grid: Grid,
        *,
        policy: ClientPolicy = ONE_MACHINE,
        owners: Callable[[], Mapping[int, str]] | None = None,
        transport: WeightTransport | None = None,
    ) -> RoundLoop:
        """Return the server's round loop, resumed or started from other weights where that is asked for.

        Args:
            grid: the connection to the clients.
            policy: How the server treats the clients: whether they share this machine.
            owners: returns node -> the client whose key it has; None where nodes have no keys.
            transport: How weights get to the clients and back; by default they are in Flower's messages.
        """
        module, data = self.build()
        options, run = self.options, self.folder
        resume = resume_checkpoint(run, options.ckpt_path)
        known = resume is not None and (run / SUMMARY).is_file()
        begun = Summary(options.name, "federated", init_from=options.init_from)
        metrics = FederationMetrics(options, Summary.read(run) if known else begun)
        device = self.fabric().device
        loop = (AsynchronousLoop if self.federation.asynchronous else RoundLoop)(
            grid,
            module,
            data,
            self.federation,
            options,
            run,
            metrics,
            device,
            policy=policy,
            owners=owners,
            transport=transport,
        )
        if resume is not None:
            loop.state.load(resume, module, data, metrics.summary, force=options.force)
        elif options.init_from:
            path = find_checkpoint(options.init_from)
            check_identity(path, read_manifest(path), module, data, "init_from", force=options.force)
            loop.state.load_weights(path)
        return loop


def _absolute(path: str) -> str:
    return str(runtime.user_path(path).resolve())
