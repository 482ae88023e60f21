"""SIGTERM and Ctrl-C at any moment: the run is saved at a full step, goes on later, and ends as if never stopped."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanofed.federated.deploy import process
from nanofed.federated.deploy.process import ended_by_signals
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.signals import Signals
from tests.faults.fits import STEPS, Cut, arguments, curve, fit, launched, losses, probe, processes_with
from tests.parity.test_paths import corpus

__all__ = ["corpus"]  # the fixture

SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nanofed"],
    "Lightning": ["-m", "nanofed"],
}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return the run that was never stopped, on so many ranks."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"whole{ranks}")
            args = arguments(corpus, folder, "whole", ranks=ranks)
            fit([*args, probe(losses=str(folder / "losses"))], folder, ranks=ranks)
            made[ranks] = folder / "whole"
        return made[ranks]

    return run


@pytest.fixture
def cuts(corpus: Path, tmp_path: Path, whole: Callable[[int], Path]) -> Callable[..., Cut]:
    """Makes runs that are to be cut short, by their options."""
    numbers = itertools.count()
    return lambda **options: Cut(corpus, tmp_path / str(next(numbers)), whole, **options)


@pytest.fixture
def cut(cuts: Callable[..., Cut]) -> Cut:
    return cuts()


# --- one rank


@SIGNALS
def test_at_a_random_moment(cuts: Callable[..., Cut], count: Callable[[int, int], int], number: int, code: int) -> None:
    for _ in range(count(2, 30)):
        cut, micro = cuts(), random.randrange(1, 16)
        said = cut.stop(code, at="micro", number=micro, signals=[number], late=0.03, seconds=0.01)
        if found := checkpoints(cut.run):  # one late in the last step of a validation may come before the first
            assert f"the last good checkpoint is {found[-1]}: go on from it with --ckpt_path last" in said
        cut.goes_on()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("micro", [3, 4], ids=["first micro-batch of a step", "second"])
def test_the_step_under_way_is_finished(cut: Cut, number: int, code: int, micro: int) -> None:
    told = cut.folder / "losses"
    said = cut.stop(code, losses=str(told), at="micro", number=micro, signals=[number])
    assert cut.step == 2 and len(losses(told)) == 4
    assert said.endswith("nanofed fit: interrupted\n") == (number == signal.SIGINT)
    assert ("Ctrl-C again stops at once" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said


@SIGNALS
@pytest.mark.parametrize("at_validation", [1, 2])
def test_in_a_validation(cut: Cut, number: int, code: int, at_validation: int) -> None:
    cut.stop(code, at="validation", number=at_validation, signals=[number])
    assert cut.step == 4
    assert curve(cut.run)[-1][0] == 0, "half a validation is none"
    cut.goes_on()


@SIGNALS
def test_in_the_last_step_and_after_it(cut: Cut, number: int, code: int) -> None:
    cut.stop(code, at="micro", number=2 * STEPS, signals=[number])
    assert cut.step == STEPS
    cut.goes_on()


@SIGNALS
def test_while_it_starts(cut: Cut, number: int, code: int) -> None:
    assert "checkpoint" not in cut.stop(code, at="setup", signals=[number])
    cut.stop(code, "--ckpt_path=last", at="micro", number=2, signals=[number])
    assert checkpoints(cut.run) == [], "before the first step is done there is nothing to save"
    cut.goes_on()


def test_ctrl_c_twice_stops_at_once_and_keeps_what_was_saved(cuts: Callable[..., Cut]) -> None:
    cut = cuts(save_every=2)
    told = cut.folder / "losses"
    cut.stop(130, losses=str(told), at="micro", number=7, signals=[signal.SIGINT, signal.SIGINT])
    assert cut.step == 2 and len(losses(told)) == 7, "the second one came in the middle of step 4"
    cut.goes_on()


@pytest.mark.slow
def test_a_process_that_still_imports(corpus: Path, tmp_path: Path, count: Callable[[int, int], int]) -> None:
    for _ in range(count(1, 10)):
        process = launched(["-m", "nanofed"], arguments(corpus, tmp_path, "early"), tmp_path / "log")
        time.sleep(random.uniform(0.2, 3))
        process.terminate()
        # Before any of our code runs, the kernel ends it: a shell calls that 143 too.
        assert process.wait(60) in (143, -signal.SIGTERM), (tmp_path / "log").read_text()


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals, ended_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGINT, KeyboardInterrupt()), (signal.SIGTERM, SystemExit(143)), (signal.SIGHUP, SystemExit(129))],
)
def test_what_unwinds_the_stack_is_not_disturbed_by_a_second_signal(
    number: int, ends: BaseException, second: int
) -> None:
    before, unwound = signal.getsignal(second), False
    with pytest.raises(type(ends)) as ended, ended_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(second)
            unwound = True
    assert (ended.value.args, unwound, signal.getsignal(second)) == (ends.args, True, before)


def test_who_asks_again_later_ends_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "AT_ONCE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


# --- two ranks


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("rank", [0, 1, -1], ids=["first rank", "second rank", "all ranks"])
def test_one_rank_or_all_are_told_and_all_stop(
    cuts: Callable[..., Cut], count: Callable[[int, int], int], number: int, code: int, rank: int
) -> None:
    for _ in range(count(1, 10)):
        cut, micro = cuts(ranks=2), random.randrange(3, 14)
        cut.stop(code, at="micro", number=micro, signals=[number], rank=rank, late=0.02, seconds=0.005)
        cut.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, -1], ids=["second rank", "all ranks"])
def test_in_a_validation_of_two_ranks(cuts: Callable[..., Cut], rank: int) -> None:
    cut = cuts(ranks=2)
    cut.stop(143, at="validation", number=2, signals=[signal.SIGTERM], rank=rank)
    assert cut.step == 4 and curve(cut.run)[-1][0] == 0
    cut.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGTERM, "parent"), (signal.SIGINT, "terminal")], ids=["SIGTERM", "Ctrl-C"]
)
def test_under_both_launchers(
    cuts: Callable[..., Cut], count: Callable[[int, int], int], launcher: str, number: int, to: str
) -> None:
    for _ in range(count(1, 10)):
        cut = cuts(ranks=2)
        moment = probe(at="micro", number=random.randrange(3, 14), signals=[number], to=to, rank=1)
        process = launched(LAUNCHERS[launcher], [*cut.args, moment], cut.folder / "log")
        code, said = process.wait(200), (cut.folder / "log").read_text()
        # torchrun tells its workers and then ends with a code of its own
        assert code == (128 + number if launcher == "Lightning" else 1), said
        end = time.monotonic() + 10
        while (left := processes_with(str(cut.folder))) and time.monotonic() < end:
            time.sleep(0.1)
        assert left == [], said
        cut.goes_on()
