"""Write documents as parquet shards: a whole dataset or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from nanofed.data.manifest import MANIFEST, Manifest, read_manifest
from nanofed.data.shards import Dataset, open_dataset, record, shard_names, verify_shard
from nanofed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MAX_SHARDS_WRITTEN = 500  # every shard being written holds a file open
_FLUSH_CHARACTERS = 256 << 20  # of all row groups that are being filled: one of very long documents is closed early


def write_shards(
    documents: Iterable[str],
    output: Path,
    *,
    num_shards: int = 8,
    rows_per_group: int = 1024,
    provenance: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Dataset:
    """Write documents as zstd-compressed shards with `dataset.json`, all of it or nothing.

    Documents are dealt to the shards in turn, so that each has the same mix; the last shard is for validation. Fewer
    documents than shards make fewer shards. The folder is built beside `output` and then renamed.

    Args:
        documents: texts, consumed once; `num_shards * rows_per_group` of them are in memory at a time.
        output: the folder; it must not exist, be empty, or, with `replace`, hold a dataset of nanofed's and nothing else.
        num_shards: training shards; one more is written for validation.
        rows_per_group: the rows in a row group.
        provenance: further fields of `dataset.json`, such as `source`.
        replace: whether a dataset that is in `output` is replaced.

    Raises:
        DataError: `output` holds other things or cannot be written, or there are fewer than 2 documents.
        ConfigError: `num_shards` or `rows_per_group` is out of range.
    """
    if not 1 <= num_shards <= MAX_SHARDS_WRITTEN:
        raise ConfigError(f"num_shards is {num_shards}; it has to be from 1 to {MAX_SHARDS_WRITTEN}")
    if rows_per_group < 1:
        raise ConfigError(f"rows_per_group is {rows_per_group}; it has to be at least 1")
    check_output(output, replace=replace)
    place = output.resolve()  # where a link leads, the link stays
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror}") from error
    try:
        building.chmod(0o755)
        names = _write(iter(documents), building, num_shards + 1, rows_per_group)
        recorded = {name: record(building / name) for name in names}
        Manifest(names[-1], recorded, provenance or {}).write(building)
        check_output(place, replace=replace)
        if place.exists():
            _swap(building, place)
        else:
            building.rename(place)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_dataset(output)


def check_output(output: Path, *, replace: bool) -> None:
    """Refuse an output folder that holds anything but, with `replace`, a dataset of nanofed's as it was written.

    Raises:
        DataError: the folder is a file, or holds files that its `dataset.json` does not list or that are not those it lists.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"{output} is a file, not a folder")
    present = sorted(path.name for path in output.iterdir())
    if not present:
        return
    manifest = read_manifest(output)
    ours = {MANIFEST, *manifest.shards} if manifest else set()
    foreign = [name for name in present if name not in ours]
    if foreign:
        what = "which is not a shard" if foreign[0] not in shard_names(output) else f"which no {MANIFEST} lists"
        raise DataError(f"{output} holds {foreign[0]!r}, {what}: choose another folder")
    if not replace:
        raise DataError(f"{output} holds shards already: choose another folder, or replace them with --force")
    for name, recorded in manifest.shards.items() if manifest else ():
        path = output / name
        if path.exists() and path.stat().st_size != recorded.bytes and verify_shard(path) is None:
            raise DataError(
                f"{path} is whole but not the shard that {MANIFEST} lists: move it, or choose another folder"
            )


def _swap(building: Path, output: Path) -> None:
    """Put a new dataset in the place of an old one, of which exactly what its `dataset.json` lists is deleted."""
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent)) / output.name
    output.rename(old)
    try:
        building.rename(output)
    except OSError:
        old.rename(output)
        old.parent.rmdir()
        raise
    manifest = read_manifest(old)
    for name in (*(manifest.shards if manifest else ()), MANIFEST):
        (old / name).unlink(missing_ok=True)
    try:
        old.rmdir()
        old.parent.rmdir()
    except OSError:
        logger.warning("%s is kept: it holds what was put beside the old shards meanwhile", old)


def _write(documents: Iterator[str], folder: Path, total: int, rows_per_group: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = list(islice(documents, total))
    if len(first) < 2:
        raise DataError(
            f"{len(first)} documents make no dataset: at least 2 are needed, one of them for validation (a txt or md file is one "
            "document, a line of a jsonl file is one)"
        )
    names = [f"shard_{index:05d}.parquet" for index in range(len(first))]
    schema = pa.schema([pa.field("text", pa.string(), nullable=False)])
    buffers: list[list[str]] = [[] for _ in names]
    characters = [0] * len(names)
    with ExitStack() as stack:
        # Neither a dictionary nor statistics: documents hardly repeat, and both would hold whole documents again.
        options = {
            "compression": "zstd",
            "use_dictionary": False,
            "write_statistics": False,
            "write_page_checksum": True,
        }
        writers = [stack.enter_context(pq.ParquetWriter(folder / name, schema, **options)) for name in names]

        def flush(index: int) -> None:
            writers[index].write_table(pa.table([pa.array(buffers[index], pa.string())], schema=schema))
            buffers[index].clear()
            characters[index] = 0

        for index, text in zip(cycle(range(len(names))), chain(first, documents), strict=False):
            buffers[index].append(text)
            characters[index] += len(text)
            if len(buffers[index]) == rows_per_group or characters[index] >= _FLUSH_CHARACTERS // len(names):
                flush(index)
        for index, buffer in enumerate(buffers):
            if buffer:
                flush(index)
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    return names
