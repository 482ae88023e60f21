"""Build what the demo needs: its corpus and a small tokenizer, offline, in seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from filelock import FileLock

from nanofed import runtime
from nanofed.data.demo import build_demo_corpus
from nanofed.data.shards import Dataset, read_texts
from nanofed.errors import NanofedError
from nanofed.tokenizer import train_tokenizer
from nanofed.tokenizer.storage import has_tokenizer

logger = logging.getLogger(__name__)

DEMO_VOCAB_SIZE = 2048  # the head is most of a tiny model's work


def prepare_demo(*, tokenizer: bool = True) -> None:
    """Build the demo corpus, and train its tokenizer, where they are not there yet; says so in a line each."""
    folder, tokenizer_folder = runtime.dataset_dir("demo"), runtime.tokenizer_dir("demo")
    try:
        runtime.make_folder(folder.parent)
    except NanofedError:
        if (folder / "dataset.json").is_file() and (not tokenizer or has_tokenizer(tokenizer_folder)):
            return  # a cache that others share and nobody may write: all that is wanted is there
        raise
    with FileLock(folder.parent / "prepare.lock"):
        if not (folder / "dataset.json").is_file():
            logger.info("building the demo corpus in %s", folder)
        dataset = build_demo_corpus(folder)
        if tokenizer and not has_tokenizer(tokenizer_folder):
            logger.info("training its tokenizer of %s tokens in %s", f"{DEMO_VOCAB_SIZE:,}", tokenizer_folder)
            train_tokenizer(_texts(dataset), vocab_size=DEMO_VOCAB_SIZE).save(tokenizer_folder)


def _texts(dataset: Dataset) -> Iterator[str]:
    for shard in dataset.train:
        for group in range(len(shard.row_group_rows)):
            yield from read_texts(shard, group)
