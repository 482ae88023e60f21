"""Uploading to a hub: a real HTTP server on this machine that takes commits as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import nanofed
from nanofed.errors import ConfigError, DataError


@dataclass
class Hub:
    url: str
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refuses: bool = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({"siblings": [], "id": "me/model"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_token" or served.refuses:
                return self._answer({"error": "no"}, 403)
            if self.path == "/api/repos/create":
                served.repositories.append(json.loads(body))
                return self._answer({"url": f"{served.url}/me/model"})
            if self.path == "/api/models/me/model/preupload/main":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._answer({"files": files})
            if self.path == "/api/models/me/model/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        served.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                address = f"{served.url}/me/model/commit/0"
                return self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})
            return self._answer({"errors": [], "warnings": []})  # of the model card's header

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_whole_folder_is_uploaded_to_a_private_repository(hub: Hub, wild: Path, tmp_path: Path) -> None:
    folder = nanofed.export(wild, tmp_path / "model", push="me/model")
    (made,) = hub.repositories
    assert (made["organization"], made["name"]) == ("me", "model")
    assert made.get("visibility") == "private" or made.get("private") is True  # by the library's version
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 'from_pretrained("me/model")' in (folder / "README.md").read_text()


def test_a_hub_that_refuses_is_a_data_error_and_the_folder_stays(hub: Hub, wild: Path, tmp_path: Path) -> None:
    hub.refuses = True
    with pytest.raises(DataError, match=r"model is written, and was not uploaded: .*403"):
        nanofed.export(wild, tmp_path / "model", push="me/model")
    assert (tmp_path / "model" / "config.json").is_file()
    assert hub.files == {}


@pytest.mark.parametrize("name", ["model", "me/my model", "a/b/c", "me/--x"])
def test_a_name_that_no_repository_has_is_refused_before_anything_is_written(
    name: str, wild: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--push"):
        nanofed.export(wild, tmp_path / "model", push=name)
    assert list(tmp_path.iterdir()) == []
