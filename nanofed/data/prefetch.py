"""Items made ahead of their use, by a thread in the background."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, nullcontext
from queue import SimpleQueue
from typing import TypeVar

from nanofed.errors import ConfigError

T = TypeVar("T")

# A thread that a dead disk holds up must not hold up the end of the process; one that an overloaded machine slows down must
# be waited for, because a process whose thread comes back from native code after the interpreter's end ends with SIGABRT.
_JOIN_SECONDS = 30.0


def made_ahead(source: Iterator[T], depth: int) -> AbstractContextManager[Iterator[T]]:
    """Return a context that gives the items of `source`, made by a thread up to `depth` ahead, or with 0 when they are asked for.

    Raises:
        ConfigError: `depth` is negative.
    """
    if depth < 0:
        raise ConfigError(f"data.prefetch={depth} is negative: 0 makes batches in the step, 4 that many ahead")
    return closing(Prefetcher(source, depth)) if depth else nullcontext(source)


class Prefetcher(Iterator[T]):
    """Iterates over `source` in a thread of its own, which stays at most `depth` items ahead and then sleeps.

    Items come in the order of `source`. An error in it is raised here, the same object, after the items made before it;
    then, and after the last item, the iteration is over. The thread ends with the iteration, with `close`, when nobody
    holds the iterator any more, and before the interpreter ends; it may be in the middle of one item then.

    A thread and not a process: tiktoken and pyarrow, which do nearly all of the work, release the GIL, and nothing has
    to be copied between processes or survive a fork.

    Args:
        source: used by the thread alone from now on.
        depth: items to be ahead, at least 1.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._made = SimpleQueue[Future[T]]()
        self._room = threading.Semaphore(depth)
        self._over = threading.Event()
        work = (source, self._made, self._room, self._over)  # without `self`, so that both can end
        # A daemon that never gets to be one: the finalizer stops it before the interpreter would cut it off anywhere.
        thread = threading.Thread(target=_make, args=work, name="nanofed-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._made, self._room, self._over, thread)
        thread.start()

    def __next__(self) -> T:
        if self._over.is_set():
            raise StopIteration
        self._room.release()
        try:
            return self._made.get().result()
        except BaseException:  # the end of the source, too, is a StopIteration
            self._over.set()
            raise

    def close(self) -> None:
        """End the thread and drop what it made."""
        self._finalizer()


def _make(source: Iterator[T], made: SimpleQueue[Future[T]], room: threading.Semaphore, over: threading.Event) -> None:
    ended = False
    while not ended and room.acquire() and not over.is_set():
        item: Future[T] = Future()
        try:
            item.set_result(next(source))
        except BaseException as error:  # whatever it is, the one who iterates is to get it
            item.set_exception(error)
            ended = True
        made.put(item)
        del item  # or the thread would hold it through its next sleep


def _stop(
    made: SimpleQueue[Future[T]], room: threading.Semaphore, over: threading.Event, thread: threading.Thread
) -> None:
    over.set()
    room.release()
    if thread is not threading.current_thread():  # the garbage collector may call this from any thread
        thread.join(_JOIN_SECONDS)
    while not made.empty():
        made.get()
