"""`bin/bench link`: rounds over lines of given rates: the share of their seconds that sites train, by codec, and as planned.

Server and sites are in network namespaces of their own, joined by veth pairs whose rate the kernel limits both ways (tbf); a
delay is a relay's. All namespaces end with the last process in them, however the benchmark ends. TLS and keys are on for ours;
stock has none. Without --train sites train nothing: the share is that in rounds of --round_seconds, of which so many are not
training.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nanofed.errors import ConfigError
from nanofed.federated.deploy.process import ended_by_signals
from nanofed.federated.planning import CODEC_PAIRS, Model, Places, PlannedSite, overheads
from tests.benchmarks import machine
from tests.benchmarks.report import progress, show
from tests.benchmarks.round import CPU, DOWN, UP, fleet, fleet_options, work_folder
from tests.benchmarks.round_fleet import FleetError, Network, ours, running, stock

INSIDE = "NANOFED_BENCH_NAMESPACE"  # is set in the server's namespace
# A user, network and mount namespace for the server; those of the sites are named in it, below /run.
UNSHARE = ("unshare", "--map-root-user", "--net", "--mount", "--")
SKIPPED = 3
HEADER = (
    "Mbit/s",
    "codecs",
    *(f"s {name}" for name in ("down", "site", "up", "server")),
    "s not training",
    "as planned",
    "error",
    "training",
    "MB down",
    "MB up",
)
QUEUE = ("latency", "50ms")  # that a line holds back before it drops
GROUPS = {  # of the phases of a round (`round_phases.PHASES`)
    "down": ("push", "SuperNode waits", "download", "client starts", "client pulls"),
    "site": ("hand-over", "hand-back"),
    "up": ("client pushes", "upload", "server pulls"),
    "server": ("validate", "fold", "outer step", "checkpoint", "until next push"),
}


class Namespaces(Network):
    """A namespace for each site, each joined by a line of its own to this process's, where the server is."""

    listen = "0.0.0.0"

    def __init__(self, sites: int, delay_ms: float) -> None:
        self._sites = range(sites)
        self._delay = delay_ms / 2e3  # seconds each way
        _do("mount", "-t", "tmpfs", "none", "/run")  # names of namespaces are files there
        _do("ip", "link", "set", "lo", "up")
        for site in self._sites:
            name, here = f"site-{site}", f"to-site-{site}"
            _do("ip", "netns", "add", name)
            _do("ip", "link", "add", here, "type", "veth", "peer", "name", "line", "netns", name)
            _do("ip", "address", "add", f"10.77.{site}.1/24", "dev", here)
            _do("ip", "link", "set", here, "up")
            _do("ip", "-n", name, "address", "add", f"10.77.{site}.2/24", "dev", "line")
            for device in ("lo", "line"):
                _do("ip", "-n", name, "link", "set", device, "up")

    def server(self, site: int) -> str:
        """Return the server's end of a site's line, or where there is a relay on the way, that."""
        return "127.0.0.1" if self._delay else f"10.77.{site}.1"

    def at(self, site: int, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command in a site's namespace."""
        return ["ip", "netns", "exec", f"site-{site}", *command]

    @contextmanager
    def relays(self, port: int, folder: Path) -> Iterator[None]:
        """Run a relay in each site's namespace where there is a delay: the kernel limits rates, but has no delay here."""
        with ExitStack() as stack:
            for site in self._sites if self._delay else ():
                relay = [
                    sys.executable,
                    "-P",
                    "-m",
                    "tests.faults.link",
                    str(port),
                    f"10.77.{site}.1",
                    str(self._delay),
                ]
                stack.enter_context(running(self.at(site, relay), folder / f"relay-{site}.log", os.environ))
            yield

    def limit(self, mbit: float) -> None:
        """Let all lines pass so many Mbit/s each way."""
        burst = max(
            64 << 10, int(mbit * 1e6 / 8 / 100)
        )  # bytes: what a line passes in 10 ms, between two ticks of a clock
        rate = ("root", "tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", str(burst), *QUEUE)
        for site in self._sites:
            _do("tc", "qdisc", "replace", "dev", f"to-site-{site}", *rate)
            _do("tc", "-n", f"site-{site}", "qdisc", "replace", "dev", "line", *rate)


def _do(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoNamespaces(f"there is no {command[0]} here") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"{' '.join(command)}: {' '.join(error.stderr.split())}") from error


class NoNamespaces(RuntimeError):
    """This machine has no network namespaces, or no lines between them whose rates it limits; the message says why."""


def main(argv: Sequence[str]) -> int:
    parser = fleet_options("link", __doc__, round_seconds=300.0, sites=2)
    pairs = ",".join(map("/".join, CODEC_PAIRS))
    parser.add_argument("--mbit", default="50,200,1000", help="of each site's line, each way (default: %(default)s)")
    delay = "milliseconds to the server and back, by a relay at each site (default: none)"
    parser.add_argument("--delay_ms", type=float, default=0.0, help=delay)
    parser.add_argument("--codecs", default=pairs, help="pairs of codecs, down/up (default: %(default)s)")
    args = parser.parse_args(argv)
    args.secure = True
    try:
        rates = [float(rate) for rate in args.mbit.split(",")]
        codecs = [(down, up) for down, up in (pair.split("/") for pair in args.codecs.split(","))]
    except ValueError as error:
        raise ConfigError(
            f"--mbit takes numbers, --codecs pairs such as bf16/int8, with commas between: {error}"
        ) from error
    if min(rates) <= 0 or any(down not in DOWN or up not in UP for down, up in codecs):
        raise ConfigError(f"--mbit takes rates above 0, --codecs {'|'.join(DOWN)} / {'|'.join(UP)}, not {args.codecs}")
    try:
        if INSIDE in os.environ:
            result = measure(args, Namespaces(args.sites, args.delay_ms), rates, codecs)
            show(result, [line(run, args.sites) for run in result["runs"]], HEADER, as_json=args.json)
            return int(any("failed" in run for run in result["runs"]))
        _do(*UNSHARE, "true")
    except NoNamespaces as error:
        print(f"bench: skipped, for there are no network namespaces with limited lines here: {error}", file=sys.stderr)
        return SKIPPED
    path = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    command = [*UNSHARE, sys.executable, "-P", "-m", "tests.benchmarks", "link", *argv]
    with ended_by_signals(), subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, INSIDE: "1"}) as inside:
        try:
            return inside.wait()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # of which the terminal has told all
                inside.terminate()
            inside.wait()  # it stops what it has started
            raise


