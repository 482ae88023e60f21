"""Parquet shards on disk: a folder of `*.parquet` files with a `text` column, one of them for validation."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanofed.data.manifest import MANIFEST, Manifest, Recorded, read_manifest, safe_name
from nanofed.errors import ConfigError, DataError
from nanofed.files import sha256 as file_sha256

if TYPE_CHECKING:
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

MAX_GROUP_BYTES = 2 << 30  # uncompressed: a row group beyond it is a decompression bomb, not text
MAX_EXPANSION = 1000  # uncompressed over the bytes of the file; text compresses some 3 to 10 times
PLAUSIBLE_BYTES = 256 << 20  # of a row group, however small the file: one text may stand there many times
_REMEDY = "build one offline with `nanofed data demo`, or download text with `nanofed data download -n 8`"


@dataclass(frozen=True)
class Shard:
    """One parquet file, as its metadata describes it.

    `text_bytes` is the uncompressed size of the text column; `sha256` is what `dataset.json` records, if anything.
    """

    name: str
    path: Path
    num_rows: int
    row_group_rows: tuple[int, ...]
    num_bytes: int
    text_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Dataset:
    """The shards of one folder: those to train on, sorted by name, and the one for validation."""

    path: Path
    train: tuple[Shard, ...]
    validation: Shard

    def fingerprint(self) -> str:
        """Return the sha256 over name, rows and bytes of every shard and which one is for validation."""
        rows = [[s.name, s.num_rows, s.num_bytes] for s in (*self.train, self.validation)]
        return hashlib.sha256(json.dumps([sorted(rows), self.validation.name]).encode()).hexdigest()


def shard_names(folder: Path) -> list[str]:
    """Return the names of the shards in a folder, sorted; hidden and unfinished (`*.tmp`, `*.part`) files are none.

    Raises:
        DataError: a name is unsafe, or a link that leads out of the folder.
    """
    names = sorted(p.name for p in folder.glob("*.parquet") if not p.name.startswith("."))
    inside = folder.resolve()
    for name in names:
        safe_name(folder, name)
        if (folder / name).resolve().parent != inside:
            raise DataError(f"{folder / name} is a link that leads out of the folder; put the file itself there")
    return names


def open_dataset(path: Path, *, validation: str | None = None, num_shards: int | None = None) -> Dataset:
    """Read the metadata of a folder's shards.

    With a `dataset.json` its shards are the dataset, whatever else lies in the folder; without one every `*.parquet`
    file is, and the last by name is for validation.

    Args:
        path: The folder.
        validation: The shard for validation, instead of the one that the folder names (a resumed run's record).
        num_shards: Keep only the first so many training shards.

    Raises:
        DataError: there are no shards, fewer than asked for, or one is missing, damaged or not what was recorded.
        ConfigError: `num_shards` is below 1.
    """
    if num_shards is not None and num_shards < 1:
        raise ConfigError(f"num_shards is {num_shards}; at least 1 shard is needed to train on")
    if not path.is_dir():
        raise DataError(f"there is no data folder {path}; {_REMEDY}")
    manifest, present = read_manifest(path), shard_names(path)
    names = sorted(manifest.shards) if manifest else present
    if manifest and (missing := [name for name in names if name not in present]):
        raise DataError(f"{path} lacks {', '.join(missing[:3])}, which {MANIFEST} lists: {_restore(manifest)}")
    if unlisted := len(set(present) - set(names)):
        logger.warning("%s: %d shards that %s does not list are left out", path, unlisted, MANIFEST)
    if not names:
        raise DataError(f"{path} holds no parquet shards; {_REMEDY}")
    if len(names) < 2:
        raise DataError(f"{path} holds only {names[0]}: at least 2 shards are needed, one of them for validation")
    chosen = validation or (manifest.validation if manifest else names[-1])
    if chosen not in names:
        raise DataError(f"{path} has no shard {chosen!r}, which is to be the one for validation")
    train = [name for name in names if name != chosen]
    if num_shards is not None and num_shards > len(train):
        raise DataError(f"{path} has {len(train)} training shards, {num_shards} were asked for")
    recorded = manifest.shards if manifest else {}
    opened = [_open_recorded(path / name, recorded.get(name)) for name in (chosen, *train[:num_shards])]
    return Dataset(path, tuple(opened[1:]), opened[0])


def _restore(manifest: Manifest) -> str:
    return f"restore them, or make the folder anew (it came from {manifest.provenance.get('source', 'elsewhere')})"


def _open_recorded(path: Path, recorded: Recorded | None) -> Shard:
    if recorded is None:
        return read_shard(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if (size := path.stat().st_size) != recorded.bytes:
        raise DataError(f"{path} has {size:,} bytes, {MANIFEST} says {recorded.bytes:,}: it is damaged or was replaced")
    shard = read_shard(path)
    if shard.num_rows != recorded.rows:
        raise DataError(f"{path} has {shard.num_rows:,} rows, {MANIFEST} says {recorded.rows:,}: it is damaged")
    return Shard(**{**vars(shard), "sha256": recorded.sha256})


@contextmanager
def _parquet(path: Path) -> Iterator[tuple[pq.ParquetFile, int]]:
    """Open a shard; yields it with the index of its text column, and names the file in whatever goes wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if schema.names.count("text") != 1:
                raise DataError(f"{path} has no `text` column; its columns are {', '.join(schema.names) or 'none'}")
            kind = schema.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: the column `text` holds {kind}, not string")
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            yield file, leaves.index("text")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except MemoryError as error:
        raise DataError(f"{path} has row groups that this machine's memory does not hold: make them smaller") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} is truncated, damaged or not a parquet file: {reason[0][:200]}") from error


