from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofed.data import transfer
from nanofed.data.download import download
from nanofed.data.manifest import MANIFEST, read_manifest
from nanofed.data.shards import Dataset, open_dataset, verify_shard
from nanofed.data.transfer import Retry
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, DataError
from nanofed.files import sha256
from tests.data.hub import Hub, make_files, serving

FAST = Retry(attempts=3, backoff=0.01)
VALIDATION = "shard_01822.parquet"
FIRST = "shard_00000.parquet"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return make_files(tmp_path_factory.mktemp("hub") / "shards")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub(dict(files))) as running:
        yield running


def get(hub: Hub, output: Path, num_shards: int = 2, retry: Retry = FAST, **options: object) -> Dataset:
    return download(num_shards, output=output, base_url=f"{hub.url}/main", retry=retry, **options)  # type: ignore[arg-type]


def assert_whole(output: Path, hub: Hub, num_shards: int = 2) -> None:
    """Every byte is the server's, `dataset.json` says so, and nothing unfinished is left."""
    names = [*(f"shard_{i:05d}.parquet" for i in range(num_shards)), VALIDATION]
    for name in names:
        assert (output / name).read_bytes() == hub.files[name]
    manifest = read_manifest(output)
    assert manifest is not None
    assert manifest.validation == VALIDATION
    assert {n: r.sha256 for n, r in manifest.shards.items()} == {n: sha256(output / n) for n in names}
    assert sorted(p.name for p in output.iterdir() if p.name != ".download.lock") == sorted([MANIFEST, *names])


def test_download(hub: Hub, tmp_path: Path) -> None:
    dataset = get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    assert [shard.name for shard in dataset.train] == [FIRST, "shard_00001.parquet"]
    assert dataset.validation.name == VALIDATION
    assert all(len(hub.gets(name)) == 1 for name in (FIRST, "shard_00001.parquet", VALIDATION))
    assert not hub.gets("shard_00002.parquet")
    before = len(hub.requests)
    assert get(hub, tmp_path / "data") == dataset
    assert len(hub.requests) == before  # all is there: the network is not needed


def test_the_validation_shard_is_there_before_the_others_begin(hub: Hub, tmp_path: Path) -> None:
    hub.faults[VALIDATION] = deque(["500"])
    get(hub, tmp_path / "data")
    asked = [request.path.rsplit("/", 1)[-1] for request in hub.requests if request.method == "GET"]
    assert asked[:2] == [VALIDATION] * 2 and sorted(asked[2:]) == [FIRST, "shard_00001.parquet"]


def test_what_the_shards_need_is_told_by_one_that_is_no_rest(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path / "data")
    (head,) = (request.path for request in hub.requests if request.method == "HEAD")
    assert head.endswith("shard_00001.parquet")


def test_more_shards_later(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path / "data", 1)
    dataset = get(hub, tmp_path / "data", 3)
    assert len(dataset.train) == 3
    assert_whole(tmp_path / "data", hub, 3)
    assert len(hub.gets(FIRST)) == len(hub.gets(VALIDATION)) == 1
    assert len(get(hub, tmp_path / "data", 1).train) == 3  # what is there stays listed


@pytest.mark.parametrize("second", ["drop", "short length"])
def test_a_broken_connection_is_resumed_however_often(hub: Hub, tmp_path: Path, second: str) -> None:
    hub.faults[FIRST] = deque(["drop", second])
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    offsets = [int(r.headers.get("Range", "bytes=0-")[6:-1]) for r in hub.gets(FIRST)]
    assert offsets[0] == 0 < offsets[1] < offsets[2] < len(hub.files[FIRST])
    assert hub.gets(FIRST)[1].headers["If-Range"] == hub.etag(FIRST)


