"""Flower's simulation engine: `nanofed federate --runtime simulation` starts it, waits, and reports what became of it."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from pathlib import Path

import torch

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.deploy.process import ended_by_signals
from nanofed.federated.deploy.superlink import SuperLink, write_app
from nanofed.federated.federation import Federation, Start
from nanofed.federated.runtimes.connections import Resources, write_connections
from nanofed.training.run_folder import hold_run
from nanofed.training.summary import Summary

logger = logging.getLogger(__name__)

SHORT = "/tmp"  # where the folder for temporary files has a long name
LOG = "flower.log"


def run_simulation(federation: Federation) -> Summary:
    """Run a federation under Flower's simulation engine, on this machine, and return what the run came to.

    A SuperLink of the run's own, on a free port, with a Flower home of its own: neither another SuperLink nor another run is
    touched, and all processes end with the run. Everything that they print is in the run's `flower.log`.

    Raises:
        ConfigError: Ray is not installed, or a wrong option.
        DataError: no shards or no tokenizer.
        NanofedError: the run failed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--runtime simulation needs Ray: pip install 'nanofed-lightning[simulation]' (or leave out --runtime: the "
            "in-process runtime needs nothing)"
        )
    federation.anchor()
    clients, cpus = federation.federation.clients, runtime.cpu_count()
    gpus = 0 if federation.config.fabric.accelerator == "cpu" else torch.cuda.device_count()
    on_cpu, on_gpu = Resources(clients, cpus, 0), Resources(clients, cpus, max(1, gpus))
    with hold_run(federation.folder) as rounds:
        run = federation.open()
        rounds.release()
        write_connections(runtime.flower_home(), {"local-simulation": on_cpu, "local-simulation-gpu": on_gpu})
        with ended_by_signals():
            simulate(run / LOG, on_gpu if gpus else on_cpu, federation.start())
        return Summary.read(run)


def simulate(log: Path, resources: Resources, start: Start) -> None:
    """Simulate a run, which is open, to its end.

    Args:
        log: file to which everything printed is appended.
        resources: The cores and GPUs of the simulation, and those of each client.
        start: The run, and how it is started.

    Raises:
        NanofedError: the run failed: the server's own error where it gave one, else Flower's reason.
    """
    # A socket's path has room for about 100 characters, of which Ray's own part takes 60: it would go to a folder of all users.
    place = None if len(tempfile.gettempdir()) < 28 else SHORT
    with tempfile.TemporaryDirectory(prefix="nf-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        app = write_app(folder / "app")
        ray = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_ADDRESS": None,  # never another cluster
            "RAY_TMPDIR": name,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as in this process; else Ray sets the client's cores
        }
        link = SuperLink(folder, log, environment=ray)
        with link.running(["--simulation"]):
            start.write(link.home)
            run_id = link.submit(app, "--federation-config", resources.federation_config())
            logger.info("Flower's simulation engine is starting; its own log is %s", log)
            link.follow(run_id)
            link.check(run_id)
