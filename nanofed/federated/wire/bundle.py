"""The app's bundle: the server sends nanofed's sources to Flower, and a site compares them with its own and runs its own."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath

import nanofed
from nanofed.errors import NanofedError

PACKAGE = "nanofed"
LISTING = ".info/CONTENT"  # Flower's
SETTINGS = "pyproject.toml"
MAX_BYTES = 64 << 20  # unpacked


class BundleError(NanofedError):
    """A bundle that this site does not run."""


@cache
def installed() -> dict[str, bytes]:
    """Return the source files of the nanofed package that is running, by their names in a bundle."""
    root = Path(nanofed.__file__).parent
    return {f"{PACKAGE}/{path.relative_to(root).as_posix()}": path.read_bytes() for path in root.rglob("*.py")}


def code_hash(files: Mapping[str, bytes] | None = None) -> str:
    """Return the SHA-256 over names and contents of a bundle's sources, by default of the package that is running."""
    files = installed() if files is None else files
    digest = hashlib.sha256()
    for name in sorted(files, key=PurePosixPath):
        digest.update(name.removeprefix(f"{PACKAGE}/").encode() + b"\0")
        digest.update(files[name])
    return digest.hexdigest()


@lru_cache(maxsize=1)  # it comes with every message
def check_bundle(content: bytes) -> None:
    """Refuse a bundle, a zip file, whose sources are not those of the nanofed that is running.

    Whoever can submit a run to the SuperLink decides what the sites run; so a bundle's code is compared, and never executed.

    Raises:
        BundleError: The content is no bundle, or has other files than the package, or one that differs.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise BundleError(f"the bundle is larger than {MAX_BYTES:,} bytes")
            files = {name: archive.read(name) for name in archive.namelist() if name not in (LISTING, SETTINGS)}
    except BundleError:
        raise
    except Exception as error:  # foreign bytes: zipfile raises a dozen kinds
        raise BundleError(f"the bundle cannot be read: {error}") from error
    here = installed()
    if files == here:
        return
    differing = sorted({name for name, source in files.items() if here.get(name) != source} | (here.keys() - files))
    raise BundleError(
        f"this site runs only the nanofed that is installed here, code {code_hash()[:16]}: the bundle's is "
        f"{code_hash(files)[:16]} and differs in {len(differing)} files ({', '.join(differing[:3])}); "
        "server and sites need the same version"
    )
