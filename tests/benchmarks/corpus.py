"""What benchmarks read: real text with a tokenizer of the size that is asked for, kept between runs, or random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.data.shards import Dataset, all_texts, open_dataset
from nanofed.data.streams import Batch, DataState
from tests.benchmarks.machine import ROOT
from tests.benchmarks.report import progress

SYNTHETIC = "synthetic"
UNION = "union"
SHARDS = 8  # for training; one more is for validation


def default_data() -> str:
    """Return the folder of real text beside the checkout, else the name of the demo corpus."""
    folder = ROOT.parent / "shared" / "data" / "cpp-docs"
    return str(folder) if folder.is_dir() else "demo"


def texts(dataset: Dataset) -> Iterator[str]:
    """Return the training documents."""
    return chain.from_iterable(map(all_texts, dataset.train))


def equal_parts(parts: Mapping[str, str]) -> str:
    """Write parts of equal bytes of several corpora's training texts, and beside them their union, whose folder is returned.

    Shard n of the union holds the documents of shard n of every part, mixed: what it has for validation is what they have.

    Args:
        parts: the folder of each part, all in one folder, and the corpus that it is taken from.
    """
    union = Path(next(iter(parts))).parent / UNION
    if union.is_dir():
        return str(union)
    found = {part: list(texts(open_dataset(runtime.dataset_dir(corpus)))) for part, corpus in parts.items()}
    sizes = {name: list(accumulate(len(text.encode()) for text in documents)) for name, documents in found.items()}
    least = min(size[-1] for size in sizes.values())
    draw, together = random.Random(0), [list[str]() for _ in range(SHARDS + 1)]
    for name, documents in found.items():
        kept = [text for text, size in zip(documents, sizes[name], strict=True) if size <= least]
        draw.shuffle(kept)
        shards = [kept[number :: SHARDS + 1] for number in range(SHARDS + 1)]
        _write(shards, Path(name))
        for mixed, shard in zip(together, shards, strict=True):
            mixed += shard
    for mixed in together:
        draw.shuffle(mixed)
    temporary = union.with_suffix(".tmp")
    _write(together, temporary)
    temporary.rename(union)
    return str(union)


def _write(shards: Sequence[list[str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        pq.write_table(pa.table({"text": shard}), folder / f"shard_{number:05d}.parquet", row_group_size=64)


def tokenizer_folder(data: str, vocab_size: int) -> Path:
    """Return the folder of a tokenizer trained on a corpus, of at most `vocab_size` tokens; trains it the first time."""
    dataset = open_dataset(runtime.dataset_dir(data))
    folder = runtime.base_dir() / "bench" / f"tokenizer_{dataset.fingerprint()[:12]}_{vocab_size}"
    if not folder.is_dir():
        from nanofed.tokenizer.training import train_tokenizer  # not every machine that trains models has rustbpe

        progress(f"training a tokenizer of {vocab_size:,} on {dataset.path.name}, once")
        tokenizer = train_tokenizer(texts(dataset), vocab_size=vocab_size)
        temporary = folder.with_suffix(".tmp")
        tokenizer.save(temporary)
        temporary.rename(folder)
    return folder


def data_module(
    data: str, vocab_size: int, *, sequence_len: int, device_batch_size: int, packing: str
) -> TokenDataModule:
    """Return the data module over a corpus, with a tokenizer of the size asked for."""
    return TokenDataModule(
        str(runtime.dataset_dir(data)),
        tokenizer=str(tokenizer_folder(data, vocab_size)),
        sequence_len=sequence_len,
        device_batch_size=device_batch_size,
        packing=packing,
    )


def random_batches(vocab_size: int, *, sequence_len: int, device_batch_size: int) -> Iterator[Batch]:
    """Yield batches of random tokens for ever: for machines without a corpus, and to leave the data's cost out."""
    generator = torch.Generator().manual_seed(0)
    pinned = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # as TokenLoader's are
    made = []
    for _ in range(8):
        tokens = torch.randint(vocab_size, (device_batch_size, sequence_len + 1), generator=generator)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if pinned:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        made.append(Batch(inputs, targets, DataState(0, {})))
    while True:
        yield from made
