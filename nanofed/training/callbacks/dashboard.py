"""What a run writes while the Trainer drives it: TensorBoard's scalars, text samples and `summary.json`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from nanofed import runtime
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.generation.text import SAMPLE_TOKENS, complete
from nanofed.training.losses import LossWindow, SmoothedLoss
from nanofed.training.module import GPTModule
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Point, Summary
from nanofed.training.tensorboard import Attempts, describe, write_point
from nanofed.training.wandb_run import MirroredWriter, WandbRun


def writer_of(trainer: Trainer) -> Any:
    """Return TensorBoard's SummaryWriter on the first rank, None elsewhere or without a logger."""
    experiment = getattr(trainer.logger, "experiment", None) if trainer.is_global_zero else None
    return experiment if hasattr(experiment, "add_scalar") else None


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, which makes no file before the run's folder is opened.

    Lightning asks for its writer and saves its hyper-parameters before it loads the checkpoint of a resumed run.

    Attributes:
        is_open: whether it may write.
    """

    is_open = False
    _wandb: WandbRun | None = None

    def open(self, options: RunOptions) -> None:
        """Write from now on, and to Weights & Biases as well where a project there is named."""
        self.is_open = True
        if options.wandb_project:
            self._wandb = WandbRun(options)

    @property
    def experiment(self) -> Any:
        """TensorBoard's SummaryWriter on the first rank once it is open; else a dummy that writes nothing."""
        if not self.is_open:
            return _DummyExperiment()
        return super().experiment if self._wandb is None else MirroredWriter(super().experiment, self._wandb)

    def finish(self, summary: Summary) -> None:
        """Say what the run came to, where nothing follows that is to be written."""
        if self._wandb is not None:
            self._wandb.finish(summary)

    def save(self) -> None:
        """Write what was logged, as far as the disk takes it."""
        if self.is_open:
            with contextlib.suppress(OSError):  # whoever has written the figures says so
                super().save()

    def finalize(self, status: str) -> None:
        """Close the writer; where a signal ends the run in the middle of that, Lightning asks again, and it is left as it is."""
        try:
            super().finalize(status)
        except OSError:
            self.reopen()
        except BaseException:
            self.reopen()
            raise

    def reopen(self) -> None:
        """Have what is written next begin a file of its own."""
        self._experiment = None


