"""The README can be followed: its commands run in their order, its messages are the code's, its files are there."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanofed import cli
from nanofed.federated.flower import free_port
from tests.commands import blocks, commands, missing_files, parse
from tests.support import REPOSITORY

pytest_plugins = ["tests.workspace"]

README = REPOSITORY / "README.md"

# Commands that do not run here, each with the reason. Those of nanofed, also under torchrun, are read by their own parsers; and
# files of the repository that a command names are there.
NOT_RUN = {
    r"torchrun .*|nanofed .* configs/d\d+\w*\.yaml.*": "needs GPUs, or hours",
    r"nanofed data download .*|nanofed tokenizer train": "needs the network, or what it brings",
    r"nanofed export .* --push .*": "needs the Hugging Face Hub",
    r"nanofed (server|site) .*--keys .*": "needs another machine",
    r"bin/(quickstart|setup|test|gpu-check|speedrun).*": "is minutes of the commands that run here, or needs GPUs",
    r"(git clone|pip install|lm_eval) .*": "needs the network",
    r"(cd|source) .*": "is the shell's own",
    r"(sbatch|kubectl) .*": "needs a cluster",
    r"tensorboard .*": "serves until it is stopped",
}


@pytest.fixture
def services() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the README starts in terminals of their own: what still runs at the end is told to stop."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_every_command_and_every_line_of_python_runs(workspace: Path, services: list[subprocess.Popen[bytes]]) -> None:
    address = f"127.0.0.1:{free_port()}"
    names: dict[str, Any] = {}
    unused = set(NOT_RUN)
    for language, text in blocks(README):
        assert language in ("console", "bash", "python", "text", "bibtex"), f"a block of {language!r} is in no class"
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' own deprecations
                exec(text, names)
        for command in commands(language, text) if language in ("console", "bash") else ():
            words = shlex.split(command)
            assert missing_files(words) == [], command
            matching = {pattern for pattern in NOT_RUN if re.fullmatch(pattern, command)}
            unused -= matching
            if matching and words[0] in ("nanofed", "torchrun"):
                parse(words)
            elif not matching:
                assert words[0] == "nanofed", f"{command!r} is in no class: add it to NOT_RUN, or run it"
                if re.match(r"nanofed (server|site) --", command):
                    place = "--listen" if words[1] == "server" else "--superlink"
                    services.append(subprocess.Popen([sys.executable, "-m", *words, f"{place}={address}"]))
                else:
                    assert cli.main(words[1:]) == 0, command
    server, site = services
    assert server.wait(timeout=200) == 0
    site.terminate()
    assert site.wait(timeout=60) == 143
    assert unused == set(), "these exceptions stand for no command"


def texts_of_the_code() -> set[str]:
    """Return every string in the package; in an f-string each value is an ellipsis."""
    found = set()
    for path in (REPOSITORY / "nanofed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_message_of_troubleshooting_is_the_code_s() -> None:
    section = README.read_text(encoding="utf-8").partition("## Troubleshooting\n")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 12
    code = "\0".join(texts_of_the_code())
    for message in messages:
        pattern = "[^\0]*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, code), f"no message of the code says {message!r}"


def test_every_paper_that_is_to_be_cited_is_cited_in_the_code() -> None:
    eprints = set(re.findall(r"eprint = \{([\d.]+)\}", README.read_text(encoding="utf-8")))
    assert len(eprints) > 10
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "nanofed").rglob("*.py"))
    assert {eprint for eprint in eprints if f"arXiv:{eprint}" not in code} == set()
