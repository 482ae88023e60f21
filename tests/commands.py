"""Command lines as they stand in documents and scripts: where they are found, and the parsers that read them."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from nanofed.cli import COMMANDS
from nanofed.federated.config import Arguments
from tests.support import REPOSITORY
from tests.test_configs import Parsed, on_meta

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of every code block of a Markdown document."""
    text = document.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert text.count("```") == 2 * len(found), "a code block is indented or has no end"
    yield from found


def commands(language: str, text: str) -> Iterator[str]:
    """Yield the commands of a block, without comments: in `console` those after a `$`, in `bash` every line."""
    for line in text.replace("\\\n", " ").splitlines():
        if language == "console" and not line.startswith("$ "):
            continue  # what the command printed
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield shlex.join(words)


def parse(words: Sequence[str]) -> Any:
    """Read a command line with the parsers that would read it: torchrun's, and nanofed's. The model it names is built on meta.

    Returns:
        the config of a command that trains, else None.
    """
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.module and launch.training_script == "nanofed", words
        words = ["nanofed", *launch.training_script_args]
    assert words[0] == "nanofed", words
    name: Any
    name, *args = words[1:]
    module: Any = importlib.import_module(COMMANDS[name][0])
    if name in ("fit", "validate", "profile"):
        config = Parsed(args, command=name).config
    elif name in ("federate", "server", "site"):
        config = Arguments.from_args(module._parser().parse_known_args(args)[1]).config
    else:
        parser = getattr(module, f"_{name}_parser", None) or module._parser  # export's module is import's, too
        parser().parse_args(args)
        return None
    on_meta(config)
    return config


def missing_files(words: Sequence[str]) -> list[str]:
    """Return the files of the repository that a command line names and that are not there."""
    named = [word for word in words if re.match(r"(bin|configs|notebooks)/", word)]
    return [word for word in named if not (REPOSITORY / word).exists()]
