"""A run's folder from its opening on: locked, marked as nanofed's, and replaced only once the new run has done a step.

runs/
  NAME/                  the run
    nanofed-run.json     nanofed's marker: without it nothing here is ever replaced or removed
    config.yaml  summary.json  checkpoints/  events.out.tfevents.*
  .NAME.lock             while a process uses the run
  .NAME.replaced/        the run that --overwrite true replaces, until the new one has done its first step
  .NAME.failed/          what a start wrote that was to replace a run and failed before
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from nanofed.errors import ConfigError, NanofedError
from nanofed.files import sync_folder, write_atomically
from nanofed.training.checkpoint.atomic import SaveError
from nanofed.training.checkpoint.folder import candidates, checkpoints
from nanofed.training.checkpoint.format import find_checkpoint, newest_whole
from nanofed.training.event_files import CUT
from nanofed.training.run_lock import ROUNDS, RunLock
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import CONFIG, MARKER, SUMMARY

logger = logging.getLogger(__name__)

KILLED_SECONDS = 15.0  # a round loop whose command was killed has ended by then, once it is told

# What nanofed writes into a run's folder, by its path in it. What else is there is a person's, and is never deleted.
_CHECKPOINT = r"\.?(?:step|round)_\d+(?:\.old|\.\d+(?:\.gone)?\.tmp|\.\d+)?"
_OURS = re.compile(
    rf"""\.?(?:{re.escape(MARKER)}|config\.yaml|summary\.json|hparams\.yaml|server\.json|server\.lock|wandb-id\.txt)(?:\.\w+\.tmp)?
    |events(?:\.old)?\.jsonl|flower\.log[\w.]*
    |(?:sites/[^/]+/)?(?:events\.out\.tfevents\.[^/]+|\.events\.[^/]+\.tmp|{CUT}/[^/]+)
    |checkpoints/(?:superseded/)?{_CHECKPOINT}/(?:model\.safetensors|state\.pt|manifest\.json|tokenizer/[\w.-]+)
    |(?:server|clients|spool|wandb)/.+""",
    re.VERBOSE,
)
_OWN_FOLDERS = ("checkpoints", "sites", "server", "clients", "spool", "wandb", CUT)


class Reached(IntEnum):
    """How far a run has come, as its marker says."""

    OPENED = 0
    STEP = 1  # a full optimizer step is done, or a round is committed
    CHECKPOINT = 2


@dataclass(frozen=True)
class Marker:
    """What makes a folder a run of nanofed.

    Attributes:
        kind: `fit` or `federated`.
        reached: a value of `Reached`; it is written before what it says can be lost.
    """

    kind: str
    reached: int

    def write(self, run: Path) -> None:
        """Write it durably."""
        write_atomically(run / MARKER, json.dumps(asdict(self)) + "\n")


def read_marker(run: Path) -> Marker | None:
    """Return the marker of a run's folder, None where there is none that can be read."""
    try:
        content = json.loads((run / MARKER).read_text(encoding="utf-8"))
        return Marker(str(content["kind"]), Reached(content["reached"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reach(run: Path, reached: Reached) -> None:
    """Note in a run's marker how far it has come; with the first step the run that it replaces is deleted.

    Raises:
        SaveError: the marker cannot be written.
    """
    marker = read_marker(run)
    if marker is None or marker.reached >= reached:
        return
    try:
        Marker(marker.kind, reached).write(run)
    except OSError as error:
        raise SaveError(f"{run / MARKER} cannot be written: {error.strerror or error}") from error
    _finish_replacing(run.resolve())


def resume_checkpoint(run: Path, ckpt_path: str | None) -> Path | None:
    """Return the checkpoint that `--ckpt_path` names: `last` is the run's newest that verifies.

    Returns None for `last` where the run has provably saved nothing yet, and so starts anew.

    Raises:
        ConfigError: there is none of that name, it is a URL, or the run has saved checkpoints that are not there now.
        CheckpointError: the run has checkpoints, and all of them are damaged.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        return find_checkpoint(ckpt_path)
    found = newest_whole(run)
    if found is None and has_saved(run):
        raise ConfigError(f"{_lost(run)}; to start anew, choose another --name")
    return found


def has_saved(run: Path) -> bool:
    """Tell whether a run has ever saved a checkpoint, which may be gone by now; where nothing is proven, that is assumed."""
    if candidates(run):
        return True
    marker = read_marker(run)
    if marker is None:  # of an older nanofed, or not ours: nothing is proven
        return any((run / name).exists() for name in (MARKER, CONFIG, SUMMARY))
    return marker.reached >= Reached.CHECKPOINT


def is_used(run: Path) -> bool:
    """Tell whether a folder holds a run, or something in the place of one."""
    return any((run / name).exists() for name in (MARKER, CONFIG, SUMMARY)) or bool(candidates(run))


def check_usable(options: RunOptions) -> None:
    """Refuse a folder that the run's options do not allow to be used, and say what is in it.

    Raises:
        ConfigError: it holds a run and neither resuming nor overwriting is asked, or something that is no run of nanofed's.
        NanofedError: it is a link to a folder that is not there, or no folder, or it cannot be read.
    """
    run = options.folder
    with _writing(run):
        if run.is_symlink() and not run.exists():
            raise NanofedError(f"{run} is a link to {run.readlink()}, which is not there: is its disk mounted?")
        if not run.exists():
            return
        marker = read_marker(run)
        if options.overwrite:
            _check_replaceable(run, marker)
        elif marker is None:
            taken = _taken(run)
            if checkpoints(run) and not options.ckpt_path:
                # Of an older nanofed.
                raise ConfigError(f"{run} already holds a run: go on with --ckpt_path last, choose another --name")
            if taken and not checkpoints(run):
                raise ConfigError(f"{run} is no run of this nanofed and holds {taken}: choose another --name")
        elif options.ckpt_path or marker.reached == Reached.OPENED:
            return  # `resume_checkpoint` says whether there is what it names; before its first step a run holds nothing
        elif not has_saved(run):
            raise ConfigError(
                f"{run} already holds a run, which ended before its first checkpoint: start it anew with --ckpt_path last or "
                "--overwrite true, or choose another --name"
            )
        elif not candidates(run):
            raise ConfigError(f"{_lost(run)}; to start anew, choose another --name or pass --overwrite true")
        else:
            raise ConfigError(
                f"{run} already holds a run: go on with --ckpt_path last, choose another --name, or pass --overwrite true"
            )


def _check_replaceable(run: Path, marker: Marker | None) -> None:
    if marker is None and any(run.iterdir()):
        raise ConfigError(
            f"{run} is no run of this nanofed (it has no {MARKER}), and --overwrite true replaces nothing else: move it away "
            "yourself, or choose another --name"
        )
    for name in (*_OWN_FOLDERS, "server/weights"):
        if (run / name).is_symlink():
            raise ConfigError(
                f"{run / name} is a link to {(run / name).readlink()}: --overwrite true does not follow it; remove it "
                "yourself, or choose another --name"
            )


def _taken(run: Path) -> str | None:
    """Return what lies in a folder under a name that nanofed writes to; `server/weights` may be made before (README)."""
    for path in sorted(run.iterdir()):
        if _OURS.fullmatch(path.name):
            return path.name
        if path.name in _OWN_FOLDERS and not path.is_dir():
            return f"{path.name}, which is no folder"
        if path.name in _OWN_FOLDERS and any(below.name != "weights" for below in path.iterdir()):
            return path.name
    return None


def _lost(run: Path) -> str:
    folder = run / "checkpoints"
    found = "is empty" if folder.is_dir() else "is not there"
    return f"{run} holds a run that has begun, and {folder} {found}: was it moved, or is its disk not mounted? Bring it back"


@contextlib.contextmanager
def hold_run(run: Path, end_leftovers: Callable[[], None] | None = None) -> Iterator[RunLock]:
    """Hold the folder of a command's run for the block, and give it the lock of the round loop, which it may release.

    On entering, the run is locked, and what a killed start has left is put right: a run that was being replaced comes back
    unless the new one had done a step. On leaving it comes back, too, if the new one has failed before its first step.

    Args:
        run: the folder.
        end_leftovers: ends what a killed command has left running on the run; called once the command's lock is held.

    Raises:
        NanofedError: on entering, if another process uses the run, which is named.
    """
    rounds = RunLock(run, ROUNDS, patience=KILLED_SECONDS if end_leftovers else 0.0)
    with RunLock(run):
        if end_leftovers is not None:
            end_leftovers()
        with rounds:
            _put_right(run)
            try:
                yield rounds
            finally:
                _put_right(run)


def open_run(options: RunOptions, kind: str, config: str) -> None:
    """Make the folder and write the marker and the resolved config, when all else has been checked.

    With `--overwrite true` the run that is there steps aside first.

    Args:
        options: the run's options.
        kind: `fit` or `federated`.
        config: YAML.

    Raises:
        ConfigError: the folder is in use for something else.
        NanofedError: it cannot be written.
    """
    check_usable(options)
    run = options.folder
    with _writing(run):
        if options.overwrite and read_marker(run) is not None:
            real = run.resolve()
            real.rename(_beside(real, "replaced"))
            sync_folder(real.parent)
            real.mkdir()
        elif options.ckpt_path == "last" and not candidates(run):
            logger.info("%s has no checkpoint yet: --ckpt_path last starts it anew", run)
        run.mkdir(parents=True, exist_ok=True)
        if read_marker(run) is None:
            Marker(kind, Reached.CHECKPOINT if has_saved(run) else Reached.OPENED).write(run)
        write_atomically(run / CONFIG, config)


def _put_right(run: Path) -> None:
    with _writing(run):
        real = run.resolve()
        marker = read_marker(real)
        if marker is not None and marker.reached > Reached.OPENED:
            _finish_replacing(real)
        elif (old := _beside(real, "replaced")).exists():
            failed = _beside(real, "failed")
            if failed.exists():
                _remove(failed, old)
            if real.exists():
                real.rename(failed)
            old.rename(real)
            sync_folder(real.parent)
            logger.warning(
                "%s is again as it was: the run that was to replace it ended before its first step, and left what it "
                "wrote in %s",
                run,
                failed,
            )


def _beside(real: Path, word: str) -> Path:
    return real.parent / f".{real.name}.{word}"


def _finish_replacing(real: Path) -> None:
    """Delete the run that another one has replaced; what nanofed did not write goes into the new one's folder."""
    if (old := _beside(real, "replaced")).exists():
        _remove(old, real)


def _remove(old: Path, into: Path) -> None:
    """Delete what nanofed wrote in a folder, and move what it did not write into another one, where that place is free."""
    moved, stay = [], []
    for folder, folders, files in os.walk(old, topdown=False):
        for name in (*files, *folders):
            path = Path(folder, name)
            within = path.relative_to(old)
            if name in folders and not path.is_symlink():
                with contextlib.suppress(OSError):  # something stays in it
                    path.rmdir()
            elif _OURS.fullmatch(within.as_posix()):
                path.unlink()
            elif os.path.lexists(into / within):
                stay.append(str(within))
            else:
                (into / within).parent.mkdir(parents=True, exist_ok=True)
                path.rename(into / within)
                moved.append(str(within))
    if moved:
        logger.warning("kept in %s, since nanofed did not write it: %s", into, ", ".join(sorted(moved)))
    if stay:
        kept = _free_name(into.parent / f"{into.name}.kept")
        old.rename(kept)
        logger.warning("kept in %s, since nanofed did not write it: %s", kept, ", ".join(sorted(stay)))
    else:
        old.rmdir()


def _free_name(path: Path) -> Path:
    number = 0
    while (free := path.with_name(f"{path.name}{number or ''}")).exists():
        number += 1
    return free


@contextlib.contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NanofedError(
            f"the run folder {run} cannot be written: {error.strerror or error}; choose another --runs_dir"
        ) from error
