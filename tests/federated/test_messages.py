from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from nanofed.federated.wire.bundle import code_hash
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.messages import (
    KEY,
    MAX_JSON,
    Evaluate,
    Evaluation,
    Hello,
    Instructions,
    Report,
    SiteShard,
    WireMessage,
)
from tests.federated.replies import instructions, report

HELLO = Hello(
    "site-1",
    code_hash(),
    {"n_layer": 2, "n_embd": 128},
    "t" * 64,
    "d" * 64,
    8,
    training={"matrix_lr": "0.02", "packing": "contiguous"},
    versions={"python": "3.12.1", "flwr": "1.41.0"},
    devices=4,
    tokens_per_second=1234.5,
    shards=(SiteShard("shard_00000.parquet", 100, 4000, "f" * 64),),
)
NOTES: list[WireMessage] = [
    HELLO,
    instructions(),
    instructions(data=None, seconds=7.25),
    report(),
    Evaluate("a" * 32, 3, "client-0", "c" * 32, "b" * 64, "fp32", "", 36, 1, 2, 150.0),
    Evaluation("a" * 32, 3, "client-0", "c" * 32, "b" * 64, 812.5, 400, 1.25, ""),
]
IDS = ["hello", "instructions", "fresh-instructions", "report", "evaluate", "evaluation"]


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_what_is_sent_is_what_arrives(note: WireMessage) -> None:
    config = note.to_config()
    assert list(config) == [note.key] and isinstance(config[note.key], str)
    assert type(note).from_config(json.loads(json.dumps(config))) == note


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_every_field_is_needed_and_no_other_is_taken(note: WireMessage) -> None:
    plain = json.loads(note.to_config()[note.key])
    for field in fields(note):
        less = {name: value for name, value in plain.items() if name != field.name}
        with pytest.raises(WireError, match=f"a {type(note).__name__} cannot be read: it lacks the field {field.name}"):
            type(note).from_config({note.key: json.dumps(less)})
    with pytest.raises(WireError, match="it has the unknown field admin"):
        type(note).from_config({note.key: json.dumps({**plain, "admin": True})})


KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "Reason": (str,), "Int": (int,), "bool": (bool,)}
KINDS |= {"float": (int, float), "float | None": (int, float)}


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_a_value_of_another_kind_is_refused_by_name(note: WireMessage) -> None:
    plain = json.loads(note.to_config()[note.key])
    optional = {field.name for field in fields(note) if str(field.type).endswith(" | None")}
    garbage: list[Any] = [None, True, "3", "", 1.5, -1, [], [1], {}, {"a": 1}, 10**30, 1e308, [[[]]], "x" * 3000]
    for field in fields(note):
        kinds = KINDS.get(str(field.type))
        for value in garbage:
            if value is None and field.name in optional:
                continue
            config = {note.key: json.dumps({**plain, field.name: value})}
            if kinds is None:  # a structure: garbage never gives anything but a well-formed one
                try:
                    got = getattr(type(note).from_config(config), field.name)
                except WireError as error:
                    assert len(str(error)) < 500
                else:
                    kind = "list" if field.name in ("lease", "shards") else "dict"
                    assert (kind, field.name, value) in [
                        ("list", field.name, []),
                        ("dict", field.name, {}),
                        ("dict", "model", {"a": 1}),
                    ]
                    assert got == (tuple(value) if kind == "list" else value)
            elif type(value) not in kinds or (kinds == (int,) and value == 10**30):
                with pytest.raises(WireError, match=f"{type(note).__name__}.* {field.name} is ") as refused:
                    type(note).from_config(config)
                assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "lease",
    [
        "rows",
        [["s", 0, 1, 0]],
        [{"shard": "s", "start": 0, "stop": 1}, 7],
        [{"shard": "s", "start": "0", "stop": 1, "epoch": 0}],
        [{"shard": 5, "start": 0, "stop": 1, "epoch": 0}],
        [{"shard": "s", "start": 0, "stop": 1.5, "epoch": 0}],
        [{"shard": "s", "start": 0, "stop": 1, "epoch": 0, "more": 1}],
    ],
)
def test_a_lease_of_garbage_is_refused(lease: Any) -> None:
    plain = json.loads(instructions().to_config()[KEY])
    with pytest.raises(WireError, match=r"Instructions cannot be read: .*lease"):
        Instructions.from_config({KEY: json.dumps({**plain, "lease": lease})})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ('{"a":' * 100_000, "Invalid JSON"),
        ("null", "is None"),
        ("[]", r"is \[\]"),
        ('"text"', "is 'text'"),
        ("9" * 5000, "Invalid JSON"),
        (" " * (MAX_JSON + 1), "at most"),
        (b"{}", "one JSON string"),
        (None, "one JSON string"),
        (3, "one JSON string"),
        ("\ud800", "Invalid JSON"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_json_object_is_refused(text: Any, says: str) -> None:
    with pytest.raises(WireError, match=says):
        Report.from_config({KEY: text})


@pytest.mark.parametrize("config", [None, 5, [], {}, {"other": "{}"}])
def test_another_dictionary_is_refused(config: Any) -> None:
    with pytest.raises(WireError, match="a Report must be one JSON string"):
        Report.from_config(config)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["seconds", "loss_first", "loss_last"])
