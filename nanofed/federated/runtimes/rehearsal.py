"""A deployment on one machine: `nanofed federate --runtime deployment` starts a server and its sites, all on loopback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanofed import runtime
from nanofed.federated.flower import free_port
from nanofed.federated.processes import ended_on_sigterm, undisturbed
from nanofed.federated.run import Federation, client_name
from nanofed.federated.runtimes.deployment import ServerOptions, run_server
from nanofed.training.run import Summary

STOP_SECONDS = 30.0


def run_deployment(federation: Federation) -> Summary:
    """Serve a federation and take part in it with as many sites as it has clients, and return what the run came to.

    What real sites would do, with a real SuperLink and SuperNodes; they share this machine's devices and its clock.

    Raises:
        ConfigError: a wrong option.
        DataError: no shards or no tokenizer.
        NanofedError: the run crashed again and again.
    """
    federation.config.runtime = "deployment"
    federation.anchor()
    listen = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="nanofed-") as folder, ended_on_sigterm():
        config = Path(folder) / "config.yaml"
        config.write_text(federation.parser.dump(federation.config, skip_link_targets=False), encoding="utf-8")
        with _sites(federation, config, listen, Path(folder)):
            return run_server(federation, ServerOptions(listen))


@contextmanager
def _sites(federation: Federation, config: Path, superlink: str, folder: Path) -> Iterator[None]:
    """Run the sites; each keeps its optimizer state and logs under the folder of all runs, by the run's name."""
    started: list[subprocess.Popen[bytes]] = []
    kept = runtime.base_dir() / "rehearsals" / federation.options.name
    try:
        for index in range(federation.federation.clients):
            name = client_name(index)
            command = [sys.executable, "-P", "-m", "nanofed", "site", "--config", str(config)]
            command += ["--superlink", superlink, "--name", name, "--state", str(kept / name)]
            command += ["--devices", str(federation.fabric_options.devices)]
            with (folder / f"{name}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
                )
        yield
    finally:
        with undisturbed():
            for process in started:
                process.terminate()
            for process in started:
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
