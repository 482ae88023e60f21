"""The LightningModule around the GPT: what a step, a validation and an optimizer are, for every way of driving them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor

from nanofed import runtime
from nanofed.data.streams import Batch, DataState
from nanofed.errors import ConfigError
from nanofed.evaluation.bits_per_byte import BitsPerByte
from nanofed.model import GPT, GPTConfig
from nanofed.model.attention import attention_kernel
from nanofed.optim import Clock, DistMuonAdamW, Movement, MuonAdamW, movements, parameter_groups
from nanofed.ranges import Range, Rows, Seed, check_numbers
from nanofed.training.recipe import OCTOBER, Recipe
from nanofed.training.strategy import FabricShardedStrategy, ShardedStrategy

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class GPTModule(LightningModule):
    """A GPT of one depth with its recipe.

    The learning rate is a function of the optimizer's clock, which counts tokens; no hook of the Trainer does training
    arithmetic, so `Trainer.fit` and a Fabric loop end in the same bits.

    Args:
        depth: the one dial: width 64 x depth, heads of 128 (`GPTConfig.from_depth`).
        sequence_len: tokens a row.
        vocab_size: taken from the tokenizer of the data.
        recipe: batch, horizon, learning rates.
        compute_dtype: dtype of the matmuls, Newton-Schulz's too; masters are fp32. `auto` is bf16 where the device multiplies it.
        compile: compile the model; `auto` does where a compiler is found.
        seed: initialises the weights, whatever the global generator's state.

    Attributes:
        compiled: whether the model, once it is built, is compiled; Newton-Schulz is on a GPU then, too.

    Raises:
        ConfigError: an option is out of its range, or `vocab_size` is not given.

    Example:
        >>> module = nanofed.GPTModule(depth=4, vocab_size=65_536, compile=False)
        >>> module.num_steps, module.clock.horizon_tokens  # both follow from the depth
        (1400, 734003200)
        >>> module.configure_model()  # as a Trainer does, on its device
        >>> sum(weight.numel() for weight in module.gpt.parameters())
        36700160
    """

    def __init__(
        self,
        depth: Annotated[int, Range(1, 1024)] = 20,
        sequence_len: Rows = 2048,
        vocab_size: int | None = None,
        recipe: Recipe = OCTOBER,
        compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        seed: Seed = 42,
    ) -> None:
        super().__init__()
        given = {"depth": depth, "sequence_len": sequence_len, "seed": seed}
        check_numbers(given, "model.", kind=GPTModule)
        if vocab_size is None:
            raise ConfigError("model.vocab_size is not known: it comes from the tokenizer of the data")
        self.config = GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len)
        self.recipe = recipe
        self.num_steps = self.recipe.steps(self.config)
        self.clock = Clock(step_tokens=self.recipe.batch_tokens, horizon_tokens=self.recipe.horizon(self.config))
        self.compute_dtype = compute_dtype
        self.compile_model = compile
        self.seed = seed
        self.data_state: DataState | None = None
        self.micro_losses: list[Tensor] = []
        self.bits_per_byte: BitsPerByte | None = None
        self.compiled = False
        self._first_weights: Mapping[str, Tensor] | None = None
        self.gpt: GPT

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Give the GPT these weights, all of them by name; `configure_model` loads them where it is not built yet.

        Whoever drives the module builds the model in the context of its device; built here, its dtype and whether it is
        compiled would follow the host's CPU.
        """
        if hasattr(self, "gpt"):
            self.gpt.load_state_dict(weights, strict=True)
        else:
            self._first_weights = weights

    def configure_model(self) -> None:
        """Build and initialise the GPT on the current default device, once: whoever calls it sets the device first."""
        if hasattr(self, "gpt"):
            return
        device = torch.get_default_device()
        if device.type == "cpu":
            runtime.keep_freed_memory()
        auto = runtime.default_compute_dtype(device)
        self.gpt = GPT(self.config, compute_dtype=DTYPES.get(self.compute_dtype, auto))
        if self._first_weights is not None:
            self.gpt.load_state_dict(self._first_weights, strict=True)
            self._first_weights = None
        elif device.type != "meta":
            self.gpt.init_weights(self.seed)
        if device.type == "cuda":
            self._say_kernel(device)
        self.compiled = runtime.should_compile(self.compile_model, device)
        if self.compiled:
            runtime.keep_compiled_code()
            self.gpt.compile(dynamic=False, fullgraph=True)

    def _say_kernel(self, device: torch.device) -> None:
        kernel = attention_kernel(self.config, self.gpt.compute_dtype, device)
        logger.info("attention by %s", kernel)
        wanted = torch.are_deterministic_algorithms_enabled()  # cuDNN's kernel is not deterministic
        if kernel == "FlashAttention 2" and not wanted and torch.cuda.get_device_capability(device)[0] == 9:
            logger.warning(
                "attention runs FlashAttention 2, which is slower than cuDNN's on this GPU: torch prefers cuDNN's from version "
                "9.15 on (this one is %s) unless that is switched off",
                torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            )

    def count_bytes_with(self, token_bytes: Tensor) -> None:
        """Prepare bits per byte: `token_bytes` (vocab_size,) holds the UTF-8 bytes of every token."""
        self.bits_per_byte = BitsPerByte(token_bytes)

    def setup(self, stage: str) -> None:
        """Take the token lengths from the data module."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.count_bytes_with(torch.tensor(data.tokenizer.token_bytes))

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Return the mean loss of a micro-batch in nats a token, a scalar; remember where the data stands."""
        loss: Tensor = self.gpt(batch.inputs, batch.targets)
        self.data_state = batch.state
        self.micro_losses.append(loss.detach())
        return loss

    def pop_losses(self) -> list[Tensor]:
        """Return the losses of the micro-batches since the last call: tensors on the device, nothing waits for it."""
        losses, self.micro_losses = self.micro_losses, []
        return losses

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Add a micro-batch to bits per byte."""
        assert self.bits_per_byte is not None
        nats = self.gpt(batch.inputs, batch.targets, reduction="none")
        self.bits_per_byte.update(nats, batch.targets.flatten())

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        assert self.bits_per_byte is not None
        self.bits_per_byte.reset()

    def on_validation_epoch_end(self) -> None:
        """Report bits per byte, pooled over ranks by nats and bytes."""
        assert self.bits_per_byte is not None
        self.log("val/bpb", self.bits_per_byte.compute(), logger=False, sync_dist=False)

    def configure_optimizers(self) -> MuonAdamW:
        """Return the one optimizer, Muon and AdamW in groups, on this module's clock."""
        recipe = self.recipe
        groups = self._groups(self.gpt)
        # Under a strategy without a reducer the optimizer is what moves gradients between ranks.
        driver: Any = self._trainer or self._fabric
        sharded = driver is not None and isinstance(driver.strategy, (ShardedStrategy, FabricShardedStrategy))
        optimizer = DistMuonAdamW if sharded else MuonAdamW
        return optimizer(
            groups,
            schedule=recipe.schedule,
            clock=self.clock,
            clip=recipe.clip or None,
            ns_dtype=self.gpt.compute_dtype,  # matmuls, too
            compiled=self.compiled,
        )

    def _groups(self, gpt: GPT) -> list[dict[str, Any]]:
        recipe = self.recipe
        return parameter_groups(
            gpt,
            embedding_lr=recipe.embedding_lr,
            head_lr=recipe.head_lr,
            matrix_lr=recipe.matrix_lr,
            weight_decay=recipe.weight_decay,
        )

    def movements(self) -> dict[str, Movement]:
        """Return how far an optimizer step of the recipe moves every weight, by name; no model is built for it."""
        with torch.device("meta"):
            gpt = GPT(self.config)
        return movements(gpt.named_parameters(), self._groups(gpt))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the data stands (all ranks' streams) and the random state."""
        checkpoint["data"] = self.gathered_data_state()
        checkpoint["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["rng_cuda"] = torch.cuda.get_rng_state()

    def gathered_data_state(self) -> dict[str, Any] | None:
        """Return where the run's data stands, all ranks' streams joined, as plain values."""
        if self.data_state is None or not (dist.is_available() and dist.is_initialized()):
            return self.data_state.to_plain() if self.data_state else None
        parts: list[DataState | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.data_state)
        return DataState.merge([part for part in parts if part is not None]).to_plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where the data stood; the loader that is made next goes on from there."""
        plain = checkpoint.get("data")
        self.data_state = DataState.from_plain(plain) if plain else None
        if checkpoint.get("rng") is not None:
            torch.set_rng_state(checkpoint["rng"].cpu())
        if checkpoint.get("rng_cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["rng_cuda"].cpu())
