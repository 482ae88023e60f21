"""The parts of the round loop by themselves: norms, pace, events, plain words, measuring, presence."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server import events as events_module
from nanofed.federated.server.events import OTHERS, SERVER, Events
from nanofed.federated.server.measuring import Measuring
from nanofed.federated.server.norms import LARGEST, WARM_UP, NormGuard
from nanofed.federated.server.pace import SPEED_ROUNDS, Pace
from nanofed.federated.server.presence import Presence
from nanofed.federated.server.roster import Roster
from nanofed.federated.server.state import Clock
from nanofed.federated.server.validation import Refused
from nanofed.federated.wire.plain import plain
from nanofed.training.options import RunOptions
from nanofed.training.run import Summary
from tests.federated.replies import report


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


class TestNorms:
    def guard(self, action: Any = "clip", ratio: float | None = 4.0) -> NormGuard:
        guard = NormGuard(ratio, action)
        for first in range(1, WARM_UP + 1, 2):
            guard.accept([(first * 2.0, 4), (first + 1.0, 1)])  # per root of steps: 1 to 8, median 4.5
        return guard

    def test_a_norm_is_held_against_the_median_per_root_of_steps(self) -> None:
        guard = self.guard()
        assert guard.scale(18.0, 1, lambda: 0.0) == 1.0 and guard.scale(36.0, 4, lambda: 0.0) == 1.0
        assert guard.scale(36.0, 1, lambda: 0.0) == pytest.approx(0.5)
        assert guard.state_dict() == {"norms": [1.0, 2, 3, 4, 5, 6, 7, 8], "rounds": 4}, "clipped is not merged yet"

    def test_what_is_rejected_moves_the_median_no_further_than_the_limit(self) -> None:
        guard = self.guard("reject")
        with pytest.raises(Refused, match="more than the limit of 18") as refused:
            guard.scale(1e9, 1, lambda: 0.0)
        assert refused.value.kind == "large_norm" and guard.state_dict()["norms"][-1] == 18.0

    def test_before_the_median_is_known_the_weights_are_the_measure(self) -> None:
        guard = NormGuard(4.0, "reject")
        assert guard.scale(10.0, 1, lambda: 1.0) == 1.0
        with pytest.raises(Refused, match="limit of 10"):
            guard.scale(10.1, 1, lambda: 1.0)
        guard.accept([(1.0, 1)] * 99)  # a round of many clients is one round
        assert guard.scale(10.0, 1, lambda: 1.0) == 1.0

    def test_what_dwarfs_the_others_of_its_round_is_found(self) -> None:
        guard = NormGuard(4.0, "clip")
        round_ = {"a": (1.0, 4), "b": (1.5, 4), "c": (2.0, 4), "d": (2.5, 4)}
        assert guard.outliers(round_ | {"e": (8.0, 4)}) == {}
        found = guard.outliers(round_ | {"e": (8.1, 4)})
        assert set(found) == {"e"} and found["e"].kind == "large_norm"
        assert "8.1 long where 2 is usual for 4 steps among the 5 of the round, more than 4 times that" in str(
            found["e"]
        )

    def test_steps_that_agree_are_no_reason(self) -> None:
        guard = NormGuard(4.0, "clip")
        slow = {"a": (1.0, 1), "b": (1.0, 1), "c": (1.0, 1)}
        assert guard.outliers(slow | {"fast": (4 * 100.0, 10)}) == {}, "they even grow, from a head of zeros"
        assert set(guard.outliers(slow | {"fast": (401.0, 10)})) == {"fast"}
        fast = {"a": (100.0, 100), "b": (100.0, 100), "c": (100.0, 100)}
        assert guard.outliers(fast | {"slow": (40.0, 1)}) == {}, "a tenth of theirs is what one step may be"
        assert set(guard.outliers(fast | {"slow": (41.0, 1)})) == {"slow"}

    def test_where_nobody_can_be_the_odd_one_out(self) -> None:
        assert NormGuard(4.0, "clip").outliers({"a": (1.0, 1), "b": (1e6, 1)}) == {}
        assert NormGuard(4.0, "clip").outliers({"a": (0.0, 1), "b": (0.0, 1), "c": (1.0, 1)}) == {}, (
            "nobody moved but one"
        )
        # What 1, 1 and 7 first steps of the tiny model came to, with honest clients.
        assert NormGuard(5.0, "clip").outliers({"a": (1.88, 1), "b": (1.88, 1), "c": (70.1, 7)}) == {}
        assert NormGuard(None, "clip").outliers({"a": (1.0, 1), "b": (1.0, 1), "c": (1e6, 1)}) == {}

    def test_without_a_ratio_only_what_fp32_cannot_hold_is_too_large(self) -> None:
        guard = self.guard(ratio=None)
        assert guard.scale(1e20, 1, lambda: 1.0) == 1.0
        assert guard.scale(1e31, 1, lambda: 1.0) == pytest.approx(LARGEST / 1e31)

    def test_it_is_saved(self) -> None:
        other = NormGuard(4.0, "clip")
        other.load_state_dict(self.guard().state_dict())
        assert other.scale(36.0, 1, lambda: 0.0) == pytest.approx(0.5)


class TestPace:
    def learned(self, seconds: float = 10.0, elapsed: float = 16.0) -> Pace:
        pace = Pace()
        for _ in range(SPEED_ROUNDS):
            pace.learn(report(tokens=1000, seconds=seconds), elapsed)
        return pace

    def test_a_round_is_shorter_by_what_messages_and_merge_take(self) -> None:
        pace = self.learned()
        pace.learn_merge(2.0)
        assert pace.budget("client-0", 60.0) == pytest.approx(60 - 6 - 2)
        assert pace.budget("new", 60.0) == pytest.approx(58)
        pace.learn(report(tokens=1000, seconds=10.0), 1010.0)
        assert pace.budget("client-0", 60.0) == pytest.approx(6.0), "a tenth, whatever the messages take"

    def test_more_time_than_has_passed_is_refused(self) -> None:
        with pytest.raises(Refused, match=r"claims 10.0 s of training, 5.0 s after it was asked"):
            Pace().check(report(seconds=10.0), 5.0)
        Pace().check(report(seconds=5.5), 5.0)

    def test_more_tokens_than_the_speed_so_far_gives_are_refused_until_it_is_believed(self) -> None:
        pace = self.learned()
        pace.check(report(tokens=1500, seconds=9.0), 10.0)
        honest_on_a_new_machine = report(tokens=4000, seconds=9.0)
        for _ in range(3):
            with pytest.raises(Refused, match=r"claims 4000 tokens within 10.0 s, 1.5 times its speed so far"):
                pace.check(honest_on_a_new_machine, 10.0)
        pace.check(honest_on_a_new_machine, 10.0)

    def test_the_speed_of_the_first_rounds_binds_nobody(self) -> None:
        pace = Pace()
        pace.learn(report(tokens=10, seconds=10.0), 10.0)  # it compiled
        pace.check(report(tokens=10_000, seconds=10.0), 10.0)

    def test_who_was_late_trains_for_a_tenth_and_then_longer_again(self) -> None:
        pace = self.learned()
        pace.hurry("client-0", 60.0)
        assert pace.budget("client-0", 60.0) == pytest.approx(6)
        pace.learn(report(tokens=1000, seconds=6.0), 6.0 + 20.0)
        assert pace.budget("client-0", 60.0) == pytest.approx(60 - 40)

    def test_it_is_saved(self) -> None:
        pace = self.learned()
        assert Pace(**json.loads(json.dumps(pace.state_dict()))) == pace


class TestEvents:
    def test_they_are_counted_by_kind_and_client(self, tmp_path: Path) -> None:
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

    def test_neither_memory_nor_file_grows_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events_module, "MAX_NAMES", 5)
        monkeypatch.setattr(events_module, "MAX_FILE_BYTES", 1000)
        events = Events(tmp_path)
        for number in range(100):
            events.add("hello", f"node {number}", "x" * 10**6, number)
        assert len(events.by_client()) == 6 and events.total(client=OTHERS) == 95 and events.total() == 100
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4000

    def test_a_file_that_cannot_be_written_ends_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        events = Events(tmp_path / "gone")
        events.add("stale", "a", "why", 1)
        assert events.total() == 1 and "events.jsonl cannot be written" in caplog.text


class Clients:
    """A roster of which the test says who is there, one answer a look."""

    def __init__(self, *looks: list[str]) -> None:
        self._looks = list(looks)
        self.refused: dict[str, str] = {}
        self.seen: dict[str, float] = {"late": time.monotonic()}

    def connected(self) -> dict[str, int]:
        names = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return {name: number for number, name in enumerate(names, 1)}


class TestPresence:
    def presence(self, clients: Clients, *, simulated: bool = False, **config: Any) -> tuple[Presence, Events]:
        events = Events()
        options = FederationConfig(**{"quorum": 2, **config})
        return Presence(cast(Roster, clients), options, events, 1, simulated=simulated), events

    def test_a_round_waits_for_a_quorum_and_says_for_whom(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        now = [0.0]
        monkeypatch.setattr("nanofed.federated.server.presence.time.monotonic", lambda: now[0])
        monkeypatch.setattr("nanofed.federated.server.presence.time.sleep", lambda s: now.__setitem__(0, now[0] + s))
        caplog.set_level(logging.INFO)
        clients = Clients(*[["a"]] * 500, ["a", "late"])
        clients.seen = {"late": -120.0}
        presence, events = self.presence(clients, quorum_seconds=100.0)
        heard: list[str] = []
        assert presence.wait(7, heard.append) == {"a": 1, "late": 2}
        lines = [record.getMessage() for record in caplog.records]
        assert lines[0] == "round   7  waiting for 1 more clients of 2 (here: a; late was here 2 min ago)"
        assert len(heard) == 500 and heard[-1].startswith("1 more clients of 2 (here: a; late was here 6 min ago")
        assert len(lines) <= 250 / 60 + 3, "once a minute, and a warning each time the patience ends"
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2 and warnings[0].startswith("round 7: it cannot begin for 100 s: it needs 1 more")
        assert events.total("quorum") == 2

    def test_in_vain_is_not_waited_on_one_machine(self) -> None:
        clients = Clients(["a"])
        clients.refused = {"b": "code x there, y here"}
        presence, _ = self.presence(clients, simulated=True)
        with pytest.raises(NanofedError, match=r"round 1 needs 2 clients, 1 can take part \(b: code x there, y here\)"):
            presence.wait(1)

    def test_options_that_cannot_be(self) -> None:
        for wrong, says in (
            ({"quorum": 0}, "federation.quorum must be at least 1"),
            ({"quorum_seconds": 0}, "federation.quorum_seconds must be positive"),
            ({"grace_seconds": -1}, "federation.grace_seconds must be positive"),
            ({"trim": 0.5}, "federation.trim"),
            ({"max_norm_ratio": 1}, "federation.max_norm_ratio"),
            ({"merge": "median", "weighting": "tokens"}, "federation.merge=median"),
            ({"max_failed_rounds": 0}, "federation.max_failed_rounds"),
        ):
            with pytest.raises(ConfigError, match=says):
                FederationConfig(**cast(Any, wrong))


class SlowEvaluator:
    """Measures when it is let."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.go = threading.Event()
        self.loaded: list[Any] = []
        self.fails = False
        self.released = 0

    def load(self, weights: Any) -> None:
        self.loaded.append(weights)

    def bits_per_byte(self) -> float:
        while not self.go.wait(0.01):
            if self.stopped.is_set():
                raise RuntimeError("stopped")
        if self.fails:
            raise OSError("the shard is gone")
        return float(self.loaded[-1])

    def sample(self, prompt: str) -> str:
        return prompt

    def release(self) -> None:
        self.released += 1


