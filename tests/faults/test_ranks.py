"""Ranks that die, hang or fail end all ranks of the run in time, with an exit code that says so, and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanofed.training.callbacks.watchdog import Limits
from tests.parity.test_paths import corpus
from tests.ranks import TORCHRUN, Started, in_time, two_ranks

__all__ = ["corpus"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENDLESS = ("--model.recipe.num_steps=1000000", "--eval_every=50")
FAULTY = str(Path(__file__).with_name("faulty_fit.py"))
STANDALONE = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
LAUNCHERS = pytest.mark.parametrize("launcher", [(), STANDALONE], ids=["lightning", "torchrun"])
DEATH = 10.0  # seconds within which a death ends all


def fit(launcher: tuple[str, ...]) -> list[str]:
    return [*launcher, "-m", "nanofed", "fit"]


@LAUNCHERS
def test_a_killed_rank_ends_all(
    corpus: Path,
    tmp_path: Path,
    launcher: tuple[str, ...],
    count: Callable[..., int],
    record_property: Callable[[str, object], None],
) -> None:
    for turn in range(count(1, 10)):
        command = [*fit(launcher), *two_ranks(corpus, tmp_path, f"run{turn}", *ENDLESS)]
        with Started(command, tmp_path / "log") as run:
            run.wait_for_step(50)
            os.kill(run.rank(1), signal.SIGKILL)
            begin = time.monotonic()
            assert run.wait(in_time(DEATH)) == 1
            record_property(f"ended_after_seconds_{turn}", round(time.monotonic() - begin, 1))
            run.assert_nothing_left(in_time(1))
            said = run.output
            assert said.count("rank 1 (process") + said.count("rank 1 was killed by SIGKILL") == 1, said


@LAUNCHERS
def test_no_orphans_of_a_killed_launcher(
    corpus: Path, tmp_path: Path, launcher: tuple[str, ...], count: Callable[..., int]
) -> None:
    """The launcher is the first rank, or torchrun's agent."""
    for turn in range(count(1, 10)):
        command = [*fit(launcher), *two_ranks(corpus, tmp_path, f"run{turn}", *ENDLESS)]
        with Started(command, tmp_path / "log") as run:
            run.wait_for_step(50)
            run.process.kill()
            run.assert_nothing_left(in_time(DEATH))


# Under Lightning's launcher the first rank keeps the store in which the ranks tell each other what has failed.
@pytest.mark.parametrize(
    ("launcher", "fault", "rank", "code"),
    [((), "hang", 1, 1), ((), "stop", 0, -signal.SIGKILL), (STANDALONE, "hang", 0, 1), (STANDALONE, "stop", 1, 1)],
    ids=["lightning-data", "lightning-stopped", "torchrun-data", "torchrun-stopped"],
)
def test_a_hanging_rank_ends_all(
    corpus: Path,
    tmp_path: Path,
    launcher: tuple[str, ...],
    fault: str,
    rank: int,
    code: int,
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    more, limit = limits(count)
    command = [*launcher, FAULTY, fault, str(rank), *two_ranks(corpus, tmp_path, "run", *ENDLESS, *more)]
    with Started(command, tmp_path / "log") as run:
        run.wait_until(lambda: "hangs\n" in run.output, "hang")
        begin = time.monotonic()
        assert run.wait(limit + 60) == code, run.output
        seconds = time.monotonic() - begin
        record_property("ended_after_seconds", round(seconds, 1))
        assert_in_time(run, seconds)
        if fault == "hang":
            assert re.search(rf"rank {rank} has made no progress .* it stands in \S+ \(", run.output), run.output


def limits(count: Callable[[int, int], int]) -> tuple[list[str], int]:
    """A short limit to keep it quick; in the campaign the default one."""
    short = count(6, 0)
    return ([f"--watchdog.step={short}"], short) if short else ([], int(Limits().step))


def assert_in_time(run: Started, seconds: float) -> None:
    """The limit is longer where steps are slow, as on a machine that is overloaded: then that is said."""
    allowed = max(int(limit) for limit in re.findall(r"watchdog.step allows (\d+) s", run.output))
    assert allowed - 2 <= seconds <= allowed + in_time(10), f"{seconds} s\n{run.output}"
    run.assert_nothing_left(in_time(1))


def test_slow_saves_and_evaluations_kill_nothing(corpus: Path, tmp_path: Path) -> None:
    more = ("--eval_every=4", "--save_every=4", "--watchdog.step=2")
    with Started([FAULTY, "slow", "0", *two_ranks(corpus, tmp_path, "run", *more)], tmp_path / "log") as run:
        assert run.wait(200) == 0, run.output
        run.assert_nothing_left(in_time(1))
        assert run.output.count("step      8/8") == 1, run.output


@pytest.mark.parametrize(
    ("launcher", "fault", "code", "line"),
    [
        ((), "data", 3, "shard_00001.parquet is damaged"),
        (STANDALONE, "bug", 1, "ZeroDivisionError in faulty_fit.py"),  # torchrun's own exit code is always 1
    ],
    ids=["lightning-data", "torchrun-bug"],
)
def test_an_error_of_one_rank_is_said_once(
    corpus: Path, tmp_path: Path, launcher: tuple[str, ...], fault: str, code: int, line: str
) -> None:
    command = [*launcher, FAULTY, fault, "1", *two_ranks(corpus, tmp_path, "run", *ENDLESS)]
    with Started(command, tmp_path / "log") as run:
        assert run.wait(200) == code, run.output
        run.assert_nothing_left(in_time(1))
        assert run.output.count(line) == 1, run.output
