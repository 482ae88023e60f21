"""Damaged, malicious and misleading shards: an error that names the file, never another text, a path, or the memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flwr.common import Context, RecordDict

from nanofed import cli
from nanofed.data.download import download
from nanofed.data.manifest import MANIFEST, read_manifest
from nanofed.data.rows import RowPlan, RowRange
from nanofed.data.shards import Dataset, Shard, all_texts, open_dataset, read_shard, read_texts, verify_shard
from nanofed.data.transfer import Retry
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, DataError
from nanofed.federated.site.client import client_name
from nanofed.training.run_options import RunOptions
from tests.data.hub import Hub, make_files, serving
from tests.faults.children import call

DOCUMENTS = [f"Document {i}: é ∑ 🙂 " + "words " * (i % 17) for i in range(100)]
ELSEWHERE = ["../x.parquet", "..", "/etc/x.parquet", "a/../../x.parquet", "a/b.parquet", "..parquet", "a\\b.parquet"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_shards(DOCUMENTS, tmp_path / "corpus", num_shards=3, rows_per_group=8, provenance={"source": "test"})


def texts_of(shard: Shard) -> list[str]:
    return list(all_texts(shard))


# --- damage


@pytest.mark.parametrize("recorded", [True, False], ids=["with dataset.json", "without"])
def test_damage_never_becomes_another_text(
    dataset: Dataset, recorded: bool, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """Flip, overwrite, cut or insert bytes: an error, or exactly the texts that were written.

    Without recorded hashes that holds for the pages (they have checksums); with them, for every byte of the file.
    """
    manifest = read_manifest(dataset.path)
    assert manifest is not None
    shard = dataset.train[0]
    whole, expected = shard.path.read_bytes(), texts_of(shard)
    metadata_bytes = int.from_bytes(whole[-8:-4], "little") + 8
    if not recorded:
        (dataset.path / MANIFEST).unlink()
    refused = mutations = 0
    for seed in range(count(60, 1000)):
        draw = random.Random(seed)
        content = bytearray(whole)
        at = draw.randrange(len(whole) if recorded else len(whole) - metadata_bytes)
        kind = draw.choice(["flip", "overwrite", "cut", "insert"] if recorded else ["flip"])
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "overwrite":
            content[at : at + 8] = draw.randbytes(8)
        elif kind == "cut":
            del content[at : at + draw.randrange(1, 64)]
        else:
            content[at:at] = draw.randbytes(draw.randrange(1, 64))
        if bytes(content) == whole:
            continue
        mutations += 1
        shard.path.write_bytes(content)
        try:
            found = texts_of(open_dataset(dataset.path).train[0])
        except DataError as error:
            assert shard.name in str(error)
            refused += 1
        else:
            assert found == expected, f"seed {seed}"
        if recorded:
            assert verify_shard(shard.path, manifest.shards[shard.name]) is not None, f"seed {seed}"
    assert refused > 0
    record_property("refused", f"{refused} of {mutations}")


# --- bombs


def _repeated(text: str, rows: int) -> pa.Table:
    """Return a column of one text over and over, of which parquet stores one."""
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))})


def _read_within(path: Path, megabytes: int) -> tuple[str, int]:
    """Read a shard with so much address space left; return what is wrong with it, and how many megabytes reading took."""
    read_texts(read_shard(path.with_name("small.parquet")), 0)  # what Arrow sets up once
    limit = _status("VmSize") + (megabytes << 20)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        texts_of(read_shard(path))
        reason = "nothing"
    except DataError as error:
        reason = str(error)
    return reason, (_status("VmHWM") - resident) >> 20


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.parametrize(
    ("size", "rows", "megabytes", "says"),
    [
        (1 << 16, 10_000_000, 1024, "holds more than 268,435,456 bytes of text there"),
        (1 << 20, 240, 16, "has row groups that this machine's memory does not hold"),
    ],
    ids=["a bomb", "a large row group"],
)
def test_what_the_memory_cannot_hold_is_refused_before_it_is_full(
    tmp_path: Path, size: int, rows: int, megabytes: int, says: str
) -> None:
    """600 GB in some KB, none of which the file declares: what parquet stores is one text, and how often it stands there."""
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "small.parquet")
    pq.write_table(_repeated("a" * size, rows), path, compression="zstd", store_schema=False)
    if megabytes == 1024:
        assert path.stat().st_size < 100_000 and read_shard(path).text_bytes < 1 << 20
    reason, took = call(_read_within, path, megabytes)
    assert f"bomb.parquet {says}" in reason
    assert took < 512 or megabytes < 1024, "the bomb itself is never in memory"


# --- names that lead elsewhere


@pytest.fixture
def outside(dataset: Dataset) -> Path:
    """A shard beside the dataset's folder, which nothing may reach."""
    path = dataset.path.parent / "out.parquet"
    shutil.copy(dataset.train[0].path, path)
    return path


@pytest.mark.parametrize("name", [*ELSEWHERE, ""])
def test_a_shard_elsewhere_is_not_named_in_a_manifest(dataset: Dataset, outside: Path, name: str) -> None:
    path = dataset.path / MANIFEST
    whole = json.loads(path.read_text())
    entry = whole["shards"][dataset.train[0].name]
    for change in ({"shards": {**whole["shards"], name: entry}}, {"validation": name}):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError, match="is not a shard name") as error:
            open_dataset(dataset.path)
        assert str(path) in str(error.value)
        with pytest.raises(DataError, match="is not a shard name"):
            download(1, output=dataset.path, base_url="http://127.0.0.1:9/main")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_shard_elsewhere_is_not_taken_for_validation_or_leased(dataset: Dataset, outside: Path, name: str) -> None:
    with pytest.raises(DataError, match="has no shard"):
        open_dataset(dataset.path, validation=name)
    with pytest.raises(DataError, match="which is not in the dataset"):
        RowPlan([RowRange(name, 0, 1)], dataset.train, repeat=False)


@pytest.mark.parametrize("path", ["/main", "/main/..%2F..%2Fetc", "/../../etc"])
def test_what_a_server_says_moves_no_file(tmp_path: Path, path: str) -> None:
    """Names are counted here, not listed there: wherever it redirects to, only the file that was asked for is written."""
    files = make_files(tmp_path / "hub")
    with serving(Hub(dict(files))) as store, serving(Hub(dict(files))) as front:
        front.redirect_to = store.url + path
        folder = tmp_path / "deep" / "data"
        download(1, output=folder, base_url=f"{front.url}/main", retry=Retry(attempts=1))
        assert store.requests
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]
    assert sorted(path.name for path in folder.glob("*.parquet")) == ["shard_00000.parquet", "shard_01822.parquet"]


@pytest.mark.parametrize("name", ["../out", "..", ".", "/etc/out", "a/../../out", "a/b", ""])
def test_a_run_or_a_client_is_not_named_elsewhere(
    dataset: Dataset, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="is not a plain folder name"):
        RunOptions(name=name, runs_dir=str(tmp_path / "runs"))
    before = sorted(tmp_path.rglob("*"))
    for command in ("fit", "federate"):
        where = [f"--data.path={dataset.path}", f"--runs_dir={tmp_path / 'runs'}"]
        assert cli.main([command, *where, f"--name={name}"]) == 2
        assert "is not a plain folder name" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    context = Context(run_id=1, node_id=0, node_config={"name": name}, state=RecordDict(), run_config={})
    with pytest.raises(ValueError, match="must give a plain `name`"):
        client_name(context)