class TestMeasuring:
    def measuring(self) -> tuple[Measuring, SlowEvaluator, list[Any], Any]:
        written: list[Any] = []
        summary = Summary("run", "federated", seconds=5.0)
        board = SimpleNamespace(
            summary=summary,
            validation=lambda point, step, seconds: written.append((point.step, point.tokens, point.bpb, step)),
        )
        evaluator = SlowEvaluator()
        measuring = Measuring(cast(Any, evaluator), cast(Any, board), RunOptions(), beside=True)
        state = SimpleNamespace(clock=Clock(3, 30, 9), weights=1.5, events=Events())
        return measuring, evaluator, written, state

    def test_a_figure_is_of_the_round_that_was_measured(self) -> None:
        measuring, evaluator, written, state = self.measuring()
        measuring.start(state)
        state.clock, state.weights = Clock(4, 40, 12), 9.9  # the next round goes on
        measuring.take(state)
        assert written == [] and measuring.round == 3
        measuring.start(state)
        assert evaluator.loaded == [1.5], "one at a time"
        evaluator.go.set()
        measuring.take(state, wait=True)
        assert written == [(3, 30, 1.5, 9)]
        measuring.start(state, last=True)
        assert written[1:] == [(4, 40, 9.9, 12)] and measuring.round == 4
        assert evaluator.released == 2

    def test_a_failure_is_counted_and_the_run_goes_on(self) -> None:
        measuring, evaluator, written, state = self.measuring()
        evaluator.fails = True
        evaluator.go.set()
        measuring.start(state)
        measuring.take(state, wait=True)
        count = state.events.last("evaluation", SERVER)
        assert written == [] and count.round == 3 and "the shard is gone" in count.reason
        assert evaluator.released == 1
        with pytest.raises(OSError, match="the shard is gone"):
            measuring.start(state, last=True)

    def test_where_there_is_no_room_for_the_weights_the_run_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measuring, evaluator, written, state = self.measuring()

        def load(weights: Any) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(evaluator, "load", load)
        measuring.start(state)
        count = state.events.last("evaluation", SERVER)
        assert written == [] and count.round == 3 and "no room" in count.reason
        assert evaluator.released == 1
        monkeypatch.undo()
        evaluator.go.set()
        measuring.start(state)
        measuring.take(state, wait=True)
        assert written == [(3, 30, 1.5, 9)]

    def test_the_end_does_not_wait_for_it(self) -> None:
        measuring, _, written, state = self.measuring()
        measuring.start(state)
        started = time.monotonic()
        measuring.stop()
        assert time.monotonic() - started < 5 and written == []
