"""The bundle of CORE's tasks over HTTP: resumed, checked, and unpacked where nothing gets out of its folder."""

from __future__ import annotations

import contextlib
import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from nanofed import cli
from nanofed.data.core_download import _problem, download_core, unpack
from nanofed.data.transfer import Retry
from nanofed.errors import ConfigError, DataError
from nanofed.evaluation.core.bundle import Bundle
from tests.data.hub import Hub, serving
from tests.evaluation.small_bundle import write_bundle

FAST = Retry(attempts=3, backoff=0.01)
NAME = "eval_bundle.zip"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("zip")
    write_bundle(folder / "eval_bundle")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._core.yaml").write_text("junk")
    (folder / "eval_bundle" / "eval_data" / "rest.bin").write_bytes(bytes(range(256)) * 400)
    with zipfile.ZipFile(folder / NAME, "w") as files:  # stored, so that it is longer than a piece of the transfer
        for path in sorted(folder.rglob("*")):
            if path.name != NAME:
                files.write(path, path.relative_to(folder))
    return (folder / NAME).read_bytes()


@pytest.fixture
def hub(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving(Hub({NAME: content})) as running:
        yield running


def check(folder: Path) -> None:
    Bundle.read(folder).check()


def get(hub: Hub, output: Path) -> Path:
    return download_core(check, output=output, url=f"{hub.url}/{NAME}", retry=FAST)


def assert_whole(folder: Path) -> None:
    assert len(Bundle.read(folder).tasks) == 4
    assert sorted(path.name for path in folder.iterdir()) == ["core.yaml", "eval_data", "eval_meta_data.csv"]
    beside = {path.name for path in folder.parent.iterdir()}
    assert beside == {folder.name, ".download.lock"}, "nothing unfinished is left"


def test_it_is_downloaded_unpacked_and_then_there(hub: Hub, tmp_path: Path) -> None:
    assert_whole(get(hub, tmp_path / "eval_bundle"))
    before = len(hub.requests)
    get(hub, tmp_path / "eval_bundle")
    assert len(hub.requests) == before


@pytest.mark.parametrize("fault", ["drop", "flip", "page", "short length"])
def test_a_bad_line_and_a_damaged_file_are_made_good(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.faults[NAME].extend([fault])
    assert_whole(get(hub, tmp_path / "eval_bundle"))
    resumed = ["Range" in request.headers for request in hub.gets(NAME)]
    assert resumed == [False, fault == "drop"]


def test_what_never_comes_whole_leaves_no_folder(hub: Hub, tmp_path: Path) -> None:
    hub.always = "flip"
    with pytest.raises(DataError, match="what came is not the file"):
        get(hub, tmp_path / "eval_bundle")
    assert not (tmp_path / "eval_bundle").exists()
    hub.always = ""
    assert_whole(get(hub, tmp_path / "eval_bundle"))


def test_another_folder_in_its_place_stays(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "eval_bundle").mkdir()
    (tmp_path / "eval_bundle" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is there and is no whole bundle: move it away"):
        get(hub, tmp_path / "eval_bundle")
    assert (tmp_path / "eval_bundle" / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="no http or https address"):
        download_core(check, output=tmp_path / "other", url="file:///etc/passwd")


def test_a_zip_that_holds_no_bundle_makes_no_folder(hub: Hub, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as files:
        files.writestr("eval_bundle/readme.txt", "hello")
    hub.files[NAME] = packed.getvalue()
    with pytest.raises(DataError, match="there is no CORE bundle"):
        get(hub, tmp_path / "eval_bundle")
    assert not (tmp_path / "eval_bundle").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_bit_anywhere_is_said_in_a_sentence(method: int, tmp_path: Path) -> None:
    archive, random = tmp_path / "flipped.zip", Random(0)
    with zipfile.ZipFile(archive, "w", method) as files:
        for number in range(3):
            files.writestr(f"eval_bundle/ä{number}.jsonl", f'{{"a": {number}}}\n' * 200)
    whole, found = archive.read_bytes(), 0
    assert _problem(archive) is None
    for attempt in range(200):
        flipped = bytearray(whole)
        flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        archive.write_bytes(flipped)
        found += _problem(archive) is not None
        with contextlib.suppress(DataError, OSError):  # what `unpack` says that it raises
            unpack(archive, tmp_path / str(attempt))
    assert found > 20  # the rest are dates, permissions and names


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "a/../../out.txt", "a\\..\\..\\out.txt", "C:out.txt", "link"]
)
def test_nothing_gets_out_of_the_folder(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.zip"
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(archive, "w") as files:
        info = zipfile.ZipInfo(name)
        if name == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        files.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="no plain file of its own folder"):
        unpack(archive, tmp_path / "deep" / "in")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.zip", "deep", "in"]


def test_a_zip_that_unpacks_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanofed.data.core_download.MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("core.yaml", b"0" * 1001)
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(tmp_path / "bomb.zip", tmp_path / "bomb")


def test_the_command(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    assert cli.main(["data", "download", "--core", f"--base_url={hub.url}/{NAME}"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'base' / 'eval_bundle'}: 4 of CORE's tasks, without hella")
    assert cli.main(["data", "download", "--core", "--background"]) == 2
    assert "--core brings one small file" in capsys.readouterr().err
