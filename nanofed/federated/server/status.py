"""How far a federated run is: what its checkpoint and events say, and what its server said last in `server.json`."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self

import torch

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.server.events import KINDS, SERVER, Events
from nanofed.federated.server.ledger import ledger_figures
from nanofed.files import write_atomically
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import STATE, Manifest, read_manifest
from nanofed.training.summary import CONFIG

logger = logging.getLogger(__name__)

FILE = "server.json"
KINDS_IN_FILE: dict[str, type | UnionType] = {
    "pid": int, "host": str, "since": float, "when": float, "phase": str, "round": int, "horizon": int | None,
    "clients": list, "merged": list, "refused": dict, "waiting_for": str, "tokens": int,
    "began": float, "seconds": float | None, "steps": int | None,
}  # fmt: skip


class StatusFile:
    """Keeps `server.json` in a run's folder up to date while a round loop runs, as a context manager.

    Attributes:
        said: what it holds, replaced as a whole with each change.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self.said: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}

    def __enter__(self) -> Self:
        self.say(phase="starting")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.say(phase="ended" if kind is None else "failed")

    def say(self, **figures: Any) -> None:
        """Write what the server is doing; figures that were said before stay."""
        self.said = {**self.said, "when": time.time(), **figures}
        try:
            write_atomically(self._path, json.dumps(self.said) + "\n")
        except OSError as error:  # the file is for people who look on; the run does not need it
            logger.debug("%s cannot be written: %s", self._path, error)


def read_status_file(run: Path) -> dict[str, Any] | None:
    """Return what the server of a run said last, None if it said nothing that can be read."""
    try:
        said = json.loads((run / FILE).read_text())
    except (OSError, ValueError):
        return None
    right = isinstance(said, dict) and all(isinstance(said[n], kind) for n, kind in KINDS_IN_FILE.items() if n in said)
    return said if right else None


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    run: str  # the run's folder
    round: int  # the last saved round; 0 before the first
    tokens: int  # tokens merged by that round
    horizon: int | None  # tokens of the whole run, None where no server has said it
    bpb: float | None  # the last bits per byte by that round
    saved: float | None  # time at which the checkpoint was written, seconds since 1970
    # What the server said last, and `alive`: whether it still runs, None where that cannot be known from here.
    server: dict[str, Any] | None
    # Name -> rounds, tokens, tokens_per_second, overhead_seconds and rows_held. Where sites evaluate the weights, also bpb, the
    # last bits per byte of the site's own text, and bpb_round, the round after which it was measured.
    sites: dict[str, dict[str, float]]
    shards: dict[str, dict[str, float]]  # name -> how often the shard was merged, and how many of its rows are on lease
    events: dict[str, dict[str, dict[str, Any]]]  # client -> kind -> count, reason, round, when


def read_status(run: Path) -> Status:
    """Return the status of a federated run.

    Raises:
        ConfigError: the folder holds no federated run.
        CheckpointError: its newest checkpoint cannot be read.
    """
    if not run.is_dir() or not ((run / CONFIG).is_file() or checkpoints(run)):
        raise ConfigError(f"{run} is no run's folder: name one such as runs/tiny_federated")
    said = read_status_file(run)
    newest = _newest(run)
    if newest is None and said is None:
        raise ConfigError(f"{run} holds no federated run that has begun: no server has said anything, nothing is saved")
    manifest, state, saved = newest or (None, {}, None)
    events = Events()
    events.load_state_dict(state.get("events", []))
    held, shards = ledger_figures(state.get("ledger", {}))
    return Status(
        run=str(run),
        round=int(state.get("clock", {}).get("round", 0)),
        tokens=manifest.tokens if manifest else 0,
        horizon=(said or {}).get("horizon"),
        bpb=manifest.metrics.get("val/bpb") if manifest else None,
        saved=saved,
        server=None if said is None else {**said, "alive": _alive(said)},
        sites=_sites(state, held),
        shards=shards,
        events={
            client: {kind: vars(count).copy() for kind, count in counts.items()}
            for client, counts in events.by_client().items()
        },
    )


def _newest(run: Path) -> tuple[Manifest, dict[str, Any], float] | None:
    """Return manifest and state of the newest checkpoint; the server may remove it while it is read."""
    for attempt in range(3):
        found = checkpoints(run)
        if not found:
            return None
        try:
            manifest = read_manifest(found[-1], verify=False)
            if manifest.kind != "federated":
                raise ConfigError(f"{run} holds a {manifest.kind} run: `nanofed status` reads federated ones")
            # The file is mapped, so that nothing of a large model's momentum is read.
            state = torch.load(found[-1] / STATE, map_location="cpu", weights_only=True, mmap=True)
            return manifest, state, found[-1].stat().st_mtime
        except (CheckpointError, OSError, RuntimeError) as error:
            if attempt == 2 and found[-1].exists():
                raise CheckpointError(f"{found[-1]} cannot be read: {error}") from error
    return None