def test_attempts_count_only_without_progress(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST] = deque(["500", "500", "500", "drop", "500", "429"])  # three in a row are borne
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    assert len(hub.gets(FIRST)) == 7


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "408", "drop", "no length", "page", "flip", "short length", "compressed"]
)
def test_one_fault_is_survived(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.faults[FIRST] = deque([fault])
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    assert len(hub.gets(FIRST)) == (1 if fault == "no length" else 2)  # a length is no duty of a server


@pytest.mark.parametrize("second", ["ignore range", "wrong range", "416"])
def test_a_server_that_cannot_resume(hub: Hub, tmp_path: Path, second: str) -> None:
    hub.faults[FIRST] = deque(["drop", second])
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    ranges = [r.headers.get("Range") for r in hub.gets(FIRST)]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert ranges[2:] == ([] if second == "ignore range" else [None])  # from the start, once


@pytest.mark.parametrize("etags", [True, False])
def test_content_that_changes_meanwhile(hub: Hub, tmp_path: Path, etags: bool) -> None:
    """A part of the old file and a part of the new one never become a shard."""
    hub.etags = etags
    old, new = hub.files[FIRST], hub.files["shard_00001.parquet"]
    hub.faults[FIRST] = deque(["drop", "500", "500", "500", "500"])
    with pytest.raises(DataError, match="answered 500"):
        get(hub, tmp_path / "data")
    part = tmp_path / "data" / f"{FIRST}.part"
    assert 0 < part.stat().st_size < len(old)
    assert part.read_bytes() == old[: part.stat().st_size]
    hub.files[FIRST] = new
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)


def test_a_finished_part_of_a_killed_run_is_used(hub: Hub, tmp_path: Path) -> None:
    folder, content = tmp_path / "data", hub.files[FIRST]
    folder.mkdir()
    (folder / f"{FIRST}.part").write_bytes(content)
    note = {"url": f"{hub.url}/main/{FIRST}", "etag": hub.etag(FIRST), "total": len(content), "sha256": None}
    (folder / f"{FIRST}.part.json").write_text(json.dumps(note))
    (folder / f"{VALIDATION}.part").write_bytes(b"of unknown origin")  # without a note it is worth nothing
    get(hub, folder)
    assert_whole(folder, hub)
    assert not hub.gets(FIRST)


@pytest.mark.parametrize("status", ["404", "410", "403", "401"])
def test_a_refusal_is_final(hub: Hub, tmp_path: Path, status: str) -> None:
    hub.faults[FIRST] = deque([status])
    with pytest.raises(DataError, match=rf"{FIRST} .*{status}"):
        get(hub, tmp_path / "data")
    assert len(hub.gets(FIRST)) == 1
    assert not (tmp_path / "data" / MANIFEST).exists()
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)


def test_retry_after_is_honoured(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST], hub.retry_after = deque(["429"]), "1"
    start = time.monotonic()
    get(hub, tmp_path / "data")
    assert time.monotonic() - start >= 1.0
    date = "Wed, 21 Oct 2015 07:28:00 GMT"  # the other form, and long past
    hub.faults["shard_00002.parquet"], hub.retry_after = deque(["503"]), date
    start = time.monotonic()
    get(hub, tmp_path / "data", 3, Retry(attempts=3, backoff=60))
    assert time.monotonic() - start < 10


def test_waits_grow_with_jitter_up_to_a_limit() -> None:
    retry = Retry(backoff=2.0, longest=20.0)
    for failures, middle in ((1, 2), (2, 4), (3, 8), (10, 20)):
        waits = {retry.wait(failures, None) for _ in range(50)}
        assert middle * 0.5 <= min(waits) < max(waits) <= middle * 1.5
    assert retry.wait(1, 7.0) == 7.0
    assert retry.wait(1, 7000.0) == 20.0


