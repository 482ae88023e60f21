from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofed.data import shards as shards_module
from nanofed.data.manifest import MANIFEST, read_manifest
from nanofed.data.shards import Dataset, all_texts, open_dataset, read_shard, read_texts, verify_shard
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, DataError
from nanofed.files import sha256

DOCUMENTS = [f"Document {i}: é ∑ 🙂 " + "words " * (i % 17) for i in range(100)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_shards(DOCUMENTS, tmp_path / "corpus", num_shards=3, rows_per_group=8, provenance={"source": "test"})


def write(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def edit_manifest(dataset: Dataset, **changes: object) -> None:
    path = dataset.path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_was_written_is_read(dataset: Dataset) -> None:
    assert [s.name for s in dataset.train] == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"]
    assert dataset.validation.name == "shard_00003.parquet"
    for index, shard in enumerate((*dataset.train, dataset.validation)):
        assert list(all_texts(shard)) == DOCUMENTS[index::4]  # dealt in turn
        assert shard.row_group_rows == (8, 8, 8, 1)
        assert shard.num_rows == 25
        assert shard.num_bytes == shard.path.stat().st_size
        assert shard.sha256 == sha256(shard.path)
        text = sum(len(document.encode()) for document in DOCUMENTS[index::4])
        assert text < shard.text_bytes < text + 4 * 25 + 4 * 100  # four bytes of length a text, and page headers
        assert verify_shard(shard.path) is None
    shards = {f"shard_0000{i}.parquet" for i in range(4)}
    assert {p.name for p in dataset.path.iterdir()} == shards | {"dataset.json"}
    assert [p.name for p in dataset.path.parent.iterdir()] == ["corpus"]  # nothing of the building is left


def test_same_documents_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    source = {"source": "test"}
    again = write_shards(iter(DOCUMENTS), tmp_path / "again", num_shards=3, rows_per_group=8, provenance=source)
    assert [s.sha256 for s in again.train] == [s.sha256 for s in dataset.train]
    assert again.fingerprint() == dataset.fingerprint()
    other = write_shards(DOCUMENTS[1:], tmp_path / "other", num_shards=3, rows_per_group=8)
    assert other.fingerprint() != dataset.fingerprint()


def test_fingerprint_knows_the_validation_shard(dataset: Dataset) -> None:
    moved = open_dataset(dataset.path, validation="shard_00000.parquet")
    assert moved.validation.name == "shard_00000.parquet"
    assert [s.name for s in moved.train] == ["shard_00001.parquet", "shard_00002.parquet", "shard_00003.parquet"]
    assert moved.fingerprint() != dataset.fingerprint()


def test_validation_is_named_or_last(dataset: Dataset) -> None:
    edit_manifest(dataset, validation="shard_00001.parquet")
    assert open_dataset(dataset.path).validation.name == "shard_00001.parquet"
    (dataset.path / MANIFEST).unlink()
    assert open_dataset(dataset.path).validation.name == "shard_00003.parquet"
    with pytest.raises(DataError, match=r"no shard 'shard_00009\.parquet'"):
        open_dataset(dataset.path, validation="shard_00009.parquet")


def test_num_shards_keeps_the_first(dataset: Dataset) -> None:
    some = open_dataset(dataset.path, num_shards=2)
    assert some.train == dataset.train[:2]
    assert some.validation == dataset.validation
    with pytest.raises(DataError, match="has 3 training shards, 4 were asked for"):
        open_dataset(dataset.path, num_shards=4)
    with pytest.raises(ConfigError, match="num_shards is 0"):
        open_dataset(dataset.path, num_shards=0)


def test_unlisted_and_unfinished_files_are_left_out(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    (dataset.path / "shard_00009.parquet.tmp").write_bytes(b"half")
    (dataset.path / "._shard_00000.parquet").write_bytes(b"a file manager's")
    assert open_dataset(dataset.path) == dataset
    assert not caplog.records
    shutil.copy(dataset.validation.path, dataset.path / "shard_00009.parquet")
    assert open_dataset(dataset.path) == dataset
    assert "1 shards that dataset.json does not list are left out" in caplog.text


def test_real_shards(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "cpp-docs")
    assert (len(dataset.train), dataset.validation.name) == (8, "shard_00008.parquet")
    assert sum(shard.num_rows for shard in (*dataset.train, dataset.validation)) == 9488
    assert len(list(all_texts(dataset.validation))) == dataset.validation.num_rows


@pytest.mark.parametrize("case", ["missing", "empty", "one", "file"])
def test_no_dataset(case: str, dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if case == "file":
        folder.write_text("")
    elif case != "missing":
        folder.mkdir()
    if case == "one":
        shutil.copy(dataset.validation.path, folder)
    says = "at least 2 shards" if case == "one" else "folder.*nanofed data demo.*download"
    with pytest.raises(DataError, match=says):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2; this nanofed reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"validation": "../shard_00000.parquet"}, "not a shard name"),
        ({"validation": "shard_00007.parquet"}, "does not list"),
        ({"validation": None}, "not a shard name"),
        ({"shards": []}, "wrong kind"),
        ({"shards": {"shard_00003.parquet": 5}}, "wrong kind"),
        ({"shards": {"shard_00003.parquet": {"sha256": "00", "bytes": 1, "rows": 1}}}, "needs a sha256"),
        ({"shards": {"shard_00003.parquet": {"sha256": "0" * 64, "bytes": True, "rows": 1}}}, "bytes and rows"),
        ({"shards": {"/etc/passwd.parquet": {"sha256": "0" * 64, "bytes": 1, "rows": 1}}}, "not a shard name"),
        ({"shards": {"a..b.parquet": {"sha256": "0" * 64, "bytes": 1, "rows": 1}}}, "not a shard name"),
    ],
)
def test_bad_manifest(dataset: Dataset, changes: dict[str, object], message: str) -> None:
    edit_manifest(dataset, **changes)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(dataset.path)
    assert str(dataset.path / MANIFEST) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_json(dataset: Dataset, content: bytes) -> None:
    (dataset.path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(dataset.path)


def test_listed_shard_is_missing_or_has_another_size(dataset: Dataset) -> None:
    shard = dataset.train[1].path
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks shard_00001\.parquet"):
        open_dataset(dataset.path)
    shard.write_bytes(content + b"x")
    with pytest.raises(DataError, match=r"shard_00001\.parquet has .* bytes, dataset\.json says"):
        open_dataset(dataset.path)


def test_links_and_names_out_of_the_folder(dataset: Dataset, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.parquet"
    shutil.copy(dataset.validation.path, outside)
    (dataset.path / MANIFEST).unlink()
    link = dataset.path / "shard_00007.parquet"
    link.symlink_to(outside)
    with pytest.raises(DataError, match=r"shard_00007\.parquet is a link"):
        open_dataset(dataset.path)
    link.unlink()
    shutil.copy(outside, dataset.path / "odd name.parquet")
    with pytest.raises(DataError, match=r"'odd name\.parquet' is not a shard name"):
        open_dataset(dataset.path)


def test_shards_that_are_none(tmp_path: Path, dataset: Dataset) -> None:
    whole = dataset.validation.path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "html.parquet").write_bytes(b"<html>not found</html>" * 50)
    (tmp_path / "folder.parquet").mkdir()
    write(tmp_path / "textless.parquet", content=pa.array(["a"]))
    write(tmp_path / "numbers.parquet", text=pa.array([1, 2]))
    write(tmp_path / "lists.parquet", text=pa.array([["a"], ["b"]]))
    expected = {
        "cut": "truncated, damaged or not a parquet file",
        "empty": "truncated, damaged or not a parquet file",
        "html": "truncated, damaged or not a parquet file",
        "folder": "truncated, damaged or not a parquet file",
        "textless": r"no `text` column; its columns are content: `nanofed data pack .* --key NAME --output DIR`",
        "numbers": "holds int64, not string",
        "lists": "not string",
        "absent": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message) as error:
            read_shard(tmp_path / f"{name}.parquet")
        assert f"{name}.parquet" in str(error.value)


def test_other_columns_and_large_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=pa.array([1, 2]), text=pa.array(["x", "y"], pa.large_string()))
    assert list(all_texts(read_shard(path))) == ["x", "y"]


