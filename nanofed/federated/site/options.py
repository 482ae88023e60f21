"""Who a site is, and where its server is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.flower import host_port, is_loopback
from nanofed.federated.wire.plain_text import SAFE_NAME
from nanofed.files import check_private


@dataclass(frozen=True)
class SiteOptions:
    """Who the site is, and where its server is."""

    superlink: str  # `host:port` of the server
    name: str  # name of the site, the same as long as it takes part
    authority: Path | None  # certificate of the server's CA; without one plain HTTP, on loopback only
    key: Path | None  # the site's private key; the server knows the public one
    folder: Path  # what the site keeps: optimizer state, logs, its lock
    devices: int = 1  # devices of this machine that train together
    stall_seconds: float = 600.0  # longest time without a step, while training, before the worker is started anew
    worker: str = "nanofed.federated.site.worker"  # module that is run as the worker
    threads: int | None = None  # CPU threads of each device's process; None as PyTorch chooses


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(SiteOptions):
    """What the supervisor tells its worker: the site's options, and how the two and the SuperNode meet."""

    supernode: str  # `host:port` of the SuperNode's runtime API
    progress: str | None = None  # path of the supervisor's `Page`
    supervisor: int = 0  # process id of the supervisor, with which the worker ends; 0 for none

    @property
    def secret(self) -> Path:
        """The file with what the SuperNode wants to know of who takes messages."""
        return self.folder / "secret"

    def to_json(self) -> str:
        """Return the options as one argument of a command line."""
        return TypeAdapter(WorkerOptions).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read options from their JSON.

        Raises:
            ConfigError: The text is no such JSON.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"the options of a site's worker cannot be read: {error}") from error


def site_options(
    superlink: str,
    name: str,
    *,
    keys: str | Path | None = None,
    devices: int = 1,
    state: str | Path | None = None,
) -> SiteOptions:
    """Return checked options.

    Args:
        superlink: `host:port`.
        name: name of the site.
        keys: the folder that `nanofed server init` hands out for a site.
        devices: The number of this machine's devices that train together.
        state: the site's folder; by default `sites/NAME` in the cache folder.

    Raises:
        ConfigError: what is no address or name, keys that are not there, or an address on the network without any.
    """
    host, _ = host_port("--superlink", superlink)
    if not SAFE_NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} must be up to 64 letters, digits, '.', '_' and '-'")
    if devices < 1:
        raise ConfigError(f"--devices must be at least 1, not {devices}")
    authority = key = None
    if keys is not None:
        folder = runtime.user_path(keys).resolve()
        authority, key = folder / "ca.pem", folder / "site.key"
        for path in (authority, key):
            if not path.is_file():
                raise ConfigError(
                    f"{path} is missing: --keys names the folder that `nanofed server init` made for this site"
                )
        check_private(key)
    elif not is_loopback(host):
        raise ConfigError(
            f"--superlink {superlink} is reached over the network: that needs --keys, the folder that the server handed out"
        )
    folder = runtime.user_path(state) if state is not None else runtime.base_dir() / "sites" / name
    return SiteOptions(superlink, name, authority, key, folder, devices)
