"""Shards from anybody's own text: txt, md, jsonl and parquet files; the first three also compressed."""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nanofed.data.manifest import MANIFEST, read_manifest
from nanofed.data.shards import Dataset, all_texts, read_shard
from nanofed.data.writing import MAX_SHARDS_WRITTEN, check_output, write_shards
from nanofed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PLAIN = frozenset({".txt", ".text", ".md", ".markdown"})
LINES = frozenset({".jsonl", ".ndjson"})
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # the ending of a compressed file -> Arrow's name of the codec
SUPPORTED = f"{' '.join((*sorted(PLAIN), *sorted(LINES)))} (also as {' '.join(CODECS)}) .parquet"
KINDS_NAMED = 12  # at most, of the files that are left out
MAX_DOCUMENT_BYTES = 1 << 30
SOURCE = "packed: "  # how the source of a pack begins in `dataset.json`
BUFFERED_CHARACTERS = 256 << 20  # at most, of all documents in the buffer that shuffles them
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

    A txt or md file is one document, a line of a jsonl file and a row of a parquet file is one. What is left out is said in
    a warning: files of other kinds, hidden ones, linked folders and datasets of nanofed's within a folder, blank documents.
    All or nothing is written.

    Args:
        paths: files, and folders to search for files of these kinds (by name). A dataset of nanofed's is packed anew where
            it is named itself.
        output: the folder for the shards.
        num_shards: training shards, one more is for validation; by default one for every 200 MB, from 8 to 500.
        rows_per_group: the most documents in a row group.
        key: the key of jsonl objects, and the column of parquet files, that holds the text; `a.b` is the entry b of a.
        shuffle_buffer: documents are drawn at random from a buffer of so many (0: order of the files; fewer where they are
            long), so that a shard is no single file and the validation shard is like the others.
        seed: the seed of that draw.
        force: whether the shards that an earlier `pack` has written to `output` are replaced.

    Raises:
        DataError: naming file and line: not there, not UTF-8, not JSON, without the key; or `output` is taken.
        ConfigError: an argument is out of range.
    """
    if shuffle_buffer < 0:
        raise ConfigError(f"shuffle_buffer is {shuffle_buffer}; it has to be 0 (off) or more")
    check_output(output, replace=force)
    if force and (there := read_manifest(output)) and not str(there.provenance.get("source", "")).startswith(SOURCE):
        raise DataError(
            f"{output} holds shards from elsewhere ({there.provenance.get('source')}): choose another folder"
        )
    try:
        files = _files(paths, output.resolve())
        if num_shards is None:
            size = sum(path.stat().st_size for path in files)
            num_shards = min(max(8, size // SHARD_BYTES), MAX_SHARDS_WRITTEN)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    blank, textless = 0, list[str]()

    def documents() -> Iterator[str]:
        nonlocal blank
        for path in files:
            found = 0
            for text in _documents(path, key):
                if text.strip():
                    found += 1
                    yield text
                else:
                    blank += 1
            if not found:
                textless.append(str(path))

    provenance = {
        "source": SOURCE + ", ".join(path.name or str(path) for path in paths),
        "pack": {"files": len(files), "key": key, "shuffle_buffer": shuffle_buffer, "seed": seed},
    }
    dataset = write_shards(
        _shuffled(documents(), shuffle_buffer, seed),
        output,
        num_shards=num_shards,
        rows_per_group=rows_per_group,
        provenance=provenance,
        replace=force,
    )
    if blank:
        logger.warning("left out blank documents: %s", f"{blank:,}")
    if textless:
        logger.warning("files without text: %s, such as %s", f"{len(textless):,}", ", ".join(textless[:3]))
    return dataset


def _shuffled(documents: Iterable[str], size: int, seed: int) -> Iterator[str]:
    draw, buffer, characters = random.Random(seed), list[str](), 0
    for text in documents:
        buffer.append(text)
        characters += len(text)
        while len(buffer) > size or characters > BUFFERED_CHARACTERS:
            drawn = buffer.pop()
            if buffer:
                index = draw.randrange(len(buffer))
                buffer[index], drawn = drawn, buffer[index]
            characters -= len(drawn)
            yield drawn
    draw.shuffle(buffer)
    yield from buffer


def _files(paths: Sequence[Path], output: Path) -> list[Path]:
    """Return the files to read, each once: in the order of the paths given, within a folder by name."""
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = list(_search(path, output))
            if not inside:
                raise DataError(f"{path} holds no files of the kinds {SUPPORTED}")
        elif not path.exists():
            raise DataError(f"{path} does not exist")
        elif _kind(path) is None:
            raise DataError(f"{path}: cannot pack this kind of file; these can be: {SUPPORTED}")
        else:
            inside = [path]
        for file in inside:
            if not file.is_file():
                raise DataError(f"{file} is no regular file (a broken link?)")
            if output in file.resolve().parents:
                raise DataError(f"{file} is in {output}, which is to be packed into itself: choose another --output")
            found.setdefault(file.resolve(), file)
    if not found:
        raise ConfigError("nothing to pack: name files or folders")
    return list(found.values())


def _kind(path: Path) -> str | None:
    """Return how a file is read, by its name: `plain`, `lines` or `parquet`; None for other kinds."""
    compressed = path.suffix.lower() in CODECS
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    if suffix in PLAIN:
        return "plain"
    # Corpora come as .json.gz with an object a line (C4, Dolma); a .json file alone is nearly always something else.
    if suffix in LINES or (compressed and suffix == ".json"):
        return "lines"
    return "parquet" if suffix == ".parquet" and not compressed else None


def _search(folder: Path, output: Path) -> Iterator[Path]:
    left_out = Counter[str]()
    listed = _listed_shards(folder)
    for name, folders, files in os.walk(folder, onerror=_refuse):
        here = Path(name)
        entered = []
        for sub in sorted(folders):
            if sub.startswith("."):
                left_out["hidden"] += 1
            elif (here / sub).is_symlink():
                left_out["linked folder"] += 1
            elif (here / sub).resolve() == output:
                continue  # what an earlier run packed there is no input of this one
            elif _listed_shards(here / sub):
                logger.warning(
                    "%s is left out: it is a dataset of nanofed's; name it to have it packed too", here / sub
                )
            else:
                entered.append(sub)
        folders[:] = entered
        if here.resolve() == output:
            raise DataError(f"{output} is to be packed into itself: choose another --output")
        for file in sorted(files):
            path = here / file
            if listed and here == folder and file == MANIFEST:
                continue
            if file.startswith("."):
                left_out["hidden"] += 1
            elif _kind(path) is None:
                left_out[_ending(path) or "without an ending"] += 1
            elif path.suffix.lower() in CODECS and path.stem in files and _kind(path.with_suffix("")):
                left_out["compressed, with the same file uncompressed beside it"] += 1
            elif listed and here == folder and file not in listed:
                raise DataError(
                    f"{folder} holds shards that {MANIFEST} lists and also {file!r}: name the files to pack, or move these"
                )
            else:
                yield path
    if left_out:
        most = sorted(left_out.most_common(KINDS_NAMED))
        more = {"others": left_out.total() - sum(count for _, count in most)} if len(left_out) > len(most) else {}
        named = ", ".join(f"{count} {kind}" for kind, count in (*most, *more.items()))
        logger.warning("%s: left out %s; what can be packed: %s", folder, named, SUPPORTED)


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix.lower() in CODECS else path.suffixes[-1:])


def _listed_shards(folder: Path) -> frozenset[str]:
    """Return the shards that a folder's `dataset.json` of nanofed's lists, none where there is no such file."""
    try:
        manifest = read_manifest(folder)
    except DataError:  # somebody else's file of that name
        return frozenset()
    return frozenset(manifest.shards) if manifest else frozenset()


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _documents(path: Path, key: str) -> Iterator[str]:
    try:
        kind = _kind(path)
        if kind == "plain":
            yield _plain(path)
        elif kind == "lines":
            yield from _lines(path, key)
        else:
            yield from all_texts(read_shard(path, key))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading its bytes, uncompressed where its name says that it is compressed."""
    import pyarrow as pa

    content: Any = pa.input_stream(str(path), compression=CODECS.get(path.suffix.lower()))
    return io.BufferedReader(content, 1 << 20)


def _plain(path: Path) -> str:
    with _opened(path) as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{path} has more than {MAX_DOCUMENT_BYTES:,} bytes, the most of a document: split it")
    return _decode(content, str(path))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = where if line == 1 else f"{where}, line {line}"
        raise DataError(f"{place}: not UTF-8 (byte {content[error.start]:#04x} at offset {error.start})") from error


def _lines(path: Path, key: str) -> Iterator[str]:
    with _opened(path) as file:
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
    text: Any = entry
    for part in [key] if key in entry else key.split("."):
        if not isinstance(text, dict) or part not in text:
            keys = ", ".join(map(repr, list(entry)[:8])) or "none"
            raise DataError(f"{where}: there is no key {key!r} (its keys: {keys}); --key names another")
        text = text[part]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} has half of a surrogate pair at character {error.start}") from error
    return text
