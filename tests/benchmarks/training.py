"""One side at work: it takes steps when it is told to, and measures itself. Lives in a process of its own (`Worker`)."""

from __future__ import annotations

import time
from itertools import islice

import torch

from nanofed.evaluation.bits_per_byte import BitsPerByte, evaluate_bits_per_byte
from nanofed.training.gemm import ceiling
from nanofed.training.laps import Laps
from tests.benchmarks import machine
from tests.benchmarks.sides import SIDES, Setting, Side

Readings = dict[str, dict[str, float]]  # seconds by clock and phase


class Training:
    """A model, its optimizer and its batches, built from a setting."""

    def __init__(self, side: str, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.device = torch.device(setting.device)
        self._start_mb = machine.resident_memory_mb()
        started = time.perf_counter()
        self.side: Side = SIDES[side](setting)
        self._batches = setting.batches()
        self._laps = Laps(self.device)
        self._step = 0
        self._build_seconds = time.perf_counter() - started

    def warm_up(self, steps: int = 2) -> dict[str, float]:
        """Take steps until nothing is compiled any more; return the seconds of building and of the first step."""
        started = time.perf_counter()
        self.steps(1)
        first = time.perf_counter() - started
        self.steps(steps)
        return {"build": self._build_seconds, "first_step": first}

    def steps(self, count: int, *, update: bool = True) -> list[Readings]:
        """Take steps and return how long each took; without `update` gradients are dropped instead.

        On a GPU one more comes first, which is not counted, and afterwards the memory that is free goes back: the other side
        needs it too.
        """
        with self.side.around:
            if self.device.type == "cuda":
                self._one_step(update)
                self._laps.read()
            for _ in range(count):
                self._one_step(update)
            readings = self._laps.read()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return readings

    def _one_step(self, update: bool) -> None:
        laps, accumulation = self._laps, self.setting.accumulation
        self._step += 1
        laps.start()
        for _ in range(accumulation):
            batch = next(self._batches).to(self.device)
            laps.lap("data")
            loss = self.side.loss(batch) / accumulation
            laps.lap("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            laps.lap("backward")
        del loss
        if update:
            self.side.update()
        else:
            self.side.model.zero_grad()
        laps.lap("optimizer")
        if update:
            self.side.log(read=self._step % self.setting.log_every == 0)
        laps.lap("logging")

    def memory(self, steps: int = 2) -> dict[str, float]:
        """Return peaks in MB: of forward and backward before there is optimizer state, and of whole steps.

        To be called in a process that has done nothing else; compiling does not count.
        """
        self.steps(2, update=False)
        machine.reset_peak_memory(self.device)
        self.steps(steps, update=False)
        forward_backward = machine.peak_memory_mb(self.device)
        self.steps(2)
        machine.reset_peak_memory(self.device)
        self.steps(steps)
        peaks = {"forward_backward": forward_backward, "step": machine.peak_memory_mb(self.device)}
        if self.device.type == "cpu":
            peaks["before_building"] = self._start_mb
        return peaks

    def gemm(self, dtype: str, seconds: float) -> dict[str, dict[str, float]]:
        """Return the GEMM ceiling at this model's shapes, in FLOP/s by shape and clock."""
        tokens = self.setting.device_batch_size * self.setting.sequence_len
        return ceiling(self.setting.config, tokens, self.setting.torch_dtype(dtype), self.device, seconds)

    def restart(self) -> None:
        """Go back to the first weights, optimizer state and batch; what was compiled stays so."""
        self.side.restart()
        self._batches, self._step = self.setting.batches(), 0

    def bits_per_byte(self, batches: int) -> float:
        """Return bits per byte on the first forward passes of the validation text."""
        data = self.setting.data_module()
        validation = ((b.inputs, b.targets) for b in islice(data.validation_loader(), batches))
        metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes))
        return evaluate_bits_per_byte(self.side.model, validation, metric, self.device)
