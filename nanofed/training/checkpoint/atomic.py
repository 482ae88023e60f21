"""A directory on disk that is there whole or not at all, whatever ends the process that writes it.

The directory is written under a temporary name beside its own. Every file is hashed while it is written, and synced. Then the
directory takes its name in one rename. A directory that has the name already is renamed to `.NAME.old` before, and is deleted
when the new one is in place: a process killed between the two renames leaves the old directory whole under that name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanofed.errors import NanofedError
from nanofed.files import sync_folder

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20  # that are hashed and written at a time
THREADED_BYTES = 1 << 16  # from this size on another thread hashes faster
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class CheckpointError(NanofedError):
    """A checkpoint is missing, damaged, or of another kind than asked for; or it could not be saved."""


class SaveError(CheckpointError):
    """A checkpoint could not be saved: nothing of it is left, and those before it are as they were."""


class NoSpaceError(SaveError):
    """A checkpoint could not be saved because the disk, or a quota on it, has too little room."""


class HashedFile:
    """A new file that is hashed while it is written, so that it need not be read again; synced when it is closed."""

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None  # torch.save makes another error of it
        self.bytes = 0
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1)  # beside the writing

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data and return how many bytes that is."""
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        try:
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                if len(chunk) < THREADED_BYTES:
                    self._hash.update(chunk)
                    self._write(chunk)
                    continue
                hashed = self._hashing.submit(self._hash.update, chunk)
                try:
                    self._write(chunk)
                finally:
                    hashed.result()  # the caller may change the data afterwards
        except OSError as error:
            self.failure = error
            raise
        self.bytes += len(view)
        return len(view)

    def _write(self, rest: memoryview) -> None:
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> dict[str, Any]:
        """Sync and close the file, and return its size and SHA-256."""
        os.fsync(self._file.fileno())
        self.abandon()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close the file without syncing it."""
        self._hashing.shutdown()
        self._file.close()


class Staging:
    """A directory that is being written.

    Attributes:
        files: size and SHA-256 of every file so far, by its name within the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[HashedFile]:
        """Open a new file of the directory; `name` may stand in a folder, as in `tokenizer/tokenizer.json`."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        file = HashedFile(path)
        try:
            yield file
            self.files[name] = file.close()
        except Exception as error:
            if file.failure is not None and error is not file.failure:
                raise file.failure from None
            raise
        finally:
            file.abandon()

    def sync(self) -> None:
        """Sync the folders; every file was synced when it was closed."""
        for folder in (*(path for path in self.folder.iterdir() if path.is_dir()), self.folder):
            sync_folder(folder)


@contextmanager
def written(path: Path, needed_bytes: int) -> Iterator[Staging]:
    """Write the directory `path` anew in the body, and put it in its place when the body is done.

    Before the body runs, `put_right` cleans up after killed saves, and the free space is compared with `needed_bytes`.

    Args:
        path: the directory; the folder above it is made if only that one is missing.
        needed_bytes: the bytes that the directory will take.

    Raises:
        NoSpaceError: there is too little space, or it ran out.
        SaveError: the folder is gone, or it or the disk cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        put_right(path.parent, path.name)
        free = shutil.disk_usage(path.parent).free
        if free < needed_bytes:
            raise NoSpaceError(
                f"{path} is not saved: it needs {needed_bytes / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB left; "
                "nothing has been touched; make room or lower --keep_checkpoints"
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.mkdir()
        with _locked(temporary):
            try:
                staging = Staging(temporary)
                yield staging
                staging.sync()
                _take_place(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        raise _save_error(path, error) from error


def hidden_name(name: str) -> str:
    """Return the name that a directory has while another one takes its place."""
    return f".{name}.old"


def discard(path: Path) -> None:
    """Delete a directory. One rename takes it out of sight first, however long the deletion takes."""
    gone = path.with_name(f".{path.name.strip('.').removesuffix('.old')}.{os.getpid()}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def put_right(folder: Path, name: str) -> None:
    """Put right what killed saves of `name`, or of any step or round, have left in a folder.

    A directory that was to be replaced and has lost its name gets it back. Temporaries that no process holds are deleted.
    """
    left = re.compile(rf"\.((?:step|round)_\d+|{re.escape(name)})\.(old|\d+\.(?:gone\.)?tmp)")
    for path in sorted(folder.iterdir()):
        found = left.fullmatch(path.name)
        if not found or not path.is_dir():
            continue
        owner = folder / found[1]
        if found[2] != "old":
            if not _is_held(path):
                shutil.rmtree(path)
        elif owner.exists():
            discard(path)
        else:
            path.rename(owner)


def _take_place(temporary: Path, path: Path) -> None:
    old = path.with_name(hidden_name(path.name))
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_folder(path.parent)
    if old.exists():
        with suppress(OSError):  # the new one is in place: what is left of the old one goes with the next save
            discard(old)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder that ends with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    """Tell whether a process has a folder locked, also where that cannot be told."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _save_error(path: Path, error: OSError) -> SaveError:
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return NoSpaceError(
            f"{path} could not be saved: {reason}; those before it are kept; make room or lower --keep_checkpoints"
        )
    if not path.parent.is_dir():
        return SaveError(f"{path} could not be saved: the folder {path.parent.parent} is gone or is none ({reason})")
    if error.errno in READ_ONLY:
        return SaveError(f"{path} could not be saved: {path.parent} cannot be written ({reason})")
    return SaveError(f"{path} could not be saved: {reason}; those before it are kept")