@pytest.mark.parametrize("fault", ["500", "429", "page", "flip", "short length", "long length", "compressed"])
def test_a_server_that_never_gets_it_right(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.always = fault
    with pytest.raises(DataError, match=r"shard_.*; gave up after 4 attempts"):
        get(hub, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.parquet"))
    assert not (tmp_path / "data" / MANIFEST).exists()


def test_a_stalled_connection_times_out(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", (1.0, 0.3))
    hub.bytes_per_second = 4096  # one piece a second
    with pytest.raises(DataError, match=r"timed out|connection broke"):
        get(hub, tmp_path / "data", 1, Retry(attempts=1, backoff=0.01))


@pytest.mark.parametrize(
    ("linked", "message"),
    [("hash", "sha256 is not the one that the server announced"), ("size", r"announced [\d,]+ bytes and then")],
)
def test_what_the_hub_announces_is_checked(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, linked: str, message: str
) -> None:
    """The hub tells hash and size where it redirects to its storage: another whole shard is not taken for the one."""
    with serving(Hub(dict(files), redirect_to=hub.url, linked=(linked,))) as front:
        get(front, tmp_path / "good")
        assert_whole(tmp_path / "good", hub)
        hub.files[FIRST] = hub.files["shard_00001.parquet"]
        assert len(hub.files[FIRST]) != len(front.files[FIRST])
        with pytest.raises(DataError, match=message):
            get(front, tmp_path / "bad")
        assert not (tmp_path / "bad" / FIRST).exists()


def test_the_token_stays_with_the_hub(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(dict(files))) as front:
        front.redirect_to = hub.url
        monkeypatch.setenv("HF_ENDPOINT", front.url)
        dataset = download(1, output=tmp_path / "data", retry=FAST)
        assert dataset.validation.name == VALIDATION
        assert front.requests
        assert all(r.headers.get("Authorization") == "Bearer hf_secret" for r in front.requests)
        files_at = "/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/"
        assert all(r.path.startswith(files_at) for r in front.requests)
        assert hub.requests
        assert not any("Authorization" in r.headers for r in hub.requests)
    hub.requests.clear()
    get(hub, tmp_path / "mirror", 1)  # an address that is not the configured hub's
    assert hub.requests
    assert not any("Authorization" in r.headers for r in hub.requests)


@pytest.mark.parametrize("token", ["hf_\nsecret", "hf_sécret", "hf secret"])
def test_a_broken_token_is_not_shown(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(ConfigError, match="HF_TOKEN") as error:
        download(1, output=tmp_path / "data", retry=FAST)
    assert "cret" not in str(error.value)
    assert not hub.requests


def test_proxies_are_honoured(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    download(1, output=tmp_path / "data", base_url="http://hub.invalid/main", retry=FAST)
    assert {r.path for r in hub.requests} == {f"http://hub.invalid/main/{name}" for name in (FIRST, VALIDATION)}
    with pytest.raises(DataError, match=r"cannot reach https://hub\.invalid/main \(the proxy"):
        download(1, output=tmp_path / "other", base_url="https://hub.invalid/main", retry=FAST)
    assert hub.requests[-1].path == "hub.invalid:443"


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/main"
    with pytest.raises(DataError) as error:
        download(1, output=tmp_path / "data", base_url=address, retry=FAST)
    assert error.value.exit_code == 3
    assert str(error.value) == (
        f"cannot reach {address} (Connection refused); without a network build a corpus with `nanofed data demo` "
        "or `nanofed data pack PATH --output DIR`"
    )


def test_the_disk_is_too_small(hub: Hub, tmp_path: Path) -> None:
    hub.head_length = 10**18
    with pytest.raises(DataError, match=r"GB free, 3 shards need about 3000000000\.0 GB"):
        get(hub, tmp_path / "data")
    assert not any(r.method == "GET" for r in hub.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 0}, "0 shards"),
        ({"num_shards": 1823}, "from 1 to 1822"),
        ({"num_shards": -2}, "-2 shards"),
        ({"workers": 0}, "workers is 0"),
        ({"base_url": "ftp://hub.invalid"}, "no http or https address"),
        ({"base_url": "hub.invalid/main"}, "no http or https address"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        download(output=tmp_path / "data", **{"num_shards": 1, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()


def test_what_is_in_the_folder(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """nanochat's shards are taken over, damaged ones fetched anew, another corpus is left alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / FIRST).write_bytes(hub.files[FIRST])
    (folder / "shard_00001.parquet").write_bytes(hub.files["shard_00001.parquet"][:-100])
    (folder / "shard_00002.parquet").write_bytes(hub.files["shard_00002.parquet"])
    get(hub, folder)
    assert_whole(folder, hub, 3)
    assert not hub.gets(FIRST)
    assert len(hub.gets("shard_00001.parquet")) == 1
    assert "shard_00001.parquet is truncated" in caplog.text
    assert f"2 files of before are taken for shards by their names: {FIRST}, shard_00002.parquet" in caplog.text
    write_shards(["a", "b"], tmp_path / "own", provenance={"source": "packed: letters"})
    with pytest.raises(DataError, match=r"shards from elsewhere \(packed: letters\)"):
        get(hub, tmp_path / "own")


def test_a_whole_file_of_the_same_name_is_kept(hub: Hub, tmp_path: Path) -> None:
    """Somebody's own shard may bear the name of one that is missing by the record."""
    folder = get(hub, tmp_path / "data").path
    own = write_shards(["mine", "too"], tmp_path / "own").validation.path.read_bytes()
    (folder / FIRST).write_bytes(own)
    get(hub, folder)
    assert (folder / FIRST).read_bytes() == hub.files[FIRST]
    assert (folder / f"{FIRST}.replaced").read_bytes() == own
    assert open_dataset(folder).train[0].name == FIRST


def test_a_shard_without_rows_is_no_shard_of_the_hub(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    hub.files[FIRST] = (tmp_path / "empty.parquet").read_bytes()
    with pytest.raises(DataError, match=r"what came is not the file: .* has no rows"):
        get(hub, tmp_path / "data")


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write into"):
        get(hub, tmp_path / "file" / "data")


def test_random_faults(hub: Hub, tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """Whatever happens on the way: either the exact files, or a clear error and no file that is not exact."""
    faults = ["500", "429", "drop", "drop", "flip", "page", "short length", "long length", "no length", "ignore range"]
    faults += ["wrong range", "compressed", "404", "416"]
    for seed in range(count(8, 200)):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        for name in hub.files:
            hub.faults[name] = deque(draw.choices(faults, k=draw.randrange(6)))
        try:
            get(hub, folder, 3, Retry(attempts=3, backoff=0.001))
        except DataError as error:
            assert "shard_" in str(error)
            for path in folder.glob("*.parquet"):
                assert path.read_bytes() == hub.files[path.name], f"seed {seed}"
            hub.faults.clear()
            get(hub, folder, 3)
        assert_whole(folder, hub, 3)
        shutil.rmtree(folder)


def _start(hub: Hub, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nanofed", "data", "download", "-n", "2", "--output", str(output)]
    command += ["--base_url", f"{hub.url}/main", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on(hub: Hub, tmp_path: Path, number: signal.Signals) -> None:
    hub.bytes_per_second = 200_000
    part = tmp_path / "data" / f"{VALIDATION}.part"
    with _start(hub, tmp_path / "data", "--workers", "1") as process:
        _until(lambda: part.exists() and part.stat().st_size > 100_000)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -signal.SIGKILL)
    assert "Traceback" not in errors
    kept = part.stat().st_size
    assert part.read_bytes() == hub.files[VALIDATION][:kept]
    assert not list((tmp_path / "data").glob("*.parquet"))
    hub.bytes_per_second = None
    get(hub, tmp_path / "data")
    assert_whole(tmp_path / "data", hub)
    assert hub.gets(VALIDATION)[1].headers["Range"] == f"bytes={kept}-"


@pytest.mark.slow
def test_two_downloads_do_not_fight(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 400_000
    with _start(hub, tmp_path / "data") as first:
        _until(lambda: bool(hub.gets(VALIDATION)))
        with _start(hub, tmp_path / "data") as second:
            outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "another download into" in outputs[1][1]
    assert_whole(tmp_path / "data", hub)
    assert all(len(hub.gets(name)) == 1 for name in (FIRST, "shard_00001.parquet", VALIDATION))


@pytest.mark.slow
def test_background(hub: Hub, tmp_path: Path) -> None:
    with _start(hub, tmp_path / "data", "--background") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    log = tmp_path / "data" / "download.log"
    assert str(log) in output
    _until(lambda: "for validation" in log.read_text())
    log.unlink()
    assert_whole(tmp_path / "data", hub)
    assert verify_shard(tmp_path / "data" / FIRST) is None
    assert len(open_dataset(tmp_path / "data").train) == 2
