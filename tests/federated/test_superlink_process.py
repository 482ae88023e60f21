"""The SuperLink's process: what it loads, and how it says that it cannot begin."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanofed.errors import NanofedError
from nanofed.federated.deploy.keys import init
from nanofed.federated.deploy.process import kill_marked
from nanofed.federated.deploy.superlink import SuperLink
from nanofed.runtime import process_lives
from tests.faults.perimeter import wait_until


def test_it_needs_no_torch() -> None:
    """Torch would be 180 MB that serve for nothing, and seconds of each start."""
    code = (
        "import sys, nanofed.federated.deploy.superlink_process, flwr.superlink.cli.flower_superlink, flwr.superlink.main;"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_an_address_that_is_taken_is_said(tmp_path: Path) -> None:
    keys = init(tmp_path / "keys", [], ["lab-a"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        link = SuperLink(tmp_path, tmp_path / "flower.log")
        options = ["--folder", str(tmp_path), "--keys", str(keys.folder), "--listen", "127.0.0.1", port]
        said = f"exit 1: cannot listen on 127.0.0.1, port {port}: Address already in use"
        with pytest.raises(NanofedError, match=said), link.running(options):
            pass


@pytest.mark.slow
def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nanofed.federated.deploy.superlink import SuperLink;"
        "from nanofed.federated.deploy.process import marked;"
        "folder = Path(sys.argv[1]); link = SuperLink(folder, folder / 'flower.log');"
        "link.start(['--folder', str(folder)]); print(marked(link.marker, 'superlink_process')[0].pid, flush=True);"
        "time.sleep(600)"
    )
    try:
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert process_lives(pid)
            parent.kill()
        wait_until(lambda: not process_lives(pid), 20, "it ends")
    finally:
        kill_marked(SuperLink(tmp_path, tmp_path / "flower.log").marker)
