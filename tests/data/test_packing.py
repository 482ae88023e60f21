from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest

from nanofed.data.packing import BestFitPacker, ContiguousPacker, Exhausted, StreamState, Tokens
from nanofed.data.rows import Row

BOS = -1


def rows(count: int, start: int = 0) -> Iterator[Row]:
    return (Row(0, "s", number) for number in range(start, count))


def reader(lengths: list[int]) -> dict[int, Tokens]:
    """Documents of distinct tokens, so that every token's place is known; BOS first."""
    numbers = itertools.count()
    return {n: np.array([BOS, *itertools.islice(numbers, length)], np.int32) for n, length in enumerate(lengths)}


def random_lengths(seed: int, count: int, longest: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, longest, count)]


def drain(packer: ContiguousPacker | BestFitPacker) -> list[Tokens]:
    out = []
    while True:
        try:
            out.append(packer.next_row())
        except Exhausted:
            return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("buffer_size", [1, 4, 128])
def test_best_fit_rows_begin_a_document_and_every_token_is_accounted_for(seed: int, buffer_size: int) -> None:
    docs = reader(random_lengths(seed, 200, 50))
    packer = BestFitPacker(rows(200), lambda row: docs[row.row], StreamState(), 24, buffer_size=buffer_size)
    made = drain(packer)
    assert made and all(row[0] == BOS and len(row) == 25 for row in made)
    held = sum(len(docs[row.row]) for row in packer.state.pending)
    assert 25 * len(made) + packer.cropped_tokens + held == sum(map(len, docs.values()))
    tokens = np.concatenate(made)
    tokens = tokens[tokens != BOS]
    assert len(np.unique(tokens)) == len(tokens), "no token twice"
    whole = {tuple(document) for document in docs.values()}
    for row in made:
        parts = np.split(row, np.flatnonzero(row == BOS)[1:])
        assert all(tuple(part) in whole for part in parts[:-1]), "only the last document of a row may be cropped"
        assert any(document[: len(parts[-1])] == tuple(parts[-1]) for document in whole)


def test_best_fit_reads_on_where_its_buffer_cannot_fill_a_row() -> None:
    docs = reader([2] * 1000)
    packer = BestFitPacker(rows(1000), lambda row: docs[row.row], StreamState(), 599, buffer_size=128)
    assert len(drain(packer)) == 5, "3000 tokens in all, 384 in 128 documents"


def test_best_fit_takes_the_longest_that_fits_and_crops_the_shortest() -> None:
    docs = reader([1, 8, 4, 8, 20, 30])  # with BOS: 2, 9, 5, 9, 21, 31
    packer = BestFitPacker(rows(6), lambda row: docs[row.row], StreamState(), 15)
    first = packer.next_row()  # 16 tokens: 9 (the first of two), 5, 2
    assert [row.row for row in packer.state.pending] == [3, 4, 5] and packer.cropped_tokens == 0
    assert (first == np.concatenate([docs[1], docs[2], docs[0]])).all()
    second = packer.next_row()  # 9, then 7 of the shortest left: 21
    assert (second == np.concatenate([docs[3], docs[4][:7]])).all() and packer.cropped_tokens == 14
    assert [row.row for row in packer.state.pending] == [5]


def obvious_contiguous(docs: dict[int, Tokens], length: int) -> Iterator[tuple[list[int], int, list[int], int]]:
    """Row, documents read, documents pending and offset, from one long list of (token, document)."""
    stream = [(int(token), number) for number, tokens in docs.items() for token in tokens]
    for start in range(0, len(stream) - length, length):
        end = start + length  # its token is the last target, and the first input of the next row
        number = stream[end][1]
        read = number + 1
        offset = end - stream.index((int(docs[number][0]), number))
        yield [token for token, _ in stream[start : end + 1]], read, list(range(number, read)), offset


