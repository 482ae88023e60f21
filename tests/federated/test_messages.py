from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.messages import KEY, MAX_JSON, Hello, Instructions, Report, code_hash
from tests.federated.replies import instructions, report

HELLO = Hello("site-1", code_hash(), {"n_layer": 2, "n_embd": 128}, "t" * 64, "d" * 64, 8)
NOTES: list[Hello | Instructions | Report] = [HELLO, instructions(), instructions(data=None, seconds=7.25), report()]
IDS = ["hello", "instructions", "fresh-instructions", "report"]


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_what_is_sent_is_what_arrives(note: Hello | Instructions | Report) -> None:
    config = note.to_config()
    assert list(config) == [KEY] and isinstance(config[KEY], str)
    assert type(note).from_config(json.loads(json.dumps(config))) == note


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_every_field_is_needed_and_no_other_is_taken(note: Hello | Instructions | Report) -> None:
    plain = json.loads(note.to_config()[KEY])
    for field in fields(note):
        less = {name: value for name, value in plain.items() if name != field.name}
        with pytest.raises(WireError, match=rf"a {type(note).__name__} lacks the fields \['{field.name}'\]"):
            type(note).from_config({KEY: json.dumps(less)})
    with pytest.raises(WireError, match=r"unknown \['admin'\]"):
        type(note).from_config({KEY: json.dumps({**plain, "admin": True})})


@pytest.mark.parametrize("note", NOTES, ids=IDS)
def test_a_value_of_another_kind_is_refused_by_name(note: Hello | Instructions | Report) -> None:
    plain = json.loads(note.to_config()[KEY])
    optional = {"seconds": isinstance(note, Instructions), "data": isinstance(note, Instructions)}
    garbage: list[Any] = [None, True, "3", "", 1.5, -1, [], [1], {}, {"a": 1}, 10**30, 1e308, [[[]]], "x" * 3000]
    for field in fields(note):
        kinds = {
            "str": (str,),
            "int": (int,),
            "bool": (bool,),
            "float": (int, float),
            "float | None": (int, float),
        }.get(str(field.type))
        for value in garbage:
            if value is None and optional.get(field.name):
                continue
            config = {KEY: json.dumps({**plain, field.name: value})}
            if kinds is None:  # a structure: garbage never gives anything but a well-formed one
                try:
                    got = getattr(type(note).from_config(config), field.name)
                except WireError as error:
                    assert len(str(error)) < 500
                else:
                    assert (field.name, value) in [("lease", []), ("model", {}), ("model", {"a": 1})]
                    assert got == (tuple(value) if field.name == "lease" else value)
            elif type(value) not in kinds or value == 10**30:
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
    with pytest.raises(WireError, match="Instructions has a field of the wrong kind"):
        Instructions.from_config({KEY: json.dumps({**plain, "lease": lease})})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"a":' * 100_000, "is no JSON"),
        ("null", "not a NoneType"),
        ("[]", "not a list"),
        ('"text"', "not a str"),
        ("9" * 5000, "is no JSON"),
        (" " * (MAX_JSON + 1), "at most"),
        (b"{}", "one JSON string"),
        (None, "one JSON string"),
        (3, "one JSON string"),
        ("\ud800", "is no JSON"),
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
    changed = text.replace(f'"{name}": {number}', f'"{name}": {value}')
    assert changed != text
    with pytest.raises(WireError):
        Report.from_config({KEY: changed})


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\nb", ".hidden", "x" * 65, "ü"])
def test_a_client_has_a_plain_name(name: str) -> None:
    with pytest.raises(WireError, match="no plain word"):
        Hello.from_config(replace(HELLO, name=name).to_config())


def test_an_unknown_field_of_any_size_makes_a_short_message() -> None:
    plain = json.loads(report().to_config()[KEY])
    with pytest.raises(WireError) as refused:
        Report.from_config({KEY: json.dumps({**plain, "x" * 1_000_000: 1})})
    assert len(str(refused.value)) < 500


def test_the_code_hash_is_of_the_sources() -> None:
    assert len(code_hash()) == 64 and code_hash() == code_hash()
