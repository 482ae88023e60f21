"""Which checkpoints a run has: listed by step or round, the newest kept, those of a future it no longer has set aside."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from nanofed.training.checkpoint.atomic import discard, hidden_name

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
SET_ASIDE = "superseded"
_NAME = re.compile(r"(?:step|round)_(\d+)")


def number_of(path: Path) -> int:
    """Return the step or round of a checkpoint by its name."""
    found = _NAME.search(path.name)
    return int(found[1]) if found else -1


def candidates(run: Path) -> list[Path]:
    """Return everything in a run's folder that is or was a checkpoint, whole or not, oldest first."""
    folder = run / FOLDER
    named = {path.name: path for path in folder.glob("*_*") if _NAME.fullmatch(path.name)}
    for path in folder.glob(hidden_name("*_*")):  # its save was killed before the new one took its place
        name = path.name[1:].removesuffix(".old")
        if _NAME.fullmatch(name):
            named.setdefault(name, path)
    return sorted(named.values(), key=number_of)


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first; what they hold is not looked at."""
    return [path for path in candidates(run) if (path / MANIFEST).is_file()]


def prune_checkpoints(run: Path, keep: int, every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints of a run, and those of every `every`-th step or round.

    A checkpoint that cannot be deleted is logged, and does not make the save before it a failed one.

    Args:
        run: the run's folder.
        keep: how many of the newest checkpoints to keep; 0 keeps all.
        every: checkpoints at multiples of so many steps (rounds) stay as well; 0 for none.
    """
    if not keep:
        return
    newest = checkpoints(run)[-keep:]
    for path in candidates(run):
        if path not in newest and not (every and number_of(path) % every == 0):
            try:
                discard(path)
            except OSError as error:
                logger.warning("%s is not needed any more, and cannot be deleted: %s", path, error.strerror)


def set_aside_later(path: Path) -> None:
    """Move the checkpoints beside `path` that are of a later step or round into `superseded`.

    Later checkpoints are there when a run goes on from an earlier one, because the later ones are damaged or by choice. The one
    that it goes on from, or that it saves, is to be the newest of the run: `last` means that.
    """
    for later in path.parent.iterdir() if _NAME.fullmatch(path.name) else ():
        if not _NAME.fullmatch(later.name) or number_of(later) <= number_of(path):
            continue
        aside = _move_aside(later)
        logger.warning("%s is of a later step than %s, where the run is now: moved to %s", later, path.name, aside)


def set_aside(path: Path) -> None:
    """Move a checkpoint into `superseded` before another one of the same step is saved, in a run that went back."""
    if (path / MANIFEST).is_file():
        logger.warning("%s is saved anew: the one before is moved to %s", path, _move_aside(path))


def _move_aside(path: Path) -> Path:
    folder = path.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    aside, number = folder / path.name, 0
    while aside.exists():  # of a future that was given up before
        number += 1
        aside = folder / f"{path.name}.{number}"
    path.rename(aside)
    return aside
