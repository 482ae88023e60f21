"""The notebooks run from top to bottom, and stand in the repository with what they printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# What makes each notebook short, beside `bin/test --campaign`: every cell runs all the same.
SHORTER = {
    "callbacks": {"num_steps=80": "num_steps=20", "max_steps=80": "max_steps=20", "interval=40": "interval=10"},
    "federation": {"TOKENS = 163_840": "TOKENS = 40_960"},
    "pretrain": {
        'num_steps": 120': 'num_steps": 24',
        'num_steps": 60': 'num_steps": 12',
        '"eval_every": 12': '"eval_every": 6',
    },
    "transformers": {'num_steps": 60': 'num_steps": 12', '"eval_every": 60': '"eval_every": 12'},
    "two_domains": {"TOKENS = 98_304": "TOKENS = 24_576"},
}
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@each
def test_it_was_executed_in_order_and_without_an_error(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@each
def test_it_runs(notebook: Path, tmp_path_factory: pytest.TempPathFactory, count: Callable[[int, int], int]) -> None:
    pytest.importorskip("matplotlib")
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    for long, short in SHORTER[notebook.stem].items() if count(1, 0) else ():
        assert long in code
        code = code.replace(long, short)
    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "NANOCHAT_BASE_DIR": str(tmp_path_factory.getbasetemp() / "notebooks"),  # they share the demo corpus
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=notebook.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
