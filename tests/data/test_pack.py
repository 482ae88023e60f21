from __future__ import annotations

import bz2
import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofed import cli
from nanofed.data.manifest import read_manifest
from nanofed.data.pack import _shuffled, pack
from nanofed.data.shards import Dataset, all_texts, open_dataset
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, DataError
from nanofed.files import sha256


def texts(dataset: Dataset) -> list[str]:
    shards = (*dataset.train, dataset.validation)
    return [text for shard in shards for text in all_texts(shard)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffplain text\r\nof two lines".encode())
    (folder / "deep" / "b.MD").write_text("# Überschrift\n")
    (folder / "deep" / "blank.txt").write_text(" \n")
    (folder / "deep" / ".git" / "c.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = [json.dumps({"text": f"line {i}", "id": i}) for i in range(50)]
    (folder / "d.jsonl").write_text("\n".join([*lines[:20], "", *lines[20:]]))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(30)]}), folder / "e.parquet", row_group_size=7)
    return folder


LINES, ROWS = {f"line {i}" for i in range(50)}, {f"row {i}" for i in range(30)}
EXPECTED = {"plain text\r\nof two lines", "# Überschrift\n"} | LINES | ROWS


def test_every_document_once(source: Path, tmp_path: Path) -> None:
    dataset = pack([source, source / "a.txt", source / "deep"], tmp_path / "out", num_shards=3, rows_per_group=5)
    assert sorted(texts(dataset)) == sorted(EXPECTED)
    assert [shard.num_rows for shard in (*dataset.train, dataset.validation)] == [21, 21, 20, 20]
    assert dataset.train[0].row_group_rows == (5, 5, 5, 5, 1)
    manifest = read_manifest(dataset.path)
    assert manifest is not None
    assert manifest.provenance["source"] == "packed: source, a.txt, deep"
    assert str(tmp_path) not in (dataset.path / "dataset.json").read_text()  # no path of this machine
    assert {name: entry.sha256 for name, entry in manifest.shards.items()}.items() <= hashes(dataset.path).items()


def test_same_files_same_bytes(source: Path, tmp_path: Path) -> None:
    first = pack([source], tmp_path / "one", num_shards=2)
    assert hashes(pack([source], tmp_path / "two", num_shards=2).path) == hashes(first.path)
    assert hashes(pack([source], tmp_path / "three", num_shards=2, seed=1).path) != hashes(first.path)


@pytest.mark.parametrize("buffer", [0, 1, 7, 10_000])
def test_shuffling(source: Path, tmp_path: Path, buffer: int) -> None:
    dataset = pack([source / "d.jsonl"], tmp_path / "out", num_shards=1, shuffle_buffer=buffer)
    found = texts(dataset)
    assert sorted(found) == sorted(f"line {i}" for i in range(50))
    in_order = found == [f"line {i}" for i in [*range(0, 50, 2), *range(1, 50, 2)]]  # dealt to two shards in turn
    assert in_order == (buffer <= 1)


def test_few_long_documents_fill_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanofed.data.pack.BUFFERED_CHARACTERS", 100)
    drawn = list(_shuffled((str(n) * 40 for n in range(9)), 10_000, 0))
    assert sorted(drawn) == [str(n) * 40 for n in range(9)] and drawn != sorted(drawn)
    held, most = 0, 0

    def documents() -> Iterator[str]:
        nonlocal held
        for _ in range(20):
            held += 40
            yield "a" * 40

    for text in _shuffled(documents(), 10_000, 0):
        most, held = max(most, held), held - len(text)
    assert most <= 140


def test_as_many_shards_as_can_be_written_are_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanofed.data.pack.SHARD_BYTES", 1)  # as with more than 100 GB
    assert len(pack([source], tmp_path / "out").train) == 81  # fewer documents than 500


