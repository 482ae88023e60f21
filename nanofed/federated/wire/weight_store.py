"""The store of a deployment: files through which weights go to the sites and come back, beside Flower's messages.

The round loop makes the files and takes them up; the SuperLink's process reads and writes them for the sites
(`weights_server.py`). A file's name is its ticket, 128 random bits: that of the weights is in all messages of the round, that of
an answer only in the message to its site.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from nanofed.errors import NanofedError
from nanofed.federated.wire.codec import Arrays, Codec, Part, Weights, WireError, arrays_over, layout_of, payload_bytes
from nanofed.federated.wire.messages import StoredWeights
from nanofed.federated.wire.weight_transport import RoundWeights, WeightTransport
from nanofed.federated.wire.weights_calls import DOWN, UP


class WeightStore(WeightTransport):
    """Moves weights through files that the server's and the SuperLink's process share.

    Args:
        folder: A folder that nothing else uses; what an earlier round loop left in it is removed.

    Raises:
        NanofedError: The folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._placed: list[tuple[Arrays, str]] = []  # with their tickets
        self._under_way: list[_StoredRound] = []
        try:
            for name in (DOWN, UP):
                if (folder / name).exists():
                    shutil.rmtree(folder / name)
                self._make(name)
        except OSError as error:
            raise self._failed(error) from error

    def encode(self, weights: Weights, codec: Codec, base: Mapping[str, Part] | None = None) -> Arrays:
        """Return what is sent, in a new file of the store; files of weights that no site fetches any more are removed."""
        self.remove()
        ticket, mapped = self._file(DOWN, codec.nbytes(weights))
        arrays = codec.encode(weights, mapped) if base is None else codec.pack(weights, base, mapped)
        self._placed.append((arrays, ticket))
        return arrays

    def place(self, arrays: Arrays) -> Arrays:
        """Copy arrays into a new file of the store."""
        ticket, mapped = self._file(DOWN, payload_bytes(arrays))
        placed = arrays_over(mapped, tuple((array.dtype, array.shape) for array in arrays))
        for array, copy in zip(arrays, placed, strict=True):
            np.copyto(copy, array)
        self._placed.append((placed, ticket))
        return placed

    def offer(self, payloads: Mapping[str, Arrays], answer_bytes: int, seconds: float) -> RoundWeights:
        """Make a file for each client's answer."""
        there = {id(arrays): (ticket, layout_of(arrays)) for arrays, ticket in self._placed}
        stored = dict[str, StoredWeights]()
        round_weights = _StoredRound(self, self._folder / UP, stored)
        try:
            for client, payload in payloads.items():  # before anybody trains for what has no room
                answer = self._file(UP, answer_bytes)[0] if answer_bytes else ""
                stored[client] = StoredWeights(*there[id(payload)], answer, answer_bytes, seconds)
        except NanofedError:
            round_weights.close()
            raise
        self._under_way.append(round_weights)
        return round_weights

    def remove(self, over: RoundWeights | None = None) -> None:
        """Remove the files of the weights that no site fetches any more, now that a round is over."""
        self._under_way = [other for other in self._under_way if other is not over]
        needed = {ticket for other in self._under_way for ticket in other.tickets}
        for _, ticket in self._placed:
            if ticket not in needed:
                with contextlib.suppress(OSError):
                    (self._folder / DOWN / ticket).unlink()
        self._placed = [(arrays, ticket) for arrays, ticket in self._placed if ticket in needed]

    def _file(self, where: str, size: int) -> tuple[str, mmap.mmap]:
        """Make a file of so many bytes, and return its ticket and its bytes; where there is no room, there is no file."""
        ticket = secrets.token_hex(16)
        path = self._folder / where / ticket
        try:
            self._make(where)  # somebody may have removed it meanwhile
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, size)  # a mapped page for which there is no room would end this process
                return ticket, mmap.mmap(file, size)
            finally:
                os.close(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise self._failed(error) from error

    def _make(self, name: str) -> None:
        """Make one of the two folders if it is not there; the folder around them may be a link to one on another disk."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self._folder, self._folder / name):
            folder.mkdir(mode=0o700, exist_ok=True)

    def _failed(self, error: OSError) -> NanofedError:
        reason = error.strerror or error
        if self._folder.is_symlink() and not self._folder.exists():
            reason = f"it is a link to {self._folder.readlink()}, which is not there: is its disk mounted?"
        return NanofedError(f"the round's weights cannot be kept in {self._folder}: {reason}")


class _StoredRound(RoundWeights):
    """The files of one round."""

    def __init__(self, store: WeightStore, folder: Path, stored: dict[str, StoredWeights]) -> None:
        super().__init__({})  # the messages hold none
        self._store = store
        self._folder = folder
        self._stored = stored
        self._held: dict[str, int] = {}

    def note(self, client: str) -> dict[str, Any]:
        return self._stored[client].to_config()

    def take(self, client: str, reply: Message, codec: Codec, like: Weights) -> Arrays:
        """Return a client's answer over its file, which is locked and has no name any more.

        It is read more than once, first to be checked and then to be merged: whoever still wrote to it meanwhile could have
        something merged that was not checked.
        """
        stored = self._stored[client]
        path = self._folder / stored.answer
        try:
            file = self._held[client] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            path.unlink()  # first: whoever comes now finds nothing, and the lock waits for what is being written only
            fcntl.flock(file, fcntl.LOCK_EX)
            mapped = mmap.mmap(file, stored.answer_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is shorter
            reason = getattr(error, "strerror", None) or error
            raise WireError(f"there is no room for its answer, or it was changed here: {reason}") from error
        return codec.over(mapped, like)

    def drop(self, client: str) -> None:
        if client in self._held:
            os.close(self._held.pop(client))  # the lock goes with the last array

    @property
    def tickets(self) -> set[str]:
        """The names of the files that hold the weights."""
        return {stored.ticket for stored in self._stored.values()}

    def close(self) -> None:
        self._store.remove(over=self)
        for client, stored in self._stored.items():
            self.drop(client)
            if stored.answer:
                with contextlib.suppress(OSError):
                    (self._folder / stored.answer).unlink()