def read_shard(path: Path) -> Shard:
    """Read a shard's metadata, none of its text.

    Raises:
        DataError: the file is truncated, not parquet, empty, without a string column `text`, or implausibly large.
    """
    with _parquet(path) as (file, column):
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        rows = tuple(group.num_rows for group in groups)
        sizes = [group.column(column).total_uncompressed_size for group in groups]
        num_rows = metadata.num_rows
    if num_rows < 1:
        raise DataError(f"{path} has no rows")
    if sum(rows) != num_rows or min(rows) < 0 or min(sizes) < 0:
        raise DataError(f"{path} is damaged: its row groups do not add up to its {num_rows:,} rows")
    most = _most_bytes(path)
    for index, size in enumerate(sizes):
        if size > most:
            raise DataError(f"{path}: row group {index} declares {size:,} bytes of text, more than {most:,}")
    return Shard(path.name, path, num_rows, rows, path.stat().st_size, sum(sizes))


def read_texts(shard: Shard, row_group: int) -> list[str]:
    """Read the texts of one row group.

    The first read of a shard that `dataset.json` records checks its hash, and page checksums are always verified, so
    that damage is an error and never another text.

    Raises:
        DataError: naming file and row group: damaged, changed since it was opened, or with nulls (naming the row).
    """
    texts: list[str] = []
    try:
        if shard.sha256 is not None:
            state = shard.path.stat()
            _check_hash(shard.path, state.st_size, state.st_mtime_ns, shard.sha256)
        for texts_of_batch in _batches(shard.path, row_group):
            texts += texts_of_batch
    except DataError as error:
        raise DataError(f"row group {row_group}: {error}") from error
    except OSError as error:
        raise DataError(f"row group {row_group}: {shard.path} cannot be read: {error.strerror}") from error
    if len(texts) != shard.row_group_rows[row_group]:
        expected = shard.row_group_rows[row_group]
        raise DataError(f"{shard.path}: row group {row_group} has {len(texts)} rows instead of {expected}: damaged")
    return texts


def _batches(path: Path, row_group: int) -> Iterator[list[str]]:
    rows = size = 0
    with _parquet(path) as (file, column):
        if row_group >= file.metadata.num_row_groups:
            raise DataError(f"{path} has only {file.metadata.num_row_groups} row groups: damaged or replaced")
        declared = file.metadata.row_group(row_group).column(column).total_uncompressed_size
        most = _most_bytes(path)
        if declared > most:
            raise DataError(f"{path} declares {declared:,} bytes of text there, more than {most:,}")
        # Threads of Arrow's own would not survive a DataLoader's fork.
        for batch in file.iter_batches(256, row_groups=[row_group], columns=["text"], use_threads=False):
            texts = batch.column(0)
            size += texts.nbytes  # a dictionary may expand to far more than was declared
            if size > most:
                raise DataError(f"{path} holds more than {most:,} bytes of text there")
            if texts.null_count:
                row = rows + texts.is_null().to_pylist().index(True)
                raise DataError(f"{path} has a null instead of a text in row {row} there")
            rows += len(texts)
            yield texts.to_pylist()


def _most_bytes(path: Path) -> int:
    """Return how large a row group may be, uncompressed: what lies beyond is no text but made to fill the memory."""
    return min(MAX_GROUP_BYTES, max(PLAUSIBLE_BYTES, MAX_EXPANSION * path.stat().st_size))


@functools.lru_cache(maxsize=4096)
def _check_hash(path: Path, size: int, mtime_ns: int, sha256: str) -> None:
    """Compare a file's hash, once a process for every state of the file."""
    if file_sha256(path) != sha256:
        raise DataError(f"{path} is damaged or was replaced: its sha256 is not the one in {MANIFEST}")


def verify_shard(path: Path, recorded: Recorded | None = None) -> str | None:
    """Read all of a shard, compare it with what `dataset.json` records, and return what is wrong (None: nothing)."""
    try:
        shard = _open_recorded(path, recorded)
        if recorded and file_sha256(path) != recorded.sha256:
            return f"{path} is damaged or was replaced: its sha256 is not the one in {MANIFEST}"
        for group in range(len(shard.row_group_rows)):
            read_texts(shard, group)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def record(path: Path) -> Recorded:
    """Return what `dataset.json` is to record of a shard."""
    shard = read_shard(path)
    return Recorded(file_sha256(path), shard.num_bytes, shard.num_rows)