def test_a_signal_leaves_no_half_of_a_dataset(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanofed.data.writing.record", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "pack", str(source), "--output", str(tmp_path / "out")])
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_another_key(source: Path, tmp_path: Path) -> None:
    (source / "f.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert sorted(texts(pack([source / "f.jsonl"], tmp_path / "out", key="body"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"fine\nnot \xff fine", r"x\.txt, line 2: not UTF-8 \(byte 0xff at offset 9\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n["text"]', r"x\.jsonl, line 3: not a JSON object"),
        ("x.jsonl", b'{"body": "a"}', r"x\.jsonl, line 1: there is no key 'text' \(its keys: 'body'\)"),
        ("x.jsonl", b'{"text": 5}', r"x\.jsonl, line 1: 'text' is not a string but int"),
        ("x.jsonl", b'{"text": null}', r"x\.jsonl, line 1: 'text' is not a string but NoneType"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"x\.jsonl, line 2: not UTF-8"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x\.jsonl, line 1: 'text' has half of a surrogate pair"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: not JSON"),
        ("x.parquet", b"PAR1", r"x\.parquet is truncated, damaged or not a parquet file"),
        ("x.docx", b"PK", r"x\.docx: cannot pack this kind of file"),
        ("x.tar.gz", b"PK", r"x\.tar\.gz: cannot pack this kind of file"),
        ("x.jsonl.gz", b"no gzip", r"x\.jsonl\.gz cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"x\.jsonl\.gz cannot be read: Truncated"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": ', mtime=0), r"x\.jsonl\.gz, line 2: not JSON"),
    ],
)
def test_bad_input_leaves_nothing(source: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    bad.write_bytes(content)
    (tmp_path / "results").mkdir()
    with pytest.raises(DataError, match=message):
        pack([source, bad], tmp_path / "results" / "out")
    assert list((tmp_path / "results").iterdir()) == []


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def test_compressed_files_are_read(tmp_path: Path) -> None:
    lines = {name: "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(40)).encode() for name in "abcd"}
    folder = tmp_path / "in"
    folder.mkdir()
    as_pigz = gzip.compress(lines["a"][:700]) + gzip.compress(lines["a"][700:])
    (folder / "a.jsonl.gz").write_bytes(as_pigz)
    (folder / "b.jsonl.zst").write_bytes(zstd(lines["b"]) + zstd(b""))
    (folder / "c.json.gz").write_bytes(gzip.compress(lines["c"]))
    (folder / "d.ndjson.BZ2").write_bytes(bz2.compress(lines["d"]))
    (folder / "c.json").write_bytes(lines["c"])  # of a kind that is not packed, so that it is no copy in its place
    (folder / "e.txt.gz").write_bytes(gzip.compress("\ufeffplain é".encode()))
    expected = [f"{name} {i}" for name in "abcd" for i in range(40)]
    assert sorted(texts(pack([folder], tmp_path / "out"))) == sorted([*expected, "plain é"])


def test_what_is_left_out_is_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "g.tar.gz").write_bytes(b"")
    (source / "LICENSE").write_text("free")
    (source / ".hidden.txt").write_text("hidden")
    (source / "d.jsonl.gz").write_bytes(gzip.compress((source / "d.jsonl").read_bytes()))
    (source / "loop").symlink_to(source)
    dataset = pack([source], tmp_path / "out")
    assert sorted(texts(dataset)) == sorted(EXPECTED)
    copies = "1 compressed, with the same file uncompressed beside it"
    kinds = f"left out 1 .png, 1 .tar.gz, {copies}, 2 hidden, 1 linked folder, 1 without an ending; what can be packed:"
    assert f"{source}: {kinds}" in caplog.text
    assert "left out blank documents: 1" in caplog.text
    assert f"files without text: 1, such as {source / 'deep' / 'blank.txt'}" in caplog.text


def test_many_kinds_left_out_are_counted(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(40):
        (source / f"log.{number}").write_text("")
    pack([source], tmp_path / "out")
    assert "30 others; what can be packed" in caplog.text


def test_a_dataset_in_the_input_is_left_out(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was packed before would be trained on twice; a corpus of another origin is asked for by its name."""
    earlier = pack([source], source / "earlier").path
    dataset = pack([source], tmp_path / "out")
    assert sorted(texts(dataset)) == sorted(EXPECTED)
    assert f"{earlier} is left out: it is a dataset of nanofed's" in caplog.text
    assert sorted(texts(pack([earlier], tmp_path / "again"))) == sorted(EXPECTED)
    (earlier / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"earlier holds shards that dataset\.json lists and also 'notes\.txt'"):
        pack([earlier], tmp_path / "mixed")
    (source / "dataset.json").write_text("{}")  # somebody else's file of that name
    assert sorted(texts(pack([source], tmp_path / "third"))) == sorted(EXPECTED)


def test_parts_without_rows_are_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "part-1.parquet")
    assert sorted(texts(pack([tmp_path], tmp_path / "out"))) == ["a", "b"]
    assert f"files without text: 1, such as {tmp_path / 'part-1.parquet'}" in caplog.text


def test_key_names_the_column_of_parquet_and_what_is_inside_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"doc": {"body": "one"}}\n{"doc.body": "two"}\n')
    pq.write_table(pa.table({"doc": [{"body": "three"}], "text": ["no"]}), tmp_path / "b.parquet")
    assert sorted(texts(pack([tmp_path], tmp_path / "out", key="doc.body"))) == ["one", "three", "two"]
    with pytest.raises(DataError, match=r"line 1: there is no key 'doc\.id' \(its keys: 'doc'\)"):
        pack([tmp_path], tmp_path / "none", key="doc.id")


def test_force_replaces_packs_only(source: Path, tmp_path: Path) -> None:
    there = write_shards(["a", "b"], tmp_path / "out", provenance={"source": "karpathy/fineweb-edu-100b-shuffle"})
    with pytest.raises(DataError, match=r"holds shards from elsewhere \(karpathy/fineweb-edu-100b-shuffle\)"):
        pack([source], there.path, force=True)
    assert open_dataset(there.path) == there


def test_parquet_without_text_or_with_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no `text` column"):
        pack([tmp_path / "a.parquet"], tmp_path / "out")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has a null instead of a text in row 1"):
        pack([tmp_path / "b.parquet"], tmp_path / "out")


def test_nothing_to_pack(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        pack([tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files of the kinds"):
        pack([tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "empty" / "x.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"x\.txt is no regular file"):
        pack([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match="1 documents make no dataset"):
        pack([source / "a.txt"], tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to pack"):
        pack([], tmp_path / "out")
    with pytest.raises(ConfigError, match="shuffle_buffer"):
        pack([source], tmp_path / "out", shuffle_buffer=-1)
    assert not (tmp_path / "out").exists()


def test_output_that_is_taken(source: Path, tmp_path: Path) -> None:
    first = pack([source], tmp_path / "out", num_shards=2)
    with pytest.raises(DataError, match=r"holds shards already.*--force"):
        pack([source / "d.jsonl"], first.path)
    assert open_dataset(first.path) == first
    second = pack([source / "d.jsonl"], first.path, num_shards=1, force=True)
    assert sorted(texts(second)) == sorted(f"line {i}" for i in range(50))
    with pytest.raises(DataError, match="line 1: there is no key"):
        pack([source / "d.jsonl"], first.path, force=True, key="other")
    assert open_dataset(first.path) == second  # a failure leaves what was there


def test_output_inside_the_input(source: Path, tmp_path: Path) -> None:
    first = pack([source], source / "packed", num_shards=2)
    again = pack([source], source / "packed", num_shards=2, force=True)
    assert again.fingerprint() == first.fingerprint()  # the shards of before were no input
    for inside in (source / "packed", first.train[0].path):
        with pytest.raises(DataError, match="into itself"):
            pack([inside], source / "packed", force=True)
    assert open_dataset(source / "packed") == again


def test_real_text(shared_data: Path, tmp_path: Path) -> None:
    dataset = pack([shared_data / "rust-rfcs"], tmp_path / "out", num_shards=3, rows_per_group=32)
    assert sum(shard.num_rows for shard in (*dataset.train, dataset.validation)) == 647
