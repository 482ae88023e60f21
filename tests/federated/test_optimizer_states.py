"""What a site keeps of its clients' optimizers, and for how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from nanofed.federated.site.optimizer_states import FORGOTTEN_SECONDS, KEPT, StateFolder


def test_states_of_runs_that_have_ended_long_ago_are_deleted(tmp_path: Path) -> None:
    states = StateFolder(tmp_path)
    for run in ("old", "recent"):
        for number in range(1, 6):
            states.save("lab", run, number, {"moment": torch.ones(3)})
        assert len(list((tmp_path / "lab" / run).iterdir())) == KEPT
    long_ago = time.time() - FORGOTTEN_SECONDS - 60
    for path in (tmp_path / "lab" / "old").iterdir():
        os.utime(path, (long_ago, long_ago))
    states.save("lab", "recent", 6, {"moment": torch.ones(3)})
    assert (tmp_path / "lab" / "old").is_dir(), "nothing goes while a run goes on"
    states.save("lab", "new", 1, {"moment": torch.ones(3)})
    assert {path.name for path in (tmp_path / "lab").iterdir()} == {"recent", "new"}
    assert states.newest("lab", "recent", 99) == 6
