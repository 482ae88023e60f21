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
from nanofed.federated.wire.codec import Layout

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
        self._sent = sent
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._written = 0
        self._broken: OSError | None = None
        try:
            for left in folder.glob(f"*{SUFFIX}"):
                left.unlink()
        except OSError as error:
            raise self.unusable(error) from error

    def make(self) -> None:
        """Make the folder.

        Raises:
            NanofedError: it cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unusable(error) from error

    def write(self, client: str, opened: Sequence[Sequence[Tensor]]) -> None:
        """Keep a client's reply.

        Raises:
            NanofedError: there is no room for it, or there was none for an earlier one: the round cannot be merged.
        """
        self.check()
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
            raise self.unusable(error) from error

    def check(self) -> None:
        """Refuse a merge of those alone for whom there was room.

        Raises:
            NanofedError: a reply could not be written.
        """
        if self._broken:
            raise self.unusable(self._broken)

    def offsets(self) -> list[int]:
        """Return where each weight's arrays begin in a file."""
        sizes = [sum(_padded(*field) for field in layout) for layout in self._layouts()]
        return list(itertools.accumulate(sizes, initial=0))[:-1]

    def read(self, client: str, index: int, offset: int) -> list[Tensor]:
        """Return the arrays of one weight in a client's reply: mapped, one-dimensional.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is shorter than it was.
        """
        return _map(self._files[client], self._layouts()[index], offset)

    def _layouts(self) -> list[Layout]:
        return [self._sent.up.layout(shape) for shape in self._sent.shapes.values()]

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

    def unusable(self, error: Exception) -> NanofedError:
        """Return why the round cannot be merged."""
        return NanofedError(
            f"the round cannot be merged: its replies cannot be kept in {self._folder} "
            f"({getattr(error, 'strerror', None) or error}); make room there for a payload of every client, or set "
            "federation.merge=mean, which keeps only those that are unusually long"
        )


def _padded(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * math.prod(shape)
    return size + -size % ALIGNMENT


def _map(file: Path, layout: Layout, offset: int) -> list[Tensor]:
    arrays = []
    for dtype, shape in layout:
        size = math.prod(shape)
        mapped = np.memmap(file, dtype, "r", offset, (size,)) if size else np.empty(0, dtype)
        arrays.append(flat(mapped))
        offset += _padded(dtype, shape)
    return arrays
