"""The process of a site's SuperNode, whose server answers as no server should."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from nanofed.federated.flower import free_port
from tests.ranks import Started

PULL, HEARTBEAT = "pull-messages", "send-node-heartbeat"
ANSWERS = {
    "activate-node": ActivateNodeResponse(node_id=7).SerializeToString(),
    HEARTBEAT: SendNodeHeartbeatResponse(success=True).SerializeToString(),
    PULL: PullMessagesResponse().SerializeToString(),
}


@contextmanager
def server(call: str, code: int) -> Iterator[str]:
    """Serve a SuperNode that gets no message, and answer one of its calls with a status; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            called = self.path.rpartition("/")[2]
            answer = b"" if called == call else ANSWERS.get(called, b"")
            self.send_response(code if called == call else 200)
            self.send_header("content-type", "application/protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{made.server_port}"
        finally:
            made.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("call", "code"), [(PULL, 400), (PULL, 500), (HEARTBEAT, 500)])
def test_an_answer_that_it_does_not_know_ends_the_process(call: str, code: int, tmp_path: Path) -> None:
    """Flower's own stays there without its loop or its heartbeats, and no message ever reaches it again."""
    with server(call, code) as superlink:
        own = ["--insecure", "--superlink", superlink, "--isolation", "process", "--port", str(free_port())]
        with Started(["-P", "-m", "nanofed.federated.deploy.supernode", *own], tmp_path / "log") as supernode:
            assert supernode.wait(60) == 1
            assert f"'{code} " in supernode.output and call in supernode.output
            assert "the SuperNode cannot go on: " in supernode.output.splitlines()[-1]


@pytest.mark.slow
def test_it_ends_with_the_site_that_started_it(tmp_path: Path) -> None:
    """A site that is killed cannot stop it, and its server would wait in every round for an answer that nobody trains."""
    told = tmp_path / "pid"
    with server("", 200) as superlink:
        own = ["--insecure", "--superlink", superlink, "--isolation", "process", "--port", str(free_port())]
        command = [sys.executable, "-P", "-m", "nanofed.federated.deploy.supernode", *own]
        site = f"import pathlib, subprocess, time; p = subprocess.Popen({command!r}); "
        site += f"pathlib.Path({str(told)!r}).write_text(str(p.pid)); time.sleep(600)"
        with Started(["-c", site], tmp_path / "log") as parent:
            parent.wait_until(lambda: "Starting Flower SuperNode" in parent.output, "SuperNode")
            supernode = psutil.Process(int(told.read_text()))
            parent.process.kill()
            supernode.wait(20)
            assert "the SuperNode cannot go on: " in parent.output.splitlines()[-1]
