"""From YAML and dotted overrides to objects: the LightningCLI behind `fit` and `validate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

from lightning import Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.ranges import Seed, check_number
from nanofed.training.callbacks.core import CoreEvaluation
from nanofed.training.callbacks.dashboard import Dashboard, RunLogger, TextSamples
from nanofed.training.callbacks.opening import Opening
from nanofed.training.callbacks.progress import Progress
from nanofed.training.callbacks.saving import SaveCheckpoint
from nanofed.training.callbacks.stopping import Stopping
from nanofed.training.callbacks.watchdog import Limits, Watchdog
from nanofed.training.checkpoint.lightning_io import DirectoryCheckpointIO
from nanofed.training.config_errors import parse, resolved
from nanofed.training.gc_control import ManualCollection
from nanofed.training.lightning_errors import lightning_errors
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from nanofed.training.run_folder import check_usable
from nanofed.training.run_options import RunOptions
from nanofed.training.signals import Signals
from nanofed.training.startup import Startup
from nanofed.training.strategy import automatic, cluster_environment

# Trainer options that a run sets itself: what is asked for is said by another key.
TAKEN = {
    "gradient_clip_val": "model.recipe.clip (the optimizer clips, by the norm over all ranks)",
    "gradient_clip_algorithm": "model.recipe.clip",
    "precision": "model.compute_dtype (weights stay fp32)",
    "max_steps": "model.recipe.num_steps",
    "max_epochs": "model.recipe.num_steps",
    "min_steps": "model.recipe.num_steps",
    "min_epochs": "model.recipe.num_steps",
    "fast_dev_run": "model.recipe.num_steps, to a few",
    "limit_train_batches": "model.recipe.num_steps",
    "limit_val_batches": "data.eval_tokens",
    "overfit_batches": "data.num_shards 1",
    "num_sanity_val_steps": "--eval_every (a run begins with a validation)",
    "enable_checkpointing": "--save_every",
    "log_every_n_steps": "--log_every",
    "barebones": "--eval_every, --save_every and --log_every",
    "reload_dataloaders_every_n_epochs": "data.num_shards (a run goes on in the data where it is)",
    "accumulate_grad_batches": "model.recipe.batch_tokens",
    "val_check_interval": "--eval_every",
    "check_val_every_n_epoch": "--eval_every",
}

METRIC = "val/bpb"  # what a callback of Lightning's can watch


# The sections of both paths' configs, and whose options they hold.
KINDS: dict[str, Any] = {"": RunOptions, "model": GPTModule, "model.recipe": Recipe, "data": TokenDataModule}


class FitCLI(LightningCLI):
    """LightningCLI with the run's options; the module takes vocabulary, and the data the row length, from each other."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        command: Literal["fit", "validate", "profile"] = "fit",
        signals: Signals | None = None,
        startup: Startup | None = None,
    ) -> None:
        self.command = command
        self.startup = startup or Startup()
        self.signals = signals or Signals()
        self.garbage = ManualCollection()
        self.run_options: RunOptions
        self.dashboard: Dashboard
        self.opening: Opening
        self.saver: SaveCheckpoint
        super().__init__(
            GPTModule,
            TokenDataModule,
            args=list(args),
            run=False,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False, "prog": f"nanofed {command}"},
            trainer_defaults={
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "enable_checkpointing": False,  # SaveCheckpoint writes nanofed's format
                "enable_progress_bar": False,  # Progress counts optimizer steps
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "check_val_every_n_epoch": None,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's options and tie together what has one truth."""
        parser.add_class_arguments(RunOptions, None, as_group=False)
        parser.add_class_arguments(Limits, "watchdog")
        link_model_and_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with errors for people."""
        assert isinstance(args, list)
        if not args:
            raise ConfigError(f"name a config: {parser.prog} --config configs/tiny.yaml")
        self.config = parse(parser, args, {**KINDS, "watchdog": Limits})
        self.startup.done("config")

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; nothing is written yet."""
        self.run_options = run_options(self.config)
        for key, instead in TAKEN.items():
            if self.config.trainer[key] != self._default(key):
                raise ConfigError(f"trainer.{key} is not used: set {instead}")
        if runtime.is_first_rank() and self.command == "fit":
            check_usable(self.run_options)
        with self.lightning_errors():
            self.config_init = self.parser.instantiate(self.config)  # Lightning calls it by a name that is deprecated
        self.datamodule = self.config_init["data"]
        self.model = self.config_init["model"]
        self.startup.done("tokenizer")
        self.trainer = self.instantiate_trainer()
        self.startup.done("trainer")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the run's callbacks, logger and checkpoint format."""
        options = self.run_options
        trainer = dict(self._get(self.config_init, "trainer", default={}))
        self.watchdog = Watchdog(self.config_init["watchdog"])
        given = trainer.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        for callback in given:
            if getattr(callback, "monitor", None) not in (None, METRIC):
                raise ConfigError(
                    f"trainer.callbacks: {type(callback).__name__} monitors {callback.monitor!r}; all there is is {METRIC!r}"
                )
        callbacks = [self.watchdog, *given]  # first: it hears of a step before it is saved
        self.dashboard = Dashboard(options)
        if self.command != "fit":
            kwargs["logger"] = False
            callbacks += [self.dashboard] if self.command == "profile" else []  # it reads losses, as in a fit
        else:
            self.opening = Opening(options, self.resolved_config, self.dashboard.summary)
            self.saver = SaveCheckpoint(options, self.dashboard, self.garbage)
            callbacks += [
                self.opening,
                self.dashboard,
                Progress(self.dashboard, self.startup),
                TextSamples(options, self.dashboard),
                CoreEvaluation(options, self.dashboard, self.watchdog),
                self.saver,
                Stopping(self.signals, self.saver),
            ]
            if trainer.get("logger") in (None, True):
                kwargs["logger"] = RunLogger(options.folder, name="", version="", default_hp_metric=False)
            elif options.wandb_project:
                raise ConfigError("--wandb_project sends what nanofed's own logger writes: leave trainer.logger out")
        io = DirectoryCheckpointIO(self.model.config, self.datamodule.tokenizer, self.datamodule)
        plugins = trainer.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        runtime.warn_of_unused_gpu(str(trainer["accelerator"]))
        if options.deterministic:
            runtime.be_deterministic()
        with self.lightning_errors(building=True):
            own = [plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)]
            environment = own or [cluster_environment()]
            kwargs["plugins"] = [*(plugin for plugin in plugins if plugin not in own), io, *environment]
            if trainer["strategy"] == "auto":
                place = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes")}
                kwargs["strategy"] = automatic(**place, plugins=environment)
            built = self._instantiate_trainer({**trainer, **kwargs, "callbacks": callbacks}, [])
        self.watchdog.patience(built.strategy)
        return built

    def lightning_errors(self, *, building: bool = False) -> AbstractContextManager[None]:
        """Turn what Lightning raises over the Trainer's options into a ConfigError that names those not at their defaults."""
        given = (name for name, value in vars(self.config.trainer).items() if value != self._default(name))
        return lightning_errors("trainer", [f"trainer.{name}" for name in given], building=building)

    def _default(self, name: str) -> Any:
        return self.parser.get_default(f"trainer.{name}")

    @cached_property
    def resolved_config(self) -> str:
        """Every key of the run with its value, YAML."""
        return resolved(self.parser, self.config)


def run_options(config: Any) -> RunOptions:
    """Return the run's options out of a parsed config, checked before anything is built.

    Raises:
        ConfigError: an interval that is none, a name that is no folder's, a recipe that contradicts itself.
    """
    options = RunOptions(**{name: config[name] for name in RunOptions.__dataclass_fields__})
    Recipe(**vars(config.model.recipe))
    return options


def link_model_and_data(parser: Any) -> None:
    """One truth each: the vocabulary is the tokenizer's, the row length and the seed are the model's and the run's."""
    parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
    parser.link_arguments("model.sequence_len", "data.sequence_len")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise ConfigError("seed_everything must be a number: runs are reproducible")
    check_number("seed_everything", value, Seed)
    return value
