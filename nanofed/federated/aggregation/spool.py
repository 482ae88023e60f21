"""Replies of a round that wait on disk, encoded as they arrived, so that they take no memory."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nanofed.errors import NanofedError
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import flat

logger = logging.getLogger(__name__)

SUFFIX = ".update"
ALIGNMENT = 64  # bytes: every array in a file begins at a multiple of it


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
        sizes = [sum(_padded(*array) for array in layout) for layout in self._layouts]
        self._offsets = list(itertools.accumulate(sizes, initial=0))  # where each weight's arrays begin in a file
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._written = 0
        self._broken: OSError | None = None
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
            NanofedError: There is no room for it, or there was none for an earlier one: the round cannot be merged.
        """
        if self._broken:
            raise self._unusable(self._broken)
        self.make()
        file = self._folder / f"{self._written:05d}{SUFFIX}"
        self._written += 1
        self._files[client] = file
        try:
            with file.open("wb") as out:
                for array in itertools.chain.from_iterable(opened):
                    out.write(array.numpy().view(np.uint8).data)
                    out.write(bytes(-array.nbytes % ALIGNMENT))
        except OSError as error:
            self._broken = error
            self.close()
            raise self._unusable(error) from error

    def read(self, client: str, index: int) -> list[Tensor]:
        """Return the arrays of the weight number `index` in a client's reply: mapped, one-dimensional.

        Raises:
            NanofedError: The file cannot be read, or is shorter than it was: the round cannot be merged.
        """
        if self._broken:
            raise self._unusable(self._broken)
        arrays, offset = [], self._offsets[index]
        try:
            for dtype, shape in self._layouts[index]:
                size = math.prod(shape)
                mapped = np.memmap(self._files[client], dtype, "r", offset, (size,)) if size else np.empty(0, dtype)
                arrays.append(flat(mapped))
                offset += _padded(dtype, shape)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        return arrays

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


def _padded(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * math.prod(shape)
    return size + -size % ALIGNMENT
