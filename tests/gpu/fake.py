"""Programs on the fake H100 of `bin/test --fake-gpu FOLDER`: real compilers, allocator and counts, no arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY, ended

SECONDS = 1800  # of one program: the real compilers work for d20 and more


@dataclass(frozen=True)
class FakeGPU:
    """The folder that `fakegpu/build` made: a CUDA build of torch in `venv`, and libraries that stand in for the driver."""

    folder: Path
    prelude = "import os, sys; sys.path.append(os.environ['NANOFED_SITE']); import fakegpu\n"

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment of a process on the card; what torch's venv lacks comes from this one's packages."""
        folder = self.folder
        libraries = ":".join(str(folder / name) for name in ("libfakecudart.so", "libfakelibs.so", "libcuda.so.1"))
        return {
            **os.environ,
            "FAKEGPU_HOME": str(folder),
            "LD_PRELOAD": libraries,
            "LD_LIBRARY_PATH": str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
            "NANOFED_SITE": sysconfig.get_path("purelib"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **changes,
        }

    def start(
        self, program: Sequence[str], *, seconds: float = SECONDS, changes: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments on the card and wait for its end."""
        python = str(self.folder / "venv/bin/python")
        environment = self.environment(**(changes or {}))
        return ended([python, *program], env=environment, cwd=REPOSITORY, timeout=seconds)

    def measure(self, *, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        """Return what `tests/gpu/step.py` counts of a training step with these options."""
        arguments = [f"--{name}={value}" for name, value in options.items()]
        ended = self.start(["-m", "tests.gpu.step", *arguments], changes=environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        counted: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return counted
