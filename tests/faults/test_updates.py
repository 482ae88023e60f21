"""Updates that are wrong, by accident or on purpose: none reaches the model, none stops the run, each is counted by name.

One of two clients misbehaves in the second of three rounds. Model and ledger then have to be, after every round and to the
bit, those of a run in which that client simply failed in that round. Here is one such update of every sort; all that can be
wrong with one, `tests/federated/test_validation.py` tries without a run around it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row
from nanofed.data.streams import DataState
from nanofed.federated.aggregation import norm_guard
from nanofed.federated.wire.codec import Arrays, hash_arrays
from nanofed.federated.wire.messages import Instructions, Report
from tests.faults.hostile import Trace, play
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.spoiled import SPOILS
from tests.federated.tiny import Fit, federation
from tests.support import BATCH

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures

HOSTILE, HONEST = "client-1", "client-0"
Attack = Callable[[Arrays, Report, Instructions], tuple[Arrays, Report]]


def announced(arrays: list[Any], report: Report) -> tuple[Arrays, Report]:
    """The report announces the arrays as they are: only what is in them is wrong."""
    return arrays, replace(report, payload_hash=hash_arrays(arrays))


def poison(value: float) -> Attack:
    def attack(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
        arrays[1] = arrays[1].copy()
        arrays[1].reshape(-1)[-1] = value
        return announced(arrays, report)

    return attack


def change(index: int, how: Callable[[Any], Any]) -> Attack:
    def attack(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
        return announced([how(a) if n == index else a for n, a in enumerate(arrays)], report)

    return attack


def rearrange(how: Callable[[Arrays], Arrays]) -> Attack:
    return lambda arrays, report, asked: announced(how(arrays), report)


def claim(**changes: Any) -> Attack:
    return lambda arrays, report, asked: (arrays, replace(report, **changes))


def stand_still(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
    """Steps, and not a row read for them beyond those that were begun before."""
    assert asked.data is not None
    return arrays, replace(report, data=asked.data)


def run_ahead(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
    last = asked.lease[-1]
    at = report.data.streams[0]
    assert at.position is not None
    ahead = at.position._replace(shard=last.shard, epoch=last.epoch, row=last.stop + 9)
    return arrays, replace(report, data=DataState(0, {**report.data.streams, 0: replace(at, position=ahead)}))


def damage(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
    arrays[0] = arrays[0] + np.float32(1e-3)  # type: ignore[operator]
    return arrays, report


ATTACKS: dict[str, tuple[Attack, str, str]] = {
    "nan": (poison(float("nan")), "not_finite", "is not finite"),
    "broadcastable shape": (change(0, lambda a: a[:1].copy()), "malformed", "has shape (1, "),
    "no arrays": (rearrange(lambda arrays: []), "malformed", "there are no weights in it"),
    "huge norm": (change(0, lambda a: a * np.float32(1e6)), "large_norm", "more than the limit"),
    "norm beyond fp32": (change(0, lambda a: np.full_like(a, 3e38)), "large_norm", "more than the limit"),
    "other arrays than announced": (damage, "damaged", "damaged on their way"),
    "too many tokens": (claim(tokens=10**15), "tokens", "claims 1000000000000000 tokens"),
    "rows of others": (run_ahead, "position", "outside its lease"),
    "another client's name": (claim(client=HONEST), "foreign", "it is for client 'client-0'"),
    "an older nonce": (claim(nonce="0" * 32), "stale", "it is for nonce"),
}


def meddling(attack: Attack, *, when: Callable[[Instructions], bool]) -> Callable[..., tuple[Arrays, Report]]:
    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        local, report = fit(arrays, asked)
        return attack(list(local), report, asked) if when(asked) else (local, report)

    return hook


def in_round_two(asked: Instructions) -> bool:
    return (asked.client, asked.round) == (HOSTILE, 2)


def fail(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
    raise OSError("the disk is gone")


OPTIONS: dict[str, Any] = {"rounds": 3, "on_large_norm": "reject"}


@pytest.fixture(scope="module")
def failed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """What is left of a run in which the client failed instead."""
    config = federation(tiny_corpus, tmp_path_factory.mktemp("failed"), "run", **OPTIONS)
    _, _, left = play(config, hook=meddling(fail, when=in_round_two))
    assert left.events == {HOSTILE: {"failed": 1}} and set(left.hashes) == {1, 2, 3}
    return left


@pytest.fixture(scope="module")
def clean(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    _, _, left = play(federation(tiny_corpus, tmp_path_factory.mktemp("clean"), "run", **OPTIONS))
    assert left.events == {}
    return left


@pytest.mark.parametrize("name", ATTACKS)
def test_an_update_is_refused_by_name(name: str, failed: Trace, tiny_corpus: Path, tmp_path: Path) -> None:
    attack, kind, says = ATTACKS[name]
    config = federation(tiny_corpus, tmp_path, "run", **OPTIONS)
    loop, _, left = play(config, hook=meddling(attack, when=in_round_two))
    assert left.same_course(failed)
    assert left.events == {HOSTILE: {kind: 1}}
    count = loop.state.events.last(kind, HOSTILE)  # type: ignore[arg-type]
    assert count is not None and says in count.reason and count.round == 2
    (line,) = (config.folder / "events.jsonl").read_text().splitlines()
    assert {"round": 2, "client": HOSTILE, "kind": kind}.items() <= json.loads(line).items()


def test_who_is_refused_goes_on_where_it_stood(tiny_corpus: Path, tmp_path: Path) -> None:
    """Its rows are not handed on at once, or the next client would train again on the documents that this one has begun."""
    asked: dict[int, Instructions] = {}

    def hook(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        if instructions.client == HOSTILE:
            asked[instructions.round] = instructions
        return meddling(fail, when=in_round_two)(fit, arrays, instructions)

    play(federation(tiny_corpus, tmp_path, "run", **OPTIONS), hook=hook)
    assert asked[2].data is not None and asked[3].data == asked[2].data
    first, again = asked[2].lease[0], asked[3].lease[0]
    assert (again.shard, again.epoch, again.start) == (first.shard, first.epoch, first.start)


def test_tokens_without_text_are_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "round_steps": 6}
    _, _, failed = play(federation(tiny_corpus, tmp_path, "failed", **options), hook=meddling(fail, when=in_round_two))
    config = federation(tiny_corpus, tmp_path, "run", **options)
    loop, _, left = play(config, hook=meddling(stand_still, when=in_round_two))
    assert left.same_course(failed) and left.events == {HOSTILE: {"tokens": 1}}
    count = loop.state.events.last("tokens", HOSTILE)
    assert count is not None and f"it claims {6 * BATCH} tokens; the " in count.reason


@pytest.mark.parametrize("age", [1, 2])
def test_a_replayed_update_is_stale(age: int, clean: Trace, tiny_corpus: Path, tmp_path: Path) -> None:
    """What was accepted in an earlier round comes again in the last one, to the letter."""
    answers: dict[int, tuple[Arrays, Report]] = {}

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        local, report = fit(arrays, asked)
        if asked.client == HOSTILE:
            answers[asked.round] = ([array.copy() for array in local], report)
            if asked.round == 3:
                return answers[3 - age]
        return local, report

    _, _, left = play(federation(tiny_corpus, tmp_path, "run", **OPTIONS), hook=hook)
    assert left.events == {HOSTILE: {"stale": 1}}
    assert [left.hashes[n] for n in (1, 2)] == [clean.hashes[n] for n in (1, 2)] and left.hashes[3] != clean.hashes[3]


def test_duplicates_and_strays_are_counted_and_dropped(clean: Trace, tiny_corpus: Path, tmp_path: Path) -> None:
    first: list[Message] = []

    def tamper(reply: Message) -> list[Message]:
        first.append(reply)
        if len(first) == 1:
            return [reply, reply, first[0]]
        stranger = Message(reply.content, reply_to=_request("never sent", reply.metadata.dst_node_id))
        thief = Message(reply.content, reply_to=_request(reply.metadata.reply_to_message_id, 77))
        return [stranger, thief, reply] if len(first) == 3 else [reply]

    loop, _, left = play(federation(tiny_corpus, tmp_path, "run", **OPTIONS), tamper=tamper)
    assert left.same_course(clean)
    assert left.events == {HONEST: {"duplicate": 2}, "server": {"foreign": 2}}
    foreign = loop.state.events.last("foreign", "server")
    assert foreign is not None and foreign.reason == "node 77 answered a message that it was not sent"


def _request(message_id: str, node: int) -> Message:
    from tests.federated.replies import request

    message = request()
    message.metadata.__dict__.update(_message_id=message_id, _dst_node_id=node)
    return message


def test_hostile_metric_names_change_nothing(clean: Trace, tiny_corpus: Path, tmp_path: Path) -> None:
    def tamper(reply: Message) -> list[Message]:
        metrics = reply.content.config_records["fitres.metrics"]
        evil: dict[str, Any] = {"fed/clients_asked": 1e300, "train/loss" * 10_000: -1.0}
        evil |= {"\x1b[2J\x00/../../etc": "x" * 1_000_000}
        reply.content["fitres.metrics"] = ConfigRecord({**metrics, **evil})
        return [reply]

    _, _, left = play(federation(tiny_corpus, tmp_path, "run", **OPTIONS), tamper=tamper)
    assert left.same_course(clean) and left.events == {}


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b]0;owned\x07\r\nround 3: all is well", "\u202e" * 9, "\ud800", "y" * 2_000_000]
)
def test_hostile_strings_are_cut_and_escaped(
    text: str, failed: Trace, tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def attack(arrays: Arrays, report: Report, asked: Instructions) -> tuple[Arrays, Report]:
        raise OSError(text)

    config = federation(tiny_corpus, tmp_path, "run", **OPTIONS)
    loop, _, left = play(config, hook=meddling(attack, when=in_round_two))
    assert left.same_course(failed) and left.events == {HOSTILE: {"failed": 1}}
    words = [record.getMessage() for record in caplog.records if record.name.startswith("nanofed.federated.server")]
    words += (config.folder / "events.jsonl").read_text().splitlines()
    words += [count.reason for kinds in loop.state.events.by_client().values() for count in kinds.values()]
    words += [str(json.loads((config.folder / "server.json").read_text())["refused"])]
    assert any("the client failed: OSError: " in word for word in words)
    for word in words:
        assert word.isprintable() and len(word) < 1000, word[:100]


FIELDS = ["code", "tokenizer", "dataset", "model", "streams", "training", "nanofed", "flwr", "no hello"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_client_that_does_not_match_is_refused_at_its_hello(field: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """The run is that of the honest client alone."""

    def greet(hello: Any) -> Any:
        if hello.name != HOSTILE:
            return hello
        if field == "no hello":
            raise OSError("the disk is gone")
        if field in hello.versions:
            return replace(hello, versions={**hello.versions, field: "0.1"})
        old = getattr(hello, field)
        first = next(iter(old)) if isinstance(old, dict) else ""
        other = (
            {**old, first: type(old[first])("9")} if isinstance(old, dict) else 3 if field == "streams" else "e" * 64
        )
        return replace(hello, **{field: other})

    loop, site, left = play(federation(tiny_corpus, tmp_path, "run", **OPTIONS), greet=greet)
    _, _, alone = play(federation(tiny_corpus, tmp_path, "alone", **OPTIONS), names=[HONEST])
    assert left.same_course(alone) and {asked.client for asked in site.asked} == {HONEST}
    ((who, kinds),) = left.events.items()
    assert kinds == {"hello": 1} and who == ("node 2" if field == "no hello" else HOSTILE)
    reason = loop.clients.refused[who]
    if field == "dataset":
        assert reason == "the validation shard holds other text"
    else:
        assert field == "no hello" or (field in reason and " there, " in reason and reason.endswith(" here"))


def test_an_update_over_the_limit_is_held_and_then_clipped_to_it(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged is the mean of the honest update and of the part of the other that is within the limit."""
    seen: dict[str, list[Any]] = {}

    def scale(
        self: norm_guard.NormGuard, length: norm_guard.Length, here: dict[str, norm_guard.Length], *_: Any
    ) -> float:
        return 0.25 if length is here[HOSTILE] else 1.0

    monkeypatch.setattr(norm_guard.NormGuard, "is_unsuspicious", lambda self, length: False)
    monkeypatch.setattr(norm_guard.NormGuard, "scale", scale)

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        base = [array.copy() for array in arrays]
        local, report = fit(arrays, asked)
        seen[asked.client] = [a.astype(np.float64) - b for a, b in zip(local, base, strict=True)]
        seen["base"] = base
        return local, report

    options = {**OPTIONS, "on_large_norm": "clip", "rounds": 1, "outer_lr": 1, "outer_momentum": 0}
    loop, _, left = play(federation(tiny_corpus, tmp_path, "run", **options), hook=hook)
    assert left.events == {HOSTILE: {"clipped": 1}} and not list((tmp_path / "run" / "spool").iterdir())
    for (name, ours), base, honest, theirs in zip(
        loop.state.weights.items(), seen["base"], seen[HONEST], seen[HOSTILE], strict=True
    ):
        np.testing.assert_allclose(ours, base + (honest + theirs / 4) / 2, rtol=1e-5, atol=1e-6, err_msg=name)


