"""Flower's connections file: `local-simulation` and `local-simulation-gpu`, for `flwr run . local-simulation`."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML, FLOWER_CONFIG_FILE

from nanofed.errors import ConfigError, NanofedError
from nanofed.files import write_atomically

START = "# >>> nanofed federate --runtime simulation writes this block anew each time"
END = "# <<< nanofed"
BLOCK = re.compile(rf"\s*{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)


@dataclass(frozen=True)
class Resources:
    """What a simulation has; its clients take turns, so that a client's time is its own, one on each GPU."""

    clients: int  # simulated nodes
    cpus: int  # cores of the machine that Ray may use
    gpus: int  # GPUs of the machine

    @property
    def client_cpus(self) -> int:
        """Cores of a client."""
        return max(1, self.cpus // max(1, self.gpus))

    @property
    def client_gpus(self) -> float:
        """GPUs of a client."""
        return 1.0 if self.gpus else 0.0

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
        others = BLOCK.sub("\n", text)
        if START in others:
            raise ConfigError(f"{path} has the line {START!r} but not {END!r}: remove the block between them")
        owned = tomllib.loads(others).get("superlink", {})
        mine = {name: resources for name, resources in connections.items() if name not in owned}
        block = "\n".join([START, *(resources.connection(name) for name, resources in mine.items()), END])
        new = f"{others.rstrip()}\n\n{block}\n" if mine else others
        tomllib.loads(new)
        if not path.exists() or new != text:
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            write_atomically(path, new, mode=mode)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"Flower's connections file {path} is no valid TOML ({error}): correct or remove it"
        ) from error
    except OSError as error:
        raise NanofedError(f"Flower's connections file {path} cannot be written: {error.strerror}") from error
    return list(mine)
