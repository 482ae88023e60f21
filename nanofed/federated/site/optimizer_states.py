"""The optimizer states that clients keep between rounds, in files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import torch

from nanofed.files import sync_folder

logger = logging.getLogger(__name__)

KEPT = 2  # a server that lost its open round asks for the one before
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
        files, memory = self._files(folder), self._memory[folder]
        known = sorted(n for n in files.keys() | memory.keys() if n <= number)  # later ones: a future that was lost
        stay = known[-KEPT:]
        for n in [n for n in memory if n not in stay]:
            del memory[n]
        for n in [n for n in files if n not in stay]:
            try:
                files[n].unlink()
            except OSError as error:
                logger.warning("%s cannot be removed: %s", files[n], error.strerror)

    def newest(self, client: str, run: str, before: int) -> int:
        """Return the newest round before `before` that has a state, 0 if none has."""
        folder = self._folder / client / run
        return max((n for n in self._files(folder).keys() | self._memory[folder].keys() if n < before), default=0)

    def load(self, client: str, run: str, before: int) -> tuple[int, Saved] | None:
        """Return the newest state from before round `before` that can be read, on the CPU, and its round."""
        folder = self._folder / client / run
        files, memory = self._files(folder), self._memory[folder]
        for number in sorted((n for n in files.keys() | memory.keys() if n < before), reverse=True):
            source: Path | IO[bytes] = io.BytesIO(memory[number]) if number in memory else files[number]
            try:
                with zipfile.ZipFile(source) as content:  # torch writes checksums, and does not look at them
                    if damaged := content.testzip():
                        raise ValueError(f"{damaged} in it is damaged")
                if isinstance(source, io.BytesIO):
                    source.seek(0)
                saved: Saved = torch.load(source, map_location="cpu", weights_only=True)
                if (saved["client"], saved["run"], saved["round"]) != (client, run, number):
                    raise ValueError(f"it is of client {saved['client']}, run {saved['run']}, round {saved['round']}")
                state: Saved = saved["state"]
                return number, state
            except Exception as error:  # a damaged file: torch raises a dozen kinds
                text = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("%s cannot be read and is passed over: %s", files.get(number, number), text)
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
            temporary.replace(folder / f"round_{number:08d}.pt")
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if self._durable:
            sync_folder(folder)

    @staticmethod
    def _files(folder: Path) -> dict[int, Path]:
        names = [(f.stem.removeprefix("round_"), f) for f in folder.glob("round_*.pt")]
        return {int(number): file for number, file in names if number.isdecimal()}
