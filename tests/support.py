"""What tests of several rooms share; it imports nothing that a process which starts at once would have to wait for."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = 512  # tokens of a step of the tiny model


def tiny_model(corpus: Path) -> dict[str, object]:
    """Options of a model of one layer on a corpus of `data` and `tokenizer`."""
    model: dict[str, object] = {"model.depth": 1, "model.sequence_len": 32, "model.compile": "false"}
    model |= {"model.compute_dtype": "float32", "model.recipe.batch_tokens": BATCH}
    data = {"data.path": corpus / "data", "data.tokenizer": corpus / "tokenizer"}
    return model | data | {"data.device_batch_size": 8, "data.eval_tokens": 512}


def ended(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its code."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
