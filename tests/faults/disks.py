"""A small disk at a folder of one process and its children, which a test fills and frees meanwhile.

python -m tests.faults.disks SIZE FOLDER COMMAND...    what is in the folder is copied to the disk, then COMMAND runs
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.children import call, mount_disk

BALLAST = ".ballast"


def small_disk(size: int, folder: Path) -> list[str]:
    """Return what stands before a command that shall have such a disk; without the right to mount, the test is skipped."""
    with tempfile.TemporaryDirectory() as place:
        call(_try_mount, Path(place))
    return [sys.executable, "-P", "-m", "tests.faults.disks", str(size), str(folder)]


def _try_mount(folder: Path) -> None:
    mount_disk(folder, "1m")


def seen_by(pid: int, path: Path) -> Path:
    """Return a path by which others see what a process has there."""
    return Path(f"/proc/{pid}/root{path}")


def fill(folder: Path) -> None:
    """Leave not a byte on a disk."""
    with (folder / BALLAST).open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def free(folder: Path) -> None:
    """Give the room back."""
    (folder / BALLAST).unlink()


def main(size: str, place: str, *command: str) -> None:
    folder = Path(place)
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        mount_disk(folder, size)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
