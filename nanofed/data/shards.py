"""Parquet shards on disk: a folder of `*.parquet` files with a `text` column, one of them for validation.

Packing, training, the tokenizer and `nanofed data` all read text here, and nowhere else: `read_shard` decides whether a file
holds text, and `read_texts` returns it.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanofed.data.identity import DataIdentity
from nanofed.data.manifest import MANIFEST, Manifest, Recorded, read_manifest, safe_name
from nanofed.errors import ConfigError, DataError
from nanofed.files import sha256, sha256_once

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

MAX_GROUP_BYTES = 2 << 30  # uncompressed: a row group beyond it is a decompression bomb, not text
MAX_EXPANSION = 1000  # uncompressed over the bytes of the file; text compresses some 3 to 10 times
PLAUSIBLE_BYTES = 256 << 20  # of a row group, however small the file: one text may stand there many times
_EXPANDED_BYTES = 16 << 20  # at most, of the rows that are decoded at a time; one row may be longer
# Arrow's types of text; bytes have to be UTF-8.
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_REMEDY = "build one offline with `nanofed data demo`, or download text with `nanofed data download -n 8`"


@dataclass(frozen=True)
class Shard:
    """One parquet file, as its metadata describes it.

    `text_bytes` is the uncompressed size of the text column, whose name is `column` (`a.b` is the field b of the column a);
    `sha256` is what `dataset.json` records, if anything. A file may have no rows, as Spark writes some.
    """

    name: str
    path: Path
    num_rows: int
    row_group_rows: tuple[int, ...]
    num_bytes: int
    text_bytes: int
    sha256: str | None = None
    column: str = "text"


@dataclass(frozen=True)
class Dataset:
    """The shards of one folder: those to train on, sorted by name, and the one for validation."""

    path: Path
    train: tuple[Shard, ...]
    validation: Shard

    @functools.cached_property
    def identity(self) -> DataIdentity:
        """Which text this is, as the shards were when this was first asked for."""
        return DataIdentity.of(self)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the content of all shards and which one is for validation."""
        return self.identity.fingerprint()


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
    file that has rows is, and the last by name is for validation.

    Args:
        path: the folder.
        validation: the shard for validation, instead of the one that the folder names (a resumed run's record).
        num_shards: how many of the first training shards to keep; all by default.

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
    recorded = manifest.shards if manifest else {}
    chosen = validation or (manifest.validation if manifest else None)
    if chosen is not None and chosen not in names:
        raise DataError(f"{path} has no shard {chosen!r}, which is to be the one for validation")
    empty: list[str] = []
    last_first = _with_rows(path, [chosen] if chosen else names[::-1], recorded, empty)
    held_out = next(last_first, None)
    if held_out is None:
        raise DataError(f"{path}: {', '.join(empty[:3])} has no rows, and so none for validation; {_REMEDY}")
    others = _with_rows(path, [name for name in names if name not in (held_out.name, *empty)], recorded, empty)
    train = tuple(itertools.islice(others, num_shards))
    if num_shards is not None and num_shards > len(train):
        raise DataError(f"{path} has {len(train)} training shards, {num_shards} were asked for")
    if not train:
        raise DataError(
            f"{path} has rows only in {held_out.name}: at least 2 shards are needed, one of them for validation"
        )
    if empty:
        logger.warning("%s: %d files without rows are left out: %s", path, len(empty), ", ".join(sorted(empty)[:3]))
    return Dataset(path, train, held_out)


def _with_rows(path: Path, names: list[str], recorded: Mapping[str, Recorded], empty: list[str]) -> Iterator[Shard]:
    """Open shards one by one and yield those that have rows; the names of the others are added to `empty`."""
    for name in names:
        shard = _open_recorded(path / name, recorded.get(name))
        if shard.num_rows:
            yield shard
        else:
            empty.append(name)


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
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file, and name it in whatever goes wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise DataError(f"{path} has row groups that this machine's memory does not hold: make them smaller") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} is truncated, damaged or not a parquet file: {reason[0][:200]}") from error


def _text_leaf(path: Path, file: pq.ParquetFile, column: str) -> int:
    """Return the index, among the file's leaves, of the column that holds the text.

    Raises:
        DataError: the column is not there, or holds no text: names the columns and what to do.
    """
    import pyarrow as pa

    columns = list(_columns(file.schema_arrow))
    named = f"its columns are {', '.join(name for name, _ in columns) or 'none'}"
    remedy = f"`nanofed data pack {path.parent} --key NAME --output DIR` makes shards of the column that holds the text"
    kinds = [kind for name, kind in columns if name == column]
    if len(kinds) != 1:
        raise DataError(f"{path} has no `{column}` column; {named}: {remedy}")
    (kind,) = kinds
    if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in _TEXT:
        raise DataError(f"{path}: the column `{column}` holds {str(kind)[:80]}, not string; {named}: {remedy}")
    return [file.schema.column(i).path for i in range(len(file.schema))].index(column)


