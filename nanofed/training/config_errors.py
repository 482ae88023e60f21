"""Command line and YAML to options: whatever is wrong with them becomes one line that names file, key and remedy."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import yaml

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.ranges import check_number, ranged
from nanofed.training.run_options import START
from nanofed.training.summary import CONFIG, MARKER, SUMMARY

logger = logging.getLogger(__name__)

ELSEWHERE = {"trainer": "fit", "federation": "federate", "fabric": "federate"}  # sections of one command only


def parse(parser: Any, args: Sequence[str], kinds: Mapping[str, Any]) -> Any:
    """Parse `args` with a jsonargparse parser.

    Args:
        parser: the parser.
        args: the command line.
        kinds: section -> the class whose options it holds, "" for those without a section: their numbers keep to the ranges
            that `ranges.ranged` finds.

    Raises:
        ConfigError: a config file that is not there or not YAML, a key that does not exist, a value of the wrong type.
    """
    files = {path: read_yaml(path) for path in config_files(args)}
    typed, rest = _start_options(args)
    key: str | None = None
    try:
        config = parser.parse_args([*rest, *typed])
        _check_nothing(args, config)
        _forget_start_options(config, parser, files, typed)
        ranges = {
            f"{section}.{name}".lstrip("."): hint for section in kinds for name, hint in ranged(kinds[section]).items()
        }
        for key in [action.dest for action in parser._actions if action.dest in config]:
            check_number(key if "." in key else f"--{key}", config[key], ranges.get(key))
        return config
    except argparse.ArgumentError as error:
        key, message = explain(str(error), set(known_keys(parser)))
        failure: Exception = error
    except ConfigError as error:
        message, failure = str(error), error
    is_typed = any(arg == f"--{key}" or arg.startswith(f"--{key}=") for arg in args)
    holding = [path for path, content in files.items() if key and _holds(content, key)]
    source = None if is_typed or not holding else holding[-1]
    raise ConfigError(f"{source}: {message}" if source else message) from failure


def _check_nothing(args: Sequence[str], config: Any) -> None:
    """Refuse a typed value that YAML reads as null: a name that begins with # is a comment in YAML."""
    for arg in args:
        name, given, value = arg.removeprefix("--").partition("=")
        if given and value.strip().lower() not in ("", "null", "~") and name in config and config[name] is None:
            raise ConfigError(f"--{name} {value!r:.60} is nothing to YAML: write ./ before it, if it is a path")


def resolved(parser: Any, config: Any) -> str:
    """Return every key of a run with its value as YAML, once it has been read back and found the same.

    The options that say how this one command starts are left out.

    Raises:
        ConfigError: a value would be read back as another one, or cannot be written in UTF-8; names it.
    """
    config = config.clone()
    for name in START:
        config.pop(name, None)
    before = json.loads(parser.dump(config, skip_link_targets=False, skip_unset=False, format="json"))
    for key, value in _leaves(before):
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ConfigError(f"{key} holds a character that is no text: {value!r:.60}")
    text = str(parser.dump(config, skip_link_targets=False, skip_unset=False))  # null may not be the default
    try:
        read = parser.parse_string(text)
        for name in START:
            read.pop(name, None)
        again = json.loads(parser.dump(read, skip_link_targets=False, skip_unset=False, format="json"))
    except argparse.ArgumentError as error:
        raise ConfigError(f"the config would not read back: {explain(str(error), set())[1]}") from error
    there, here = dict(_leaves(before)), dict(_leaves(again))
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if a != b:
            raise ConfigError(
                f"{key} {_short(repr(a))} would be read back from the saved config as {_short(repr(b))}: change it"
            )
    return text


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in a config that is no mapping or list itself."""
    items = (
        content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else None
    )
    if not items:
        yield prefix.removesuffix("."), content
    for key, value in items or ():
        yield from _leaves(value, f"{prefix}{key}.")


class _Dumper(yaml.SafeDumper):
    """Writes YAML in which no reader takes a string for anything else.

    Readers differ: `8612e71` is text to PyYAML and a float to jsonargparse and YAML 1.2, `on` is text to YAML 1.2 and true to
    YAML 1.1. So a string stands without quotes only where it can be nothing else.
    """


PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*", re.ASCII)
WORDS = frozenset(["y", "yes", "n", "no", "true", "false", "on", "off", "null", "none", "nan", "inf", "infinity"])


def _write_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = PLAIN.fullmatch(text) and text.lower() not in WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _write_string)


def _dump_yaml(content: Any) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")))


jsonargparse.set_dumper("yaml", _dump_yaml)  # for --print_config, too


def _start_options(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into those that say how to start (`--overwrite true`), and the rest."""
    names = tuple(f"--{name}" for name in START)
    typed: list[str] = []
    rest: list[str] = []
    takes_next = False
    for arg in args:
        is_typed = takes_next or arg.split("=")[0] in names
        takes_next = not takes_next and arg in names
        (typed if is_typed else rest).append(arg)
    return typed, rest


