"""Who a site is, and where its server is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.federated.flower import is_loopback
from nanofed.federated.wire.names import SAFE_NAME
from nanofed.federated.wire.signature import read_trusted


@dataclass(frozen=True)
class SiteOptions:
    """Who the site is, and where its server is.

    Attributes:
        superlink: `host:port` of the server.
        name: of the site, the same as long as it takes part.
        authority: certificate of the server's CA; without one plain HTTP, on loopback only.
        key: the site's private key; the server knows the public one.
        folder: what the site keeps: optimizer state, logs, its lock, signed bundles.
        devices: devices of this machine that train together.
        stall_seconds: longest time without a step, while training, before the trainer is started anew.
        trainer: module that is run as the trainer.
        threads: CPU threads of each device's process; None as PyTorch chooses.
        trust: public key of who may sign the nanofed that it runs; None: it runs the installed one only.
    """

    superlink: str
    name: str
    authority: Path | None
    key: Path | None
    folder: Path
    devices: int = 1
    stall_seconds: float = 600.0
    trainer: str = "nanofed.federated.site.service"
    threads: int | None = None
    trust: Path | None = None


def site_options(
    superlink: str,
    name: str,
    *,
    keys: str | Path | None = None,
    devices: int = 1,
    state: str | Path | None = None,
    trust: str | Path | None = None,
) -> SiteOptions:
    """Return checked options.

    Args:
        superlink: `host:port`.
        name: of the site.
        keys: the folder that `nanofed server init` hands out for a site.
        devices: of this machine.
        state: the site's folder; by default `sites/NAME` in the cache folder.
        trust: `code.pub` of `nanofed server sign`.

    Raises:
        ConfigError: what is no address or name, keys that are not there, or an address on the network without any.
    """
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--superlink must be host:port, not {superlink!r}")
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
    elif not is_loopback(host.strip("[]")):
        raise ConfigError(
            f"--superlink {superlink} is reached over the network: that needs --keys, the folder that the server handed out"
        )
    folder = runtime.user_path(state) if state is not None else runtime.base_dir() / "sites" / name
    if trust is not None:
        trust = runtime.user_path(trust).resolve()
        read_trusted(trust)
    return SiteOptions(superlink, name, authority, key, folder, devices, trust=trust)
