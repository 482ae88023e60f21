"""The line that moves on the terminal of `nanofed federate`: the round, the time left in it, and what each client does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from nanofed.terminal import duration, fitting

TURN_SECONDS = 2.0  # for which a part of the clients is shown, where there is no room for all of them
BUSY = ("waiting", "training", "evaluating")  # before the end of a client's training

Figures = Mapping[str, Any]


class RoundLine:
    """Makes the text of the line from the figures of server and clients, which it asks for each time the line is drawn.

    Args:
        server: A function that returns what `StatusFile` holds; None before the server has written anything.
        clients: A function that returns the figures of each client's `Progress`; None for a client that is being started.
        speeds: The clients' speeds, where they take turns in one process; None where they train at the same time.
    """

    def __init__(
        self,
        server: Callable[[], Figures | None],
        clients: Callable[[], Mapping[str, Figures | None]],
        speeds: Mapping[str, float] | None = None,
    ) -> None:
        self._server = server
        self._clients = clients
        self._speeds = speeds

    def __call__(self, columns: int) -> str:
        """Return the line: each client by itself where all fit, else those that train and the numbers of the others.

        Where not even these fit, numbers and clients take turns.
        """
        said, clients = self._server() or {"phase": "starting"}, self._clients()
        phase = said["phase"]
        parts = [f"round {said['round']}"] if "round" in said else []
        if phase != "training":
            waits_for = phase == "waiting" and said.get("waiting_for")
            parts.append(f"waiting for {waits_for}" if waits_for else phase)
        if phase not in ("starting", "training"):
            return fitting(parts, columns)
        present, merged = set(said.get("clients", [])), set(said.get("merged", []))
        doing = {client: _doing(client, figures, said, present, merged) for client, figures in clients.items()}
        if (left := self._left(said, doing, clients)) is not None:
            parts.append(f"{duration(left)} left")
        speeds = {name: _speed(figures) for name, figures in clients.items() if figures and doing[name] == "training"}
        training = [f"{name} {speed}" for name, speed in speeds.items()]
        each = [f"{name} {speeds.get(name, what)}" for name, what in doing.items()]
        whole = [f"{said['tokens'] / said['horizon']:.0%} of the run"] if said.get("horizon") else []
        for shown in (each, [*training, _numbers(what for what in doing.values() if what != "training")]):
            if len("  ".join([*parts, *shown])) <= columns:
                return fitting([*parts, *shown, *whole], columns)
        turn = int(time.monotonic() / TURN_SECONDS)
        if turn % 2 or not training:
            return "  ".join([*parts, _numbers(doing.values())])
        first = turn // 2 % len(training)
        return fitting([*parts, *training[first:], *training[:first]], columns)

    def _left(self, said: Figures, doing: Mapping[str, str], clients: Mapping[str, Figures | None]) -> float | None:
        """Return the seconds until all clients have trained, None where nothing is known of that yet."""
        seconds, steps, speeds = said.get("seconds"), said.get("steps"), self._speeds
        if seconds is not None and speeds is None:
            return max(0.0, float(said["began"] + seconds - time.time()))
        busy = {name: figures for name, figures in clients.items() if figures is not None and doing[name] in BUSY}
        trains = {name: figures for name, figures in busy.items() if doing[name] == "training"}
        if seconds is not None and speeds is not None:
            spent: float = sum(time.monotonic() - figures["began"] for figures in trains.values())
            return max(0.0, float(seconds) * sum(speeds[name] for name in busy) - spent)
        fast = [f["tokens_per_second"] / f["step_tokens"] for f in clients.values() if f and f["tokens_per_second"]]
        if not (steps and fast and busy):
            return None
        to_go = [steps - (figures["steps"] if name in trains else 0) for name, figures in busy.items()]
        return float((max(to_go) if speeds is None else sum(to_go)) * len(fast) / sum(fast))


def _doing(client: str, figures: Figures | None, said: Figures, present: Set[str], merged: Set[str]) -> str:
    """Return what a client does, in one word."""
    if figures is None or figures["state"] == "starting":
        return "starting"
    if said["phase"] == "starting":
        return "waiting"
    if client not in present:
        return "absent"
    if client in merged:
        return "done"
    if figures["state"] != "idle":
        return str(figures["state"])
    if figures["round"] != said["round"]:
        return "waiting"
    return "refused" if client in said.get("refused", {}) else "sending"


def _speed(figures: Figures) -> str:
    """Return the steps and the speed of a client that trains."""
    speed = figures["tokens_per_second"]
    return f"{figures['steps']} steps {f'{speed / 1e3:,.0f}k' if speed >= 1e4 else f'{speed:,.0f}'} tok/s"


def _numbers(words: Iterable[str]) -> str:
    """Return how many clients do what."""
    return ", ".join(f"{number} {what}" for what, number in sorted(Counter(words).items()))
