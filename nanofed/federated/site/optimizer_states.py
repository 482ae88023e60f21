"""The optimizer states that clients keep between rounds, in files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from nanofed.files import sync_folder

logger = logging.getLogger(__name__)

KEPT = 3  # a server that lost the round before the one that sites have trained goes back to the state before both
FORGOTTEN_SECONDS = 14 * 86_400  # without a new state, after which those of a run are deleted when another one begins
Saved = dict[str, Any]


class StateFolder:
    """Optimizer states by client, run and round: `folder/<client>/<run>/round_<n>.pt`.

    What cannot be written, because the disk is full or read-only, is kept in memory instead and counted: the run goes on, and
    only a restart loses it.

    Args:
        folder: The folder of all states.
        durable: Have the disk itself take every state before it counts as saved: it survives a power cut then.

    Attributes:
        unwritten: The number of states that could not be written so far.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self._folder = folder
        self._durable = durable
        self._memory: defaultdict[Path, dict[int, bytes]] = defaultdict(dict)
        self.unwritten = 0

    def save(self, client: str, run: str, number: int, state: Saved) -> None:
        """Keep a client's state after round `number`, and drop what no round can ask for any more."""
        folder = self._folder / client / run
        if not folder.exists():
            self._forget_old_runs(folder.parent)
        saved = {"client": client, "run": run, "round": number, "state": state}
        try:
            self._write(folder, number, saved)
        except (OSError, RuntimeError) as error:  # torch raises either
            self.unwritten += 1
            reason = f"cannot be written to {folder} and stays in memory: {str(error).splitlines()[0]}"
            logger.warning("client %s, round %d: the optimizer state %s", client, number, reason)
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            self._memory[folder][number] = buffer.getvalue()
        else:
            self._memory[folder].pop(number, None)
        kept = self._kept(folder)
        known = sorted(n for n in kept if n <= number)  # later ones are of a future that was lost
        for n in kept.keys() - set(known[-KEPT:]):
            self._memory[folder].pop(n, None)
            try:
                self._file(folder, n).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", self._file(folder, n), error.strerror)

    def _forget_old_runs(self, folder: Path) -> None:
        """Delete a client's states of runs that have ended long ago: a site takes part in one run after the other."""
        with contextlib.suppress(OSError):  # it is tried again with the next run
            for run in folder.iterdir() if folder.exists() else ():
                newest = max((path.stat().st_mtime for path in run.iterdir()), default=0.0)
                if time.time() - newest > FORGOTTEN_SECONDS:
                    logger.info("%s is deleted: its run has not gone on for %d days", run, FORGOTTEN_SECONDS // 86_400)
                    shutil.rmtree(run)

    def newest(self, client: str, run: str, before: int) -> int:
        """Return the newest round before `before` that has a state, 0 if none has."""
        return max((n for n in self._kept(self._folder / client / run) if n < before), default=0)

    def load(self, client: str, run: str, before: int) -> Saved | None:
        """Return the newest state from before round `before` that can be read, on the CPU."""
        kept = self._kept(self._folder / client / run)
        for number in sorted((n for n in kept if n < before), reverse=True):
            source = kept[number]
            try:
                with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
                    with zipfile.ZipFile(file) as content:  # torch writes checksums, and does not look at them
                        if damaged := content.testzip():
                            raise ValueError(f"{damaged} in it is damaged")
                    file.seek(0)
                    saved: Saved = torch.load(file, map_location="cpu", weights_only=True)
                if (saved["client"], saved["run"], saved["round"]) != (client, run, number):
                    raise ValueError(f"it is of client {saved['client']}, run {saved['run']}, round {saved['round']}")
                state: Saved = saved["state"]
                return state
            except Exception as error:  # a damaged file: torch raises a dozen kinds
                text = (str(error).splitlines() or [type(error).__name__])[0]
                where = number if isinstance(source, bytes) else source
                logger.warning("%s cannot be read and is passed over: %s", where, text)
        return None

    def _write(self, folder: Path, number: int, saved: Saved) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".state.tmp"
        try:
            with temporary.open("wb") as file:
                torch.save(saved, file)
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(self._file(folder, number))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if self._durable:
            sync_folder(folder)

    def _kept(self, folder: Path) -> dict[int, Path | bytes]:
        """Return the state after each round: its file, or its content where that could not be written."""
        names = [(file.stem.removeprefix("round_"), file) for file in folder.glob("round_*.pt")]
        files: dict[int, Path | bytes] = {int(number): file for number, file in names if number.isdecimal()}
        return files | self._memory[folder]

    @staticmethod
    def _file(folder: Path, number: int) -> Path:
        return folder / f"round_{number:08d}.pt"