def test_numbers_that_are_none_are_refused(name: str, value: str) -> None:
    text = report().to_config()[KEY]
    number = json.loads(text)[name]
    changed = text.replace(f'"{name}":{number}', f'"{name}":{value}')
    assert changed != text
    with pytest.raises(WireError):
        Report.from_config({KEY: changed})


def text(number: int, rows: int, text_bytes: int, name: str = "s") -> list[dict[str, Any]]:
    """What a site says of so many shards that are alike."""
    alike = {"num_rows": rows, "text_bytes": text_bytes, "fingerprint": "f" * 64}
    return [{"name": f"{name}{n}", **alike} for n in range(number)]


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\nb", ".hidden", "x" * 65, "ü"])
def test_a_client_has_a_plain_name(name: str) -> None:
    with pytest.raises(WireError, match="no plain word"):
        Hello.from_config(replace(HELLO, name=name).to_config())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"packing": 3}}, "training.packing is 3: Input should be a valid string"),
        ({"versions": {"torch": "2.11\x1b[31m"}}, "versions 'torch' is no plain text"),
        ({"versions": {"x" * 1000: "1"}}, "is no plain text"),
        ({"devices": 0}, "0 devices"),
        ({"tokens_per_second": -1.0}, "-1.0 tokens a second"),
        ({"shards": [{"name": "a", "num_rows": 1, "text_bytes": 9}]}, "fingerprint"),
        ({"shards": [{"name": "a\nb", "num_rows": 1, "text_bytes": 9, "fingerprint": "f"}]}, "no plain name"),
        ({"shards": [{"name": "a", "num_rows": 0, "text_bytes": 9, "fingerprint": "f"}]}, "has 0 rows"),
        ({"shards": [{"name": "a", "num_rows": 1.5, "text_bytes": 9, "fingerprint": "f"}]}, "shards.0.num_rows is 1.5"),
        ({"shards": [{"name": "a", "num_rows": 1, "text_bytes": 9, "fingerprint": "f"}] * 2}, "named twice"),
        ({"shards": text(1, 1 << 38, 1 << 45)}, "rows, of 268435456 at most"),
        ({"shards": text(60_000, 8, 400)}, "60000 shards, of 4096 at most"),
        ({"shards": text(1, 1000, 999)}, "1000 rows of 999 bytes"),
        ({"shards": text(1, 8, 1 << 62)}, "rows of 4611686018427387904 bytes"),
        ({"shards": text(1, 8, 400, "../up")}, "no plain name"),
        ({"shards": text(1, 8, 400, "x" * 300)}, "no plain name"),
    ],
)
def test_a_hello_is_of_plain_words_and_counts(changes: dict[str, Any], says: str) -> None:
    plain = {**json.loads(HELLO.to_config()[KEY]), **changes}
    with pytest.raises(WireError, match=re.escape(says)) as refused:
        Hello.from_config({KEY: json.dumps(plain)})
    assert len(str(refused.value)) < 300 and str(refused.value).isprintable()


def test_an_unknown_field_of_any_size_makes_a_short_message() -> None:
    plain = json.loads(report().to_config()[KEY])
    with pytest.raises(WireError) as refused:
        Report.from_config({KEY: json.dumps({**plain, "x" * 1_000_000: 1})})
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["participants", "batch_tokens", "horizon_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_schedule_divides_by_nothing_that_is_not_positive(name: str, value: int) -> None:
    with pytest.raises(WireError, match=name):
        Instructions.from_config(instructions(**{name: value}).to_config())


@pytest.mark.parametrize("changes", [{"share": 2}, {"share": -1}, {"eval_tokens": 0}, {"seconds": 0.0}])
def test_a_request_to_evaluate_is_of_text_that_there_is(changes: dict[str, Any]) -> None:
    asked = Evaluate("a" * 32, 3, "client-0", "c" * 32, "b" * 64, "fp32", "", 36, 1, 2, 150.0)
    with pytest.raises(WireError, match="a Evaluate has a value out of range: share "):
        Evaluate.found_in(replace(asked, **changes).to_config())
    assert Evaluate.found_in({KEY: "{}"}) is None
