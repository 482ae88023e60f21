"""A site's SuperNode: `flower-supernode` with nanofed's patches, and the same arguments."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import NoReturn

from nanofed.errors import in_one_line
from nanofed.federated import flower_patches

PARENT = os.getppid()  # on import, right after the start: it lives then


def main() -> None:
    """Run `flower-supernode`; the process ends with its loop, and with any of its threads.

    An answer of the server that Flower does not know, such as an internal error, ends its loop, or its thread of heartbeats. The
    others would go on, and the site would take part in no round again while everything seems to be well.
    """
    from flwr.supercore.corestate import in_memory_corestate
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_patches.look_sooner(start_client_internal)
    flower_patches.ask_again_soon(start_client_internal)
    flower_patches.send_every_answer(start_client_internal)
    flower_patches.notice_dead_workers_sooner(in_memory_corestate)
    threading.Thread(target=_end_with_parent, name="nanofed-orphan", daemon=True).start()
    threading.excepthook = lambda died: _end(died.exc_value)
    sys.argv[0] = "flower-supernode"
    try:
        flower_supernode()
    except Exception as error:
        _end(error)
    _end(None)


def _end_with_parent() -> None:
    """End when the site that started this is gone: its server would go on waiting for answers that nobody trains."""
    while os.getppid() == PARENT:
        time.sleep(1.0)
    _end(RuntimeError("the process that started it is gone"))


def _end(error: BaseException | None) -> NoReturn:
    if error is not None:
        traceback.print_exception(error)
    reason = "its loop has ended, and it is said above why" if error is None else in_one_line(error)
    sys.stderr.write(f"the SuperNode cannot go on: {reason}\n")
    sys.stderr.flush()
    os._exit(1)  # Python would wait for the other threads


if __name__ == "__main__":
    main()
