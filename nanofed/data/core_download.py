"""nanochat's bundle of CORE's tasks: one zip file over HTTP, checked, and unpacked where nothing can get out of its folder."""

from __future__ import annotations

import lzma
import secrets
import shutil
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from nanofed import runtime
from nanofed.data.download import locked
from nanofed.data.transfer import Retry, Transfer
from nanofed.errors import ConfigError, DataError
from nanofed.files import sync_folder

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FOLDER = "eval_bundle"  # which the zip file has around everything
MOST_BYTES = 4 << 30  # of what is unpacked
_IGNORED = ("__MACOSX", ".DS_Store")  # macOS leaves them in zip files
# What Python raises for a zip file that is damaged; a RuntimeError stands for a password or a compression that it does not know.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeDecodeError, RuntimeError)


def download_core(
    check: Callable[[Path], None],
    *,
    output: Path | None = None,
    url: str = URL,
    retry: Retry | None = None,
) -> Path:
    """Download and unpack the bundle of CORE's tasks, unless it is there already, and return its folder.

    A partial file is resumed. The zip file counts when it has the announced length and every file in it has its checksum
    (CRC-32); the folder appears when everything is unpacked and `check` has passed, all of it or nothing.

    Args:
        check: reads the bundle in a folder, and raises DataError where it is damaged.
        output: the folder; by default nanochat's, `<base>/eval_bundle`.
        url: the address of the zip file.
        retry: how often and when to try again.

    Raises:
        ConfigError: the address is none.
        DataError: no network, no space, a damaged file, or `output` holds something else.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"{url!r} is no http or https address (--base_url)")
    folder = output or runtime.core_dir()
    with locked(folder.parent):
        if folder.exists():
            try:
                check(folder)
            except DataError as error:
                raise DataError(f"{folder} is there and is no whole bundle: move it away ({error})") from error
            return folder
        archive = folder.with_name(f"{folder.name}.zip")
        if not archive.exists() or _problem(archive):
            with tqdm(unit="B", unit_scale=True, desc=archive.name, disable=None) as bar:
                Transfer(url, archive, _problem, bar.update, threading.Event(), retry or Retry()).run()
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        try:
            unpack(archive, staging)
            inner = staging / FOLDER if (staging / FOLDER).is_dir() else staging
            check(inner)
            inner.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        archive.unlink()
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files of a zip file into a new folder.

    Raises:
        DataError: a file would lie outside of the folder or is a link, together they have more than 4 GiB, or one is damaged.
        OSError: the folder is there, or cannot be written.
    """
    folder.mkdir()
    left = MOST_BYTES
    try:
        with zipfile.ZipFile(archive) as files:
            for info in files.infolist():
                parts = PurePosixPath(info.filename).parts
                if info.is_dir() or any(part in _IGNORED for part in parts):
                    continue
                kind = stat.S_IFMT(info.external_attr >> 16)
                outside = info.filename.startswith("/") or ".." in parts or any(c in info.filename for c in "\\:\0")
                if outside or not parts or kind not in (0, stat.S_IFREG):
                    raise DataError(f"{archive} holds {info.filename!r:.80}, which is no plain file of its own folder")
                left -= info.file_size
                if left < 0:
                    raise DataError(
                        f"{archive} unpacks to more than {MOST_BYTES >> 30} GiB, which no bundle of tasks does"
                    )
                path = folder.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with files.open(info) as source, path.open("xb") as target:
                    shutil.copyfileobj(source, target)  # no more than `file_size`, and its checksum is checked
    except (*_UNREADABLE, FileExistsError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error


def _problem(archive: Path) -> str | None:
    try:
        with zipfile.ZipFile(archive) as files:
            damaged = files.testzip()
    except (*_UNREADABLE, OSError) as error:
        return f"it is no zip file that can be read ({error})"
    return f"{damaged} in it is damaged" if damaged else None
