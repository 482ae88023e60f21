"""A deployment on one machine: `nanofed federate --runtime deployment` starts a server and its sites, all on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nanofed import runtime
from nanofed.errors import NanofedError, in_one_line
from nanofed.federated.deploy.process import ended_by_signals, undisturbed
from nanofed.federated.deploy.server import ServerOptions, run_server
from nanofed.federated.deploy.site import run_site
from nanofed.federated.federation import Federation, client_name
from nanofed.federated.flower import free_port
from nanofed.federated.site.options import SiteOptions, site_options
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
        return run_server(federation, ServerOptions(listen), beside=lambda run: _sites(federation, run, listen))


@contextmanager
def _sites(federation: Federation, run: Path, superlink: str) -> Iterator[Callable[[], None]]:
    """Run the sites while the block lasts; what is yielded raises once one of them has ended.

    Their supervisors are threads of this process: what they start dies with it or is found by the next one.
    """
    end = threading.Event()
    names = [client_name(index) for index in range(federation.federation.clients)]
    devices = federation.fabric_options.devices
    # Else each would take all cores: N sites of N threads spend most of their time waiting for each other.
    threads = (
        None if "OMP_NUM_THREADS" in runtime.environment() else max(1, runtime.cpu_count() // (len(names) * devices))
    )
    sites = []
    for name in names:
        options = site_options(superlink, name, devices=devices, state=run / CLIENTS / name)
        sites.append(_Site(replace(options, threads=threads), ["--config", str(run / CONFIG)], end))

    def check() -> None:
        for site in sites:
            site.check()

    try:
        for site in sites:
            site.start()
        yield check
    finally:
        with undisturbed():
            end.set()
            for site in sites:
                if site.ident is not None:  # it was started
                    site.join()


class _Site(threading.Thread):
    """A site's supervisor, as `nanofed site` runs it."""

    def __init__(self, options: SiteOptions, arguments: Sequence[str], end: threading.Event) -> None:
        super().__init__(name=f"nanofed-{options.name}")
        self._options = options
        self._arguments = arguments
        self._end = end
        self._error: Exception | None = None

    def run(self) -> None:
        """Keep the site going until it is told to end."""
        try:
            run_site(self._options, self._arguments, lambda: not self._end.is_set())
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what ended the site."""
        if self._error is not None:
            kind = type(self._error) if isinstance(self._error, NanofedError) else NanofedError
            raise kind(f"site {self._options.name}: {in_one_line(self._error)}") from self._error
        if not self.is_alive() and not self._end.is_set():
            raise NanofedError(f"site {self._options.name} has ended; see {self._options.folder}")