KINDS = {
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary_of_binary": pa.dictionary(pa.int32(), pa.binary()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_that_holds_text_is_read(tmp_path: Path, kind: str) -> None:
    """Pandas writes categories as dictionaries, Polars string views, and Spark binary columns for some tables."""
    path = write(tmp_path / "a.parquet", text=pa.array(DOCUMENTS * 9).cast(KINDS[kind]))
    assert list(all_texts(read_shard(path))) == DOCUMENTS * 9
    assert verify_shard(path) is None


def test_a_field_of_a_column_is_read(tmp_path: Path) -> None:
    docs = pa.array([{"id": 1, "text": "x"}, {"id": 2, "text": "y"}])
    path = write(tmp_path / "a.parquet", doc=docs, n=pa.array([1, 2]))
    assert list(all_texts(read_shard(path, "doc.text"))) == ["x", "y"]
    with pytest.raises(DataError, match=r"no `text` column; its columns are doc, doc\.id, doc\.text, n:"):
        read_shard(path)
    with pytest.raises(DataError, match=r"the column `doc\.id` holds int64, not string"):
        read_shard(path, "doc.id")
    nulls = write(tmp_path / "b.parquet", doc=pa.array([{"text": "x"}, None]))
    with pytest.raises(DataError, match=r"null instead of a text in row 1"):
        read_texts(read_shard(nulls, "doc.text"), 0)


def test_files_without_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Spark writes a part file for every task, also for one that had nothing to write."""
    for name, documents in (("b", ["x", "y"]), ("d", ["z"])):
        write(tmp_path / f"part-{name}.parquet", text=pa.array(documents))
    write(tmp_path / "part-a.parquet", text=pa.array([], pa.string()))
    write(tmp_path / "part-c.parquet", text=pa.nulls(0))
    write(tmp_path / "part-e.parquet")  # as pandas writes an empty frame
    dataset = open_dataset(tmp_path)
    assert ([s.name for s in dataset.train], dataset.validation.name) == (["part-b.parquet"], "part-d.parquet")
    assert "3 files without rows are left out: part-a.parquet, part-c.parquet, part-e.parquet" in caplog.text
    assert verify_shard(tmp_path / "part-e.parquet") is None
    with pytest.raises(DataError, match="has 1 training shards, 2 were asked for"):
        open_dataset(tmp_path, num_shards=2)
    with pytest.raises(DataError, match=r"part-a\.parquet has no rows, and so none for validation"):
        open_dataset(tmp_path, validation="part-a.parquet")
    (tmp_path / "part-b.parquet").unlink()
    with pytest.raises(DataError, match=r"has rows only in part-d\.parquet: at least 2 shards"):
        open_dataset(tmp_path)


def test_nulls_and_text_that_is_not_utf8(tmp_path: Path) -> None:
    nulls = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"text": pa.array(["a"] * 700 + [None] + ["b"] * 9)}), nulls, row_group_size=400)
    shard = read_shard(nulls)
    assert len(read_texts(shard, 0)) == 400
    with pytest.raises(DataError, match=r"row group 1: .*nulls\.parquet has a null instead of a text in row 300"):
        read_texts(shard, 1)
    assert "null" in (verify_shard(nulls) or "")
    broken = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    for name, column in {"utf8": broken, "raw": broken.cast(pa.binary()), "dict": broken.dictionary_encode()}.items():
        path = write(tmp_path / f"{name}.parquet", text=column)
        with pytest.raises(DataError, match=rf"group 0: .*{name}\.parquet has text that is not UTF-8 in row 1 there"):
            read_texts(read_shard(path), 0)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_GROUP_BYTES", 1 << 20)
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"text": ["a" * (3 << 20)]}), plain, use_dictionary=False, compression="zstd")
    assert plain.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"row group 0 declares .* bytes of text, more than"):
        read_shard(plain)
    # One long text in the dictionary and many rows that name it: little is declared, much comes out.
    shard = read_shard(write(tmp_path / "dictionary.parquet", text=pa.array(["a" * 50_000] * 1000)))
    assert shard.text_bytes < 1 << 20
    with pytest.raises(DataError, match="holds more than"):
        read_texts(shard, 0)
    chosen = pa.array(["a" * 50_000] * 1000).dictionary_encode()
    with pytest.raises(DataError, match="holds more than"):
        read_texts(read_shard(write(tmp_path / "chosen.parquet", text=chosen)), 0)


def test_a_shard_that_changed_since_it_was_opened(dataset: Dataset) -> None:
    shard = dataset.train[0]
    assert len(read_texts(shard, 0)) == 8
    (dataset.path / MANIFEST).unlink()
    unrecorded = open_dataset(dataset.path).train[0]
    shutil.copy(write(dataset.path.parent / "other.parquet", text=pa.array(["x"])), shard.path)
    with pytest.raises(DataError, match="its sha256 is not the one"):
        read_texts(shard, 0)
    with pytest.raises(DataError, match="row group 0 has 1 rows instead of 8"):
        read_texts(unrecorded, 0)
    with pytest.raises(DataError, match=r"row group 3: .* has only 1 row groups"):
        read_texts(unrecorded, 3)
    shard.path.unlink()
    for opened in (shard, unrecorded):
        with pytest.raises(DataError, match=r"row group 0: .*(No such file|does not exist)"):
            read_texts(opened, 0)


def test_verify_names_what_is_wrong(dataset: Dataset) -> None:
    manifest = read_manifest(dataset.path)
    assert manifest is not None
    shard = dataset.train[0]
    recorded = manifest.shards[shard.name]
    assert verify_shard(shard.path, recorded) is None
    content = bytearray(shard.path.read_bytes())
    content[-20] ^= 1  # in the footer's metadata
    shard.path.write_bytes(content)
    assert shard.name in (verify_shard(shard.path, recorded) or "")
    shard.path.unlink()
    assert "does not exist" in (verify_shard(shard.path, recorded) or "")


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    def failing() -> object:
        yield from DOCUMENTS
        raise DataError("line 101 is bad")

    with pytest.raises(DataError, match="line 101"):
        write_shards(failing(), tmp_path / "corpus", num_shards=2, rows_per_group=4)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="holds shards already"):
        write_shards(DOCUMENTS, dataset.path)
    assert open_dataset(dataset.path) == dataset
    replaced = write_shards(DOCUMENTS[:9], dataset.path, num_shards=2, replace=True)
    assert len(replaced.train) == 2
    assert [p.name for p in dataset.path.parent.iterdir()] == ["corpus"]
    (dataset.path / "thesis.docx").write_text("mine")
    with pytest.raises(DataError, match=r"'thesis\.docx', which is not a shard"):
        write_shards(DOCUMENTS, dataset.path, replace=True)
    assert (dataset.path / "thesis.docx").read_text() == "mine"
    with pytest.raises(DataError, match="is a file"):
        write_shards(DOCUMENTS, dataset.path / "thesis.docx", replace=True)


def test_only_a_dataset_as_it_was_written_is_replaced(dataset: Dataset, tmp_path: Path) -> None:
    """Parquet files are not nanofed's for being parquet files: they may be somebody's only copy."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "a.parquet", text=pa.array(["mine"]))
    with pytest.raises(DataError, match=r"mine holds 'a\.parquet', which no dataset\.json lists"):
        write_shards(DOCUMENTS, folder, replace=True)
    assert list(all_texts(read_shard(folder / "a.parquet"))) == ["mine"]
    unlisted = write(dataset.path / "z.parquet", text=pa.array(["mine"]))
    with pytest.raises(DataError, match=r"holds 'z\.parquet', which no dataset\.json lists"):
        write_shards(DOCUMENTS, dataset.path, replace=True)
    unlisted.unlink()
    changed = write(dataset.path / "shard_00001.parquet", text=pa.array(["mine"]))
    with pytest.raises(DataError, match=r"shard_00001\.parquet is whole but not the shard that dataset\.json lists"):
        write_shards(DOCUMENTS, dataset.path, replace=True)
    assert list(all_texts(read_shard(changed))) == ["mine"]
    changed.write_bytes(b"PAR1")  # damage, and no work
    assert len(write_shards(DOCUMENTS, dataset.path, num_shards=1, replace=True).train) == 1


def test_a_link_to_the_output_folder_stays(dataset: Dataset, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(dataset.path)
    replaced = write_shards(DOCUMENTS[:9], link, num_shards=1, replace=True)
    assert link.is_symlink() and open_dataset(dataset.path).fingerprint() == replaced.fingerprint()


def test_few_documents(tmp_path: Path) -> None:
    small = write_shards(["a", "b", "c"], tmp_path / "small", num_shards=8)
    assert [s.num_rows for s in (*small.train, small.validation)] == [1, 1, 1]
    for documents in ([], ["alone"]):
        with pytest.raises(DataError, match="at least 2 are needed"):
            write_shards(documents, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for num_shards in (0, 501):
        with pytest.raises(ConfigError, match="num_shards"):
            write_shards(DOCUMENTS, tmp_path / "none", num_shards=num_shards)
    with pytest.raises(ConfigError, match="rows_per_group"):
        write_shards(DOCUMENTS, tmp_path / "none", rows_per_group=0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: "):
        write_shards(DOCUMENTS, tmp_path / "file" / "corpus")
