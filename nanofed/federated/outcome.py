"""How a process ended, in a file that it writes for the process that started it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from nanofed.errors import ConfigError, DataError, NanofedError, in_one_line
from nanofed.files import write_atomically

FILE = "outcome.json"
KINDS = {kind.exit_code: kind for kind in (NanofedError, ConfigError, DataError)}


@dataclass(frozen=True)
class Outcome:
    """The end of a process."""

    # The exit code that the error means to whoever runs nanofed; a launcher in between may end with another one.
    exit_code: int
    reason: str  # the error in one line for a person
    # Flower's number of the run that ended, which tells it from the one before; 0 where there is no such number.
    run_id: int = 0

    @classmethod
    def of(cls, error: Exception, run_id: int = 0) -> Self:
        """Return what an error means to the process that started this one."""
        return cls(getattr(error, "exit_code", NanofedError.exit_code), in_one_line(error), run_id)

    @classmethod
    def read(cls, folder: Path, run_id: int = 0) -> Self | None:
        """Return what a process wrote into a folder before it ended, None where it wrote nothing or was of another run."""
        try:
            outcome = cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return outcome if outcome.run_id == run_id else None

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what an earlier process wrote into a folder."""
        (folder / FILE).unlink(missing_ok=True)

    def write(self, folder: Path) -> None:
        """Write this into a folder.

        Raises:
            OSError: The folder cannot be written.
        """
        write_atomically(folder / FILE, json.dumps(asdict(self)))

    def error(self) -> NanofedError:
        """Return the error, as the command that started the process raises it."""
        return KINDS.get(self.exit_code, NanofedError)(self.reason)
