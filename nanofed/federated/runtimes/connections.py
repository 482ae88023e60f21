"""Flower's connections file: `local-simulation` and `local-simulation-gpu`, for `flwr run . local-simulation`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML, FLOWER_CONFIG_FILE

from nanofed.errors import ConfigError, NanofedError
from nanofed.files import write_atomically

START = "# >>> nanofed federate --runtime simulation writes this block anew each time"
END = "# <<< nanofed"


@dataclass(frozen=True)
class Resources:
    """What a simulation has and what each of its clients takes.

    Attributes:
        clients: simulated nodes.
        cpus: cores of the machine that Ray may use.
        client_cpus: cores of a client.
        client_gpus: GPUs of a client.
    """

    clients: int
    cpus: int
    client_cpus: int
    client_gpus: float

    @classmethod
    def of(cls, clients: int, cpus: int, gpus: int) -> Resources:
        """Return one client's turn at a time, so that its time is its own; with GPUs, one client on each."""
        return cls(clients, cpus, max(1, cpus // max(1, gpus)), 1.0 if gpus else 0.0)

    def federation_config(self) -> str:
        """Return what `flwr run --federation-config` takes."""
        return (
            f"num-supernodes={self.clients} client-resources-num-cpus={self.client_cpus} "
            f"client-resources-num-gpus={self.client_gpus} init-args-num-cpus={self.cpus}"
        )

    def connection(self, name: str) -> str:
        """Return the TOML of a connection to the SuperLink that `flwr` starts by itself."""
        return (
            f'[superlink.{name}]\naddress = ":local:"\noptions.num-supernodes = {self.clients}\n'
            f"options.backend.client-resources.num-cpus = {self.client_cpus}\n"
            f"options.backend.client-resources.num-gpus = {self.client_gpus}\n"
            f"options.backend.init-args.num-cpus = {self.cpus}\n"
        )


def write_connections(home: Path, connections: dict[str, Resources]) -> list[str]:
    """Write connections into Flower's file; everything else in it stays as it is, to the letter.

    Args:
        home: Flower's folder.
        connections: The resources of each connection, by its name. A connection of that name outside of our block is left alone.

    Returns:
        The names written.

    Raises:
        ConfigError: the file is no valid TOML.
        NanofedError: it cannot be read or written.
    """
    path = home / FLOWER_CONFIG_FILE
    try:
        home.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else DEFAULT_FLOWER_CONFIG_TOML
        others = _without_block(text, path)
        owned = _parse(others, path).get("superlink", {})
        mine = {name: resources for name, resources in connections.items() if name not in owned}
        block = "\n".join([START, *(resources.connection(name) for name, resources in mine.items()), END])
        new = f"{others.rstrip()}\n\n{block}\n" if mine else others
        _parse(new, path)
        if not path.exists() or new != text:
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            write_atomically(path, new, mode=mode)
    except OSError as error:
        raise NanofedError(f"Flower's connections file {path} cannot be written: {error.strerror}") from error
    return list(mine)


def _without_block(text: str, path: Path) -> str:
    if START not in text:
        return text
    before, rest = text.split(START, 1)
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigError(f"{path} has the line {START!r} but not {END!r}: remove the block between them")
    return before.rstrip() + "\n" + after


def _parse(text: str, path: Path) -> dict[str, dict[str, object]]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"Flower's connections file {path} is no valid TOML ({error}): correct or remove it"
        ) from error
