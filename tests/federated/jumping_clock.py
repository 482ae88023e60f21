"""The worker of a site on a machine whose wall clock jumps at every look: nothing may depend on it."""

from __future__ import annotations

import itertools
import runpy
import time

REAL = time.time
JUMPS = itertools.cycle([0.0, 1e3, -1e3, 3e2])  # less than a message lives: what is older is refused


def jumping() -> float:
    return REAL() + next(JUMPS)


if __name__ == "__main__":
    time.time = jumping
    runpy.run_module("nanofed.federated.site.worker", run_name="__main__", alter_sys=True)