def obvious_best_fit(
    docs: dict[int, Tokens], length: int, buffer_size: int
) -> Iterator[tuple[list[int], int, list[int], int]]:
    """The same by looking through a list of the documents held, again for every choice."""
    held: list[int] = []
    read = 0
    while True:
        row: list[int] = []
        while len(row) <= length:
            room = length + 1 - len(row)
            while read < len(docs) and (len(held) < buffer_size or sum(len(docs[n]) for n in held) < room):
                held.append(read)
                read += 1
            if sum(len(docs[n]) for n in held) < room:
                return
            fitting = [n for n in held if len(docs[n]) <= room]
            chosen = max(fitting, key=lambda n: len(docs[n])) if fitting else min(held, key=lambda n: len(docs[n]))
            held.remove(chosen)  # max and min take the first of equals
            row += docs[chosen][:room].tolist()
        yield row, read, list(held), 0


@pytest.mark.parametrize("seed", range(25))
def test_rows_and_states_are_those_of_the_obvious_ways(seed: int) -> None:
    chance = np.random.default_rng(seed)
    spans = ((0, 120), (1, 60), (1, 40), (1, 20))
    count, longest, length, buffer_size = (int(chance.integers(*span)) for span in spans)
    lengths = random_lengths(seed, count, longest)
    # A begin-of-sequence token of its own for every document, so that the list of tokens can be searched.
    docs = {n: np.array([-1 - n, *tokens[1:]], np.int32) for n, tokens in reader(lengths).items()}
    made: list[tuple[ContiguousPacker | BestFitPacker, Iterator[tuple[list[int], int, list[int], int]]]] = [
        (ContiguousPacker(rows(count), lambda r: docs[r.row], StreamState(), length), obvious_contiguous(docs, length)),
        (
            BestFitPacker(rows(count), lambda r: docs[r.row], StreamState(), length, buffer_size=buffer_size),
            obvious_best_fit(docs, length, buffer_size),
        ),
    ]
    for packer, obvious in made:
        for row, read, pending, offset in obvious:
            assert packer.next_row().tolist() == row
            held = tuple(Row(0, "s", number) for number in pending)
            assert packer.state == StreamState(Row(0, "s", read), held, offset)
        with pytest.raises(Exhausted):
            packer.next_row()


@pytest.mark.parametrize("kind", [ContiguousPacker, BestFitPacker])
def test_the_end_loses_nothing(kind: type[ContiguousPacker] | type[BestFitPacker]) -> None:
    docs = reader([5] * 40)
    packer = kind(rows(10), lambda row: docs[row.row], StreamState(), 16)
    made = drain(packer)
    with pytest.raises(Exhausted):
        packer.next_row()
    more = kind(rows(40, 10), lambda row: docs[row.row], packer.state, 16)  # the lease is extended
    made += drain(more)
    whole = drain(kind(rows(40), lambda row: docs[row.row], StreamState(), 16))
    if kind is ContiguousPacker:
        assert len(made) == len(whole) and all((a == b).all() for a, b in zip(made, whole, strict=True))
    else:  # best fit chooses among what it can see; nothing is lost or doubled
        tokens = np.concatenate(made)
        tokens = tokens[tokens != BOS]
        assert len(np.unique(tokens)) == len(tokens)
        assert len(made) == len(whole)


@pytest.mark.parametrize("kind", [ContiguousPacker, BestFitPacker])
def test_time_grows_with_the_tokens_not_faster(kind: type[ContiguousPacker] | type[BestFitPacker]) -> None:
    def seconds(count: int) -> float:
        document = np.full(40, 7, np.int32)
        packer = kind(rows(1 << 60), lambda row: document, StreamState(), 256)
        started = time.process_time()
        for _ in range(count):
            packer.next_row()
        return time.process_time() - started

    seconds(50)
    short = min(seconds(150) for _ in range(3))
    assert seconds(1500) < 30 * short, "ten times the rows"


@pytest.mark.parametrize("kind", [ContiguousPacker, BestFitPacker])
def test_one_document_far_longer_than_a_row(kind: type[ContiguousPacker] | type[BestFitPacker]) -> None:
    docs = reader([100_000, 3])
    packer = kind(rows(2), lambda row: docs[row.row], StreamState(), 16)
    started = time.process_time()
    made = drain(packer)
    assert time.process_time() - started < 5
    assert len(made) == ((100_001 + 4 - 1) // 16 if kind is ContiguousPacker else 1)
