"""Bits per byte of the global weights on the server's validation shard."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from nanofed.data.datamodule import TokenDataModule
from nanofed.evaluation.bits_per_byte import BitsPerByte, evaluate_bits_per_byte
from nanofed.federated.wire.codec import Weights
from nanofed.generation.text import SAMPLE_TOKENS, generate
from nanofed.training.module import GPTModule


class Evaluator:
    """A model of the server's own that takes the global weights to be measured.

    Args:
        module: the GPTModule; configured here if it is not yet.
        data: the shards and tokenizer.
        device: where to evaluate.
        shared: the module's model is that of a trainer in this process, too.
    """

    def __init__(self, module: GPTModule, data: TokenDataModule, device: torch.device, *, shared: bool) -> None:
        with torch.device(device):
            module.configure_model()
        self._gpt = module.gpt
        self._data = data
        self._device = device
        self._shared = shared
        self._metric = BitsPerByte(torch.tensor(data.tokenizer.token_bytes)).to(device)
        self.stopped = threading.Event()

    def load(self, weights: Weights) -> None:
        """Copy weights into the model: what is measured from now on, whatever becomes of them."""
        parameters = self._gpt.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, array in weights.items():
                if self._shared:
                    parameters[name].copy_(torch.from_numpy(array))
                else:
                    parameters[name].data = torch.from_numpy(array).to(self._device, copy=True)

    def release(self) -> None:
        """Give back the memory of the model's weights, until others are loaded; a model that is shared keeps them."""
        if not self._shared:
            for parameter in self._gpt.state_dict(keep_vars=True).values():
                parameter.data = torch.empty(0, device=self._device)

    def bits_per_byte(self) -> float:
        """Return bits per byte of the loaded weights on the validation shard."""
        return evaluate_bits_per_byte(self._gpt, self._batches(), self._metric, self._device)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._data.validation_loader():
            if self.stopped.is_set():
                raise Stopped
            yield batch.inputs, batch.targets

    def sample(self, prompt: str, max_tokens: int = SAMPLE_TOKENS) -> str:
        """Return what the model with the loaded weights says after a prompt, the likeliest token each time."""
        return prompt + "".join(
            generate(self._gpt, self._data.tokenizer, prompt, max_tokens=max_tokens, temperature=0.0)
        )


class Stopped(Exception):
    """The run has ended; the figure is not needed."""
