from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from nanofed.data.prefetch import Prefetcher
from nanofed.errors import DataError


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nanofed-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert workers() == []
    yield
    gc.collect()
    assert workers() == []


def until(condition: object) -> None:
    """Wait for what another thread is about to do."""
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Counting(Iterator[int]):
    """Counts up, and remembers how far it went and in which thread."""

    def __init__(self, stop: int | None = None) -> None:
        self.made = 0
        self.threads: set[int] = set()
        self._stop = stop

    def __next__(self) -> int:
        if self.made == self._stop:
            raise StopIteration
        self.threads.add(threading.get_ident())
        self.made += 1
        return self.made - 1


@pytest.mark.parametrize("depth", [1, 2, 7, 100])
def test_items_come_in_order_from_another_thread(depth: int) -> None:
    source = Counting(50)
    ahead = Prefetcher(source, depth)
    assert list(ahead) == list(range(50))
    assert list(ahead) == [], "over is over"
    assert threading.get_ident() not in source.threads and len(source.threads) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_it_is_at_most_depth_items_ahead_and_then_sleeps(depth: int) -> None:
    source = Counting()
    ahead = Prefetcher(source, depth)
    for taken in range(1, 20):
        assert next(ahead) == taken - 1
        until(lambda taken=taken: source.made == taken + depth)
        assert source.made == taken + depth
    (thread,) = workers()
    started = time.process_time()
    time.sleep(0.2)
    assert source.made == 19 + depth and thread.is_alive()
    assert time.process_time() - started < 0.1, "it does not poll"
    ahead.close()


@pytest.mark.parametrize("kind", [DataError, KeyError, KeyboardInterrupt, SystemExit])
def test_an_error_comes_after_the_items_before_it_and_is_the_same(kind: type[BaseException]) -> None:
    error = kind("row group 3: damaged")

    def source() -> Iterator[int]:
        yield from range(5)
        raise error

    ahead = Prefetcher(source(), 3)
    assert list(itertools.islice(ahead, 5)) == list(range(5))
    with pytest.raises(kind) as raised:
        next(ahead)
    assert raised.value is error
    assert "source" in [entry.name for entry in raised.traceback], "where it happened is in the traceback"
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_that_nobody_came_to_is_nobodys() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise DataError("beyond what was used")

    ahead = Prefetcher(source(), 4)
    assert next(ahead) == 0
    ahead.close()
    assert list(ahead) == []


def test_close_ends_the_thread_and_drops_what_was_made() -> None:
    class Item:
        pass

    made: list[weakref.ref[Item]] = []

    def source() -> Iterator[Item]:
        while True:
            item = Item()
            made.append(weakref.ref(item))
            yield item
            del item

    ahead = Prefetcher(source(), 3)
    next(ahead)
    until(lambda: len(made) == 4)
    ahead.close()
    ahead.close()
    assert workers() == [] and list(ahead) == []
    assert all(item() is None for item in made)


def test_it_ends_when_nobody_holds_it() -> None:
    source = Counting()
    ahead = Prefetcher(source, 2)
    next(ahead)
    del ahead
    assert workers() == [], "no cycle keeps it until a garbage collection"
    made = source.made
    time.sleep(0.02)
    assert source.made == made


def test_close_waits_for_the_item_in_the_making_not_for_the_rest() -> None:
    entered, release = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        for number in itertools.count():
            entered.set()
            release.wait(30)
            yield number

    ahead = Prefetcher(source(), 100)
    entered.wait(30)
    threading.Timer(0.05, release.set).start()
    ahead.close()
    assert release.is_set() and workers() == []


def test_many_start_and_end_at_any_moment() -> None:
    for number in range(200):
        ahead = Prefetcher(Counting(number % 7), 1 + number % 3)
        taken = list(itertools.islice(ahead, number % 5))
        assert taken == list(range(min(number % 7, number % 5)))
        if number % 2:
            ahead.close()
    del ahead


PROGRAM = """
import itertools, sys, threading, time
from nanofed.data.prefetch import Prefetcher

def source():
    for number in itertools.count():
        {work}
        yield number

ahead = Prefetcher(source(), 2)
{body}
"""


def run(work: str, body: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(work=work, body=body)
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, bufsize=1)


@pytest.mark.parametrize(
    "work", ["pass", "time.sleep(0.02)", "sum(range(200_000))"], ids=["full", "sleeping", "working"]
)
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('ours')"], ids=["end", "exit", "error"])
def test_the_interpreter_ends_at_once(work: str, end: str) -> None:
    with run(work, f"for _ in range(5): next(ahead)\n{end}") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert out == "" and (err == "" or err.rstrip().endswith("ValueError: ours")), err


def test_ctrl_c_ends_a_wait() -> None:
    body = "next(ahead)\nprint('waiting', flush=True)\ntry:\n  next(ahead)\nexcept KeyboardInterrupt:\n  sys.exit(130)"
    with run("time.sleep(number * 3)", body) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert time.monotonic() - sent < 9, "it waits for one item at most"


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    body = "import nanofed.data.prefetch as p\np._JOIN_SECONDS = 0.2\nnext(ahead)"
    with run("threading.Event().wait() if number else None", body) as process:
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
