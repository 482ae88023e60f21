"""What a client says of the weights that it measured may be anything: no such word is pooled, and its training is merged.

One of two clients lies. Model and every figure then have to be those of a run in which it said that it could not measure them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message

from nanofed.data.datamodule import TokenDataModule
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.evaluation import SiteEvaluator
from nanofed.federated.server.events import Events
from nanofed.federated.server.policy import SITES
from nanofed.federated.server.state import RoundClock
from nanofed.federated.wire.messages import MAX_FAILURE, MAX_JSON, Evaluate, Evaluation
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Point, Summary
from tests.faults.hostile import Trace, play
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.replies import instructions
from tests.federated.tiny import federation

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures

HOSTILE = "client-1"
OPTIONS: dict[str, Any] = {"evaluation": "sites", "eval_every": 1}
Lie = Callable[[Evaluation], Evaluation]


def claim(**changes: Any) -> Lie:
    return lambda found: replace(found, **changes)


@dataclass
class Left:
    """What is left of a run: the figures and the reasons of events beside the trace."""

    trace: Trace
    figures: dict[int, float]
    events: list[dict[str, Any]]


def run(corpus: Path, folder: Path, rounds: int, tamper: Any = None, **behaviour: Any) -> Left:
    config = federation(corpus, folder, "run", rounds=rounds, **OPTIONS)
    loop, _, trace = play(config, tamper=tamper, **behaviour)
    file = config.folder / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return Left(trace, {point.step: point.bpb for point in loop.metrics.summary.curve}, events)


LIES: dict[str, tuple[Lie, str]] = {
    "nan": (claim(nats=float("nan")), "nats is nan: Input should be a finite number"),
    "negative nats": (claim(nats=-1.0), "claims -1 nats"),
    "no nats": (claim(nats=0.0), "claims 0 nats"),
    "huge nats": (claim(nats=1e300), "claims 1e+300 nats"),
    "more nats than a byte can cost": (lambda found: replace(found, nats=found.bytes * 36.0), "nats for"),
    "negative bytes": (claim(bytes=-5), "claims -5 bytes"),
    "absurd bytes": (claim(bytes=10**12), "claims 1000000000000 bytes, of"),
    "bytes beyond 64 bits": (claim(bytes=1 << 70), "bytes is 1180591620717411303424: "),
    "a nothing with a cost": (claim(bytes=0), "nats for 0 bytes"),
    "true for a number": (claim(nats=True), "nats is True: Input should be a valid number"),
    "a huge string": (claim(nats=0.0, bytes=0, failure="\x1b[2J" * 10**6), f"at most {MAX_FAILURE} characters"),
    "a huge nonce": (claim(nonce="n" * 10**6), "it is for nonce 'nnn"),
    "another nonce": (claim(nonce="0" * 32), "it is for nonce"),
    "another round": (claim(round=1), "it is for round 1, not 18"),
    "another run": (claim(run="f" * 32), "it is for run"),
    "another client": (claim(client="client-0"), "it is for client 'client-0'"),
    "other weights": (claim(base_hash="0" * 64), "it is for base_hash"),
    "negative time": (claim(seconds=-1.0), "claims -1.0 s"),
    "more time than has passed": (claim(seconds=1e6), "claims 1000000.0 s"),
}


NOTES: list[tuple[Any, str]] = [(None, "says nothing of it"), ("[" * 100_000, "Invalid JSON"), (3, "one JSON string")]
NOTES += [("{}", "it lacks the field run"), (" " * (MAX_JSON + 1), "at most")]


ASKED = instructions(client=HOSTILE, round=18)
HONEST = replace(ASKED, client="client-0", nonce="d" * 32)


@pytest.fixture(scope="module")
def data(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataModule:
    return federation(tiny_corpus, tmp_path_factory.mktemp("data"), "run").build()[1]


def answer(asked: Evaluate, **changes: Any) -> Evaluation:
    names = ("run", "round", "client", "nonce", "base_hash")
    sums = {"nats": 700.0, "bytes": 400, "seconds": 1.5, "failure": ""}
    return Evaluation(**{name: getattr(asked, name) for name in names}, **{**sums, **changes})


@pytest.mark.parametrize(
    "name", [*LIES, *range(len(NOTES))], ids=[*LIES, *(f"note {str(note)[:9]!r}" for note, _ in NOTES)]
)
def test_a_lie_is_no_figure(name: str | int, data: TokenDataModule, tmp_path: Path) -> None:
    """The pool is of the honest client alone, and one event names client, round and reason."""
    points: list[Point] = []
    said: list[Any] = []

    def validation(point: Point, **rest: Any) -> None:
        points.append(point)
        said.append(rest)

    written = SimpleNamespace(summary=Summary("run", "federated"), validation=validation)
    config = FederationConfig(evaluation="sites")
    pool = SiteEvaluator(cast(Any, None), dict, data, config, cast(Any, written), RunOptions(eval_every=1), SITES)
    state = cast(Any, SimpleNamespace(clock=RoundClock(17, 30, 9), events=Events(tmp_path), evaluations={}))
    pool.begin(state)
    asks = pool.requests({HOSTILE: ASKED, "client-0": HONEST})
    assert pool.take_reply("client-0", answer(asks["client-0"]).to_config(), 2.0, state) == 1.5
    if isinstance(name, str):
        lie, says = LIES[name]
        metrics = {Evaluation.key: json.dumps(vars(lie(answer(asks[HOSTILE]))))}
    else:
        note, says = NOTES[name]
        metrics = {} if note is None else {Evaluation.key: note}
    assert pool.take_reply(HOSTILE, metrics, 2.0, state) == 0.0
    pool.end_round(state, merged=True)
    assert [(point.step, point.bpb) for point in points] == [(17, 700 / (math.log(2) * 400))] and said[0]["silent"] == 1
    assert set(state.evaluations) == {"client-0"}
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["round"], event["client"], event["kind"]) == (18, HOSTILE, "evaluation")
    assert says in event["reason"] and event["reason"].isprintable() and len(line) < 1000


def test_a_client_that_lies_is_merged(tiny_corpus: Path, tmp_path: Path) -> None:
    """In a run, one lie a round: figures and model are those of one in which the client says that it cannot measure."""
    replies: list[Message] = []
    names = ["nan", "absurd bytes", "another nonce"]

    def lie(found: Evaluation) -> Evaluation:
        return LIES[names[found.round - 1]][0](found) if found.client == HOSTILE and found.round <= 3 else found

    def tamper(reply: Message) -> list[Message]:
        replies.append(reply)
        if len(replies) == 8:  # the second client's in the fourth round
            metrics = dict(reply.content.config_records["fitres.metrics"])
            reply.content["fitres.metrics"] = ConfigRecord({**metrics, Evaluation.key: b"\0"})
        return [reply]

    def cannot(found: Evaluation) -> Evaluation:
        lies = found.client == HOSTILE and found.round <= 4
        return replace(found, nats=0.0, bytes=0, failure="the shard is gone") if lies else found

    without = run(tiny_corpus, tmp_path / "without", 5, judge=cannot)
    left = run(tiny_corpus, tmp_path / "left", 5, tamper, judge=lie)
    assert left.trace.same_course(without.trace) and left.figures == without.figures
    assert left.trace.events == without.trace.events == {HOSTILE: {"evaluation": 4}}
    assert set(left.figures) == set(range(6)) and len(left.trace.hashes) == 5
    says = [*(LIES[name][1] for name in names), "one JSON string"]
    for number, (event, expected) in enumerate(zip(left.events, says, strict=True), 1):
        assert (event["round"], event["client"], event["kind"]) == (number, HOSTILE, "evaluation")
        assert expected.replace("not 18", f"not {number}") in event["reason"]


def test_a_lie_of_the_last_weights_is_no_figure(tiny_corpus: Path, tmp_path: Path) -> None:
    """They are asked for alone, in the second round's name once more."""
    asked: list[Evaluation] = []
    clean = run(tiny_corpus, tmp_path / "clean", 2)
    assert clean.trace.events == {} and set(clean.figures) == {0, 1, 2}

    def judge(found: Evaluation) -> Evaluation:
        asked.append(found)
        if (len(asked), found.client) == (6, HOSTILE):
            return replace(found, nats=float("nan"))
        if (len(asked), found.client) == (5, "client-0"):
            raise OSError("the disk is gone")
        return found

    left = run(tiny_corpus, tmp_path / "left", 2, judge=judge)
    assert left.trace.same_course(clean.trace)
    # Nobody has said anything.
    assert left.figures == {number: bpb for number, bpb in clean.figures.items() if number < 2}
    assert left.trace.events == {"client-0": {"evaluation": 1}, HOSTILE: {"evaluation": 1}, "server": {"evaluation": 1}}
    assert "the client failed: OSError: the disk is gone" in left.events[0]["reason"]
    assert (
        "nats is nan: Input should be a finite number" in left.events[1]["reason"]
        and "none of the 2 sites" in left.events[2]["reason"]
    )


def test_who_is_not_asked_is_not_heard(tiny_corpus: Path, tmp_path: Path) -> None:
    """Where the server measures, a figure that a client sends of itself changes nothing."""
    options = {"rounds": 2, "eval_every": 1}
    clean, _, left = play(federation(tiny_corpus, tmp_path, "clean", **options))

    def tamper(reply: Message) -> list[Message]:
        metrics = dict(reply.content.config_records["fitres.metrics"])
        note = Evaluation("r", 1, HOSTILE, "n", "h", 1.0, 10**9, 0.0, "").to_config()
        reply.content["fitres.metrics"] = ConfigRecord({**metrics, **note})
        return [reply]

    loop, _, other = play(federation(tiny_corpus, tmp_path, "run", **options), tamper=tamper)
    assert other.same_course(left) and other.events == {}
    assert [point.bpb for point in loop.metrics.summary.curve] == [point.bpb for point in clean.metrics.summary.curve]
