"""Files and folders written whole or not at all, and files hashed: the one place for each."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nanofed.errors import ConfigError


def write_atomically(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, a crash or a power cut finds the old content or the new one, never a part.

    The content is synced to disk under a temporary name in the same folder before it takes the file's name. A symbolic link
    is followed: the file that it names is replaced, and the link stays.

    Args:
        path: file to write; its folder exists.
        content: text is written as UTF-8.
        mode: permissions of the new file, less those that the user's umask takes away; 0o600 keeps it from other users
            from its first moment.

    Raises:
        OSError: the folder is missing or cannot be written; the old file is as it was.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_private(path: Path) -> None:
    """Refuse a key that others than its owner may read.

    Raises:
        ConfigError: they may; says what to do.
    """
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others: chmod 600 {path}")


@contextlib.contextmanager
def created(path: Path) -> Iterator[Path]:
    """Make a new file or folder whole or not at all: the body writes it under the name that it is given, beside `path`.

    When the body is done, everything is synced to disk and takes the name `path`. When it fails, nothing is left. Files get the
    permissions that the user's umask leaves: libraries that write by a temporary file keep theirs from everybody else.

    Args:
        path: the file or folder to make; an empty folder may be there, and the folders above are made.

    Raises:
        ConfigError: something is there already, or the path has no name, as `.` has none.
        OSError: it cannot be written.
    """
    if not path.name:
        raise ConfigError(f"{path} is no name of a file or folder to make: choose one")
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ConfigError(f"{path} is there already: choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            if part.is_dir():
                sync_folder(part)
            else:
                with part.open("rb") as file:
                    os.fchmod(file.fileno(), 0o666 & ~umask)
                    os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable; network file systems that cannot do that are left to their own ways.

    Raises:
        OSError: the folder cannot be opened, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SETTLED_NS = 2 * 10**9  # a file that was changed longer ago has another time of change when it changes again


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal; a process reads the file once for every state of it.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    if abs(time.time_ns() - status.st_mtime_ns) <= SETTLED_NS:  # a file server's clock may run ahead
        return sha256(path)
    return _sha256_of_state(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256_of_state(path: Path, inode: int, size: int, changed_ns: int) -> str:
    return sha256(path)


def keep_short(path: Path, most: int) -> None:
    """Put the content of a log aside as `NAME.1` once it has more than `most` bytes, and let it begin anew.

    The file stays the same one, so that a process that appends to it goes on; a line that is written meanwhile may be lost. What
    was put aside before is replaced.

    Args:
        path: the log; may be missing.
        most: bytes.
    """
    with contextlib.suppress(OSError):  # a full disk: the log is short enough in that case, or is looked at again
        if path.stat().st_size > most:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)
