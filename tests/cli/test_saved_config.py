"""Whatever a string option is set to, the saved config reads back as it was, by every reader of YAML."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from nanofed import cli
from nanofed.errors import ConfigError
from nanofed.federated.config import build_parser
from nanofed.training.config_errors import parse, resolved
from nanofed.training.lightning_cli import KINDS, FitCLI
from nanofed.training.run_options import START
from tests.cli.conftest import Corpus

# Each of them is something else than a string to some reader of YAML, or looks like its syntax.
WORDS = """
    8612e71 1e3 1E3 0x1f 0b1 1_000 007 0o17 1. -.5 +1 1:30 12:30:45 2024-01-01 .inf .nan nan inf on off yes no y n true
    False None null1 ~a << = - -- --- ... ? : # #c a: a:b %d @a `a !a !!str &a *a | > == [1] [ ] {a:1} { } , "d" 'q' " '
"""
AWKWARD = [
    *WORDS.split(),
    *["\\", "\\n", "- a", "? a", "a: b", "a #c", "a, b"],
    *["", " ", " a", "a ", "\ta", "a\nb", "a\n", "\n", "a\r\nb", "2024-01-01 10:00:00", "a" * 300],
    *["ü", "日本", "🙂", "\u2028", "\x85", "\x7f", "\x07", "\ufeff", "e\u0301"],
]
# What means "not set" where an option may be that.
NULL = re.compile(r"(null|~|#.*|&\w*|---|\ufeff)\s*", re.IGNORECASE | re.DOTALL)

Parser = tuple[Any, list[str]]


@pytest.fixture
def parsers(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> dict[str, Parser]:
    """Both paths' parsers, and the config that each is given."""
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: None)
    fit = FitCLI([f"--config={corpus.fit}"])
    federate = (build_parser(), [f"--config={corpus.federate}"])
    return {"fit": (fit.parser, [f"--config={corpus.fit}"]), "federate": federate}


def string_options(parser: Any) -> dict[str, bool]:
    """Return the options whose type is a string -> whether they may be nothing as well."""
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    optional = {key for key, hint in hints.items() if set(get_args(hint)) == {str, type(None)}}
    return {key: key in optional for key, hint in hints.items() if hint is str or key in optional}


def read_back(parser: Any, text: str) -> list[Any]:
    """Return what two readers make of a saved config: PyYAML's, and the parser's own."""
    own = parser.parse_string(text)
    return [yaml.safe_load(text), json.loads(parser.dump(own, skip_link_targets=False, format="json"))]


def value_at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


@pytest.mark.parametrize("path", ["fit", "federate"])
def test_every_string_option_reads_back(path: str, parsers: dict[str, Parser]) -> None:
    parser, base = parsers[path]
    options = string_options(parser)
    assert {"name", "runs_dir", "init_from", "data.path", "data.tokenizer", "data.validation_shard"} <= set(options)
    generator = random.Random(13)
    letters = "".join(AWKWARD)
    made = ["".join(generator.choices(letters, k=generator.randint(1, 6))) for _ in range(3 * len(options))]
    left = [value for value in (*AWKWARD, *made) if value != "--"]  # which no option on a command line can be
    while left:  # a value an option and parse, each with another one
        wanted: dict[str, str] = {}
        for key, optional in options.items():
            fits = [value for value in left if not (optional and NULL.fullmatch(value))]
            if fits:
                wanted[key] = fits[0]
                left.remove(fits[0])
        config = parse(parser, [*base, *(f"--{key}={value}" for key, value in wanted.items())], KINDS)
        assert {key: config[key] for key in wanted} == wanted
        config.sample_prompts = wanted["sample_prompts"] = [*wanted.values()]  # type: ignore[assignment]
        kept = {key: value for key, value in wanted.items() if key not in START}
        for content in read_back(parser, resolved(parser, config)):
            assert {key: value_at(content, key) for key in kept} == kept


@pytest.mark.parametrize("path", ["fit", "federate"])
def test_what_is_printed_reads_back_too(
    path: str, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(corpus.start(path, "--name=8612e71", "--print_config"))
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main([path, f"--config={tmp_path / 'printed.yaml'}", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "8612e71"


@pytest.mark.parametrize("value", ["#c", "&a", "---"])
def test_what_yaml_takes_for_nothing_is_refused_by_name(value: str, parsers: dict[str, Parser]) -> None:
    parser, base = parsers["federate"]
    with pytest.raises(ConfigError, match=r"--data\.tokenizer .* is nothing to YAML"):
        parse(parser, [*base, f"--data.tokenizer={value}"], KINDS)
    for key in ("data.tokenizer", "init_from"):
        assert parse(parser, [*base, f"--{key}=null"], KINDS)[key] is None
        assert parse(parser, [*base, f"--{key}=./{value}"], KINDS)[key] == f"./{value}"


@pytest.mark.parametrize("value", ["a\0b", "a\ud800"])
def test_what_no_file_can_hold_is_refused_by_name(value: str, parsers: dict[str, Parser]) -> None:
    parser, base = parsers["federate"]
    config = parse(parser, base, KINDS)
    config.data.path = value
    with pytest.raises(ConfigError, match=r"data\.path holds a character that is no text"):
        resolved(parser, config)


def test_what_would_read_back_as_something_else_is_refused_by_name(
    parsers: dict[str, Parser], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser, base = parsers["federate"]
    read: Callable[[str], Any] = parser.parse_string
    config = parse(parser, base, KINDS)
    monkeypatch.setattr(parser, "parse_string", lambda text: read(text.replace("\nname: ", "\nname: x")))
    with pytest.raises(ConfigError, match="name 'federate' would be read back from the saved config as 'xfederate'"):
        resolved(parser, config)


def test_a_run_with_an_awkward_name_goes_on_from_its_own_config(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"--runs_dir={tmp_path}"
    assert cli.main(["federate", f"--config={corpus.federate}", "--name=8612e71", runs, "--federation.rounds=1"]) == 0
    saved = tmp_path / "8612e71" / "config.yaml"
    assert cli.main(["federate", f"--config={saved}", "--ckpt_path=last", "--federation.rounds=2"]) == 0
    assert capsys.readouterr().err == ""


def test_null_reads_back_where_it_is_not_the_default() -> None:
    parser = build_parser()
    config = parse(parser, ["--federation.max_norm_ratio=null"], KINDS)
    assert parser.parse_string(resolved(parser, config)).federation.max_norm_ratio is None
