"""The README can be followed: its commands run in their order, its messages are the code's, its files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanofed import cli
from nanofed.federated.flower import free_port
from tests.commands import blocks, commands, missing_files, parse
from tests.support import REPOSITORY

pytest_plugins = ["tests.workspace"]

README = REPOSITORY / "README.md"

# Commands that do not run here, each with the reason. Those of nanofed, also under torchrun, are read by their own parsers; of the
# others it is tested that the files they name are there.
NOT_RUN = {
    r"torchrun .*|nanofed .* configs/d\d+\w*\.yaml.*": "needs GPUs, or hours",
    r"nanofed data download .*|nanofed tokenizer train": "needs the network, or what it brings",
    r"nanofed export .* --push .*": "needs the Hugging Face Hub",
    r"nanofed (server|site) .*--keys .*": "needs another machine",
    r"bin/(quickstart|setup|test|gpu-check|speedrun).*": "is minutes of the commands that run here, or needs GPUs",
    r"(git clone|pip install) .*": "needs the network",
    r"(cd|source) .*": "is the shell's own",
    r"(sbatch|kubectl) .*": "needs a cluster",
    r"tensorboard .*": "serves until it is stopped",
}


def test_every_command_and_every_line_of_python_runs(workspace: Path) -> None:
    namespace: dict[str, Any] = {}
    unused = set(NOT_RUN)
    port = free_port()
    services = []
    for language, text in blocks(README):
        assert language in ("console", "bash", "python", "text", "bibtex"), f"a block of {language!r} is in no class"
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' own deprecations
                exec(text, namespace)
        for command in commands(language, text) if language in ("console", "bash") else ():
            words = shlex.split(command)
            assert missing_files(words) == [], command
            reasons = {pattern for pattern in NOT_RUN if re.fullmatch(pattern, command)}
            unused -= reasons
            if reasons and words[0] in ("nanofed", "torchrun"):
                parse(words)
            elif not reasons:
                assert words[0] == "nanofed", f"{command!r} is in no class: add it to NOT_RUN, or run it"
                if words[1] in ("server", "site") and words[2] != "init":
                    address = "--listen" if words[1] == "server" else "--superlink"
                    started = [sys.executable, "-m", *words, f"{address}=127.0.0.1:{port}"]
                    services.append(subprocess.Popen(started))
                else:
                    assert cli.main(words[1:]) == 0, command
    server, site = services
    assert server.wait(timeout=120) == 0
    site.terminate()
    assert site.wait(timeout=60) == 143
    assert unused == set(), "these exceptions stand for no command"
