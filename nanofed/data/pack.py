"""Shards from anybody's own text: txt, md, jsonl and parquet files."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanofed.data.shards import Dataset, read_shard, read_texts
from nanofed.data.writing import check_output, write_shards
from nanofed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PLAIN = frozenset({".txt", ".text", ".md", ".markdown"})
LINES = frozenset({".jsonl", ".ndjson"})
SUPPORTED = (*sorted(PLAIN), *sorted(LINES), ".parquet")
MAX_DOCUMENT_BYTES = 1 << 30
SHARD_BYTES = 200_000_000  # of input, when nobody says how many shards: FineWeb-Edu's have about as much text


def pack(
    paths: Sequence[Path],
    output: Path,
    *,
    num_shards: int | None = None,
    rows_per_group: int = 256,
    key: str = "text",
    shuffle_buffer: int = 10_000,
    seed: int = 0,
    force: bool = False,
) -> Dataset:
    """Pack text files, and folders of them, into shards; the same files give the same bytes.

    A txt or md file is one document, a line of a jsonl file and a row of a parquet file is one. Documents that are
    blank are left out. All or nothing is written.

    Args:
        paths: Files, and folders to search for files of these kinds (by name, hidden ones left out).
        output: The folder for the shards.
        num_shards: Training shards, one more is for validation; by default one for every 200 MB, at least 8.
        rows_per_group: Most documents of a row group.
        key: The key of jsonl objects that holds the text (in parquet files it is the column `text`).
        shuffle_buffer: Documents are drawn at random from a buffer of so many (0: order of the files), so that a
            shard is no single file and the validation shard is like the others.
        seed: Of that draw.
        force: Replace the shards that are in `output`.

    Raises:
        DataError: naming file and line: not there, not UTF-8, not JSON, without the key; or `output` is taken.
        ConfigError: an argument is out of range.
    """
    if shuffle_buffer < 0:
        raise ConfigError(f"shuffle_buffer is {shuffle_buffer}; it has to be 0 (off) or more")
    check_output(output, replace=force)
    files = _files(paths, output)
    if num_shards is None:
        num_shards = max(8, sum(path.stat().st_size for path in files) // SHARD_BYTES)
    documents = (text for path in files for text in _documents(path, key) if text.strip())
    provenance = {
        "source": "packed: " + ", ".join(path.name or str(path) for path in paths),
        "pack": {"files": len(files), "key": key, "shuffle_buffer": shuffle_buffer, "seed": seed},
    }
    return write_shards(
        _shuffled(documents, shuffle_buffer, seed),
        output,
        num_shards=num_shards,
        rows_per_group=rows_per_group,
        provenance=provenance,
        replace=force,
    )


def _shuffled(documents: Iterable[str], size: int, seed: int) -> Iterator[str]:
    draw, buffer = random.Random(seed), list[str]()
    for text in documents:
        if len(buffer) < size:
            buffer.append(text)
        elif size:
            index = draw.randrange(size)
            buffer[index], text = text, buffer[index]
            yield text
        else:
            yield text
    draw.shuffle(buffer)
    yield from buffer


def _files(paths: Sequence[Path], output: Path) -> list[Path]:
    """Return the files to read, each once: in the order of the paths given, within a folder by name."""
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = list(_search(path, output.resolve()))
            if not inside:
                raise DataError(f"{path} holds no files of the kinds {' '.join(SUPPORTED)}")
        elif not path.exists():
            raise DataError(f"{path} does not exist")
        elif path.suffix.lower() not in SUPPORTED:
            raise DataError(f"{path}: cannot pack this kind of file; these can be: {' '.join(SUPPORTED)}")
        else:
            inside = [path]
        for file in inside:
            if not file.is_file():
                raise DataError(f"{file} is no regular file (a broken link?)")
            found.setdefault(file.resolve(), file)
    if not found:
        raise ConfigError("nothing to pack: name files or folders")
    return list(found.values())


def _search(folder: Path, output: Path) -> Iterator[Path]:
    others = 0
    for name, folders, files in os.walk(folder, onerror=_refuse):
        here = Path(name)
        # What an earlier run packed is no input of this one.
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (here / f).resolve() != output)
        if here.resolve() == output:
            raise DataError(f"{output} is to be packed into itself: choose another --output")
        for file in sorted(f for f in files if not f.startswith(".")):
            if (here / file).suffix.lower() in SUPPORTED:
                yield here / file
            else:
                others += 1
    if others:
        logger.info("%s: left out %d files of other kinds", folder, others)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _documents(path: Path, key: str) -> Iterator[str]:
    try:
        suffix = path.suffix.lower()
        if suffix in PLAIN:
            yield _plain(path)
        elif suffix in LINES:
            yield from _lines(path, key)
        else:
            shard = read_shard(path)
            for group in range(len(shard.row_group_rows)):
                yield from read_texts(shard, group)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _plain(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{path} has {size:,} bytes; split it: a document may have {MAX_DOCUMENT_BYTES:,}")
    return _decode(path.read_bytes(), str(path))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = where if line == 1 else f"{where}, line {line}"
        raise DataError(f"{place}: not UTF-8 (byte {content[error.start]:#04x} at offset {error.start})") from error


def _lines(path: Path, key: str) -> Iterator[str]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{where} has more than {MAX_DOCUMENT_BYTES:,} bytes")
            if line.strip():
                yield _text_of(_decode(line, where), key, where)


def _text_of(line: str, key: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not a JSON object")
    if key not in entry:
        keys = ", ".join(map(repr, list(entry)[:8])) or "none"
        raise DataError(f"{where}: there is no key {key!r} (its keys: {keys}); --key names another")
    text = entry[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} has half of a surrogate pair at character {error.start}") from error
    return text
