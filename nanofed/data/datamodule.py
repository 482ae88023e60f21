"""The LightningDataModule: shards, tokenizer and packing as one configurable object, used by both training paths."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from lightning import LightningDataModule

from nanofed import runtime
from nanofed.data.prepare import prepare_demo
from nanofed.data.rows import RowPlan
from nanofed.data.shards import Dataset, open_dataset
from nanofed.data.streams import Batch, DataState, TokenLoader, Wait
from nanofed.errors import DataError
from nanofed.tokenizer import Tokenizer, load_tokenizer

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
        eval_tokens: tokens of the validation shard that a validation reads.
        validation_shard: file name of the validation shard; by default what `dataset.json` names, else the last by name.
        prefetch: micro-batches that a thread makes ahead of the step; 0 makes them in the step.

    Attributes:
        wait: the seconds that training steps of this process have waited for data so far (`wait.seconds`).
    """

    def __init__(
        self,
        path: str = "fineweb-edu",
        tokenizer: str | None = None,
        device_batch_size: int = 32,
        sequence_len: int = 2048,
        streams: int = runtime.DEFAULT_STREAMS,
        packing: str = "contiguous",
        num_shards: int | None = None,
        eval_tokens: int = 10_485_760,
        validation_shard: str | None = None,
        prefetch: int = 4,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer_name = tokenizer
        self.device_batch_size = device_batch_size
        self.sequence_len = sequence_len
        self.streams = streams
        self.packing = packing
        self.num_shards = num_shards
        self.eval_tokens = eval_tokens
        self.validation_shard = validation_shard
        self.prefetch = prefetch
        self.wait = Wait()

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
            plan or RowPlan.whole(self.dataset),
            self.tokenizer,
            sequence_len=self.sequence_len,
            device_batch_size=self.device_batch_size,
            streams=self.streams,
            rank=rank,
            world_size=world_size,
            packing=self.packing,
            prefetch=self.prefetch,
        )
        loader.wait = self.wait
        if state is not None:
            loader.load_state(state)
        return loader

    def validation_loader(
        self, *, rank: int = 0, world_size: int = 1, batches: int | None = None, batch_rows: int | None = None
    ) -> ValidationLoader:
        """Return the validation micro-batches of one rank: the first `eval_tokens` of the validation shard.

        Args:
            rank: this rank, of `world_size`.
            world_size: number of ranks.
            batches: to read at most, in the place of what `eval_tokens` makes.
            batch_rows: rows of each, in the place of `device_batch_size`.
        """
        return ValidationLoader(self, rank, world_size, batches, batch_rows)

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


class ValidationLoader(Iterable[Batch]):
    """The same validation rows every time it is iterated, at most `eval_tokens` over all ranks.

    Attributes:
        batches: at most, of this rank.
        batch_rows: rows of each.
    """

    def __init__(
        self,
        data: TokenDataModule,
        rank: int,
        world_size: int,
        batches: int | None = None,
        batch_rows: int | None = None,
    ) -> None:
        self._data = data
        self._rank = rank
        self._world_size = world_size
        self.batch_rows = batch_rows or data.device_batch_size
        per_batch = self.batch_rows * data.sequence_len * world_size
        self.batches = batches or max(1, data.eval_tokens // per_batch)

    def __iter__(self) -> Generator[Batch, None, None]:
        data = self._data
        loader = TokenLoader(
            RowPlan.validation(data.dataset),
            data.tokenizer,
            sequence_len=data.sequence_len,
            device_batch_size=self.batch_rows,
            streams=data.streams,
            rank=self._rank,
            world_size=self._world_size,
            prefetch=data.prefetch,
        )
        served = 0
        for batch in loader.take(self.batches):
            served += 1
            yield batch
        if served == 0:
            raise DataError(
                f"validation shard {data.dataset.validation.name} is too short for one batch of "
                f"{self.batch_rows} rows of {data.sequence_len} tokens: lower data.device_batch_size or data.streams"
            )