def measure(
    args: argparse.Namespace, lines: Namespaces, rates: Sequence[float], codecs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Run rounds at each rate with each pair of codecs, and stock's where they are asked for, and return their figures."""
    runs: list[dict[str, Any]] = []
    args.down, args.up = codecs[0]
    config = fleet(args).config
    model = Model.of(config)
    with work_folder(args, 4 * config.num_parameters) as folder:
        for mbit in rates:
            lines.limit(mbit)
            site = PlannedSite(down_mbit=mbit, up_mbit=mbit, tokens_per_second=1.0, delay_ms=args.delay_ms)
            places = Places({f"site-{index}": site for index in range(args.sites)})
            for args.down, args.up in codecs:
                planned = overheads(model, places, args.down, args.up)["site-0"].seconds
                setting = replace(fleet(args), network=lines)
                runs.append(_run(args, mbit, f"{args.down}/{args.up}", partial(ours, setting), folder, planned))
            if args.against:
                runs.append(_run(args, mbit, "stock", partial(stock, setting), folder, None))
    result = {name: getattr(args, name) for name in ("depth", "sites", "rounds", "train", "round_seconds", "delay_ms")}
    return result | {"parameters": config.num_parameters, "runs": runs, **machine.describe(CPU)}


def _run(
    args: argparse.Namespace,
    mbit: float,
    codecs: str,
    run: Callable[[Path], dict[str, Any]],
    folder: Path,
    planned: float | None,
) -> dict[str, Any]:
    """Run one federation and return its figures, those of the site that answers last; one that fails costs no other's."""
    progress(f"{mbit:g} Mbit/s, {codecs}")
    result: dict[str, Any] = {"mbit": mbit, "codecs": codecs, "planned_seconds": planned}
    own = folder / f"{mbit:g}-{codecs.replace('/', '-')}"
    try:
        figures = run(own)
    except (FleetError, ValueError) as error:  # or a mark is missing in it
        progress(f"it failed: {error}")
        return result | {"failed": str(error)}
    finally:
        shutil.rmtree(own / "runs", ignore_errors=True)
    phases, overhead = figures["phases"], figures["overhead_seconds"]
    parts = {name: sum(phases[phase] for phase in group) for name, group in GROUPS.items()}
    share = figures["trained_seconds"] / figures["round_seconds"] if args.train else 1 - overhead / args.round_seconds
    return result | {"parts": parts, "utilisation": share, **figures}


def line(run: dict[str, Any], sites: int) -> list[object]:
    """Return a run's row of the table."""
    if "failed" in run:
        return [f"{run['mbit']:g}", run["codecs"], *["failed"] * (len(HEADER) - 2)]
    planned, measured = run["planned_seconds"], run["overhead_seconds"]
    return [
        f"{run['mbit']:g}",
        run["codecs"],
        *run["parts"].values(),
        measured,
        planned,
        None if planned is None else f"{planned / measured - 1:+.1%}",
        f"{run['utilisation']:.1%}",
        *(run[way] / 1e6 / sites for way in ("bytes_down", "bytes_up")),
    ]
