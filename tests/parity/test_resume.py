"""A stopped fit goes on in the same bits, and either path starts from the other's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nanofed import api
from nanofed.training.checkpoint import checkpoints, find_checkpoint, read_manifest, read_weights
from nanofed.training.run import Summary
from tests.parity.test_paths import STEPS, arguments, corpus, one_thread, trained_by_rounds

__all__ = ["corpus", "one_thread"]  # the fixtures


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_a_stopped_fit_goes_on_in_the_same_bits(corpus: Path, tmp_path: Path, packing: str) -> None:
    args = [*arguments(corpus, tmp_path, "whole", packing), "--save_every=3", "--keep_checkpoints=0", "--log_every=1"]
    whole = api.fit(args=[*args, "--trainer.accelerator=cpu"])
    run = tmp_path / "whole"
    assert [read_manifest(path).step for path in checkpoints(run)] == [3, 6, STEPS]
    expected = read_weights(find_checkpoint(run))

    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    for path in checkpoints(stopped)[1:]:  # as if it had been killed between steps 3 and 6
        shutil.rmtree(path)
    args[0] = "--name=stopped"
    resumed = api.fit(args=[*args, "--trainer.accelerator=cpu", "--ckpt_path=last"])
    for name, weight in read_weights(find_checkpoint(stopped)).items():
        assert torch.equal(weight, expected[name]), name
    assert resumed.bpb_end == whole.bpb_end and resumed.tokens == whole.tokens


def test_either_path_starts_from_the_weights_of_the_other(corpus: Path, tmp_path: Path) -> None:
    args = arguments(corpus, tmp_path, "fit", "contiguous")
    first = api.fit(args=[*args, "--trainer.accelerator=cpu"])
    args = arguments(corpus, tmp_path, "rounds", "contiguous")
    trained_by_rounds([*args, f"--init_from={tmp_path / 'fit'}"], tmp_path, "rounds", 2)
    second = Summary.read(tmp_path / "rounds")
    assert second.bpb_start == pytest.approx(first.bpb_end, abs=1e-6)
    args = arguments(corpus, tmp_path, "again", "contiguous")
    third = api.fit(args=[*args, "--trainer.accelerator=cpu", f"--init_from={tmp_path / 'rounds'}"])
    assert third.bpb_start == pytest.approx(second.bpb_end, abs=1e-6)
