"""The parts of the round loop by themselves: norms, pace, events, plain words, measuring, presence."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.aggregation.norm_guard import LARGEST, Length, NormGuard, Steps, UnusualNorm
from nanofed.federated.config import FederationConfig
from nanofed.federated.server import events as events_module
from nanofed.federated.server.events import OTHERS, SERVER, Events
from nanofed.federated.server.measuring import Measuring
from nanofed.federated.server.pace import LEAST_SECONDS, SPEED_ROUNDS, Pace
from nanofed.federated.server.presence import Presence
from nanofed.federated.server.roster import Roster
from nanofed.federated.server.state import Clock
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.plain import plain
from nanofed.optim import Movement, Schedule
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Summary
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


ONE_STEP = Steps(1.0, 1.0)
MOVEMENTS = {"matrix": Movement("muon", "matrices", 1.0, 1.25, 0.0), "head": Movement("adamw", "head", 1.0, 1.6, 0.0)}


def moved(matrix: float, head: float = 0.1) -> Length:
    """An update that is so long in each group."""
    return Length(math.hypot(matrix, head), {"matrices": matrix, "head": head})


class TestNorms:
    def guard(self, action: Any = "clip", ratio: float | None = 5.0) -> NormGuard:
        return NormGuard(ratio, action, MOVEMENTS)

    def scale(self, guard: NormGuard, client: str, here: dict[str, Length]) -> float:
        return guard.scale(here[client], here, lambda: 1e9)

    def test_a_length_is_of_the_steps_that_were_taken(self) -> None:
        told = {"clock_tokens": 0, "step_tokens": 64 * 2}
        steps = Steps.of(Schedule(warmdown_ratio=0.5), 10, horizon_tokens=64 * 2 * 10, **told)
        rates = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
        assert steps.linear == pytest.approx(sum(rates)) and steps.quadrature == pytest.approx(
            math.sqrt(sum(rate**2 for rate in rates))
        )
        many = Steps.of(Schedule(warmdown_ratio=0.5), 10_000, horizon_tokens=64 * 2 * 10_000, **told)
        assert many.linear == pytest.approx(7_500, rel=1e-3)
        length = self.guard().measure([4.0, 0.0], Steps(16.0, 4.0))
        assert length.norm == 4.0 and length.groups == {"matrices": pytest.approx(0.5), "head": 0.0}

    def test_what_no_steps_of_the_recipe_can_move_is_refused_whatever_the_action(self) -> None:
        self.guard().measure([1.25 * 3, 1.6 * 3], Steps(3.0, 2.0))
        for norms, name in (([4.2, 0.0], "matrix"), ([1.0, 5.3], "head")):
            with pytest.raises(
                UnusualNorm, match=f"its update of {name} is .* more than the limit of .* no steps"
            ) as refused:
                self.guard().measure(norms, Steps(3.0, 2.0))
            assert refused.value.kind == "large_norm"

    def test_weight_decay_moves_as_well(self) -> None:
        guard = NormGuard(5.0, "clip", {"head": Movement("adamw", "head", 1.0, 1.6, 0.1)})
        assert guard.measure([2.6], ONE_STEP, lambda name: 10.0).norm == 2.6

    @pytest.mark.parametrize("norms", [[0.0, 0.0], [1e-9, 0.0], [0.049, 0.049]])
    def test_an_update_that_has_hardly_moved_is_refused_by_name(self, norms: list[float]) -> None:
        with pytest.raises(UnusualNorm, match="it has hardly trained") as refused:
            self.guard().measure(norms, ONE_STEP)
        assert refused.value.kind == "small_norm"

    def test_steps_at_a_rate_of_zero_move_nothing(self) -> None:
        assert self.guard().measure([0.0, 0.0], Steps(0.0, 0.0)).norm == 0.0
        with pytest.raises(UnusualNorm, match="no steps of the recipe exceed"):
            self.guard().measure([1e-9, 0.0], Steps(0.0, 0.0))

    def test_what_honest_sites_send_is_never_suspicious(self) -> None:
        """The first step of a head of zeros moves only the head; lengths are those measured of 1 and of 16 steps."""
        guard = self.guard()
        for honest in (moved(0.0, 1.0), moved(0.16, 0.9), moved(0.5, 0.5), moved(0.75, 0.02)):
            assert (
                guard.is_unsuspicious(honest) and self.scale(guard, "a", {"a": honest, "b": moved(0.06, 0.001)}) == 1.0
            )

    def test_a_site_has_one_vote_however_often_it_was_merged(self) -> None:
        guard = self.guard()
        for _ in range(50):
            guard.accept({"small": (moved(0.06, 0.001), 1.0)})
        for _ in range(20):
            guard.accept({name: (moved(0.9), 1.0) for name in ("a", "b")})
        assert self.scale(guard, "a", {"a": moved(4.4)}) == 1.0
        assert self.scale(guard, "a", {"a": moved(9.0)}) == pytest.approx(0.5, rel=0.01)

    def test_small_updates_bring_the_limit_below_no_honest_one(self) -> None:
        guard = self.guard()
        for _ in range(200):
            guard.accept({"small": (moved(0.05, 0.0), 1.0)})
        assert self.scale(guard, "honest", {"honest": moved(0.8, 0.9)}) == 1.0

    def test_who_joins_late_moves_its_head_as_its_steps_allow(self) -> None:
        """The second moments of the others remember the first gradients, its own do not: measured of 7 steps."""
        guard = self.guard("reject")
        for _ in range(20):
            guard.accept({name: (moved(0.74, 0.05), 1.0) for name in ("a", "b")})
        late = moved(0.8, 1.24)
        assert guard.is_unsuspicious(late)
        assert self.scale(guard, "late", {"a": moved(0.76, 0.05), "late": late}) == 1.0

    @pytest.mark.parametrize("sites", [2, 5])
    def test_one_site_at_the_limit_does_not_drive_it(self, sites: int) -> None:
        guard, limits = self.guard(), []
        for _ in range(200):
            here = {f"{n}": moved(0.6) for n in range(sites - 1)}
            tried = {**here, "ramp": moved(1e6)}
            limits.append(1e6 * self.scale(guard, "ramp", tried))
            scale = 0.999 * limits[-1] / 1e6
            guard.accept({**{name: (length, 1.0) for name, length in here.items()}, "ramp": (moved(1e6), scale)})
        assert max(limits) <= 5 * 0.6 * 1.001

    def test_the_limit_grows_by_a_quarter_a_round_at_most(self) -> None:
        guard, limit = self.guard(), 0.0
        for number in range(12):
            new = 1e6 * self.scale(guard, "a", {"a": moved(1e6)}) if number else 5 * 0.6
            assert number < 2 or limit < new <= 1.251 * limit
            limit = new
            guard.accept({"a": (moved(0.6 if number < 1 else 1e6), 1.0)})

    def test_who_was_refused_comes_back(self) -> None:
        guard = self.guard("reject")
        for _ in range(10):
            guard.accept({"a": (moved(0.6), 1.0), "b": (moved(0.6), 1.0)})
        for _ in range(50):
            with pytest.raises(
                UnusualNorm, match=r"in the group matrices 1\.67 times the limit, which is 5 times"
            ) as refused:
                self.scale(guard, "b", {"a": moved(0.6), "b": moved(5.0)})
            assert refused.value.kind == "large_norm"
        assert self.scale(guard, "b", {"a": moved(0.6), "b": moved(0.7)}) == 1.0

    def test_the_others_of_the_round_count_from_the_first_one_on(self) -> None:
        here = {"a": moved(2.0), "b": moved(2.2), "c": moved(40.0)}
        guard = self.guard()
        assert not guard.is_unsuspicious(here["c"]) and self.scale(guard, "c", here) == pytest.approx(5 * 2.2 / 40)

    def test_ten_times_the_weights_is_too_long_for_anything(self) -> None:
        with pytest.raises(UnusualNorm, match="10 times the weights' norm"):
            self.guard().scale(moved(2.0), {"a": moved(2.0)}, lambda: 0.1)

    def test_without_a_ratio_only_what_fp32_cannot_hold_is_too_large(self) -> None:
        guard = self.guard(ratio=None)
        assert guard.is_unsuspicious(guard.measure([0.0, 0.0], ONE_STEP))
        assert guard.scale(guard.measure([1e20, 0.0], ONE_STEP), {}, lambda: 1.0) == 1.0
        huge = guard.measure([1e31, 0.0], ONE_STEP)
        assert not guard.is_unsuspicious(huge) and guard.scale(huge, {}, lambda: 1.0) == pytest.approx(LARGEST / 1e31)

    def test_it_is_saved(self) -> None:
        guard, other = self.guard(), self.guard()
        for _ in range(3):
            guard.accept({"a": (moved(0.9), 1.0)})
        other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert other.state_dict() == guard.state_dict()
        assert self.scale(other, "a", {"a": moved(9.0)}) == self.scale(guard, "a", {"a": moved(9.0)})
        other.load_state_dict({"norms": [1.0], "rounds": 1})  # of an older nanofed
        assert other.state_dict() == self.guard().state_dict()


def test_the_recipe_says_how_far_a_step_moves_every_weight() -> None:
    """A real optimizer on gradients of noise: no step is longer, and Muon's are as long as they say."""
    module = GPTModule(
        depth=1, sequence_len=32, vocab_size=64, compile=False, recipe=Recipe(num_steps=100, weight_decay=0.1)
    )
    module.configure_model()
    optimizer, told = module.configure_optimizers(), module.movements()
    generator = torch.Generator().manual_seed(0)
    assert list(told) == list(module.gpt.state_dict())
    for number in range(12):
        before = {name: p.detach().clone() for name, p in module.gpt.named_parameters()}
        for parameter in module.gpt.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1000.0 if number % 4 == 3 else 1e-3)
        optimizer.step()
        for name, parameter in module.gpt.named_parameters():
            length, step = float((parameter.detach() - before[name]).norm()), told[name]
            assert length <= step.most + step.decay * float(before[name].norm()), name
            assert step.kind == "adamw" or length > 0.5 * step.step, name


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
        with pytest.raises(RefusedReply, match=r"claims 10.0 s of training, 5.0 s after it was asked"):
            Pace().check(report(seconds=10.0), 5.0)
        Pace().check(report(seconds=5.5), 5.0)

    def test_more_tokens_than_the_speed_so_far_gives_are_refused_until_it_is_believed(self) -> None:
        pace = self.learned(elapsed=10.0)
        pace.check(report(tokens=1500, seconds=9.0), 10.0)
        honest_on_a_new_machine = report(tokens=4000, seconds=9.0)
        for _ in range(3):
            with pytest.raises(RefusedReply, match=r"claims 4000 tokens within 10.0 s, 1.5 times its speed so far"):
                pace.check(honest_on_a_new_machine, 10.0)
        pace.check(honest_on_a_new_machine, 10.0)

    def test_speed_is_of_the_servers_seconds(self) -> None:
        """Whatever a site says of its own: it may say that it needs no time at all."""
        assert self.learned(seconds=1e-300, elapsed=16.0).rate["client-0"] == pytest.approx(1000 / 16)
        alone = Pace()
        alone.learn(report(tokens=1000, seconds=1e-300), None)
        assert alone.rate["client-0"] == 1000 / LEAST_SECONDS

    def test_tokens_are_counted_up_to_eight_times_what_others_did_a_device(self) -> None:
        pace = Pace(devices={"b": 4})
        honest = [report(client="a", tokens=100, steps=10), report(client="b", tokens=2800, steps=280)]
        assert pace.believed(honest) == honest, "seven times the speed a device"
        liar = report(client="liar", tokens=100_000, steps=10_000)
        *rest, counted = pace.believed([*honest, liar])
        assert rest == honest and (counted.tokens, counted.steps) == (8 * 100, 80)
        assert pace.believed([liar]) == [liar], "nobody to compare with"
        pace.learn(honest[0], None)
        assert pace.believed([liar])[0].tokens == 800, "who is away has a word, too"

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