class Dashboard(Callback):
    """Writes nanochat's TensorBoard tags, against steps and against tokens, and the run's summary.

    Every scalar is written at its optimizer step (with its wall time), and validations once more by tokens and seconds, so that
    runs of both paths overlay. `train/loss` is nanochat's: a debiased moving
    average over the steps; `train/data_wait` is the share of time in which a step waited for its batch. Validations and saves
    are no training time. A resumed run goes on with average, seconds and curve.

    Args:
        options: the run's folder, and the steps between two readings of the losses, which wait for the device.

    Attributes:
        summary: what the run has come to so far.

    Raises:
        NonFiniteError: a step's loss or gradients are not finite; found at the next reading or save.
    """

    def __init__(self, options: RunOptions) -> None:
        self.summary = Summary(options.name, "fit", init_from=options.init_from)
        self.tokens_per_second: float | None = None
        self._options = options
        self._smoothed = SmoothedLoss()
        self._losses = LossWindow()
        self._grad_norm = float("nan")
        self._step = 0
        self._mark: float | None = None  # when training time was last counted, None while it stands still
        self._window: tuple[float, int] = (0.0, 0)
        self._waited = 0.0
        self._attempt = Attempts(options.folder)

    def write(self, trainer: Trainer, action: Callable[[Any], object]) -> None:
        """Have the first rank write figures, and go on where the disk takes none.

        Args:
            trainer: whose logger is written to.
            action: is given TensorBoard's SummaryWriter; it is not called where there is none.
        """

        def act() -> None:
            if (writer := writer_of(trainer)) is not None:  # to open its file may fail as well
                action(writer)

        if not self._attempt(act):
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.reopen()

    @property
    def last_loss(self) -> float | None:
        """The moving average of the loss as of the last reading, nats a token; None before the first."""
        return self._smoothed.value

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        curve = [[point.step, point.tokens, point.seconds, point.bpb] for point in self.summary.curve]
        smoothed = [self._smoothed.biased, self._smoothed.steps]
        return {"seconds": self.summary.seconds, "step": self._step, "loss": smoothed, "curve": curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; validations that the run's folder knows of up to that step stay."""
        known = {point.step: point for point in self.summary.curve if point.step <= state_dict["step"]}
        known |= {point[0]: Point(*point) for point in state_dict["curve"]}
        self.summary.curve = [known[step] for step in sorted(known)]
        self.summary.seconds = state_dict["seconds"]
        self._smoothed = SmoothedLoss(*state_dict["loss"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training time, after a validation that the run was stopped before."""
        module = cast(GPTModule, pl_module)
        self._step = module.clock.step
        self._losses.start(module.data_state)
        self.write(trainer, lambda writer: describe(writer, self._options.folder))
        due = self._step > 0 and self._step * trainer.accumulate_grad_batches % int(trainer.val_check_interval) == 0
        missing = due and all(point.step != self._step for point in self.summary.curve)
        if trainer.strategy.broadcast(missing, src=0):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._window = (self.summary.seconds, module.clock.tokens)
        self._mark = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for a validation."""
        self._count()
        self._mark = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of training time for the block."""
        self._count()
        running, self._mark = self._mark is not None, None
        try:
            yield
        finally:
            self._mark = time.monotonic() if running else None

    def _count(self) -> None:
        if self._mark is not None:
            now = time.monotonic()
            self.summary.seconds += now - self._mark
            self._mark = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note a full step's losses; write loss, speed and rates every `log_every` of them."""
        module = cast(GPTModule, pl_module)
        optimizer: Any = trainer.optimizers[0]
        if self.note_step(module, optimizer) and self._step % self._options.log_every == 0:
            self.read_losses()
            self._log(trainer, module, optimizer.schedule.lr_multiplier(module.clock.progress))

    def note_step(self, module: GPTModule, optimizer: Any) -> bool:
        """Take in the losses of the full step that has been done since the last call; tell whether one has."""
        if module.clock.step == self._step:
            return False
        self._step = module.clock.step
        self._losses.add(self._step, module.pop_losses(), optimizer.grad_norm, module.data_state)
        return True

    def read_losses(self) -> None:
        """Read the losses of the steps since the last reading, on all ranks; waits for the device."""
        for step in self._losses.read():
            self._smoothed.add(step.loss)
            self._grad_norm = step.grad_norm

    def _log(self, trainer: Trainer, module: GPTModule, lr_multiplier: float) -> None:
        self._count()
        step, tokens = module.clock.step, module.clock.tokens
        elapsed = self.summary.seconds - self._window[0]
        self.tokens_per_second = (tokens - self._window[1]) / elapsed if elapsed > 0 else None
        self._window = (self.summary.seconds, tokens)
        waited, self._waited = self._waited, trainer.datamodule.wait.seconds  # type: ignore[attr-defined]
        self.summary.tokens = tokens
        loss = self.last_loss
        if loss is None:
            return
        scalars = {
            "train/loss": loss,
            "train/tokens": tokens,
            "train/seconds": self.summary.seconds,
            "train/lr_multiplier": lr_multiplier,
            "train/grad_norm": self._grad_norm,
        }
        if self.tokens_per_second is not None:
            scalars["train/tok_per_sec"] = self.tokens_per_second
            scalars["train/data_wait"] = (self._waited - waited) / elapsed
            peak = runtime.peak_flops(module.device)
            if peak is not None:
                flops = module.config.flops_per_token() * self.tokens_per_second
                scalars["train/mfu"] = flops / (peak * trainer.world_size)

        def write(writer: Any) -> None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
            writer.add_scalar("train/loss_by_tokens", loss, tokens)

        self.write(trainer, write)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write bits per byte against steps and tokens, and the summary; the clock goes on if training does."""
        module = cast(GPTModule, pl_module)
        value = float(trainer.callback_metrics["val/bpb"])
        clock = module.clock
        self.summary.add(Point(clock.step, clock.tokens, round(self.summary.seconds, 3), value))
        self.summary.tokens = clock.tokens
        self.write(trainer, lambda writer: write_point(writer, self.summary.curve[-1], clock.step))
        self.write(trainer, lambda writer: writer.flush())
        if trainer.is_global_zero:
            self._attempt(lambda: self.summary.write(self._options.folder))
        self._mark = time.monotonic() if trainer.state.fn == TrainerFn.FITTING else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses of the last steps, and stop the clock of training time."""
        self.read_losses()
        self._count()
        self._mark = None


class TextSamples(Callback):
    """Writes what the model says to a few prompts into TensorBoard, every n optimizer steps."""

    def __init__(self, options: RunOptions, dashboard: Dashboard) -> None:
        self._options = options
        self._dashboard = dashboard

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample after a validation, where the model stands still anyway."""
        module = cast(GPTModule, pl_module)
        every = self._options.sample_every
        seen = trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger)
        if not seen or not every or module.clock.step % every:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        engine, prompts = Engine(module.gpt), self._options.sample_prompts
        greedy = Sampling(temperature=0.0)
        texts = list(complete(engine, datamodule.tokenizer, prompts, greedy, max_tokens=SAMPLE_TOKENS))

        def write(writer: Any) -> None:
            for done in texts:
                writer.add_text(f"sample/{done.prompt[:40]}", done.prompt + done.text, module.clock.step)

        self._dashboard.write(trainer, write)
