"""The trainer of a site on a machine whose wall clock jumps by years at every look: nothing may depend on it."""

from __future__ import annotations

import itertools
import runpy
import time

REAL = time.time
JUMPS = itertools.cycle([0.0, 1e8, -1e8, 3e7])


def jumping() -> float:
    return REAL() + next(JUMPS)


if __name__ == "__main__":
    time.time = jumping
    runpy.run_module("nanofed.federated.site.service", run_name="__main__", alter_sys=True)
