"""A stopped fit goes on in the same bits, and either path starts from the other's weights."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from nanofed import api
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest
from nanofed.training.summary import Summary
from tests.faults.fits import STEPS, arguments, curve, fit, losses, probe, state
from tests.parity.test_paths import arguments as path_arguments
from tests.parity.test_paths import corpus, one_thread, trained_by_rounds

__all__ = ["corpus", "one_thread"]  # the fixtures

MICROS = 2 * STEPS
PACKING = {1: "best_fit", 2: "contiguous"}  # by ranks


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int) -> Path:
    """The run that is never stopped; its losses lie beside it."""
    folder = tmp_path_factory.mktemp("whole")
    args = arguments(corpus, folder, "whole", ranks=ranks, **{"data.packing": PACKING[ranks]})
    fit([*args, probe(losses=str(folder / "losses"))], folder, ranks=ranks)
    assert len(losses(folder / "losses")) == MICROS * ranks
    return folder


@pytest.mark.parametrize("how", ["SIGTERM", "killed between saves"])
def test_a_run_stopped_three_times_is_the_run_never_stopped(
    corpus: Path, tmp_path: Path, whole: Path, ranks: int, how: str
) -> None:
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    name = f"cut with seed {seed}"
    stopped = how == "SIGTERM"
    args = [
        *arguments(
            corpus, tmp_path, name, ranks=ranks, save_every=0 if stopped else 3, **{"data.packing": PACKING[ranks]}
        ),
        "--ckpt_path=last",  # which is nothing at first
    ]
    told = tmp_path / "losses"
    for _ in range(3):
        # On several ranks one of them is told, and all stop; a kill reaches all.
        aim = {"signals": [signal.SIGTERM], "rank": dice.randrange(ranks)} if stopped else {"signals": [signal.SIGKILL]}
        number = dice.randrange(3, 7) if stopped else dice.randrange(7, 9)  # of 24, less those done
        where = probe(losses=str(told), at="micro", number=number, **aim)
        fit([*args, where], tmp_path, ranks=ranks, code=143 if stopped else -signal.SIGKILL)
    fit([*args, probe(losses=str(told))], tmp_path, ranks=ranks)

    expected, got = losses(whole / "losses"), losses(told)
    if stopped:  # every micro-batch is trained on once
        assert got == expected, name
    else:  # and those that were done again since the last save came out the same
        assert len(got) > len(expected)
        assert {tuple(line) for line in got} == {tuple(line) for line in expected}, name
    first, second = state(whole / "whole"), state(tmp_path / name)
    assert first.keys() == second.keys(), name
    assert [key for key in first if first[key] != second[key]] == [], name
    assert any(key.startswith("optimizer_states") for key in first) and "rng" in first and "data/rows" in first
    assert curve(tmp_path / name) == curve(whole / "whole"), name
    assert Summary.read(tmp_path / name).tokens == Summary.read(whole / "whole").tokens


@pytest.mark.parametrize("number", [1, 5, 6])
def test_a_limit_within_an_accumulation_leaves_no_row_out(
    corpus: Path, tmp_path: Path, whole: Path, ranks: int, number: int
) -> None:
    options = {"save_every": 0, "data.packing": PACKING[ranks]}
    args = [*arguments(corpus, tmp_path, "run", ranks=ranks, **options), "--ckpt_path=last"]
    fit([*args, probe(at="micro", number=number, stop=True)], tmp_path, ranks=ranks)
    said = fit(args, tmp_path, ranks=ranks)
    assert ("resuming from" in said) == (number > 1)
    first, second = state(whole / "whole"), state(tmp_path / "run")
    curves = [key for key in {*first, *second} if key.startswith("callbacks/Dashboard/curve")]  # one point more
    assert curves and all(first[key] == second[key] for key in first if key not in curves)


def test_a_limit_of_time_counts_from_each_start(corpus: Path, tmp_path: Path) -> None:
    args = [*arguments(corpus, tmp_path, "run", save_every=0), "--ckpt_path=last", "--trainer.max_time=00:00:00:01"]
    steps = [0]
    for _ in range(3):
        said = fit([*args, probe(seconds=0.2)], tmp_path)
        steps.append(read_manifest(find_checkpoint(tmp_path / "run")).step)
        assert steps[-1] > steps[-2], said


def test_either_path_starts_from_the_weights_of_the_other(corpus: Path, tmp_path: Path) -> None:
    args = path_arguments(corpus, tmp_path, "fit", "contiguous")
    first = api.fit(args=[*args, "--trainer.accelerator=cpu"])
    args = path_arguments(corpus, tmp_path, "rounds", "contiguous")
    trained_by_rounds([*args, f"--init_from={tmp_path / 'fit'}"], tmp_path, "rounds", 2)
    second = Summary.read(tmp_path / "rounds")
    assert second.bpb_start == pytest.approx(first.bpb_end, abs=1e-6)
    args = path_arguments(corpus, tmp_path, "again", "contiguous")
    third = api.fit(args=[*args, "--trainer.accelerator=cpu", f"--init_from={tmp_path / 'rounds'}"])
    assert third.bpb_start == pytest.approx(second.bpb_end, abs=1e-6)
