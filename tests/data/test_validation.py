"""The validation text is one fixed list of rows, and every way of dividing it scores exactly that."""

from __future__ import annotations

import itertools
import logging
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanofed.data import shards
from nanofed.data.datamodule import TokenDataModule
from nanofed.data.shards import Dataset, all_texts, read_texts
from nanofed.data.streams import NO_DATA, Batch
from nanofed.data.validation import FORWARD_TOKENS, ValidationText, rows_at_once, tokens_of_share
from nanofed.errors import DataError
from nanofed.tokenizer.bpe import Tokenizer
from tests.data.corpus import Bytes, build, texts

LENGTH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tmp_path_factory.mktemp("validation") / "data", texts(160, 2), rows_per_group=16)


def module(dataset: Dataset, **options: Any) -> TokenDataModule:
    class Data(TokenDataModule):
        @cached_property
        def tokenizer(self) -> Tokenizer:
            return Bytes()

    return Data(str(dataset.path), **{"sequence_len": LENGTH, "eval_tokens": 500, **options})


def stream(dataset: Dataset) -> list[int]:
    """Return all tokens of the validation shard, in document order."""
    shard = dataset.validation
    documents = list(all_texts(shard))
    return [token for text in documents for token in Bytes().encode_document(text).tolist()]


def scored(batches: list[Batch]) -> list[tuple[int, int]]:
    """Return every pair of a token and its successor that counts, row by row."""
    pairs = []
    for batch in batches:
        assert batch.state == NO_DATA and batch.inputs.shape == batch.targets.shape
        counts = batch.targets >= 0
        assert not batch.inputs[~counts].any() and (batch.targets[~counts] == -1).all()
        pairs += list(zip(batch.inputs[counts].tolist(), batch.targets[counts].tolist(), strict=True))
    return pairs


def rank_batches(data: TokenDataModule, ranks: int, **options: Any) -> list[list[Batch]]:
    return [list(data.validation_loader(rank=rank, world_size=ranks, **options)) for rank in range(ranks)]


@pytest.mark.parametrize("eval_tokens", [1, 15, 16, 17, 500, 512, 1000])
def test_exactly_the_first_tokens_are_scored_in_document_order(dataset: Dataset, eval_tokens: int) -> None:
    """Also where they are no whole rows, or less than one."""
    tokens = stream(dataset)
    assert len(tokens) > 1001
    found = scored(list(module(dataset, eval_tokens=eval_tokens).validation_loader()))
    assert found == list(itertools.pairwise(tokens[: eval_tokens + 1]))


def test_the_rows_do_not_depend_on_batch_streams_or_prefetch(dataset: Dataset) -> None:
    expected = list(module(dataset).validation_loader())
    for size, streams, prefetch, packing in [(1, 1, 0, "best_fit"), (3, 5, 1, "contiguous"), (4096, 64, 7, "best_fit")]:
        options = {"device_batch_size": size, "streams": streams, "prefetch": prefetch, "packing": packing}
        found = list(module(dataset, **options).validation_loader())
        assert len(found) == len(expected)
        assert all(
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
            for a, b in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize("shares", [1, 2, 3, 7, 64])
def test_shares_and_ranks_divide_it_by_whole_passes(dataset: Dataset, ranks: int, shares: int) -> None:
    """Each pass is scored once, with the rows that it has on one rank, and all ranks of a share have as many."""
    data = module(dataset)
    whole = {tuple(batch.targets.flatten().tolist()) for batch in data.validation_loader()}
    assert len(whole) == 8
    found, most = [], tokens_of_share(LENGTH, 500, shares)
    for share in range(shares):
        own = rank_batches(data, ranks, share=share, shares=shares)
        assert len({len(batches) for batches in own}) == 1
        assert sum(int((batch.targets >= 0).sum()) for batches in own for batch in batches) <= most
        found += [tuple(batch.targets.flatten().tolist()) for batches in own for batch in batches]
    counted = [targets for targets in found if max(targets) >= 0]
    assert sorted(counted) == sorted(whole)
    assert len(found) - len(counted) <= shares * (ranks - 1)


def test_a_forward_pass_is_of_the_same_size_everywhere() -> None:
    assert rows_at_once(2048, 10_485_760) == rows_at_once(2048, 10**12) == 4
    assert rows_at_once(256, 65_536) == 32
    assert rows_at_once(FORWARD_TOKENS + 1, 10**9) == 1  # a row that is longer goes alone
    assert rows_at_once(32, 512) == 2, "a short text has a pass for each of 8 ranks"
    assert rows_at_once(32, 1) == 1


def test_a_shorter_shard_is_scored_whole_and_says_so_once(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    tokens = stream(dataset)
    data = module(dataset, eval_tokens=1_000_000)
    with caplog.at_level(logging.INFO, logger="nanofed"):
        for _ in range(3):
            assert scored(list(data.validation_loader())) == list(itertools.pairwise(tokens))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"validation: {len(tokens) - 1:,} of the 1,000,000 tokens asked for: the shard is shorter"]


def test_a_shard_that_is_long_enough_says_nothing(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nanofed"):
        list(module(dataset, eval_tokens=len(stream(dataset)) - 1).validation_loader())
    assert not caplog.records


@pytest.mark.parametrize(("last", "targets"), [("", 0), ("a", 1), ("abc", 3)])
def test_a_shard_shorter_than_a_row_is_one_padded_row_or_named(tmp_path: Path, last: str, targets: int) -> None:
    tiny = build(tmp_path / "data", ["some text", last], shards=1)
    data = module(tiny)
    if targets:
        assert len(scored(list(data.validation_loader()))) == targets
    else:
        with pytest.raises(DataError, match=f"{tiny.validation.name} holds no text to score"):
            list(data.validation_loader())


def test_it_is_tokenized_once(dataset: Dataset) -> None:
    encoded = []

    class Counted(Bytes):
        def encode_document(self, text: str) -> Any:
            encoded.append(text)
            return super().encode_document(text)

    text = ValidationText(dataset.validation, Counted(), sequence_len=LENGTH, eval_tokens=500)
    next(iter(text))
    assert len(encoded) < 5, "the first row does not wait for the whole text"
    first = list(text)
    count = len(encoded)
    assert all(np.array_equal(a, b) for a, b in zip(text, first, strict=True)) and len(encoded) == count


def test_threads_that_read_at_once_get_the_same_rows(dataset: Dataset) -> None:
    text = ValidationText(dataset.validation, Bytes(), sequence_len=3, eval_tokens=900)
    found: list[list[list[int]]] = []

    def read() -> None:
        found.append([row.tolist() for row in text])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(rows == found[0] for rows in found) and len(found[0]) == 300


def test_after_an_error_it_is_the_same_text(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails in the middle ends this reading; the next one must not take what was read for all of it."""
    expected = [row.tolist() for row in ValidationText(dataset.validation, Bytes(), sequence_len=3, eval_tokens=900)]
    calls = itertools.count(1)

    def unsteady(*args: Any) -> list[str]:
        if next(calls) in (2, 4):
            raise DataError("the disk is gone")
        return read_texts(*args)

    monkeypatch.setattr(shards, "read_texts", unsteady)
    text = ValidationText(dataset.validation, Bytes(), sequence_len=3, eval_tokens=900)
    for _ in range(2):
        with pytest.raises(DataError, match="the disk is gone"):
            list(text)
    assert [row.tolist() for row in text] == expected
