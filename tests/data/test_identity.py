"""What tells two texts apart, and what does not."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofed.data import identity as identity_module
from nanofed.data.identity import DataIdentity
from nanofed.data.manifest import MANIFEST
from nanofed.data.shards import open_dataset
from nanofed.data.writing import write_shards

LENGTH = 400  # characters of every document: as many bytes in whatever order they stand


def write(folder: Path, documents: list[str], *, shards: int = 3) -> None:
    """Write shards whose sizes and footers say nothing of the text: uncompressed, documents of one length, no statistics."""
    folder.mkdir()
    for index in range(shards):
        table = pa.table({"text": documents[index::shards]})
        path = folder / f"shard_{index:05d}.parquet"
        pq.write_table(table, path, row_group_size=8, compression="none", use_dictionary=False, write_statistics=False)


def documents(seed: str, count: int = 30) -> list[str]:
    return [f"{seed} {n} ".ljust(LENGTH, seed) for n in range(count)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write(tmp_path / "text", documents("a"))
    return tmp_path / "text"


def test_text_of_the_same_rows_sizes_and_footers_is_another_text(text: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", documents("b"))
    for name in ("shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"):
        a, b = text / name, tmp_path / "other" / name
        assert a.stat().st_size == b.stat().st_size
        assert pq.read_metadata(a).equals(pq.read_metadata(b))
    found = DataIdentity.of(open_dataset(text)).differences(DataIdentity.of(open_dataset(tmp_path / "other")))
    assert found == [
        "training shards shard_00000.parquet, shard_00001.parquet hold other text",
        "the validation shard holds other text",
    ]


def test_one_letter_counts(text: Path, tmp_path: Path) -> None:
    changed = documents("a")
    changed[4] = changed[4][:-1] + "x"
    write(tmp_path / "other", changed)
    found = DataIdentity.of(open_dataset(text)).differences(DataIdentity.of(open_dataset(tmp_path / "other")))
    assert found == ["training shards shard_00001.parquet hold other text"]


def test_rows_in_another_order_are_another_text(text: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", documents("a")[::-1])
    assert open_dataset(tmp_path / "other").fingerprint() != open_dataset(text).fingerprint()


def test_place_spelling_and_dates_do_not_count(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = DataIdentity.of(open_dataset(text))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(text)
    shutil.copytree(text, tmp_path / "copy", copy_function=shutil.copy)
    for path in (Path("text"), Path("./text"), Path("../") / tmp_path.name / "text", Path("link"), Path("copy")):
        after = DataIdentity.of(open_dataset(path))
        assert before.differences(after) == []
        assert before.fingerprint() == after.fingerprint()


def test_missing_and_new_shards_are_named_and_training_ones_may_not_count(text: Path) -> None:
    all_of_them, first = DataIdentity.of(open_dataset(text)), DataIdentity.of(open_dataset(text, num_shards=1))
    assert all_of_them.differences(first) == ["training shards shard_00001.parquet are there no more"]
    assert first.differences(all_of_them) == ["training shards shard_00001.parquet are new"]
    assert first.differences(all_of_them, training=False) == []


def test_the_name_of_the_validation_shard_does_not_count_and_its_text_does(text: Path) -> None:
    before = DataIdentity.of(open_dataset(text, num_shards=1))
    (text / "shard_00002.parquet").rename(text / "validation.parquet")
    assert before.differences(DataIdentity.of(open_dataset(text, num_shards=1))) == []
    other = DataIdentity.of(open_dataset(text, validation="shard_00001.parquet", num_shards=1))
    assert before.differences(other) == ["the validation shard holds other text"]


def test_a_dataset_json_that_is_lost_changes_nothing(tmp_path: Path) -> None:
    dataset = write_shards(documents("a"), tmp_path / "recorded", num_shards=2, rows_per_group=8)
    recorded = DataIdentity.of(dataset)
    (tmp_path / "recorded" / MANIFEST).unlink()
    found = DataIdentity.of(open_dataset(tmp_path / "recorded"))
    assert recorded.differences(found) == found.differences(recorded) == []
    assert recorded.fingerprint() == found.fingerprint()
    assert recorded.train != found.train


def test_recorded_hashes_tell_apart_what_samples_do_not(text: Path) -> None:
    found = DataIdentity.of(open_dataset(text))
    (name, digest), *rest = found.train.items()
    a, b = (DataIdentity({name: f"{digest}:{end}", **dict(rest)}, found.validation) for end in ("1", "2"))
    assert a.differences(b) == [f"training shards {name} hold other text"]
    assert a.differences(found) == []


def test_a_large_shard_is_read_in_part(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "SAMPLE_BYTES", 16)
    size = (text / "shard_00000.parquet").stat().st_size
    assert size > 16 * identity_module.SAMPLES
    before = identity_module._sampled(text / "shard_00000.parquet", 0, size, 1)
    content = bytearray((text / "shard_00000.parquet").read_bytes())
    for position, differs in ((0, True), (size - 1, True), (size // 2, None), (size - 20, True)):
        changed = content.copy()
        changed[position] ^= 1
        (text / "changed").write_bytes(changed)
        after = identity_module._sampled(text / "changed", position, size, 2)
        assert differs is None or (after != before) is differs


def test_what_is_saved_reads_back_and_what_is_not_of_its_form_is_refused(text: Path) -> None:
    found = DataIdentity.of(open_dataset(text))
    assert DataIdentity.from_plain(asdict(found)) == found
    damaged: object
    for damaged in ({"train": {}}, {"train": {"a": 1}, "validation": "x"}, {"train": {}, "validation": None}, [], "x"):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            DataIdentity.from_plain(damaged)
