"""The options of a federation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanofed.errors import ConfigError


@dataclass
class FederationConfig:
    """How clients and server train together.

    Attributes:
        clients: number of clients (in process and in simulation).
        rounds: rounds at most; by default as many as the recipe's horizon takes.
        round_seconds: length of a round by each client's clock.
        round_steps: optimizer steps of a round instead; two runs of one seed then end in the same weights.
        availability: chance that a client takes part in a round (Bernoulli).
        client_speeds: how fast each client is, 1 being this machine; in process, a client of 0.5 does half the steps in a
            round of seconds.
        weighting: `uniform` or `tokens`: a client's share in the mean.
        outer_lr: outer learning rate; 1 with momentum 0 is FedAvg.
        outer_momentum: outer Nesterov momentum.
        global_batch_tokens: split one batch over the clients of a round, in whole micro-batches, instead of
            `model.recipe.batch_tokens` each.
        codec: how weights travel.
        message_timeout: seconds beyond a round's budget after which a client that has not answered is given up.
        max_failed_rounds: rounds in a row without one accepted reply after which the run ends with an error.
    """

    clients: int = 2
    rounds: int | None = None
    round_seconds: float = 300.0
    round_steps: int | None = None
    availability: float = 1.0
    client_speeds: list[float] | None = None
    weighting: Literal["uniform", "tokens"] = "uniform"
    outer_lr: float = 0.7
    outer_momentum: float = 0.6
    global_batch_tokens: int | None = None
    codec: Literal["fp32"] = "fp32"
    message_timeout: float = 600.0
    max_failed_rounds: int = 5

    def __post_init__(self) -> None:
        """Refuse what no federation can run with."""
        if self.clients < 1:
            raise ConfigError(f"federation.clients must be at least 1, not {self.clients}")
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"federation.rounds must be at least 1, not {self.rounds}")
        if not self.round_seconds > 0:
            raise ConfigError(f"federation.round_seconds must be positive, not {self.round_seconds}")
        if self.round_steps is not None and self.round_steps < 1:
            raise ConfigError(f"federation.round_steps must be at least 1, not {self.round_steps}")
        if not 0 < self.availability <= 1:
            raise ConfigError(f"federation.availability is a chance in (0, 1], not {self.availability}")
        if self.client_speeds is not None:
            if len(self.client_speeds) != self.clients:
                raise ConfigError(
                    f"federation.client_speeds names {len(self.client_speeds)} speeds for {self.clients} clients"
                )
            if not all(speed > 0 for speed in self.client_speeds):
                raise ConfigError(f"federation.client_speeds must be positive, not {self.client_speeds}")
        if not self.message_timeout > 0:
            raise ConfigError(f"federation.message_timeout must be positive, not {self.message_timeout}")
        if self.max_failed_rounds < 1:
            raise ConfigError(f"federation.max_failed_rounds must be at least 1, not {self.max_failed_rounds}")

    def speed(self, client: int) -> float:
        """Return the speed of the n-th client, from 0."""
        return self.client_speeds[client] if self.client_speeds else 1.0
