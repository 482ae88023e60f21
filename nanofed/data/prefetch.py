"""Items made ahead of their use, by a thread in the background."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Generic, TypeVar

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
        self._buffer = _Buffer[T](depth)
        # A daemon that never gets to be one: the finalizer stops it before the interpreter would cut it off anywhere.
        thread = threading.Thread(target=_work, args=(source, self._buffer), name="nanofed-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._buffer, thread)
        thread.start()

    def __next__(self) -> T:
        return self._buffer.take()

    def close(self) -> None:
        """End the thread and drop what it made."""
        self._finalizer()


class _Buffer(Generic[T]):
    """The items between the thread and the iterator. It refers to neither of them, so that both can end."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False  # nothing will be put any more
        self._closed = False  # nothing will be taken any more

    def wait_for_room(self) -> bool:
        """Sleep until another item is wanted; False: none will be."""
        with self._changed:
            while len(self._items) >= self._depth and not self._closed:
                self._changed.wait()
            return not self._closed

    def put(self, item: T) -> None:
        with self._changed:
            if not self._closed:
                self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, None if self._closed else error
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
        if error is None:
            raise StopIteration
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def close(self) -> None:
        with self._changed:
            self._closed = self._ended = True
            self._error = None
            self._items.clear()
            self._changed.notify_all()


def _work(source: Iterator[T], buffer: _Buffer[T]) -> None:
    try:
        while buffer.wait_for_room():
            try:
                item = next(source)
            except StopIteration:
                break
            buffer.put(item)
            del item  # or the thread would hold it through its next sleep
    except BaseException as error:  # whatever it is, the one who iterates is to get it
        buffer.end(error)
    else:
        buffer.end()


def _stop(buffer: _Buffer[T], thread: threading.Thread) -> None:
    buffer.close()
    if thread is not threading.current_thread():  # the garbage collector may call this from any thread
        thread.join(_JOIN_SECONDS)
