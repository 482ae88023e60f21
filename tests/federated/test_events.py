"""What went wrong is counted, in words that are fit for a log."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nanofed.federated.server import events as events_module
from nanofed.federated.server.events import OTHERS, Events
from nanofed.federated.wire.plain_text import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fine, 5 °C", "fine, 5 °C"),
        ("a\nb\x1b[2J\x00", r"a\nb\x1b[2J\x00"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
        ("x" * 10**6, "x" * 19 + "…"),
        ("\n" * 30, r"\n" * 9 + "\\" + "…"),
    ],
)
def test_plain_words(text: str, shown: str) -> None:
    assert plain(text, 20) == shown and plain(text, 20).isprintable()


def test_they_are_counted_by_kind_and_client(tmp_path: Path) -> None:
    events = Events(tmp_path)
    for number in (1, 2):
        events.add("stale", "a", f"for the {number}. time\x1b", number)
    events.add("silent", "b", "no answer", 2)
    assert (events.total(), events.total("stale"), events.total(client="b"), events.total("late")) == (3, 2, 1, 0)
    last = events.last("stale", "a")
    assert last is not None and (last.count, last.round, last.reason) == (2, 2, "for the 2. time\\x1b")
    assert time.time() - last.when < 60
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["client"], line["round"]) for line in lines][-1] == ("silent", "b", 2)
    again = Events()
    again.load_state_dict(json.loads(json.dumps(events.state_dict())))
    assert again.by_client() == events.by_client()


def test_neither_memory_nor_file_grows_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_NAMES", 5)
    monkeypatch.setattr(events_module, "MAX_FILE_BYTES", 1000)
    events = Events(tmp_path)
    for number in range(100):
        events.add("hello", f"node {number}", "x" * 10**6, number)
    assert len(events.by_client()) == 6 and events.total(client=OTHERS) == 95 and events.total() == 100
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4000


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = Events(tmp_path / "gone")
    events.add("stale", "a", "why", 1)
    assert events.total() == 1 and "events.jsonl cannot be written" in caplog.text
