from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofed import runtime
from nanofed.data import demo
from nanofed.data.datamodule import TokenDataModule
from nanofed.data.demo import build_demo_corpus, prepare_demo
from nanofed.data.manifest import MANIFEST
from nanofed.data.shards import all_texts, open_dataset
from nanofed.data.writing import write_shards
from nanofed.errors import DataError
from nanofed.files import sha256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_corpus(tmp_path_factory.mktemp("demo") / "data").path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def texts(folder: Path) -> list[str]:
    dataset = open_dataset(folder)
    shards = (*dataset.train, dataset.validation)
    return [text for shard in shards for text in all_texts(shard)]


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of a few packages, so that a build takes a fraction of a second."""
    library = tmp_path / "lib"
    for package in ("json", "email", "logging", "asyncio"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, library / package)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    return library


def test_the_corpus(corpus: Path) -> None:
    dataset = open_dataset(corpus)
    shards = (*dataset.train, dataset.validation)
    assert len(shards) == 9
    assert dataset.validation.name == "shard_00008.parquet"
    assert all(len(shard.row_group_rows) == demo.GROUPS_PER_SHARD for shard in shards)
    sizes = [shard.text_bytes for shard in shards]
    assert sum(sizes) > 6_000_000
    assert max(sizes) < 2 * min(sizes)  # every shard has the same mix
    everything = texts(corpus)
    assert len(set(everything)) == len(everything)  # none twice, so none in both training and validation
    assert any("json.dumps(obj, *, skipkeys=False" in text for text in everything)  # documentation
    assert any(text.startswith("# json/decoder.py\n") and "def " in text for text in everything)  # source
    assert any("The `assert` statement" in text or 'The "assert" statement' in text for text in everything)  # reference


def test_another_process_builds_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    script = "import sys, pathlib; from nanofed.data.demo import build_demo_corpus as b; b(pathlib.Path(sys.argv[1]))"
    changed = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "data"], env={**os.environ, **changed}, check=True)
    assert hashes(tmp_path / "data") == hashes(corpus)


def test_code_and_its_documentation_are_apart(small_library: Path, tmp_path: Path) -> None:
    build_demo_corpus(tmp_path / "data", num_shards=2)
    phrase = "Serialize ``obj`` to a JSON formatted ``str``."
    assert phrase in (small_library / "json" / "__init__.py").read_text()
    found = [text for text in texts(tmp_path / "data") if phrase in text]
    assert len(found) == 1
    assert not found[0].startswith("#")


def test_it_is_built_once(small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_demo_corpus(tmp_path / "data", num_shards=2)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_select", lambda max_bytes: pytest.fail("built again"))
        assert build_demo_corpus(tmp_path / "data", num_shards=2) == first
    before = hashes(first.path)
    damaged = bytearray(first.train[1].path.read_bytes())
    damaged[100] ^= 1
    first.train[1].path.write_bytes(damaged)
    build_demo_corpus(tmp_path / "data", num_shards=2)
    assert hashes(first.path) == before
    first.validation.path.unlink()
    build_demo_corpus(tmp_path / "data", num_shards=2)
    assert hashes(first.path) == before
    with pytest.raises(DataError, match=r"holds a demo corpus of num_shards 2 and max_bytes 20000000: .*--force"):
        build_demo_corpus(tmp_path / "data", num_shards=1, max_bytes=100_000)
    assert hashes(first.path) == before
    fewer = build_demo_corpus(tmp_path / "data", num_shards=1, max_bytes=100_000, force=True)
    assert len(fewer.train) == 1
    assert 50_000 < sum(len(text.encode()) for text in texts(fewer.path)) <= 100_000


def test_a_run_keeps_a_corpus_that_was_made_on_purpose(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its size, and whichever Python made it: runs were trained on it, and go on with it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    made = build_demo_corpus(runtime.dataset_dir("demo"), num_shards=2, max_bytes=90_000)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    prepare_demo(tokenizer=False)
    assert TokenDataModule("demo").dataset == made
    made.train[0].path.unlink()  # and a damaged one is built as it was asked for
    prepare_demo(tokenizer=False)
    again = open_dataset(made.path)
    assert [s.sha256 for s in again.train] == [s.sha256 for s in made.train]


def test_a_shard_that_somebody_has_changed_is_kept(small_library: Path, tmp_path: Path) -> None:
    made = build_demo_corpus(tmp_path / "data", num_shards=1)
    pq.write_table(pa.table({"text": ["mine"]}), made.train[0].path)
    with pytest.raises(DataError, match=r"shard_00000\.parquet is whole but not the shard that dataset\.json lists"):
        build_demo_corpus(tmp_path / "data", num_shards=1)
    assert pq.read_table(made.train[0].path).to_pylist() == [{"text": "mine"}]


def test_a_foreign_folder_is_refused(small_library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match=r"'letter\.txt', which is not a shard"):
        build_demo_corpus(folder)
    (folder / "letter.txt").unlink()
    write_shards(["a", "b"], folder, provenance={"source": "packed: letters"})
    before = hashes(folder)
    with pytest.raises(DataError, match=r"shards from elsewhere \(packed: letters\)"):
        build_demo_corpus(folder)
    assert hashes(folder) == before
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds 'shard_00000\.parquet', which no dataset\.json lists"):
        build_demo_corpus(folder)


def test_a_python_without_sources(small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(small_library)
    monkeypatch.setattr(demo, "_reference", lambda: iter(()))
    with pytest.raises(DataError, match=r"no sources of its standard library in .*lib; .*nanofed data pack"):
        build_demo_corpus(tmp_path / "data")
    assert not (tmp_path / "data").exists()
