from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanofed.data import streams as streams_module
from nanofed.data.packing import Tokens
from nanofed.data.rows import Row, RowPlan, RowRange
from nanofed.data.shards import Dataset, Shard, read_texts
from nanofed.data.streams import Batch, DataState, DocumentReader, TokenLoader
from nanofed.errors import ConfigError, DataError
from tests.data.corpus import Bytes, build, documents, fewer, texts

LENGTH = 16
PACKINGS = ["contiguous", "best_fit"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Training shards of 40 rows in row groups of 16: batches cross row groups, shards and epochs."""
    return build(tmp_path_factory.mktemp("streams") / "data", texts(160, 1), rows_per_group=16)


def loader(dataset: Dataset, plan: RowPlan | None = None, **changes: Any) -> TokenLoader:
    options = {"sequence_len": LENGTH, "device_batch_size": 4, "streams": 4, **changes}
    return TokenLoader(plan or RowPlan.whole(dataset), Bytes(), **options)


def lease(dataset: Dataset, *ranges: RowRange) -> RowPlan:
    return RowPlan(ranges, dataset.train, repeat=False)


def epoch(dataset: Dataset) -> RowPlan:
    """All rows, once."""
    return lease(dataset, *RowPlan.whole(dataset).ranges)


def through_json(state: DataState) -> DataState:
    return DataState.from_plain(json.loads(json.dumps(state.to_plain())))


def same(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left.inputs, right.inputs) and torch.equal(left.targets, right.targets)
        assert left.state == right.state


@pytest.mark.parametrize("streams", [1, 4, 8])
def test_every_token_is_a_target_exactly_once_an_epoch(dataset: Dataset, streams: int) -> None:
    batches = list(loader(dataset, epoch(dataset), streams=streams, device_batch_size=streams))
    assert [batch.state.rows for batch in batches] == [streams * n for n in range(1, len(batches) + 1)]
    targets: dict[int, list[int]] = {stream: [] for stream in range(streams)}
    inputs: dict[int, list[int]] = {stream: [] for stream in range(streams)}
    for batch in batches:
        for stream in range(streams):
            targets[stream] += batch.targets[stream].tolist()
            inputs[stream] += batch.inputs[stream].tolist()
    shortest = len(batches) * LENGTH
    expected = {}
    for stream in range(streams):
        rows = [
            text
            for shard in dataset.train
            for number, text in enumerate(documents(dataset, shard.name))
            if number % streams == stream
        ]
        expected[stream] = [token for text in rows for token in (256, *text.encode())]
        assert inputs[stream] == expected[stream][:shortest]
        assert targets[stream] == expected[stream][1 : shortest + 1], "rows overlap by one token"
    # It ended because some stream could not fill another row, and no earlier.
    assert min(map(len, expected.values())) < shortest + LENGTH + 1


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("device_batch_size", [1, 4, 6])  # 1 and 6 are no whole turns of the 4 streams
def test_a_resume_from_any_batch_goes_on_bit_for_bit(dataset: Dataset, packing: str, device_batch_size: int) -> None:
    def fresh() -> TokenLoader:
        return loader(dataset, packing=packing, device_batch_size=device_batch_size)

    rows_an_epoch = sum(len(text.encode()) + 1 for s in dataset.train for text in documents(dataset, s.name)) // LENGTH
    number = int(1.3 * rows_an_epoch) // device_batch_size
    batches = list(itertools.islice(fresh(), number))
    positions = [at.position for at in batches[-1].state.streams.values()]
    assert all(position is not None and position.epoch >= 1 for position in positions), "the epoch's end is in it"
    # A best-fit state names hundreds of documents, which a resume reads again: fewer of them are tried.
    for index in range(0, number - 3, 17 if packing == "best_fit" else 3 if device_batch_size == 1 else 1):
        resumed = fresh()
        resumed.load_state(through_json(batches[index].state))
        same(itertools.islice(resumed, 3), batches[index + 1 : index + 4])


@pytest.mark.parametrize("packing", PACKINGS)
def test_global_batches_are_the_same_on_1_2_4_and_8_ranks(dataset: Dataset, packing: str) -> None:
    def rows(ranks: int, state: DataState | None = None) -> dict[int, list[int]]:
        """Row number of the run -> its tokens, of 24 rows a rank and 8."""
        out = {}
        for rank in range(ranks):
            own = loader(dataset, streams=8, device_batch_size=8 // ranks, rank=rank, world_size=ranks, packing=packing)
            if state is not None:
                own.load_state(state)
            before = own.state.rows
            for batch in itertools.islice(own, 6):
                for index, row in enumerate(batch.inputs.tolist()):
                    out[before + rank + index * ranks] = row
                before = batch.state.rows
        return out

    one = rows(1)
    assert len(one) == 48
    for ranks in (2, 4, 8):
        assert rows(ranks) == one
    # "8 GPUs on 1": states of ranks join into one that any number of ranks goes on from.
    parts = []
    for rank in range(4):
        own = loader(dataset, streams=8, device_batch_size=2, rank=rank, world_size=4, packing=packing)
        parts.append(list(itertools.islice(own, 3))[-1].state)
    joined = through_json(DataState.merge(parts))
    assert joined.rows == 24 and sorted(joined.streams) == list(range(8))
    for ranks in (1, 2, 8):
        later = rows(ranks, joined)
        assert {n: row for n, row in later.items() if n < 48} == {n: row for n, row in one.items() if n >= 24}


def test_ranks_may_change_where_they_do_not_divide_the_rows_so_far(dataset: Dataset) -> None:
    one = list(itertools.islice(loader(dataset, device_batch_size=1), 9))
    state = one[2].state
    assert state.rows == 3
    rows = []
    for rank in range(2):
        own = loader(dataset, device_batch_size=3, rank=rank, world_size=2)
        own.load_state(state)
        rows += next(iter(own)).inputs.tolist()
    assert sorted(rows) == sorted(batch.inputs[0].tolist() for batch in one[3:9])


@pytest.mark.parametrize(("streams", "ranks", "advice"), [(8, 3, "2 or 4"), (8, 16, "4 or 8"), (6, 4, "2 or 3")])
def test_ranks_that_do_not_divide_the_streams_are_refused(
    dataset: Dataset, streams: int, ranks: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=f"{ranks} ranks: use {advice} ranks"):
        loader(dataset, streams=streams, world_size=ranks)


def test_wrong_options_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packing='tight' is unknown: choose contiguous or best_fit"):
        loader(dataset, packing="tight")
    with pytest.raises(DataError, match="too few rows for 64 streams"):
        loader(dataset, streams=64)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("cut", [(0, 9), (1, 1), (1, 39), (2, 0)])
def test_a_lease_that_is_extended_reads_as_the_whole_does(dataset: Dataset, packing: str, cut: tuple[int, int]) -> None:
    """However often it ends, a lease that goes on contiguously reads the same: nothing lost, nothing twice."""
    names = [shard.name for shard in dataset.train]
    shard, row = cut
    first = [RowRange(name, 0, 40) for name in names[:shard]] + ([RowRange(names[shard], 0, row)] if row else [])
    part = loader(dataset, lease(dataset, *first), packing=packing)
    begun = list(part)
    assert all(len(batch.inputs) == 4 for batch in begun), "no partial batch"
    extended = loader(dataset, epoch(dataset), packing=packing)
    extended.load_state(through_json(part.state))
    together = begun + list(extended)
    whole = list(loader(dataset, epoch(dataset), packing=packing))
    if packing == "contiguous":
        same(together, whole)
    else:  # it chose from fewer documents near the lease's end
        for batches in (together, whole):
            assert all((batch.inputs[:, 0] == 256).all() for batch in batches)
        assert abs(len(together) - len(whole)) <= 2


@pytest.mark.parametrize("characters", [0, 2_000, 1 << 26])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_group_is_read_once_and_kept_within_bounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, characters: int, ranks: int
) -> None:
    """Streams drift apart by whole row groups: one has documents ten times as long as the others."""
    drifting = [text * (10 if number // 4 % 4 == 1 else 1) for number, text in enumerate(texts(640, 4))]
    dataset = build(tmp_path / "data", drifting, rows_per_group=16)
    expected = list(loader(dataset, epoch(dataset), device_batch_size=2))
    reads: Counter[tuple[str, int]] = Counter()
    most: list[int] = []

    def counted(shard: Shard, group: int) -> list[str]:
        reads[shard.name, group] += 1
        return read_texts(shard, group)

    class Watched(DocumentReader):
        def __call__(self, row: Row) -> Tokens:
            tokens = super().__call__(row)
            kept = [len(text) for texts in self._kept.values() for text in texts.values()]
            assert sum(kept) == self._characters
            assert sum(kept) <= characters or len(self._kept) <= 4 // ranks + 2
            most.append(len(self._kept))
            return tokens

    monkeypatch.setattr(streams_module, "read_texts", counted)
    monkeypatch.setattr(streams_module, "KEPT_CHARACTERS", characters)
    monkeypatch.setattr(streams_module, "DocumentReader", Watched)
    found = loader(dataset, epoch(dataset), device_batch_size=2 // ranks, rank=ranks - 1, world_size=ranks)
    for whole, batch in zip(expected, found, strict=False):  # a rank whose documents are longer goes further
        assert torch.equal(batch.inputs, whole.inputs[ranks - 1 :: ranks])
    if characters == 1 << 26:
        assert set(reads.values()) == {1}
        assert max(most) > 4 // ranks + 2, "more than were kept at first"
    else:
        assert sum(reads.values()) > len(reads)


def test_a_lease_without_an_end_of_its_own_gives_nothing_more(dataset: Dataset) -> None:
    tiny = loader(dataset, lease(dataset, RowRange(dataset.train[0].name, 0, 4)), sequence_len=512)
    assert list(tiny) == [] and tiny.state == DataState(0, tiny.state.streams)
    assert all(at.position is None for at in tiny.state.streams.values()), "nothing was delivered, nothing has moved"


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_of_a_lost_lease_are_dropped(dataset: Dataset, packing: str) -> None:
    a, b = dataset.train[0].name, dataset.train[1].name
    begun = loader(dataset, lease(dataset, RowRange(a, 0, 40)), packing=packing)
    state = list(itertools.islice(begun, 3))[-1].state
    assert any(at.pending for at in state.streams.values())
    other = loader(dataset, lease(dataset, RowRange(b, 0, 40)), packing=packing)
    other.load_state(state)
    fresh = loader(dataset, lease(dataset, RowRange(b, 0, 40)), packing=packing)
    for left, right in zip(other, fresh, strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert left.state.streams == right.state.streams and left.state.rows == right.state.rows + state.rows


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_document_is_read_twice_where_the_place_is_lost_but_not_what_is_held(dataset: Dataset, packing: str) -> None:
    """The rows ahead went to others: what a stream still held is leased anew, and read once."""
    name = dataset.train[0].name
    begun = loader(dataset, lease(dataset, RowRange(name, 0, 40)), packing=packing)
    state = list(itertools.islice(begun, 3))[-1].state
    held = min(row.row for at in state.streams.values() for row in at.pending)
    back = lease(dataset, RowRange(name, held, held + 1), RowRange(dataset.train[1].name, 0, 40))
    again = loader(dataset, back, packing=packing)
    again.load_state(state)
    for _ in again:
        pass
    seen = Counter(row for at in again.state.streams.values() for row in at.pending)
    assert max(seen.values()) == 1
    text = documents(dataset, name)[held]
    tokens = [256, *text.encode()]
    again.load_state(state)
    stream = held % 4
    made = [token for batch in again for token in batch.inputs[stream].tolist()]
    found = sum(made[i : i + len(tokens)] == tokens for i in range(len(made)))
    assert found <= 1


def test_a_position_in_shards_that_left_the_training_set_is_refused(dataset: Dataset) -> None:
    everything = loader(dataset)
    late = next(batch.state for batch in everything if batch.state.streams[0].position[1] > dataset.train[1].name)  # type: ignore[index]
    with pytest.raises(ConfigError, match=f"{dataset.train[2].name}, which the training set no longer has"):
        loader(fewer(dataset, 2)).load_state(late)


def test_other_streams_are_refused(dataset: Dataset) -> None:
    state = next(iter(loader(dataset))).state
    for streams in (2, 8):
        with pytest.raises(ConfigError, match=rf"has 4 of them, and this run has data\.streams={streams}"):
            loader(dataset, streams=streams).load_state(state)


def test_a_state_is_plain_and_reads_only_what_is_well_formed(dataset: Dataset) -> None:
    state = list(itertools.islice(loader(dataset, packing="best_fit"), 2))[-1].state
    assert through_json(state) == state
    assert through_json(DataState(0, {})) == DataState(0, {})
    plain = state.to_plain()
    stream = plain["streams"][0]
    wrong: list[dict[str, Any]] = [
        {},
        {"rows": "3", "streams": []},
        {"rows": 1.0, "streams": []},
        {"rows": True, "streams": []},
        {"rows": -1, "streams": []},
        {"rows": float("inf"), "streams": []},
        {"rows": 1, "streams": None},
        {"rows": 1, "streams": [1]},
        {"rows": 1, "streams": [stream, stream]},
        {"rows": 1, "streams": [[0, [0, "s"], [], 0]]},
        {"rows": 1, "streams": [[0, [0, "s", 1.5], [], 0]]},
        {"rows": 1, "streams": [[0, [0, 5, 1], [], 0]]},
        {"rows": 1, "streams": [[0, [0, "s", -1], [], 0]]},
        {"rows": 1, "streams": [[0, 0, [], 0]]},
        {"rows": 1, "streams": [[0, None, [[[], "s", {}]], 0]]},
        {"rows": 1, "streams": [[0, None, 7, 0]]},
        {"rows": 1, "streams": [["0", None, [], 0]]},
        {"rows": 1, "streams": [[0, None, [], -1]]},
    ]
    for content in wrong:
        with pytest.raises((ValueError, TypeError, KeyError)):
            DataState.from_plain(content)
