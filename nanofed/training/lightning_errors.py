"""What Lightning raises over a run's options, as errors for people."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from nanofed.errors import ConfigError, NanofedError

INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@contextmanager
def lightning_errors(section: str, given: Sequence[str] = (), *, building: bool = False) -> Iterator[None]:
    """Turn what Lightning raises in the block over options into a ConfigError that names them.

    An error of nanofed or torch in the block, such as one in a training step, passes as it is.

    Args:
        section: the section that the options stand in, such as `trainer`.
        given: the options of that section that are not at their defaults.
        building: whether the block builds nothing but objects of Lightning, so that any error is about their options.

    Raises:
        ConfigError: Lightning refuses an option, or lacks a package for it.
    """
    try:
        yield
    except NanofedError:
        raise
    except Exception as error:
        if not (building or _is_about_options(error)):
            raise
        text = str(error)
        # Among jsonargparse's alternatives.
        if found := re.search(r"Problem with given class_path '(?:.*\.)?(\w+)':\s*(.+)", text):
            text = f"{found[1]}: {found[2]}"
        text = f"{'unknown key ' * isinstance(error, KeyError)}{' '.join(text.split())[:240] or type(error).__name__}"
        raise ConfigError(f"{section}: {text}" + f" (set: {', '.join(given)})" * bool(given)) from error


def _is_about_options(error: Exception) -> bool:
    if isinstance(error, MisconfigurationException | ModuleNotFoundError):
        return True
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    packages = [_package(file) for file in files]
    if "lightning" in packages:
        called = files[len(packages) - packages[::-1].index("lightning") :]
        if not all(file.startswith((*INSTALLED, "<")) for file in called):  # a person's callback or data, say
            return False
    if isinstance(
        error, RuntimeError | OSError | MemoryError
    ):  # torch raises them of the machine, wherever it is called
        return bool(packages) and packages[-1] == "lightning"
    known = [package for package in packages if package in ("lightning", "jsonargparse", "nanofed")]
    return bool(known) and known[-1] != "nanofed"


def _package(file: str) -> str:
    """Return the top-level package of a source file, as far as its path tells."""
    parts = Path(file).parts
    return next(
        (part for part in reversed(parts[:-1]) if part in ("lightning", "jsonargparse", "nanofed", "torch")), ""
    )
