from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nanofed.data.rows import Row, RowPlan, RowRange
from nanofed.data.shards import Dataset
from nanofed.errors import DataError
from tests.data.corpus import build, texts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tmp_path_factory.mktemp("rows") / "data", texts(120, 0))


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_streams_together_walk_every_row_once_an_epoch(dataset: Dataset, streams: int) -> None:
    plan = RowPlan.whole(dataset)
    rows_an_epoch = sum(shard.num_rows for shard in dataset.train)
    seen: list[Row] = []
    for stream in range(streams):
        own = list(itertools.takewhile(lambda row: row.epoch < 2, plan.walk(stream, streams, None)))
        assert own == sorted(own), "epochs, shards and rows in order"
        assert all(row.row % streams == stream for row in own)
        seen += own
    assert len(seen) == len(set(seen)) == 2 * rows_an_epoch


def test_a_walk_goes_on_from_every_row(dataset: Dataset) -> None:
    plan = RowPlan.whole(dataset)
    whole = list(itertools.islice(plan.walk(1, 4, None), 100))
    for index, row in enumerate(whole[:-1]):
        position = row._replace(row=row.row + 1)
        assert next(iter(plan.walk(1, 4, position))) == whole[index + 1]


def test_a_lease_is_walked_in_its_order_and_its_epochs(dataset: Dataset) -> None:
    a, b = dataset.train[0].name, dataset.train[1].name
    plan = RowPlan([RowRange(b, 5, 9, 3), RowRange(a, 0, 2, 4), RowRange(b, 0, 3, 4)], dataset.train, repeat=False)
    walked = [row for stream in range(2) for row in plan.walk(stream, 2, None)]
    assert walked == [
        *[Row(3, b, 6), Row(3, b, 8), Row(4, a, 0), Row(4, b, 0), Row(4, b, 2)],
        *[Row(3, b, 5), Row(3, b, 7), Row(4, a, 1), Row(4, b, 1)],
    ]
    assert plan.holds(Row(3, b, 5)) and not plan.holds(Row(4, b, 5)), "the same row of another epoch is another"
    assert plan.locate(Row(3, b, 9)) == 0 and plan.locate(Row(3, b, 10)) is None


def test_a_range_that_ends_where_an_earlier_one_begins_is_left_at_its_own_end(dataset: Dataset) -> None:
    name = dataset.train[0].name
    plan = RowPlan([RowRange(name, 8, 12), RowRange(name, 4, 8)], dataset.train, repeat=False)
    walked = list(plan.walk(1, 2, None))
    assert [row.row for row in walked] == [9, 11, 5, 7]
    assert list(plan.walk(1, 2, Row(0, name, 8))) == [], "row 7 was its last"
    assert [row.row for row in plan.walk(1, 2, Row(0, name, 12))] == [5, 7]


def test_an_empty_lease_ends_at_once(dataset: Dataset) -> None:
    assert list(RowPlan([], dataset.train, repeat=False).walk(0, 2, None)) == []


def test_rows_that_are_not_there_are_named(dataset: Dataset) -> None:
    name, rows = dataset.train[0].name, dataset.train[0].num_rows
    for part in (RowRange(name, 0, rows + 1), RowRange(name, -1, 2), RowRange(name, 3, 3), RowRange(name, 4, 3)):
        with pytest.raises(DataError, match=f"rows {part.start} to {part.stop} of {name}"):
            RowPlan([part], dataset.train, repeat=False)
    with pytest.raises(DataError, match=r"other\.parquet"):
        RowPlan([RowRange("other.parquet", 0, 1)], dataset.train, repeat=False)
    validation = dataset.validation.name
    with pytest.raises(DataError, match=validation):
        RowPlan([RowRange(validation, 0, 1)], dataset.train, repeat=False)


def test_too_few_rows_for_the_streams_are_refused(tmp_path: Path) -> None:
    small = build(tmp_path / "data", ["text"] * 16, shards=3)  # 4 rows a shard: streams 4 to 7 would get none
    plan = RowPlan.whole(small)
    plan.check_streams(4)
    with pytest.raises(DataError, match=r"too few rows for 8 streams \(streams \[4, 5, 6, 7\]"):
        plan.check_streams(8)
