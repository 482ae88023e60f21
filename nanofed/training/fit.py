"""The vanilla path: hand module, data and Trainer to each other, and train."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.training.callbacks.dashboard import RunLogger
from nanofed.training.callbacks.stopping import take_signals
from nanofed.training.checkpoint.format import check_model, find_checkpoint, read_manifest, read_weights
from nanofed.training.losses import NonFiniteError
from nanofed.training.memory import Place
from nanofed.training.module import GPTModule
from nanofed.training.preflight import check_identity, check_start
from nanofed.training.run_folder import hold_run, resume_checkpoint
from nanofed.training.summary import AT_HORIZON, SUMMARY, Summary

if TYPE_CHECKING:
    from nanofed.training.lightning_cli import FitCLI

logger = logging.getLogger(__name__)


def run_fit(cli: FitCLI) -> Summary:
    """Train what the CLI has built: validate, fit, save, validate.

    Raises:
        Stopped: a signal that asks to stop reached `cli.signals`, and the run is saved.
        NonFiniteError: the loss is NaN; says at which step, in which rows, and where the last good checkpoint is.
        NanofedError: another process uses the run.
    """
    with cli.watchdog.over(cli.trainer), cli.lightning_errors():
        if not runtime.is_first_rank():
            return _fit(cli)
        with hold_run(cli.run_options.folder):
            return _fit(cli)


def _fit(cli: FitCLI) -> Summary:
    module: GPTModule = cli.model
    data, trainer, options = cli.datamodule, cli.trainer, cli.run_options
    accumulation = check_start(
        module,
        data,
        options,
        kind="fit",
        batch_tokens=module.recipe.batch_tokens,
        config=cli.resolved_config,
        place=Place.of(trainer),
    )
    clock, schedule = module.clock, module.recipe.schedule
    logger.info(schedule.explain_scale(clock.step_tokens, clock.horizon_tokens))
    logger.info(schedule.explain_beta2(clock.batch_tokens))
    cli.startup.done("data")
    resume = resume_checkpoint(options.folder, options.ckpt_path)
    if resume is None and options.init_from:
        start_from(module, options.init_from)
    trainer.accumulate_grad_batches = accumulation
    trainer.val_check_interval = options.eval_every * accumulation  # Lightning counts micro-batches
    trainer.fit_loop.epoch_loop.max_steps = module.num_steps
    take_signals(trainer)
    summary = cli.dashboard.summary
    try:
        if resume is None:
            cli.opening.open(trainer, module)
            trainer.validate(module, datamodule=data, verbose=False)
        else:
            if trainer.is_global_zero:
                logger.info("resuming from %s", resume)
            cli.saver.newest = resume
            if (options.folder / SUMMARY).is_file():
                before = Summary.read(options.folder)
                summary.curve, summary.init_from = before.curve, before.init_from
        with cli.garbage:
            trainer.fit(module, datamodule=data, ckpt_path=str(resume) if resume else None)
        cli.opening.open(trainer, module)  # a resumed run that has no step to do
        summary.ended = _why_ended(trainer, module)
        if not summary.curve or summary.curve[-1].step != module.clock.step:
            trainer.validate(module, datamodule=data, verbose=False)
    except NonFiniteError as error:
        summary.ended = f"the loss is not finite: {error}"
        raise NonFiniteError(f"{error}; {cli.saver.where()}") from error
    except (SystemExit, KeyboardInterrupt):  # Lightning exits where it saw a KeyboardInterrupt
        summary.ended = f"it was stopped after step {module.clock.step:,}"
        if cli.saver.newest is not None and trainer.is_global_zero:
            logger.info("stopped after step %s; %s", f"{module.clock.step:,}", cli.saver.where())
        cli.signals.await_children()
        raise
    except Exception as error:
        summary.ended = f"{type(error).__name__} after step {module.clock.step:,}"
        raise
    finally:
        if cli.opening.done:
            summary.tokens = module.clock.tokens
            with suppress(OSError):  # on a disk that is full, the error that is under way says so
                summary.write(options.folder)
            if isinstance(trainer.logger, RunLogger):
                trainer.logger.finish(summary)
    return summary


def _why_ended(trainer: Trainer, module: GPTModule) -> str:
    """Return why `Trainer.fit` has returned."""
    if module.clock.step >= module.num_steps:
        return AT_HORIZON
    at = f"after {module.clock.step:,} of {module.num_steps:,} steps"
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return f"the time limit trainer.max_time is over {at}"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping stopped it {at}: {callback.stopping_reason_message}"
    if trainer.should_stop:
        names = ", ".join(type(c).__name__ for c in callbacks if not type(c).__module__.startswith("nanofed."))
        return f"it was stopped {at} by one of its callbacks ({names or 'unknown'} set trainer.should_stop)"
    return f"there was no more training data {at}: trainer.limit_train_batches or another limit of the Trainer"


def run_validate(cli: FitCLI) -> float:
    """Return bits per byte of the checkpoint that `--ckpt_path` names."""
    options = cli.run_options
    if options.ckpt_path is None:
        raise ConfigError("name what to validate: --ckpt_path RUN_OR_CHECKPOINT, or last for the config's own run")
    path = find_checkpoint(options.folder if options.ckpt_path == "last" else options.ckpt_path)
    check_identity(path, read_manifest(path), cli.model, cli.datamodule, "validate")
    start_from(cli.model, path)
    take_signals(cli.trainer)
    with cli.watchdog.over(cli.trainer), cli.lightning_errors():
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return float(cli.trainer.callback_metrics["val/bpb"])


def start_from(module: GPTModule, where: str | Path) -> None:
    """Give the module the weights of a run or checkpoint of either path; optimizer and data start anew."""
    path = find_checkpoint(where)
    check_model(read_manifest(path), module.config, path)
    module.start_from(read_weights(path))
