"""`dataset.json` beside the shards: which one is for validation, what each has to hash to, where the text came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanofed.errors import DataError
from nanofed.files import write_atomically

MANIFEST = "dataset.json"
FORMAT_VERSION = 1
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recorded:
    """What `dataset.json` records of one shard."""

    sha256: str
    bytes: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """`dataset.json`: which shard is for validation, every shard's hash and size, and where the text came from."""

    validation: str
    shards: Mapping[str, Recorded]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `dataset.json` into a folder, atomically."""
        shards = {name: vars(recorded) for name, recorded in sorted(self.shards.items())}
        content = {"format_version": FORMAT_VERSION, **self.provenance, "validation": self.validation, "shards": shards}
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's `dataset.json`, None where there is none.

    Raises:
        DataError: it is not JSON, of an unknown format version, or a field is missing or of the wrong kind.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version!r}; this nanofed reads {FORMAT_VERSION}")
    try:
        shards = {safe_name(path, name): _recorded(path, name, entry) for name, entry in content["shards"].items()}
        validation = safe_name(path, content["validation"])
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} lacks a field or has one of the wrong kind: {error}") from error
    if validation not in shards:
        raise DataError(f"{path} names {validation} for validation but does not list it under shards")
    known = {"format_version", "validation", "shards"}
    return Manifest(validation, shards, {key: value for key, value in content.items() if key not in known})


def safe_name(source: Path, name: object) -> str:
    """Return a shard's name, refusing one that could lead out of its folder; `source` is where the name stands."""
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise DataError(f"{source}: {name!r} is not a shard name (letters, digits and ._- only, ending in .parquet)")
    return name


def _recorded(path: Path, name: str, entry: Mapping[str, Any]) -> Recorded:
    sha256, size, rows = entry["sha256"], entry["bytes"], entry["rows"]
    numbers = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in (size, rows))
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or not numbers:
        raise DataError(f"{path}: the entry of {name} needs a sha256, and bytes and rows above 0")
    return Recorded(sha256, size, rows)
