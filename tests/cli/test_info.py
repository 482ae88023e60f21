"""`nanofed info`: every part is there, none can take the others down, and none keeps a person waiting."""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanofed import cli, runtime
from nanofed.cli import info

PARTS = ["nanofed", "machine", "devices", "caches", "data", "tokenizers", "packages", "network"]


@pytest.fixture(autouse=True)
def empty_offline_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: refused at once
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return base


@pytest.fixture
def hub() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["info", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_on_an_empty_machine(capsys: pytest.CaptureFixture[str], empty_offline_machine: Path) -> None:
    import torch

    found = report(capsys)
    assert list(found) == PARTS
    assert found["machine"]["memory_bytes"] > found["machine"]["memory_available_bytes"] > 0
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["compute_dtype"] in ("float32", "bfloat16")
    assert found["packages"]["torch"] == torch.__version__
    assert found["caches"] == found["caches"] | {"base_dir": str(empty_offline_machine), "exists": False}
    assert found["data"]["demo"]["shards"] == 0
    assert found["tokenizers"]["demo"]["files"] == []
    assert found["network"]["online"] is False
    assert not empty_offline_machine.exists()  # looking changes nothing


def test_any_answer_is_online(hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    assert report(capsys)["network"] == {"endpoint": hub, "online": True}


def test_a_hub_that_never_answers_costs_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert info._ask_network()()["online"] is False
        assert time.monotonic() - started < info.NETWORK_SECONDS + 1


def test_finds_shards_and_tokenizers(capsys: pytest.CaptureFixture[str], empty_offline_machine: Path) -> None:
    shards = empty_offline_machine / "base_data"
    shards.mkdir(parents=True)
    for index in range(3):
        (shards / f"shard_{index:05d}.parquet").write_bytes(b"x" * 1000)
    (empty_offline_machine / "demo" / "tokenizer").mkdir(parents=True)
    (empty_offline_machine / "demo" / "tokenizer" / "tokenizer.json").write_text("{}")
    found = report(capsys)
    counted = {"shards": 3, "bytes": 3000, "validation": "shard_00002.parquet"}
    assert found["data"]["fineweb-edu"] == {"folder": str(shards)} | counted
    assert found["tokenizers"]["demo"]["files"] == ["tokenizer.json"]


def test_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = max(len(line.split("  ")[0]) for line in lines) + 2
    labels = {line[:column].strip() for line in lines}
    assert {"nanofed", "machine", "compiler", "cpu", "network", "data demo", "tokenizer demo", "packages"} <= labels
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


@pytest.mark.parametrize("broken", ["torch", "nanofed.data.manifest", "requests"])
def test_a_missing_piece_leaves_the_others(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, broken, None)  # what an import then does: ImportError
    found = report(capsys)
    assert list(found) == PARTS
    assert found["machine"]["cores"] >= 1
    if broken == "torch":
        assert "error" in found["devices"]
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("nanofed ")


def test_a_base_folder_that_is_a_file_is_said(empty_offline_machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_offline_machine.parent / "base").write_text("not a folder")
    found = report(capsys)
    assert found["data"]["demo"]["shards"] == 0
    assert found["caches"]["exists"] is False


def test_a_damaged_manifest_is_named(empty_offline_machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = empty_offline_machine / "demo" / "data"
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"x")
    (folder / "dataset.json").write_text("{ not json")
    assert str(folder / "dataset.json") in report(capsys)["data"]["demo"]["error"]


def test_a_gpu_that_is_not_used_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "why_gpu_is_unused", lambda: "the driver is old")
    monkeypatch.setattr(runtime, "nvidia_driver", lambda: "535.104.05")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "an NVIDIA GPU that is not used: the driver is old\n" in text
    assert "NVIDIA 535.104.05\n" in text