def _forget_start_options(
    config: Any, parser: Any, files: Mapping[str, Mapping[str, Any]], typed: Sequence[str]
) -> None:
    """Take out of a config what says how to start and was not typed: all of it from a run's own file, else `overwrite`."""
    for name in START:
        holding = [path for path, content in files.items() if content.get(name) not in (None, False)]
        ignored = [path for path in holding if name == "overwrite" or _is_of_a_run(runtime.user_path(path))]
        if not ignored or any(arg.split("=")[0] == f"--{name}" for arg in typed):
            continue
        heeded = [content[name] for path, content in files.items() if name in content and path not in ignored]
        config[name] = heeded[-1] if heeded else parser.get_default(name)
        logger.warning("%s: %s is ignored: it is heeded on the command line only", ", ".join(ignored), name)


def _is_of_a_run(path: Path) -> bool:
    """Tell whether a config file is one that a run has saved."""
    path = path.resolve()
    return path.name == CONFIG and any((path.parent / name).exists() for name in (MARKER, SUMMARY))


def config_files(args: Sequence[str]) -> list[str]:
    """Return the config files that `args` name."""
    found = []
    for index, arg in enumerate(args):
        if arg in ("--config", "-c"):
            if index + 1 == len(args):
                raise ConfigError("--config needs a file, such as configs/tiny.yaml")
            found.append(args[index + 1])
        elif arg.startswith("--config="):
            found.append(arg.removeprefix("--config="))
    return found


def read_yaml(path: str) -> Mapping[str, Any]:
    """Read a config file as a mapping of keys to values."""
    file = runtime.user_path(path)
    if not file.is_file():
        raise ConfigError(f"there is no config file {path}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no mapping of keys to values: it holds {_short(content)}")
    for key, value in content.items():
        if key in ("model", "data", "trainer", "federation", "fabric") and not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {key} is a section of keys and values, not {_short(value)}")
    return content


def known_keys(parser: Any) -> Iterator[str]:
    """Yield every dotted key that a parser takes, those of dataclasses among its types included."""
    for action in parser._actions:
        if action.dest not in ("help", argparse.SUPPRESS):
            yield action.dest
        hint = getattr(action, "_typehint", None)
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from (f"{action.dest}.{field.name}" for field in dataclasses.fields(kind))


def explain(message: str, known: set[str]) -> tuple[str | None, str]:
    """Cut jsonargparse's message down to the key it is about, where it tells, and a line for a person.

    Its messages list every alternative of a type; of these only the first, which is never null here, says what was wrong.
    """
    text = " ".join(message.split())
    keys = re.findall(r'Parser key "([^"]+)"', text)
    prefix = ".".join(keys)
    if found := re.search(r"unrecognized arguments: -*([^\s=]+)", text):
        return found[1], _no_such(found[1], known)
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        key = f"{found[1]}.{found[2]}"
        return key, _no_such(key, known)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        key = f"{prefix}.{found[1]}" if prefix else found[1]
        return key, _no_such(key, known)
    if found := re.search(r"argument (\S+) --> (\S+):", text):
        source = found[1] if found[1] in known else found[1].partition(".")[0] + ".*"  # a property is no option
        return found[2], f"{found[2]} follows {source} and cannot be set by itself"
    if found := re.search(r'Linked "([^"]+)" must be given via "([^"]+)"', text):
        return found[1], f"{found[1]} follows {found[2]}: set that"
    if found := re.search(r"Call to compute_fn of link .* failed: (.+)", text):
        return None, found[1]
    wanted = re.findall(r"Expected a (.+?)(?=\. Got value|\. Given value| Given value| - | Errors:|$)", text)
    got = re.search(r"(?:Got value|Given value): (.*?)(?= - |$)", text)
    if prefix and wanted and got:
        kinds = list(dict.fromkeys(_kind(kind) for kind in wanted))
        return prefix, f"{prefix} must be {' or '.join(kinds)}, not {_short(got[1])}"
    return None, text


def _no_such(key: str, known: set[str]) -> str:
    same_end = [name for name in known if name.split(".")[-1] == key.split(".")[-1] and name != key]
    close = same_end[:1] if len(same_end) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    other = ELSEWHERE.get(key.split(".")[0])
    if other and not any(name.startswith(f"{key.split('.')[0]}.") for name in known):
        return f"there is no option {key} here: it is one of `nanofed {other}`"
    hint = f"; did you mean {close[0]}?" if close else " (--help lists them)"
    return f"there is no option {key}{hint}"


def _kind(text: str) -> str:
    text = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", text).removeprefix("typing.")
    if found := re.match(r"Literal\[(.*)\]", text):
        return "one of " + found[1]
    return "null" if text == "NoneType" else text


def _short(value: object) -> str:
    text = "nothing" if value is None or value == "" else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _holds(content: Mapping[str, Any], key: str) -> bool:
    return any(f"{name}.".startswith(f"{key}.") for name, _ in _leaves(content))
