"""Every number that a person can set has a range, and what is out of it is refused by the option's name."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest

import nanofed
from nanofed import cli
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.federated.config import FabricOptions, FederationConfig, build_parser
from nanofed.ranges import Count, Range, Seed, check_number, ranged
from nanofed.training.callbacks.watchdog import Limits
from nanofed.training.config_errors import parse
from nanofed.training.lightning_cli import KINDS, FitCLI
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from nanofed.training.run_options import RunOptions

NONE = [math.nan, math.inf, -math.inf, -1, float("1e400"), 2**70]
OWN = ("trainer.", "seed_everything")  # Lightning's, and the one that is checked where the module takes it over
OBJECTS: dict[str, Callable[..., Any]] = {
    "model.recipe.": Recipe,
    "--": RunOptions,
    "federation.": FederationConfig,
    "watchdog.": Limits,
    "fabric.": FabricOptions,
    "data.": TokenDataModule,
    "model.": GPTModule,
}


def is_number(hint: Any) -> bool:
    """Tell whether a type is int or float, or has one inside; bool is none."""
    return hint in (int, float) or any(is_number(part) for part in get_args(hint))


def refused(name: str, value: float) -> AbstractContextManager[Any]:
    if name == "model.recipe.horizon_flops" and value == 2**70:
        return nullcontext()  # a horizon that there may be
    return pytest.raises(ConfigError, match=rf"^(--)?{name} must be ")


class Given:
    """A parser that was given one value too many: everything else stands at its default."""

    def __init__(self, parser: Any, key: str, value: Any) -> None:
        self._actions = parser._actions
        self._defaults, self._key, self._value = parser.get_defaults(), key, value

    def parse_args(self, args: list[str]) -> Any:
        self._defaults[self._key] = self._value
        return self._defaults


@pytest.mark.slow
def test_every_numeric_option_has_a_range_and_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fit, validate, federate, server and site."""
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: None)
    paths = {
        FitCLI(["--seed_everything=1"]).parser: {**KINDS, "watchdog": Limits},
        build_parser(): {**KINDS, "federation": FederationConfig, "fabric": FabricOptions},
    }
    for parser, kinds in paths.items():
        found = {f"{section}.{name}".lstrip(".") for section in kinds for name in ranged(kinds[section])}
        hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
        numeric = {name for name, hint in hints.items() if is_number(hint)}
        follows = {"model.vocab_size", "data.sequence_len", "model.seed"}  # other options
        assert {name for name in numeric if not name.startswith(OWN)} - follows == found - follows
        assert len(found) > 20
        for name in numeric - follows:
            for value in NONE:
                if value != -1 or not name.startswith(OWN):  # it means something to Lightning
                    with refused(name, value):
                        parse(Given(parser, name, value), ["x"], kinds)


@pytest.mark.parametrize("prefix", OBJECTS)
def test_every_object_refuses_by_name(prefix: str) -> None:
    kind = OBJECTS[prefix]
    needed = {"vocab_size": 300} if kind is GPTModule else {}
    assert ranged(kind)
    for name in ranged(kind):
        for value in NONE:
            given = [value] if name == "client_speeds" else value
            with refused(f"{prefix}{name}".lstrip("-"), value):
                kind(**needed, **{name: given})


COMMANDS = [
    *(f"generate --checkpoint=c --prompt=p --{name}" for name in ("max_tokens", "temperature", "top_k", "seed")),
    *(f"evaluate run --{name}" for name in ("core_examples", "eval_tokens")),
    *(f"data download --num_shards=1 --{name}" for name in ("num_shards", "workers")),
    *(f"data demo --{name}" for name in ("num_shards", "max_bytes")),
    *(f"data pack x --output=o --{name}" for name in ("num_shards", "rows_per_group", "shuffle_buffer", "seed")),
    *(f"tokenizer train --{name}" for name in ("vocab_size", "max_chars", "doc_cap")),
    "tokenizer eval --max_chars",
    *(f"server init keys --site=a --{name}" for name in ("port", "days")),
    "site --superlink=localhost:1 --name=a --devices",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line_by_name_and_makes_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for value in ("nan", "inf", "-1", "1e400", str(2**70), "x", ""):
        if value == "-1" and "download" in command and "--workers" not in command:
            continue  # all shards there are
        assert cli.main(f"{command}={value}".split()) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and f"{command.split()[-1]} must be " in said
    assert list(tmp_path.iterdir()) == []


def test_no_command_reads_a_number_without_a_range() -> None:
    for path in (Path(nanofed.__file__).parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type":
                assert ast.unparse(node.value) not in ("int", "float"), f"{path.name}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Count, 0, "x must be at least 1, not 0"),
        (Count, 1.5, "x must be a whole number, not 1.5"),
        (Count, 2**70, f"x must be at most {1 << 40:,}, not {2**70}"),
        (Seed, 2**32, f"x must be at most 4,294,967,295, not {2**32}"),
        (Annotated[float, Range(0, 1, above=True)], 0, "x must be positive, not 0"),
        (Annotated[float, Range(1, 9, above=True)], 1, "x must be above 1, not 1"),
        (Annotated[float, Range(0, 0.5, below=True)], 0.5, "x must be below 0.5, not 0.5"),
        (list[Annotated[float, Range(0, 1)]], [0.5, math.nan], "x must be a number, not nan"),
        (dict, {"a": {"b": math.inf}}, "x must be a number, not inf"),
    ],
)
def test_what_is_said(kind: Any, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_number("x", value, kind)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("kind", "value"), [(Count, 1), (Count, 1 << 40), (Count | None, None), (Seed, 0), (Any, True)]
)
def test_what_passes(kind: Any, value: Any) -> None:
    check_number("x", value, kind)
