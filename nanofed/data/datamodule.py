"""The LightningDataModule: shards, tokenizer and packing as one configurable object, used by both training paths."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import torch
from lightning import LightningDataModule

from nanofed import runtime
from nanofed.data.demo import prepare_demo
from nanofed.data.packing import PACKERS
from nanofed.data.rows import RowPlan
from nanofed.data.shards import Dataset, open_dataset
from nanofed.data.streams import Batch, DataState, TokenLoader, Wait
from nanofed.data.validation import ValidationLoader, ValidationText
from nanofed.errors import ConfigError, DataError
from nanofed.ranges import Count, Range, Rows, Tokens, check_numbers
from nanofed.tokenizer.bpe import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import nn


class TokenDataModule(LightningDataModule):
    """Streams parquet shards as micro-batches of tokens.

    Args:
        path: `fineweb-edu` (downloaded shards), `demo` (the offline corpus), or a folder of parquet shards.
        tokenizer: folder of a trained tokenizer, or `gpt2`; by default the one that belongs to `path`.
        device_batch_size: rows a micro-batch and rank.
        sequence_len: tokens a row; taken from the model.
        streams: fixed streams of the run; the number of ranks must divide it.
        packing: `contiguous` or `best_fit`.
        num_shards: use the first n training shards only.
        eval_tokens: targets that a validation scores: the first ones of the validation shard, all of it where it is shorter.
        validation_shard: file name of the validation shard; by default what `dataset.json` names, else the last by name.
        prefetch: micro-batches that a thread makes ahead of the step; 0 makes them in the step.

    Attributes:
        wait: the seconds that training steps of this process have waited for data so far (`wait.seconds`).

    Raises:
        ConfigError: an option is out of its range.
        DataError: on first use, there are no shards or no tokenizer, or they are damaged.

    Example:
        >>> data = nanofed.TokenDataModule("demo", device_batch_size=4, sequence_len=64)
        >>> batch = next(iter(data.loader()))
        >>> batch.inputs.shape, batch.targets.shape  # (rows, tokens) each; the targets are one token ahead
        (torch.Size([4, 64]), torch.Size([4, 64]))
    """

    def __init__(
        self,
        path: str = "fineweb-edu",
        tokenizer: str | None = None,
        device_batch_size: Rows = 32,
        sequence_len: Rows = 2048,
        streams: Annotated[int, Range(1, 1 << 16)] = runtime.DEFAULT_STREAMS,
        packing: str = "contiguous",
        num_shards: Count | None = None,
        eval_tokens: Tokens = 10_485_760,
        validation_shard: str | None = None,
        prefetch: Annotated[int, Range(0, 1 << 16)] = 4,
    ) -> None:
        check_numbers(dict(locals()), "data.", kind=TokenDataModule)
        super().__init__()
        self.path = path
        self.tokenizer_name = tokenizer
        self.device_batch_size = device_batch_size
        self.sequence_len = sequence_len
        self.streams = streams
        if packing not in PACKERS:
            raise ConfigError(f"data.packing={packing!r} is unknown: choose {' or '.join(PACKERS)}")
        self.packing = packing
        self.num_shards = num_shards
        self.eval_tokens = eval_tokens
        self.validation_shard = validation_shard
        self.prefetch = prefetch
        self.wait = Wait()
        self._text: ValidationText | None = None

    @cached_property
    def dataset(self) -> Dataset:
        """The shards, opened on first use; the demo corpus is built if it is not there."""
        if self.path == "demo":
            prepare_demo(tokenizer=False)
        return open_dataset(
            runtime.dataset_dir(self.path), validation=self.validation_shard, num_shards=self.num_shards
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use; the demo's is trained if it is not there."""
        if self.tokenizer_name == "gpt2":
            return Tokenizer.gpt2()
        if self.path == "demo" and self.tokenizer_name is None:
            prepare_demo()
        folder = runtime.user_path(self.tokenizer_name) if self.tokenizer_name else runtime.tokenizer_dir(self.path)
        if self.tokenizer_name and not folder.is_dir():
            raise DataError(
                f"data.tokenizer: there is no folder {folder}: make one with "
                f"`nanofed tokenizer train --data {self.path} --output {folder}`"
            )
        return load_tokenizer(folder)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, special ones included: the model takes its size from here."""
        return self.tokenizer.vocab_size

    def loader(
        self, plan: RowPlan | None = None, *, state: DataState | None = None, rank: int = 0, world_size: int = 1
    ) -> TokenLoader:
        """Return the training micro-batches of one rank over `plan` (by default the whole training set, endlessly)."""
        loader = TokenLoader(
            plan=plan or RowPlan.whole(self.dataset),
            tokenizer=self.tokenizer,
            sequence_len=self.sequence_len,
            device_batch_size=self.device_batch_size,
            streams=self.streams,
            rank=rank,
            world_size=world_size,
            packing=self.packing,
            prefetch=self.prefetch,
            wait=self.wait,
        )
        if state is not None:
            loader.load_state(state)
        return loader

    def validation_loader(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        share: int = 0,
        shares: int = 1,
        eval_tokens: int | None = None,
    ) -> ValidationLoader:
        """Return the validation micro-batches of one rank; `device_batch_size` and `streams` have no part in them.

        Ranks and shares are those of `ValidationLoader`; `eval_tokens` stands in the place of this module's own.
        """
        wanted = eval_tokens or self.eval_tokens
        if self._text is None or self._text.eval_tokens != wanted:
            self._text = ValidationText(
                self.dataset.validation, self.tokenizer, sequence_len=self.sequence_len, eval_tokens=wanted
            )
        return ValidationLoader(
            self._text, rank=rank, world_size=world_size, share=share, shares=shares, prefetch=self.prefetch
        )

    def train_dataloader(self) -> TokenLoader:
        """Return this rank's loader; a resumed run goes on where the module's `data_state` stands."""
        assert self.trainer is not None
        module: nn.Module = self.trainer.lightning_module
        state: DataState | None = getattr(module, "data_state", None)
        return self.loader(state=state, rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def val_dataloader(self) -> ValidationLoader:
        """Return this rank's validation loader."""
        assert self.trainer is not None
        return self.validation_loader(rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a micro-batch's tensors to the device; its data state stays."""
        return batch.to(device)
