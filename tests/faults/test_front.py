"""The configurations of nginx and HAProxy in front of a server: they can be read, and are in step with its own limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanofed.federated.deploy.admission import Limits

ROOT = Path(__file__).parents[2]
NGINX, HAPROXY = ROOT / "configs" / "cluster" / "nginx.conf", ROOT / "configs" / "cluster" / "haproxy.cfg"
WAITS = {  # for a client's first message of TLS, for a connection that is idle, and connections of an address
    NGINX: (r"preread_timeout (\d+)s;", r"proxy_timeout (\d+)s;", r"limit_conn addresses (\d+);"),
    HAPROXY: (r"inspect-delay (\d+)s", r"timeout client (\d+)s", r"sc0_conn_cur gt (\d+) "),
}


@pytest.mark.parametrize("file", WAITS, ids=lambda file: file.name)
def test_a_front_gives_up_before_the_server_does_and_never_on_a_site(file: Path) -> None:
    hello, idle, connections = (int(number) for wait in WAITS[file] for number in re.findall(wait, file.read_text()))
    limits = Limits()
    assert hello < limits.handshake_seconds
    assert idle > limits.idle_seconds
    assert connections < limits.address_connections  # or one address could have all that the server gives the front
    assert f"configs/cluster/{file.name}" in (ROOT / "README.md").read_text()


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or pytest.skip("nginx is not installed")
    done = subprocess.run(
        [nginx, "-t", "-e", "stderr", "-p", tmp_path, "-c", NGINX, "-g", f"pid {tmp_path}/pid;"],
        capture_output=True,
        text=True,
        check=False,
    )
    if 'unknown directive "stream"' in done.stderr:
        pytest.skip("nginx has no stream module")
    assert done.returncode == 0, done.stderr


def test_haproxy_takes_its_configuration() -> None:
    haproxy = shutil.which("haproxy") or pytest.skip("HAProxy is not installed")
    done = subprocess.run([haproxy, "-c", "-f", HAPROXY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
