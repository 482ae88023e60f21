"""Replies of a round that wait on disk, encoded as they arrived, so that they take no memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nanofed.errors import NanofedError
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import flat
from nanofed.federated.wire.codec import arrays_over, bytes_of

logger = logging.getLogger(__name__)

SUFFIX = ".update"


class Spool:
    """Keeps replies in files of one folder, one a client.

    Args:
        sent: the weights that the round was sent.
        folder: the folder of the files, made with the first of them. Files that an earlier round left there are removed.

    Raises:
        NanofedError: the folder cannot be used.
    """

    def __init__(self, sent: SentWeights, folder: Path) -> None:
        self._layouts = [sent.up.layout(shape) for shape in sent.shapes.values()]
        # Where each weight's arrays begin in a file.
        self._offsets = list(itertools.accumulate(map(bytes_of, self._layouts), initial=0))
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._written = 0
        try:
            for left in folder.glob(f"*{SUFFIX}"):
                left.unlink()
        except OSError as error:
            raise self._unusable(error) from error

    def make(self) -> None:
        """Make the folder.

        Raises:
            NanofedError: It cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, client: str, opened: Sequence[Sequence[Tensor]]) -> None:
        """Keep a client's reply.

        Raises:
            NanofedError: There is no room for it: the round cannot be merged.
        """
        self.make()
        file = self._folder / f"{self._written:05d}{SUFFIX}"
        self._written += 1
        self._files[client] = file
        try:
            with file.open("wb") as out:
                for array in itertools.chain.from_iterable(opened):
                    out.write(array.numpy().view(np.uint8).data)
        except OSError as error:
            self.close()
            raise self._unusable(error) from error

    def read(self, client: str, index: int) -> list[Tensor]:
        """Return the arrays of the weight number `index` in a client's reply: mapped, one-dimensional.

        Raises:
            NanofedError: The file cannot be read, or is shorter than it was: the round cannot be merged.
        """
        part = slice(self._offsets[index], self._offsets[index + 1])
        try:
            mapped = np.memmap(self._files[client], np.uint8, "r")
            return [flat(array) for array in arrays_over(mapped[part], self._layouts[index])]
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def remove(self, client: str) -> None:
        """Remove a client's reply."""
        file = self._files.pop(client)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s stays behind: %s", file, error.strerror)

    def close(self) -> None:
        """Remove all replies."""
        for client in list(self._files):
            self.remove(client)

    def _unusable(self, error: Exception) -> NanofedError:
        return NanofedError(
            f"the round cannot be merged: its replies cannot be kept in {self._folder} "
            f"({getattr(error, 'strerror', None) or error}); make room there for a payload of every client, or set "
            "federation.merge=mean, which keeps only those that are unusually long"
        )
