"""A deployment on one machine: `nanofed federate --runtime deployment` starts a server and its sites, all on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanofed import runtime
from nanofed.errors import NanofedError, in_one_line
from nanofed.federated.deploy.process import ended_by_signals, undisturbed
from nanofed.federated.deploy.server import run_server
from nanofed.federated.deploy.site import Site
from nanofed.federated.federation import Federation
from nanofed.federated.flower import free_port
from nanofed.federated.round_line import RoundLine
from nanofed.federated.server.status import read_status_file
from nanofed.federated.site.options import site_options
from nanofed.terminal import StatusLine
from nanofed.training.run_folder import check_usable
from nanofed.training.summary import CONFIG, Summary

CLIENTS = "clients"  # of the run's folder: what the sites keep, and their logs


def run_deployment(federation: Federation) -> Summary:
    """Serve a federation and take part in it with as many sites as it has clients, and return what the run came to.

    What real sites would do, with a real SuperLink, SuperNodes and trainers; they share this machine's devices and cores. All
    processes end with the run.

    Raises:
        ConfigError: a wrong option, or a run of that name is there already.
        DataError: no shards or no tokenizer.
        NanofedError: a site ended by itself, or the run crashed again and again.
    """
    check_usable(federation.options)
    listen = f"127.0.0.1:{free_port()}"
    with ended_by_signals():
        return run_server(federation, listen, beside=lambda run: _sites(federation, run, listen))


@contextmanager
def _sites(federation: Federation, run: Path, superlink: str) -> Iterator[Callable[[], None]]:
    """Run the sites while the block lasts; what is yielded keeps them going, and raises what ends one of them."""
    clients, devices = federation.federation.clients, federation.fabric_options.devices
    # Else each would take all cores: N sites of N threads spend most of their time waiting for each other.
    own = None if "OMP_NUM_THREADS" in runtime.environment() else max(1, runtime.cpu_count() // (clients * devices))
    sites: list[Site] = []
    begun = time.time()

    def server() -> dict[str, Any] | None:
        said = read_status_file(run)  # at first it is that of an earlier start, where the run goes on
        return said if said is not None and said.get("since", 0.0) >= begun else None

    def watch() -> None:
        for site in sites:
            try:
                site.watch()
            except (NanofedError, OSError) as error:
                kind = type(error) if isinstance(error, NanofedError) else NanofedError
                raise kind(f"site {site.name}: {in_one_line(error)}") from error

    try:
        data = federation.config.data
        tokenizer = data.tokenizer or runtime.tokenizer_dir(data.path)
        for index, name in enumerate(federation.federation.client_names):
            options = site_options(superlink, name, devices=devices, state=run / CLIENTS / name)
            arguments = ["--config", str(run / CONFIG)]
            if (folders := federation.federation.client_data) is not None:
                arguments += [f"--data.path={folders[index]}", f"--data.tokenizer={tokenizer}"]
            sites.append(Site(replace(options, threads=own), arguments))
        watch()
        line = RoundLine(server, lambda: {site.name: site.figures() for site in sites})
        with StatusLine(line):
            yield watch
    finally:
        with undisturbed(), ThreadPoolExecutor() as pool:
            list(pool.map(Site.close, sites))