def _columns(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Yield name and type of the columns, and of the fields of a column that is a struct as `a.b`."""
    import pyarrow as pa

    for field in fields:
        yield prefix + field.name, field.type
        if pa.types.is_struct(field.type):
            yield from _columns(field.type, f"{prefix}{field.name}.")


def read_shard(path: Path, column: str = "text") -> Shard:
    """Read a shard's metadata, none of its text.

    Args:
        path: the file.
        column: the column that holds the text; `a.b` is the field b of the column a. A file without rows needs none.

    Raises:
        DataError: the file is truncated, not parquet, without text in `column`, or implausibly large.
    """
    with _parquet(path) as file:
        metadata = file.metadata
        num_rows = metadata.num_rows
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)] if num_rows else []
        rows = tuple(group.num_rows for group in groups)
        leaf = _text_leaf(path, file, column) if num_rows else 0
        sizes = [group.column(leaf).total_uncompressed_size for group in groups]
    if sum(rows) != num_rows or min(rows, default=0) < 0 or min(sizes, default=0) < 0:
        raise DataError(f"{path} is damaged: its row groups do not add up to its {num_rows:,} rows")
    most = _most_bytes(path)
    for index, size in enumerate(sizes):
        if size > most:
            raise DataError(f"{path}: row group {index} declares {size:,} bytes of text, more than {most:,}")
    return Shard(path.name, path, num_rows, rows, path.stat().st_size, sum(sizes), column=column)


def read_texts(shard: Shard, row_group: int) -> list[str]:
    """Read the texts of one row group.

    The first read of a shard that `dataset.json` records checks its hash, and page checksums are always verified, so
    that damage is an error and never another text.

    Raises:
        DataError: naming file and row group: damaged, changed since it was opened, or with nulls or bytes that are not
            UTF-8 (naming the row).
    """
    texts: list[str] = []
    try:
        if shard.sha256 is not None and sha256_once(shard.path) != shard.sha256:
            raise DataError(_replaced(shard.path))
        for texts_of_batch in _batches(shard, row_group):
            texts += texts_of_batch
    except DataError as error:
        raise DataError(f"row group {row_group}: {error}") from error
    except OSError as error:
        raise DataError(f"row group {row_group}: {shard.path} cannot be read: {error.strerror}") from error
    if len(texts) != shard.row_group_rows[row_group]:
        expected = shard.row_group_rows[row_group]
        raise DataError(f"{shard.path}: row group {row_group} has {len(texts)} rows instead of {expected}: damaged")
    return texts


def all_texts(shard: Shard) -> Iterator[str]:
    """Yield the texts of a shard in order; a row group is read when its first text is asked for.

    Raises:
        DataError: as `read_texts` raises it.
    """
    for row_group in range(len(shard.row_group_rows)):
        yield from read_texts(shard, row_group)


def _batches(shard: Shard, row_group: int) -> Iterator[list[str]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    path, column = shard.path, shard.column
    rows = size = 0
    with _parquet(path) as file:
        if row_group >= file.metadata.num_row_groups:
            raise DataError(f"{path} has only {file.metadata.num_row_groups} row groups: damaged or replaced")
        leaf = _text_leaf(path, file, column)
        declared = file.metadata.row_group(row_group).column(leaf).total_uncompressed_size
        most = _most_bytes(path)
        if declared > most:
            raise DataError(f"{path} declares {declared:,} bytes of text there, more than {most:,}")
        fields = [] if column in file.schema_arrow.names else column.split(".")[1:]
        # Threads of Arrow's own would not survive a DataLoader's fork.
        for batch in file.iter_batches(256, row_groups=[row_group], columns=[column], use_threads=False):
            texts = batch.column(0)
            for field in fields:
                texts = pc.struct_field(texts, field)
            if texts.null_count:
                row = rows + texts.is_null().to_pylist().index(True)
                raise DataError(f"{path} has a null instead of a text in row {row} there")
            plain = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
            # A dictionary, or views of the same bytes, may expand to far more than was declared: a few rows at a time.
            step = max(1, len(texts)) if plain else max(1, _EXPANDED_BYTES // max(1, texts.nbytes))
            for start in range(0, len(texts), step):
                part = texts.slice(start, step)
                try:
                    strings = part if plain else part.cast(pa.large_string())
                    size += strings.nbytes
                    if size > most:
                        raise DataError(f"{path} holds more than {most:,} bytes of text there")
                    decoded = strings.to_pylist()
                except (UnicodeDecodeError, pa.ArrowInvalid) as error:
                    row = rows + start + _first_not_utf8(part.cast(pa.large_binary()).to_pylist())
                    raise DataError(f"{path} has text that is not UTF-8 in row {row} there") from error
                yield decoded
            rows += len(texts)


def _first_not_utf8(texts: list[bytes]) -> int:
    for index, text in enumerate(texts):
        try:
            text.decode()
        except UnicodeDecodeError:
            return index
    raise AssertionError("all of it is UTF-8")


def _most_bytes(path: Path) -> int:
    """Return how large a row group may be, uncompressed: what lies beyond is no text but made to fill the memory."""
    return min(MAX_GROUP_BYTES, max(PLAUSIBLE_BYTES, MAX_EXPANSION * path.stat().st_size))


def _replaced(path: Path) -> str:
    return f"{path} is damaged or was replaced: its sha256 is not the one in {MANIFEST}; delete it and make it anew"


def verify_shard(path: Path, recorded: Recorded | None = None) -> str | None:
    """Read all of a shard, compare it with what `dataset.json` records, and return what is wrong (None: nothing)."""
    try:
        shard = _open_recorded(path, recorded)
        if recorded and sha256(path) != recorded.sha256:
            return _replaced(path)
        for _ in all_texts(shard):
            pass
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def record(path: Path) -> Recorded:
    """Return what `dataset.json` is to record of a shard."""
    shard = read_shard(path)
    return Recorded(sha256(path), shard.num_bytes, shard.num_rows)
