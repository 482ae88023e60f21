"""The two sides of a comparison: nanofed as it trains, and the plain path; each takes steps over the same batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.data.streams import Batch
from nanofed.model import GPT, GPTConfig, attention, gpt
from nanofed.model.loss import capped_logits
from nanofed.optim import Clock
from nanofed.training.gc_control import ManualCollection
from nanofed.training.losses import LossWindow
from nanofed.training.module import DTYPES, GPTModule
from nanofed.training.recipe import Recipe
from tests.benchmarks.corpus import SYNTHETIC, data_module, random_batches
from tests.parity.plain import PlainGPT, PlainOptimizer


@dataclass(frozen=True)
class Setting:
    """What is trained, the same on both sides; `auto` dtypes are what is fast on the device, and the reference's fp32 on CPU."""

    data: str
    depth: int = 4
    sequence_len: int = 512
    device_batch_size: int = 8
    vocab_size: int = 4096
    accumulation: int = 1
    horizon_steps: int = 1000
    dtype: str = "auto"
    reference_dtype: str = "auto"
    ns_dtype: str = "auto"
    attention: str = "auto"
    head: str = "fused"
    packing: str = "contiguous"
    compile: bool = True
    log_every: int = 10
    device: str = "cpu"
    threads: int = 1
    seed: int = 42

    @property
    def config(self) -> GPTConfig:
        return GPTConfig.from_depth(self.depth, vocab_size=self.vocab_size, sequence_len=self.sequence_len)

    @property
    def step_tokens(self) -> int:
        return self.device_batch_size * self.sequence_len * self.accumulation

    @property
    def recipe(self) -> Recipe:
        return Recipe(batch_tokens=self.step_tokens, num_steps=self.horizon_steps)

    def torch_dtype(self, name: str) -> torch.dtype:
        return DTYPES.get(name, runtime.default_compute_dtype(self.device))

    def data_module(self) -> TokenDataModule:
        return data_module(
            self.data,
            self.vocab_size,
            sequence_len=self.sequence_len,
            device_batch_size=self.device_batch_size,
            packing=self.packing,
        )

    def batches(self) -> Iterator[Batch]:
        """Yield micro-batches on the CPU: the same on both sides."""
        if self.data == SYNTHETIC:
            sizes = {"sequence_len": self.sequence_len, "device_batch_size": self.device_batch_size}
            return random_batches(self.vocab_size, **sizes)
        return iter(self.data_module().loader())


class Side(Protocol):
    """A model with its optimizer; steps are taken inside `around`."""

    model: torch.nn.Module
    around: AbstractContextManager[Any]

    def loss(self, batch: Batch) -> Tensor:
        """Run forward on a micro-batch that is on the device."""

    def update(self) -> None:
        """Take the optimizer step and drop the gradients."""

    def log(self, read: bool) -> None:
        """Note a step's loss; with `read` take those since the last reading to Python, which waits for the device."""

    def restart(self) -> None:
        """Go back to the first weights and a new optimizer; what was compiled stays so."""


class Ours:
    """nanofed's module and optimizer, as every way of driving them uses them."""

    def __init__(self, setting: Setting) -> None:
        self.around: AbstractContextManager[Any] = ManualCollection()
        _switch(setting)
        self.module = GPTModule(
            setting.depth,
            setting.sequence_len,
            setting.vocab_size,
            recipe=setting.recipe,
            compute_dtype=setting.dtype,  # type: ignore[arg-type]
            compile=setting.compile,
            seed=setting.seed,
        )
        with torch.device(setting.device):
            self.module.configure_model()
        self.model: torch.nn.Module = self.module.gpt
        self._ns_dtype = None if setting.ns_dtype == "auto" else setting.torch_dtype(setting.ns_dtype)
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        self._losses = LossWindow()
        self.module.clock.step = self.module.clock.tokens = 0
        self.optimizer = self.module.configure_optimizers()
        if self._ns_dtype is not None:
            self.optimizer.ns_dtype = self._ns_dtype

    def loss(self, batch: Batch) -> Tensor:
        return self.module.training_step(batch)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, read: bool) -> None:
        module = self.module
        assert self.optimizer.grad_norm is not None
        self._losses.add(module.clock.step, module.pop_losses(), self.optimizer.grad_norm, module.data_state)
        if read:
            self._losses.read()

    def restart(self) -> None:
        self.module.gpt.init_weights(self.module.seed)
        self._make_optimizer()


def _switch(setting: Setting) -> None:
    """Take out of this process's model what the setting wants to see the effect of."""
    if setting.attention == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif setting.attention != "auto":
        longest = 0 if setting.attention == "sdpa" else sys.maxsize
        attention.BLOCKED_LONGEST.update(dict.fromkeys(DTYPES.values(), longest))
    if setting.head == "plain":
        gpt.head_loss = _whole_logits_loss  # type: ignore[attr-defined]


def _whole_logits_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    logits = capped_logits(hidden, head).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=reduction)


class Reference:
    """The plain path: fp32 on a CPU; on a GPU October's own way, autocast to bf16 with the embedding kept in bf16."""

    def __init__(self, setting: Setting) -> None:
        device = torch.device(setting.device)
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = DTYPES.get(setting.reference_dtype, auto)
        self._setting = setting
        self.around: AbstractContextManager[Any] = nullcontext()
        self._losses: list[Tensor] = []
        self._autocast: AbstractContextManager[Any] = nullcontext()
        self.model: torch.nn.Module = PlainGPT(setting.config)
        self.model.to(device)
        if dtype != torch.float32:
            self._autocast = torch.autocast(device.type, dtype)
            if device.type == "cuda":
                self.model.get_submodule("transformer.wte").to(dtype)
        self.restart()
        if setting.compile:
            self.model.compile(dynamic=False)

    def loss(self, batch: Batch) -> Tensor:
        with self._autocast:
            loss: Tensor = self.model(batch.inputs, batch.targets)
        self._losses.append(loss.detach())
        return loss

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, read: bool) -> None:
        if read:
            float(torch.stack(self._losses).mean())
            self._losses.clear()

    def restart(self) -> None:
        setting, recipe = self._setting, self._setting.recipe
        weights = GPT(setting.config)
        weights.init_weights(setting.seed)
        self.model.load_state_dict(weights.state_dict())
        self._losses.clear()
        self.optimizer = PlainOptimizer(
            self.model,
            schedule=recipe.schedule,
            clip=recipe.clip,
            clock=Clock(step_tokens=recipe.batch_tokens, horizon_tokens=recipe.horizon(setting.config)),
            ns_dtype=setting.torch_dtype(setting.ns_dtype),
            compile=setting.compile,
        )


SIDES: dict[str, type[Ours] | type[Reference]] = {"ours": Ours, "reference": Reference}
