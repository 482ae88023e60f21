"""Random federations over real shards and the real loader: what the ledger merges is what was trained, once an epoch."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanofed.data.packing import StreamState, Tokens
from nanofed.data.rows import Row, RowPlan, RowRange
from nanofed.data.shards import Dataset
from nanofed.data.streams import Batch, DataState, TokenLoader
from nanofed.errors import DataError
from nanofed.federated.server.ledger import FREE, LEASED, MERGED, UNMERGED_ROUNDS, Ledger, LocalLedger, ledger_figures
from nanofed.federated.wire.messages import SiteShard
from tests.data.corpus import Bytes, build, fewer
from tests.federated.replies import instructions, report

STREAMS = 4
LENGTH = 16
LONGEST = 40
SHARDS = 3
ROWS = 24  # a shard


class Numbered(Bytes):
    """The text "7:12   " is the twelve tokens 700 to 711: a target says which token of which document it is."""

    def encode_document(self, text: str) -> Tokens:
        number, length = map(int, text.split(":"))
        return np.array([0, *((number + 1) * 100 + index for index in range(length))], np.int32)


def length_of(number: int) -> int:
    return 1 + number * 7919 % LONGEST


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # Document n is row n // 4 of shard n % 4; two bytes a token, as the ledger guesses.
    texts = [f"{n}:{length_of(n)}".ljust(2 * length_of(n)) for n in range((SHARDS + 1) * ROWS)]
    return build(tmp_path_factory.mktemp("ledger") / "data", texts, shards=SHARDS, rows_per_group=ROWS)


def number_of(row: Row) -> int:
    return row.row * (SHARDS + 1) + int(row.shard.removeprefix("shard_").removesuffix(".parquet"))


def loader(dataset: Dataset, plan: RowPlan, packing: str, state: DataState | None) -> TokenLoader:
    out = TokenLoader(
        plan, Numbered(), sequence_len=LENGTH, device_batch_size=STREAMS, streams=STREAMS, packing=packing
    )
    if state is not None:
        out.load_state(state)
    return out


def leased_loader(dataset: Dataset, ledger: Ledger, client: str, packing: str) -> TokenLoader:
    return loader(dataset, RowPlan(ledger.held(client), dataset.train, repeat=False), packing, ledger.data(client))


def reloaded(ledger: Ledger, dataset: Dataset, *, through: str) -> Ledger:
    """A ledger as a server finds it after a restart."""
    plain = ledger.state_dict()
    if through == "json":
        plain = json.loads(json.dumps(plain))
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        buffer.seek(0)
        plain = torch.load(buffer, weights_only=True)
    other = Ledger(dataset.train, STREAMS)
    other.load_state_dict(plain)
    assert other.state_dict() == ledger.state_dict()
    return other


def merges(ledger: Ledger) -> Counter[Row]:
    """How often every row was merged, over all epochs, out of the saved state."""
    state = ledger.state_dict()
    counts: Counter[Row] = Counter()
    opened = {(epoch, name): runs for epoch, name, runs in state["rows"]}
    for name, newest in state["epoch"].items():
        closed = sum((epoch, name) not in opened for epoch in range(newest))
        for row in range(ROWS):
            counts[Row(0, name, row)] = closed
    for (_, name), runs in opened.items():
        row = 0
        for value, length in runs:
            for number in range(row, row + length):
                counts[Row(0, name, number)] += value == MERGED
            row += length
        assert row == ROWS
    return counts


def check_conservation(ledger: Ledger) -> None:
    """Every row of an opened epoch is free, merged, or on lease to exactly one client."""
    holders: Counter[Row] = Counter()
    for client in ledger.clients():
        own = [Row(p.epoch, p.shard, n) for p in ledger.held(client) for n in range(p.start, p.stop)]
        assert len(own) == len(set(own))
        holders.update(own)
    assert max(holders.values(), default=0) <= 1
    seen: set[Row] = set()
    for epoch, name, runs in ledger.state_dict()["rows"]:
        values = np.repeat(*np.array(runs).T)
        for number, value in enumerate(values):
            row = Row(epoch, name, number)
            seen.add(row)
            assert value in (FREE, LEASED, MERGED)
            assert holders[row] == 1 if value == LEASED else value == MERGED or holders[row] == 0
    assert set(holders) <= seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_random_federations_merge_what_was_trained_once_an_epoch(
    dataset: Dataset, packing: str, count: Callable[[int, int], int]
) -> None:
    for seed in range(count(3, 60)):
        simulate(dataset, packing, seed)


def simulate(dataset: Dataset, packing: str, seed: int) -> None:
    generator = random.Random(f"{packing}{seed}")
    ledger = Ledger(dataset.train, STREAMS)
    trained: Counter[int] = Counter()  # document -> how often its first (best fit) or last token was a merged target
    slack: Counter[int] = Counter()  # document -> how often it was given back when it had been begun
    merged = 0
    before = merges(ledger)

    def give_back(client: str) -> None:
        state = ledger.data(client)
        slack.update(number_of(row) for at in (state.streams.values() if state else ()) for row in at.pending)
        free = sum(int((rows == FREE).sum()) for rows in ledger._rows.values())
        returned = ledger.release(client)
        assert sum(int((rows == FREE).sum()) for rows in ledger._rows.values()) == free + returned
        assert ledger.held(client) == () and ledger.data(client) is None

    for _ in range(60):
        present = generator.sample([f"client-{n}" for n in range(5)], generator.randint(1, 4))
        for client in set(ledger.clients()) - set(present):
            give_back(client)
        for client in present:
            lease = ledger.lease(client, generator.randint(1, 600), spare_rows=generator.randint(0, 40))
            assert lease == ledger.held(client)
        check_conservation(ledger)
        for client in generator.sample(present, len(present)):
            batches = list(itertools.islice(leased_loader(dataset, ledger, client, packing), generator.randint(0, 8)))
            if not batches or generator.random() < 0.2:  # it failed, or its answer was refused
                give_back(client)
                continue
            merged += ledger.commit(client, batches[-1].state)
            targets = [int(token) for batch in batches for token in batch.targets.flatten() if token >= 100]
            for token in targets:
                number, index = token // 100 - 1, token % 100
                trained[number] += index == (0 if packing == "best_fit" else length_of(number) - 1)
        after = merges(ledger)
        assert all(after[row] >= before[row] for row in before), "what is merged stays merged"
        before = after
        assert ledger.merged_rows() == merged == sum(after.values())
        held, shards = ledger_figures(ledger.state_dict())
        assert sum(figures["epochs_merged"] * ROWS for figures in shards.values()) == pytest.approx(merged)
        assert held == {name: sum(p.stop - p.start for p in ledger.held(name)) for name in ledger.clients()}
        check_conservation(ledger)
        if generator.random() < 0.3:
            ledger = reloaded(ledger, dataset, through=generator.choice(["json", "torch"]))

    for client in ledger.clients():
        give_back(client)
    assert merged > len(dataset.train) * ROWS, "more than one epoch"
    for row, times in merges(ledger).items():
        number = number_of(row)
        if packing == "contiguous":
            assert trained[number] >= times, f"{row} counts as merged, its last token was never trained"
        assert trained[number] <= times + slack[number], f"{row} was trained oftener than it is counted"


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_one_client_reads_as_the_vanilla_plan_whatever_the_rounds(dataset: Dataset, packing: str) -> None:
    for seed in range(4):
        generator = random.Random(seed)
        ledger = Ledger(dataset.train, STREAMS)
        read: list[Batch] = []
        while len(read) < 60:
            steps = generator.randint(1, 9)
            # Far too much at first and now and then: what is not reached is given back, the order stays.
            tokens = steps * STREAMS * LENGTH * generator.choice([1, 1, 1, 40])
            ledger.lease("one", tokens, spare_rows=STREAMS * (8 if packing == "contiguous" else 160))
            batches = list(itertools.islice(leased_loader(dataset, ledger, "one", packing), steps))
            assert len(batches) == steps
            ledger.commit("one", batches[-1].state)
            read += batches
            if generator.random() < 0.5:
                ledger = reloaded(ledger, dataset, through="json")
        whole = loader(dataset, RowPlan.whole(dataset), packing, None)
        for batch, expected in zip(read, whole, strict=False):
            assert torch.equal(batch.inputs, expected.inputs) and torch.equal(batch.targets, expected.targets)


def test_a_client_of_unknown_speed_gives_back_what_it_does_not_need(dataset: Dataset) -> None:
    ledger = Ledger(dataset.train, STREAMS)
    ledger.lease("a", 100_000)
    taken = sum(part.stop - part.start for part in ledger.held("a"))
    batches = list(itertools.islice(leased_loader(dataset, ledger, "a", "contiguous"), 2))
    ledger.commit("a", batches[-1].state)
    ledger.lease("a", 64)
    assert sum(part.stop - part.start for part in ledger.held("a")) < taken / 4
    check_conservation(ledger)


def test_the_least_progressed_shard_comes_first_and_ties_go_by_name(dataset: Dataset) -> None:
    a, b, c = (shard.name for shard in dataset.train)
    ledger = Ledger(dataset.train, STREAMS)
    assert ledger.lease("one", 1) == (RowRange(a, 0, STREAMS),), "whole turns of the streams"
    assert ledger.lease("two", 1)[0].shard == b
    assert ledger.lease("three", 1)[0].shard == c
    ledger.release("two")
    assert ledger.lease("four", 1)[0] == RowRange(b, 0, STREAMS), "what was given back is the least taken again"
    assert ledger.lease("five", 1)[0] == RowRange(a, STREAMS, 2 * STREAMS), "all alike: by name, after what is taken"


def test_rows_come_back_although_the_next_epoch_has_begun(dataset: Dataset) -> None:
    ledger = Ledger(dataset.train, STREAMS)
    text = SHARDS * ROWS * LONGEST
    ledger.lease("slow", 200)
    slow = ledger.held("slow")
    ledger.lease("fast", text)
    assert any(part.epoch == 1 for part in ledger.held("fast")), "it has run into the second epoch"
    ledger.release("slow")
    assert ledger.lease("late", 1)[0] in {RowRange(p.shard, p.start, p.start + STREAMS, 0) for p in slow}


@pytest.mark.parametrize("stride", [None, (0, 2)])
def test_scattered_rows_of_one_stream_leave_no_other_without_text(stride: tuple[int, int] | None) -> None:
    """Clients that came and went have left single rows of one stream in many epochs: more than one lease may take."""
    ledger = Ledger([SiteShard("shard", 40, 400, "f")], STREAMS)
    for epoch in range(150):
        rows = ledger._open(epoch, "shard")
        rows[:] = MERGED
        rows[1::STREAMS] = FREE
    ledger._epoch["shard"] = 149
    for client in ("a", "b"):
        lease = ledger.lease(client, 64, stride=stride)
        read = Counter(row % STREAMS for part in lease for row in range(part.start, part.stop))
        assert min(read[stream] for stream in range(STREAMS)) >= 64 * 5 / 10 / STREAMS
        assert max(part.epoch for part in lease) >= 150
    held = [*ledger.held("a"), *ledger.held("b")]
    taken = [(part.epoch, row) for part in held for row in range(part.start, part.stop)]
    assert len(taken) == len(set(taken))


def test_epochs_close_one_shard_at_a_time(dataset: Dataset) -> None:
    ledger = Ledger(dataset.train, STREAMS)
    first = dataset.train[0].name
    part = ledger.lease("one", 0, spare_rows=ROWS // STREAMS)
    assert {p.shard for p in part} == {first} and part[0].stop == ROWS
    done = DataState(0, {s: StreamState(Row(0, first, ROWS - STREAMS + s + 1)) for s in range(STREAMS)})
    assert ledger.commit("one", done) == ROWS
    assert ledger_figures(ledger.state_dict())[1][first] == {"epochs_merged": 1.0, "rows_leased": 0}
    assert ledger.merged_rows() == ROWS
    assert ledger.held("one") == () and ledger.state_dict()["rows"] == [], "a closed epoch takes no memory"
    assert ledger.lease("one", 1)[0].shard == dataset.train[1].name


def test_a_commit_goes_no_further_than_positions_and_pending_rows(dataset: Dataset) -> None:
    name = dataset.train[0].name
    ledger = Ledger(dataset.train, STREAMS)
    ledger.lease("one", 10_000)
    at = {
        0: StreamState(Row(0, name, 9), (Row(0, name, 4),)),  # read 0 4 8, still holds 4
        1: StreamState(),  # has read nothing
        2: StreamState(Row(0, name, 3)),  # read 2
        3: StreamState(Row(0, name, 8), (Row(0, name, 7),), 5),  # read 3 and 7, holds 7
    }
    assert ledger.commit("one", DataState(4, at)) == 4
    assert [row.row for row, times in merges(ledger).items() if times] == [0, 2, 3, 8]
    assert ledger.commit("one", DataState(4, at)) == 0, "twice is once"
    held = sum(part.stop - part.start for part in ledger.held("one"))
    assert ledger.release("one") == held - 4
    assert ledger.release("one") == 0 and ledger.release("nobody") == 0


def test_a_client_that_is_away_for_a_while_goes_on_where_it_stood(dataset: Dataset) -> None:
    ledger = Ledger(dataset.train, STREAMS)
    lease = ledger.lease("one", 100)
    ledger.commit("one", DataState(0, {stream: StreamState() for stream in range(STREAMS)}))
    for _ in range(2):
        for _ in range(UNMERGED_ROUNDS - 1):
            ledger.miss("one")
            ledger = reloaded(ledger, dataset, through="json")
        assert ledger.held("one") == lease
        assert ledger.lease("one", 100) == lease, "it is back"
        ledger.commit("one", DataState(0, {stream: StreamState() for stream in range(STREAMS)}))  # and merged
    for _ in range(UNMERGED_ROUNDS):
        ledger.miss("one")
    assert ledger.clients() == () and ledger.lease("two", 100) == lease


def test_the_ledger_of_other_shards_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    ledger = Ledger(dataset.train, STREAMS)
    ledger.lease("one", 10)
    fewer_shards = Ledger(fewer(dataset, 2).train, STREAMS)
    other_rows = Ledger(build(tmp_path / "other", ["text"] * 40, shards=SHARDS).train, STREAMS)
    for other in (fewer_shards, other_rows):
        before: dict[str, Any] = other.state_dict()
        with pytest.raises(DataError, match="over other shards"):
            other.load_state_dict(ledger.state_dict())
        assert other.state_dict() == before


def rows_of(parts: tuple[RowRange, ...]) -> list[tuple[int, str, int]]:
    return [(part.epoch, part.shard, row) for part in parts for row in range(part.start, part.stop)]


def whole_of(parts: tuple[RowRange, ...], streams: int) -> DataState:
    """The streams have read a lease to its end."""
    last = parts[-1]
    return DataState(0, {n: StreamState(Row(last.epoch, last.shard, last.stop)) for n in range(streams)})


def test_with_a_stride_every_site_reads_the_whole_set_and_no_row_twice() -> None:
    ledger = Ledger([SiteShard(f"s{n}", 40, 40 * 5, "f") for n in range(3)], 2)  # a token a row
    seen: Counter[tuple[int, str, int]] = Counter()
    owner: dict[tuple[int, str, int], int] = {}
    for _ in range(6):
        for part in range(3):
            lease = ledger.lease(str(part), 8, stride=(part, 3))
            assert len(lease) > 1
            owner |= dict.fromkeys(rows_of(lease), part)
            seen.update(rows_of(lease))
            ledger.commit(str(part), whole_of(lease, 2))
            ledger.release(str(part))
    assert set(seen.values()) == {1}
    first = [row for row in seen if row[0] == 0]
    assert len(first) == 120, "the first epoch is read whole before the second goes on"
    strided = [row for row in first if owner[row] == row[2] // 2 % 3]
    assert len(strided) / len(first) > 0.8, "but for what others left over, each reads its own stretches"
    for part in range(3):
        assert {row[1] for row in first if owner[row] == part} == {"s0", "s1", "s2"}


def test_with_a_stride_what_absent_clients_leave_is_read_by_those_who_are_there() -> None:
    ledger = Ledger([SiteShard("s", 24, 24 * 5, "f")], 2)
    for part in (0, 1):
        ledger.lease(str(part), 4, stride=(part, 2))
    ledger.release("1")
    rows: list[tuple[int, str, int]] = []
    lease: tuple[RowRange, ...] = ()
    while not any(part.epoch for part in lease):
        lease = ledger.lease("0", 4, stride=(0, 2))
        rows += [row for row in rows_of(lease) if row[0] == 0]
        ledger.commit("0", whole_of(lease, 2))
    assert sorted({row for _, _, row in rows}) == list(range(24)) and len(rows) == len(set(rows))


def test_local_ledgers_lease_each_site_its_own_text() -> None:
    own = {"a": (SiteShard("x", 20, 100, "f"),), "b": (SiteShard("x", 8, 40, "g"), SiteShard("y", 8, 40, "h"))}
    ledger = LocalLedger(2)
    for client, shards in own.items():
        ledger.admit(client, shards)
    leases = {client: ledger.of(client).lease(client, 4) for client in own}
    assert {part.shard for part in leases["a"]} == {"x"}
    assert ledger.of("a").share(1) == 20 and ledger.of("b").share(1) == 16
    assert ledger.clients() == ("a", "b")
    claim = report(client="a", tokens=10**6, steps=10, data=whole_of(leases["a"], 2))
    # A token a byte at most.
    assert ledger.of("a").believed(claim, instructions()).tokens == 5 * len(rows_of(leases["a"]))
    merged = ledger.of("a").commit("a", whole_of(leases["a"], 2))
    assert merged == len(rows_of(leases["a"])) == ledger.merged_rows()
    held, figures = ledger_figures(ledger.state_dict())
    assert held["b"] and figures["b/x"] == {"epochs_merged": 0.0, "rows_leased": held["b"]}
    ledger.of("b").release("b")
    again = LocalLedger(2)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.state_dict() == ledger.state_dict() and again.of("a").data("a") == ledger.of("a").data("a")
    with pytest.raises(DataError, match="is not what it was in this run: x differ"):
        again.admit("a", (SiteShard("x", 20, 100, "other"),))
    with pytest.raises(DataError, match="no shard of 2 rows"):
        again.admit("c", (SiteShard("z", 1, 100, "f"),))
    with pytest.raises(DataError, match="sharding=local"):
        Ledger([SiteShard("x", 20, 100, "f")], 2).load_state_dict(ledger.state_dict())
    with pytest.raises(DataError, match="sharding=local"):
        again.load_state_dict(Ledger([SiteShard("x", 20, 100, "f")], 2).state_dict())
