"""Which limit counts when, without ranks: deaths and hangs of real ones are in tests/faults/test_ranks.py."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from nanofed.training.callbacks import peers, watchdog
from nanofed.training.callbacks.peers import POLL
from nanofed.training.callbacks.watchdog import GRACE, Limits, Watchdog

LIMITS = Limits(step=1, startup=2, evaluation=3, save=4)


def step(dog: Watchdog, trainer: Any, global_step: int) -> float:
    """End a micro-batch, and return the limit from then on."""
    trainer.global_step = global_step
    dog.on_train_batch_end(trainer, trainer, None, None, 0)
    return dog._limit()


def test_what_follows_a_pause_has_the_time_of_the_pause() -> None:
    dog, trainer = Watchdog(LIMITS), SimpleNamespace(global_step=7)
    any_trainer: Any = trainer
    assert dog._limit() == 2
    dog.on_train_start(any_trainer, any_trainer)
    dog.on_validation_start(any_trainer, any_trainer)  # one that a stopped run had missed
    assert dog._limit() == 3
    assert step(dog, trainer, 7) == 2, "the optimizer has not been compiled yet"
    assert step(dog, trainer, 8) == 1
    dog.on_validation_start(any_trainer, any_trainer)
    assert dog._limit() == 3
    assert step(dog, trainer, 8) == 1
    assert dog.state_dict() == {} and dog._limit() == 4
    assert step(dog, trainer, 9) == 1
    dog.on_train_end(any_trainer, any_trainer)
    assert dog._limit() == 4


def test_slow_micro_batches_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    dog, trainer = Watchdog(Limits()), SimpleNamespace(global_step=0)
    any_trainer: Any = trainer
    dog.on_train_start(any_trainer, any_trainer)
    for count in range(1, 21):
        now += 60.0
        limit = step(dog, trainer, count)
    assert limit == pytest.approx(600, rel=1e-3)
    for count in range(21, 40):
        now += 1.0
        limit = step(dog, trainer, count)
    assert limit == Limits().step


def test_the_default_ends_a_hang_within_130_seconds() -> None:
    answer = 2.0  # what a store that does not answer is waited for
    assert Limits().step + POLL + answer + GRACE < 130


def test_no_thread_outlives_a_run_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that returns from torch's store after the interpreter's end makes the process end with SIGABRT."""
    asked, before = threading.Event(), set(threading.enumerate())

    def answer_late(keys: list[str]) -> bool:
        asked.set()
        time.sleep(0.3)
        return False

    other = json.dumps([0, "other", "", 1])
    store = SimpleNamespace(set=lambda key, value: None, get=lambda key: other, check=answer_late)
    store.clone = lambda: store
    c10d = SimpleNamespace(_get_default_store=lambda: store)
    monkeypatch.setattr(peers, "dist", SimpleNamespace(distributed_c10d=c10d))
    strategy = SimpleNamespace(launcher=None, barrier=lambda name: None)
    trainer: Any = SimpleNamespace(global_rank=1, node_rank=0, world_size=2, strategy=strategy)
    dog = Watchdog(LIMITS)
    with dog.over(trainer):
        dog.setup(trainer, trainer, "fit")
        assert asked.wait(30)
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("nanofed-")] == []
