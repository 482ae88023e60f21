"""Flower's commands, as nanofed starts them: of this Python environment, in a home of their own, sending nothing anywhere."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError


def toml(value: bool | int | float | str) -> str:
    """Write a value as TOML, in which Flower takes settings; a double quote is escaped as a number, since it splits at those."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        text = '"' + text[1:-1].replace('\\"', "\\u0022").replace("\x7f", "\\u007f") + '"'
    return text


def flower_environment(home: Path, **changes: str | None) -> dict[str, str]:
    """Return the environment of Flower's processes: a home of their own, nothing installed, nothing sent anywhere."""
    binaries, given = str(Path(sys.executable).parent), runtime.environment()
    return runtime.environment(
        **{
            "PATH": f"{binaries}:{given.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",  # for Flower's own commands, which its processes start by name
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            # What is freed goes back at once: kept, as glibc does, it is a third of a round's memory where weights are in the
            # messages, and 0.4 GB at d20 where they are beside them. Then it is new pages every time: large ones cost less.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
            "GLIBC_TUNABLES": ":".join(filter(None, [given.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"])),
            **changes,
        }
    )


def free_port() -> int:
    """Return a port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def host_port(option: str, text: str) -> tuple[str, int]:
    """Return the host and the port of an option's `host:port`.

    Raises:
        ConfigError: The text is no `host:port`.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{option} must be host:port, not {text!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Tell whether a host can be this machine alone; a name that is not localhost is taken for the network."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
