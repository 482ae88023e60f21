"""A trained model as every format holds it, and whether its weights are those of this GPT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanofed.model import GPT, GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.format import TOKENIZER, Manifest, read_manifest, read_weights

SHOWN = 4  # names that a message lists


@dataclass(frozen=True)
class Pretrained:
    """Sizes, weights and tokenizer of a trained model."""

    config: GPTConfig  # the sizes of the GPT
    weights: Mapping[str, Tensor]  # the weights by nanochat's names, such as `transformer.h.0.attn.c_q.weight`
    tokenizer: Tokenizer  # the tokenizer that the model was trained with
    path: Path  # where it was read from
    manifest: Manifest | None = None  # what a checkpoint of nanofed's says of itself; None of a model in another format

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> Pretrained:
        """Read a verified checkpoint of nanofed's; its weights are mapped from the file, not copied.

        Raises:
            CheckpointError: it is damaged.
        """
        manifest = read_manifest(checkpoint)
        tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
        return cls(manifest.model, read_weights(checkpoint), tokenizer, checkpoint, manifest)

    def check(self) -> None:
        """Compare the weights with what this GPT has, before anything is made of them.

        Raises:
            CheckpointError: names or shapes differ, a weight is not finite, or the tokenizer has another number of tokens than
                the model; says which.
        """
        shapes = {name: tuple(weight.shape) for name, weight in empty_model(self.config).state_dict().items()}
        unknown = sorted(self.weights.keys() - shapes.keys())
        missing = sorted(shapes.keys() - self.weights.keys())
        if unknown:
            raise CheckpointError(f"{self.path} is of another architecture: this GPT has no {listed(unknown)}")
        if missing:
            raise CheckpointError(f"{self.path} lacks weights of this GPT: {listed(missing)}")
        for name, shape in shapes.items():
            if (found := tuple(self.weights[name].shape)) != shape:
                raise CheckpointError(f"{self.path} holds {name} of shape {found}, and its sizes ask for {shape}")
            if not self.weights[name].isfinite().all():
                raise CheckpointError(f"{self.path} is damaged: {name} holds NaN or infinity")
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise CheckpointError(
                f"{self.path} has {self.config.vocab_size:,} tokens and its tokenizer {self.tokenizer.vocab_size:,}: "
                "they do not belong together"
            )

    def model(self, device: str | torch.device, compute_dtype: torch.dtype) -> GPT:
        """Return the GPT on a device, ready to evaluate, with fp32 weights whose matmuls run in `compute_dtype`.

        Raises:
            CheckpointError: the weights are not those of this GPT.
        """
        self.check()
        model = empty_model(self.config, compute_dtype).to_empty(device=device)
        model.load_state_dict(self.weights, strict=True)
        return model.eval()


def empty_model(config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """Return a GPT without memory: names and shapes alone."""
    with torch.device("meta"):
        return GPT(config, compute_dtype=compute_dtype)


def listed(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
