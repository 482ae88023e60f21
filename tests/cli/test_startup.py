"""Where the time to the first step goes: counted without gaps, said once, and not spent on what nothing here uses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanofed import cli
from nanofed.training.startup import Startup
from tests.cli.conftest import Corpus


def test_every_second_is_counted_once() -> None:
    now, compiled = 100.0, 0.0
    startup = Startup(lambda: now, lambda: compiled)
    now = 103.0
    startup.done("imports")
    now, compiled = 108.0, 4.0
    startup.done("validation")
    now = 109.0
    startup.done("imports")
    now, compiled = 112.5, 6.0
    startup.done("step")
    assert startup.seconds == {"imports": 4.0, "validation": 1.0, "compile": 6.0, "step": 1.5}
    assert str(startup) == "first step after 12.5 s: imports 4.0, validation 1.0, compile 6.0, step 1.5"


def test_a_run_says_it_once_also_when_it_goes_on(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = corpus.start("fit", f"--runs_dir={tmp_path}")
    for command, parts in (
        (run, ["imports", "config", "tokenizer", "trainer", "data", "model", "validation", "optimizer", "step"]),
        ([*run, "--ckpt_path=last", "--model.recipe.num_steps=6"], ["imports", "config", "optimizer", "step"]),
    ):
        assert cli.main(command) == 0
        said = re.findall(r"^first step after (\S+) s: (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert len(said) == 1
        seconds = {part: float(value) for part, value in (entry.rsplit(" ", 1) for entry in said[0][1].split(", "))}
        assert set(parts) <= set(seconds)
        assert all(value >= 0 for value in seconds.values())
        assert sum(seconds.values()) == pytest.approx(float(said[0][0]), abs=0.05 * len(seconds) + 0.05)


@pytest.mark.slow
def test_a_command_imports_no_package_that_it_does_not_use() -> None:
    seen = "import sys; from nanofed.cli.output import show_progress; show_progress(); import nanofed.training.fit; "
    unused = ("transformers", "flwr", "ray", "pandas", "matplotlib", "scipy")
    code = f"{seen} print([name for name in {unused} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    # What was hidden from torchmetrics is there for everybody else.
    code = f"{seen} import gc, importlib.metadata; print(importlib.metadata.version('lightning') != '', gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("nanofed.federated.site.worker", ("transformers", "matplotlib")),
        ("nanofed.federated.runtimes.flower_app", ("transformers", "matplotlib")),
        ("nanofed.federated.deploy.site", ("torch", "numpy", "flwr")),  # it stays beside the worker, in 30 MB
    ],
)
def test_neither_does_a_process_of_a_deployment(module: str, unused: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {unused} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
