from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from nanofed.cli import main
from nanofed.data.manifest import MANIFEST
from nanofed.data.shards import open_dataset
from nanofed.data.writing import write_shards


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [f"text {i} " * 9 for i in range(90)]
    return write_shards(texts, tmp_path / "corpus", num_shards=2, rows_per_group=10).path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["data", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", [[], ["download"], ["demo"], ["pack"], ["list"], ["verify"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", *command, "--help"])
    assert stop.value.code == 0
    assert f"usage: nanofed data {' '.join(command)}".rstrip() in capsys.readouterr().out


def test_list(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list", "--data", corpus)
    assert (code, err) == (0, "")
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == ["shard", "rows", "row", "groups", "bytes", "text", "bytes"]
    assert [line.split()[0] for line in table[1:]] == [f"shard_0000{i}.parquet" for i in range(3)]
    assert [line.endswith("validation") for line in table[1:]] == [False, False, True]
    size = (corpus / "shard_00000.parquet").stat().st_size
    assert table[1].split()[1:4] == ["30", "3", f"{size:,}"]
    assert len({line.index(line.split()[3]) + len(line.split()[3]) for line in table[1:]}) == 1  # aligned
    assert f"{corpus}: 2 training shards and shard_00002.parquet for validation, 90 documents" in out


def test_list_as_json(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--data", corpus, "--json")
    content = json.loads(out)
    dataset = open_dataset(corpus)
    assert code == 0
    assert content["fingerprint"] == dataset.fingerprint()
    first = dataset.train[0]
    counted = {"rows": 30, "row_groups": 3, "bytes": first.num_bytes, "text_bytes": first.text_bytes}
    assert content["shards"][0] == {"name": first.name, **counted, "validation": False}
    assert [shard["validation"] for shard in content["shards"]] == [False, False, True]


def test_verify(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", "--data", corpus)
    assert (code, out.count("ok "), err) == (0, 3, "")
    damaged = bytearray((corpus / "shard_00001.parquet").read_bytes())
    damaged[60] ^= 1
    (corpus / "shard_00001.parquet").write_bytes(damaged)
    (corpus / "shard_00000.parquet").unlink()
    code, out, err = run(capsys, "verify", "--data", corpus)
    assert code == 3
    assert err == f"nanofed data: 2 of 3 shards in {corpus} are bad: shard_00000.parquet, shard_00001.parquet\n"
    assert out.count("BAD ") == 2
    assert "ok   shard_00002.parquet" in out


def test_verify_without_recorded_hashes(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / MANIFEST).unlink()
    code, out, _ = run(capsys, "verify", "--data", corpus)
    assert (code, out.count("no hash is recorded")) == (0, 3)
    whole = (corpus / "shard_00001.parquet").read_bytes()
    (corpus / "shard_00001.parquet").write_bytes(whole[:-50])
    code, _, err = run(capsys, "verify", "--data", corpus)
    assert code == 3
    assert "1 of 3 shards" in err
    shutil.rmtree(corpus)
    corpus.mkdir()
    code, _, err = run(capsys, "verify", "--data", corpus)
    assert code == 3
    assert "holds no parquet shards; build one offline with `nanofed data demo`" in err


@pytest.mark.parametrize("command", ["list", "verify"])
@pytest.mark.parametrize("name", ["demo", "fineweb-edu"])
def test_data_by_name(base: Path, corpus: Path, capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    folder = base / ("demo/data" if name == "demo" else "base_data")
    code, _, err = run(capsys, command, "--data", name)
    assert code == 3
    assert err.startswith(f"nanofed data: there is no data folder {folder}; ")
    shutil.copytree(corpus, folder)
    code, out, _ = run(capsys, command, "--data", name)
    assert code == 0
    assert str(folder) in out


def test_demo(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    part = Path(sysconfig.get_path("stdlib")) / "asyncio"  # of the library: parsing all of it takes seconds
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(part))
    code, out, _ = run(capsys, "demo", "-n", 2, "--max_bytes", 300_000)
    assert code == 0
    assert out.startswith(f"{base / 'demo' / 'data'}: 2 training shards and shard_00002.parquet for validation, ")
    assert run(capsys, "verify", "--data", "demo")[0] == 0


def test_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    args = ["pack", tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    code, _, err = run(capsys, *args)
    assert code == 3
    assert err == (
        f"nanofed data: {tmp_path / 'a.jsonl'}, line 1: there is no key 'text' (its keys: 'body'); "
        "--key names another\n"
    )
    assert not (tmp_path / "out").exists()
    assert run(capsys, *args, "--key", "body", "-n", 1)[0] == 0
    assert open_dataset(tmp_path / "out").validation.num_rows == 1
    assert run(capsys, *args, "--key", "body")[0] == 3
    assert run(capsys, *args, "--key", "body", "--force")[0] == 0
    assert run(capsys, *args, "--key", "body", "--force", "-n", 0)[0] == 2


@pytest.mark.parametrize("background", [[], ["--background"]])
def test_download_with_wrong_arguments(base: Path, capsys: pytest.CaptureFixture[str], background: list[str]) -> None:
    code, _, err = run(capsys, "download", "-n", 5000, *background)
    assert (code, err) == (2, "nanofed data: 5000 shards cannot be downloaded: from 1 to 1822, or -1 for all\n")
    code, _, err = run(capsys, "download", "-n", 1, "--base_url", "nowhere", *background)
    assert code == 2
    assert "'nowhere' is no http or https address" in err
    assert not base.exists()
