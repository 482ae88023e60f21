"""What a run shows and keeps while the Trainer drives it: dashboard, progress, samples, checkpoints."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from nanofed import runtime
from nanofed.errors import NanofedError
from nanofed.generation.text import generate
from nanofed.training.checkpoint import prune_checkpoints
from nanofed.training.module import GPTModule
from nanofed.training.run import Point, Summary

logger = logging.getLogger(__name__)


def _writer(trainer: Trainer) -> Any:
    """Return TensorBoard's SummaryWriter on the first rank, None elsewhere or without a logger."""
    experiment = getattr(trainer.logger, "experiment", None) if trainer.is_global_zero else None
    return experiment if hasattr(experiment, "add_scalar") else None


class Dashboard(Callback):
    """Writes nanochat's TensorBoard tags, against steps and against tokens, and the run's summary.

    Every scalar is written at its optimizer step (with its wall time), and validations once more under
    `val/bpb_by_tokens` at their token count, so that runs of both paths overlay.

    Args:
        run: the run's folder.
        summary: what the run has come to so far.
        log_every: optimizer steps between two readings of the losses, which wait for the device.
    """

    def __init__(self, run: Path, summary: Summary, log_every: int) -> None:
        self.summary = summary
        self._run = run
        self._log_every = max(1, log_every)
        self._mark = 0.0  # when training time was last counted
        self._window: tuple[float, int] = (0.0, 0)
        self.last_loss: float | None = None
        self.tokens_per_second: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training time."""
        self._mark = time.monotonic()
        self._window = (self.summary.seconds, cast(GPTModule, pl_module).clock.tokens)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it for a validation."""
        if trainer.training:
            self._count()

    def _count(self) -> None:
        now = time.monotonic()
        self.summary.seconds += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write loss, speed and rates every `log_every` optimizer steps."""
        module = cast(GPTModule, pl_module)
        step = module.clock.step
        if trainer.fit_loop._should_accumulate() or step % self._log_every:
            return
        losses = module.pop_losses()
        if not losses:
            return
        self.last_loss = float(torch.stack(losses).mean())
        if not torch.isfinite(torch.tensor(self.last_loss)):
            raise NanofedError(
                f"the training loss is {self.last_loss} at step {step}: the last whole checkpoint is the newest of "
                f"{self._run / 'checkpoints'}; lower model.recipe.lr_scale or look at the data after {module.data_state}"
            )
        self._count()
        seconds, tokens = self._window
        elapsed = self.summary.seconds - seconds
        self.tokens_per_second = (module.clock.tokens - tokens) / elapsed if elapsed > 0 else None
        self._window = (self.summary.seconds, module.clock.tokens)
        self.summary.tokens = module.clock.tokens
        writer = _writer(trainer)
        if writer is None:
            return
        optimizer: Any = trainer.optimizers[0]
        scalars = {
            "train/loss": self.last_loss,
            "train/tokens": module.clock.tokens,
            "train/seconds": self.summary.seconds,
            "train/lr_multiplier": optimizer.schedule.lr_multiplier(module.clock.progress),
            "train/grad_norm": float(optimizer.grad_norm),
        }
        if self.tokens_per_second is not None:
            scalars["train/tok_per_sec"] = self.tokens_per_second
            peak = runtime.peak_flops(module.device)
            if peak is not None:
                flops = module.config.flops_per_token() * self.tokens_per_second
                scalars["train/mfu"] = flops / (peak * trainer.world_size)
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        writer.add_scalar("train/loss_by_tokens", self.last_loss, module.clock.tokens)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write bits per byte against steps and tokens, and the summary."""
        module = cast(GPTModule, pl_module)
        value = float(trainer.callback_metrics["val/bpb"])
        clock = module.clock
        self.summary.add(Point(clock.step, clock.tokens, round(self.summary.seconds, 3), value))
        self.summary.tokens = clock.tokens
        self._mark = time.monotonic()
        writer = _writer(trainer)
        if writer is not None:
            writer.add_scalar("val/bpb", value, clock.step)
            writer.add_scalar("val/bpb_by_tokens", value, clock.tokens)
        if trainer.is_global_zero:
            self.summary.write(self._run)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the last stretch."""
        self._count()


class Progress(Callback):
    """A bar of optimizer steps on a terminal, and one line for every validation anywhere."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        module = cast(GPTModule, pl_module)
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=module.num_steps,
                initial=module.clock.step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                leave=False,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            step = cast(GPTModule, pl_module).clock.step
            loss, speed = self._dashboard.last_loss, self._dashboard.tokens_per_second
            if loss is not None and speed is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run is."""
        if not trainer.is_global_zero:
            return
        point = self._dashboard.summary.curve[-1]
        module = cast(GPTModule, pl_module)
        speed = self._dashboard.tokens_per_second
        parts = [
            f"step {point.step:>6,}/{module.num_steps:,}",
            f"{point.tokens / 1e6:8.2f} M tokens",
            f"{point.seconds:7.1f} s",
            f"val {point.bpb:.4f} bits per byte",
        ]
        if speed is not None:
            parts.append(f"{speed:,.0f} tok/s")
        if self._bar is not None:
            self._bar.clear()
        logger.info("  ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class TextSamples(Callback):
    """Writes what the model says to a few prompts into TensorBoard, every n optimizer steps."""

    def __init__(self, every: int, prompts: Sequence[str], max_tokens: int = 48) -> None:
        self._every = every
        self._prompts = tuple(prompts)
        self._max_tokens = max_tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample after a validation, where the model stands still anyway."""
        module = cast(GPTModule, pl_module)
        writer = _writer(trainer)
        if writer is None or not self._every or module.clock.step % self._every:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        for prompt in self._prompts:
            pieces = generate(module.gpt, datamodule.tokenizer, prompt, max_tokens=self._max_tokens, temperature=0.0)
            writer.add_text(f"sample/{prompt[:40]}", prompt + "".join(pieces), module.clock.step)


class SaveCheckpoint(Callback):
    """Saves every n optimizer steps and at the end, and keeps the newest `keep`."""

    def __init__(self, run: Path, every: int, keep: int) -> None:
        self._folder = run / "checkpoints"
        self._run = run
        self._every = every
        self._keep = keep
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a full optimizer step is done and its turn has come."""
        step = cast(GPTModule, pl_module).clock.step
        if self._every and step % self._every == 0 and not trainer.fit_loop._should_accumulate():
            self.save(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, before the final validation."""
        self.save(trainer, cast(GPTModule, pl_module).clock.step)

    def save(self, trainer: Trainer, step: int) -> None:
        """Save one checkpoint, once a step, and drop the oldest beyond `keep`."""
        if step == self._saved_step:
            return
        trainer.save_checkpoint(self._folder / f"step_{step:08d}", weights_only=False)
        self._saved_step = step
        if trainer.is_global_zero:
            prune_checkpoints(self._run, self._keep)