def _alive(said: dict[str, Any]) -> bool | None:
    """Tell whether the server's process runs, which is known only on its own machine."""
    if said.get("phase") in ("ended", "failed"):
        return False
    if said.get("host") != socket.gethostname():
        return None
    pid = said.get("pid")
    return isinstance(pid, int) and runtime.process_lives(pid)


def _sites(state: dict[str, Any], held: dict[str, int]) -> dict[str, dict[str, float]]:
    pace, measured = state.get("pace", {}), state.get("evaluations", {})
    return {
        name: {
            "rounds": pace.get("rounds", {}).get(name, 0),
            "tokens": pace.get("tokens", {}).get(name, 0),
            "tokens_per_second": pace.get("rate", {}).get(name, 0.0),
            "overhead_seconds": pace.get("overhead", {}).get(name, 0.0),
            "rows_held": held.get(name, 0),
            **({"bpb": measured[name]["bpb"], "bpb_round": measured[name]["round"]} if name in measured else {}),
        }
        for name in sorted(pace.get("rounds", {}).keys() | held.keys() | measured.keys())
    }


def as_text(status: Status) -> str:
    """Return a status for people."""
    lines = [f"{status.run}: round {status.round}, {status.tokens / 1e6:.2f} M tokens merged"]
    if status.horizon:
        lines[0] += f" of {status.horizon / 1e6:.2f} M ({status.tokens / status.horizon:.0%})"
    if status.bpb is not None:
        lines[0] += f", {status.bpb:.4f} bits per byte"
    lines.append(f"saved: {_ago(status.saved)}" if status.saved else "saved: nothing yet")
    lines += _server_lines(status.server)
    lines += [
        "",
        f"{'site':<24} {'rounds':>7} {'M tokens':>10} {'tok/s':>10} {'overhead':>9} {'rows held':>10} {'bits/byte':>10}  events",
    ]
    for name in sorted(status.sites.keys() | (status.events.keys() - {SERVER})):
        site = status.sites.get(name, {})
        kinds = status.events.get(name, {})
        counted = ", ".join(f"{kinds[kind]['count']} {kind}" for kind in KINDS if kind in kinds)
        bpb = f"{site['bpb']:.4f}" if "bpb" in site else "-"
        lines.append(
            f"{name:<24} {site.get('rounds', 0):>7} {site.get('tokens', 0) / 1e6:>10.2f} "
            f"{site.get('tokens_per_second', 0):>10,.0f} {site.get('overhead_seconds', 0):>8.1f}s "
            f"{site.get('rows_held', 0):>10,} {bpb:>10}  {counted}".rstrip()
        )
    lines += ["", f"{'shard':<40} {'epochs merged':>13} {'rows on lease':>13}"]
    lines += [
        f"{name:<40} {shard['epochs_merged']:>13.3f} {shard['rows_leased']:>13,.0f}"
        for name, shard in status.shards.items()
    ]
    if status.events:
        lines += ["", "what went wrong, and why the last time:"]
        lines += [
            f"  {client} {kind} x{count['count']}, round {count['round']}, {_ago(count['when'])}: {count['reason']}"
            for client, kinds in status.events.items()
            for kind, count in kinds.items()
        ]
    return "\n".join(lines)


def _server_lines(server: dict[str, Any] | None) -> list[str]:
    if server is None:
        return ["server: none has run here"]
    where = f"process {server.get('pid')} on {server.get('host')}"
    when, phase = _ago(server.get("when", 0)), server.get("phase", "")
    if server["alive"] is False:
        return [f"server: does not run ({where} {phase}, last heard of {when})"]
    known = "" if server["alive"] else " (another machine: whether it still runs is not known here)"
    lines = [f"server: {where}, {phase} round {server.get('round', '')}, {when}{known}"]
    if phase == "waiting" and server.get("waiting_for"):
        lines.append(f"waiting for {server['waiting_for']}")
    elif server.get("clients"):
        lines.append(
            f"here: {', '.join(server['clients'])}; merged so far: {', '.join(server.get('merged', [])) or 'none'}"
        )
    return lines + [f"refused: {client}: {reason}" for client, reason in server.get("refused", {}).items()]


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