def flip(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
    base = [array.copy() for array in arrays]
    local, report = fit(arrays, asked)
    if asked.client == HOSTILE:
        away = [b - np.float32(10) * (np.asarray(a, np.float32) - b) for a, b in zip(local, base, strict=True)]
        return announced(away, report)
    return local, report


@pytest.mark.parametrize("merge", ["median", "trimmed_mean"])
def test_a_robust_merge_leaves_out_what_dwarfs_its_round(merge: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """From the first round on, by what the steps of the recipe can move; as if that client had failed."""
    # Of four that are left 0.25 cut off one on each side, and of five as well.
    options = {"clients": 5, "rounds": 3, "merge": merge, "trim": 0.25, "max_norm_ratio": 5.0}
    _, _, failed = play(
        federation(tiny_corpus, tmp_path, "failed", **options),
        hook=meddling(fail, when=lambda asked: asked.client == HOSTILE),
    )
    assert failed.events == {HOSTILE: {"failed": 3}}
    loop, _, left = play(federation(tiny_corpus, tmp_path, "run", **options), hook=flip)
    assert left.same_course(failed) and left.events == {HOSTILE: {"large_norm": 3}}
    count = loop.state.events.last("large_norm", HOSTILE)
    assert count is not None and "that no steps of the recipe exceed" in count.reason


@pytest.mark.parametrize("merge", ["median", "trimmed_mean"])
def test_a_flipped_update_passes_and_a_robust_merge_bears_it(
    merge: str, tiny_corpus: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """One of five clients sends its update ten times over, with the sign turned; the norm check is off."""
    rounds = count(4, 30)
    options = {"clients": 5, "rounds": rounds, "max_norm_ratio": "null", "trim": 0.2, "save_every": 0}
    clean, _, _ = play(federation(tiny_corpus, tmp_path, "clean", merge=merge, **options))
    robust, _, left = play(federation(tiny_corpus, tmp_path, "robust", merge=merge, **options), hook=flip)
    naive, _, _ = play(federation(tiny_corpus, tmp_path, "naive", merge="mean", **options), hook=flip)
    bpb = [loop.metrics.summary.bpb_end or 0.0 for loop in (clean, robust, naive)]
    assert left.events == {} and robust.metrics.summary.tokens == 5 * rounds * BATCH
    assert bpb[1] < bpb[0] * 1.05 and bpb[2] > bpb[0] * 1.3, bpb


# --- fuzz
FUZZERS = 30  # hostile clients, beside an honest one


class Fuzz:
    """Makes one wrong reply after another of those of the fuzzers."""

    def __init__(self, seed: int) -> None:
        self._seeds = itertools.count(seed)
        self.made = 0

    def __call__(self, reply: Message) -> list[Message]:
        if not reply.has_error() and reply.metadata.src_node_id != 1:
            self.made += 1
            generator = random.Random(next(self._seeds))
            generator.choice(SPOILS)(reply, generator)
        return [reply]


def untrained(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
    """A fuzzer trains nothing: it sends the weights back as it got them, with the report of one step."""
    if asked.client == HONEST:
        return fit(arrays, asked)
    payload = [np.array(array) for array in arrays]
    last = asked.lease[-1]  # to the end of its lease: there is text for its tokens
    end = StreamState(Row(last.epoch, last.shard, last.stop))
    said: dict[str, Any] = {name: getattr(asked, name) for name in ("run", "round", "client", "nonce", "base_hash")}
    said |= {"steps": 1, "tokens": asked.batch_tokens, "seconds": 1.0, "loss_first": 5.0, "loss_last": 4.0}
    said |= {"data": DataState(0, dict.fromkeys(range(8), end)), "exhausted": False, "unwritten": False, "ahead": 0}
    return payload, Report(**said, payload_hash=hash_arrays(payload))


def test_no_fuzzed_update_reaches_the_model_or_stops_the_run(
    tiny_corpus: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    rounds = -(-count(300, 10_000) // FUZZERS)
    options: dict[str, Any] = {"rounds": rounds, "clients": FUZZERS + 1, "save_every": rounds, "max_norm_ratio": 5.0}
    options |= {"on_large_norm": "reject", "eval_every": 10**6}
    fuzz = Fuzz(seed=1)
    _, _, fuzzed = play(federation(tiny_corpus, tmp_path, "fuzzed", **options), tamper=fuzz, hook=untrained)

    def absent(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if asked.client != HONEST:
            raise OSError("the disk is gone")
        return fit(arrays, asked)

    _, _, failed = play(federation(tiny_corpus, tmp_path, "failed", **options), hook=absent)
    assert fuzz.made == rounds * FUZZERS
    assert HONEST not in fuzzed.events and sum(map(sum, (k.values() for k in fuzzed.events.values()))) == fuzz.made
    assert fuzzed.same_course(failed) and len(fuzzed.hashes) == 1
    kinds = set().union(*fuzzed.events.values())
    assert kinds >= {"malformed", "damaged", "not_finite", "tokens", "stale", "small_norm"}
