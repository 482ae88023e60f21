"""From YAML and dotted overrides to objects: the options that every run has, and the LightningCLI behind `fit` and `validate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError, NanofedError
from nanofed.training.callbacks import Dashboard, Progress, SaveCheckpoint, TextSamples
from nanofed.training.checkpoint import DirectoryCheckpointIO
from nanofed.training.module import GPTModule
from nanofed.training.run import CONFIG, Summary, open_run


@dataclass
class RunOptions:
    """Options of a run, on either path; a federated run counts rounds where a fit counts optimizer steps.

    Attributes:
        name: the run's folder is `runs_dir`/`name`.
        runs_dir: folder of all runs; TensorBoard reads it.
        overwrite: replace a run of that name.
        ckpt_path: `last` goes on with the run of that name; or a checkpoint.
        init_from: start from the weights of another run or checkpoint, of either path.
        eval_every: steps (rounds) between two validations.
        save_every: steps (rounds) between two checkpoints; 0 saves at the end only.
        keep_checkpoints: newest checkpoints to keep; 0 keeps all.
        log_every: steps between two entries of the training loss.
        sample_every: steps (rounds) between two text samples, taken at validations; 0 takes none.
        sample_prompts: what the samples go on from.
    """

    name: str = "run"
    runs_dir: str = "runs"
    overwrite: bool = False
    ckpt_path: str | None = None
    init_from: str | None = None
    eval_every: int = 250
    save_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    sample_every: int = 0
    sample_prompts: list[str] = field(default_factory=lambda: ["The capital of France is", "To open a file,"])


def parse(parser: Any, args: Sequence[str]) -> Any:
    """Parse `args`; what is wrong becomes one clear line (ConfigError, exit 2) instead of a usage text.

    A config file that is not there, a key that does not exist, a value of the wrong type: jsonargparse says which.
    """
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        path = value if flag in ("--config", "-c") else flag.removeprefix("--config=") if "--config=" in flag else None
        if path is not None and not Path(path).expanduser().is_file():
            raise ConfigError(f"there is no config file {path}")
    try:
        return parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config is not valid YAML: {' '.join(str(error).split())}") from error


class FitCLI(LightningCLI):
    """LightningCLI with the run's options; the module takes vocabulary, and the data the row length, from each other."""

    def __init__(self, args: Sequence[str], *, validate_only: bool = False) -> None:
        self.validate_only = validate_only
        self.run_options: RunOptions
        self.run_folder: Path | None = None
        self.dashboard: Dashboard | None = None
        super().__init__(
            GPTModule,
            TokenDataModule,
            args=list(args),
            run=False,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False, "prog": f"nanofed {'validate' if validate_only else 'fit'}"},
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
        link_model_and_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with errors for people."""
        assert isinstance(args, list)
        self.config = parse(parser, args)

    def instantiate_classes(self) -> None:
        """Build data, model, run folder and Trainer."""
        values = {name: self.config[name] for name in RunOptions.__dataclass_fields__}
        self.run_options = RunOptions(**values)
        self.config_init = self.parser.instantiate(self.config)  # Lightning calls it by a name that is deprecated
        self.datamodule = self.config_init["data"]
        self.model = self.config_init["model"]
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the run's callbacks, logger and checkpoint format."""
        options = self.run_options
        trainer = dict(self._get(self.config_init, "trainer", default={}))
        callbacks = list(trainer.get("callbacks") or [])
        if self.validate_only:
            kwargs["logger"] = False
        else:
            folder = Path(options.runs_dir).expanduser() / options.name
            if runtime.is_first_rank():
                open_run(options.runs_dir, options.name, overwrite=options.overwrite, resume=bool(options.ckpt_path))
                (folder / CONFIG).write_text(self.parser.dump(self.config, skip_link_targets=False))
            self.run_folder = folder
            self.dashboard = Dashboard(folder, Summary(options.name, "fit"), options.log_every)
            callbacks += [
                self.dashboard,
                Progress(self.dashboard),
                TextSamples(options.sample_every, options.sample_prompts),
                SaveCheckpoint(folder, options.save_every, options.keep_checkpoints),
            ]
            if trainer.get("logger") is None:
                kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        io = DirectoryCheckpointIO(self.model.config, self.datamodule.tokenizer)
        plugins = trainer.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), io]
        return self._instantiate_trainer({**trainer, **kwargs, "callbacks": callbacks}, [])


def link_model_and_data(parser: Any) -> None:
    """One truth each: the vocabulary is the tokenizer's, the row length and the seed are the model's and the run's."""
    parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
    parser.link_arguments("model.sequence_len", "data.sequence_len")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise NanofedError("seed_everything must be a number: runs are reproducible")
    return value
