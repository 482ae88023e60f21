"""A round waits for a quorum, as long as waiting can help."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.clients import Clients
from nanofed.federated.server.events import Events
from nanofed.federated.server.policy import ONE_MACHINE, SITES, ClientPolicy


class Looks(Clients):
    """Clients of which the test says who is there, one answer a look."""

    def __init__(self, *looks: list[str], policy: ClientPolicy = SITES, **config: Any) -> None:
        nobody = cast(Any, None)
        self.events = Events()
        super().__init__(nobody, nobody, FederationConfig(**{"quorum": 2, **config}), self.events, policy)
        self._looks = list(looks)

    def connected(self) -> dict[str, int]:
        names = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return {name: number for number, name in enumerate(names, 1)}


def test_a_round_waits_for_a_quorum_and_says_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    # In the place of the module's `time`: other threads of this process sleep, too.
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr("nanofed.federated.server.clients.time", clock)
    caplog.set_level(logging.INFO)
    clients = Looks(*[["a"]] * 500, ["a", "late"], quorum_seconds=100.0)
    clients.seen = {"late": -120.0}
    heard: list[str] = []
    assert clients.wait(7, heard.append) == {"a": 1, "late": 2}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "round   7  waiting for 1 more clients of 2 (here: a; late was here 2 min ago)"
    assert len(heard) == 500 and heard[-1].startswith("1 more clients of 2 (here: a; late was here 6 min ago")
    assert len(lines) <= 250 / 60 + 3, "once a minute, and a warning each time the patience ends"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and warnings[0].startswith("round 7: it cannot begin for 100 s: it needs 1 more")
    assert clients.events.total("quorum") == 2


def test_in_vain_is_not_waited_on_one_machine() -> None:
    clients = Looks(["a"], policy=ONE_MACHINE)
    clients.refused = {"b": "code x there, y here"}
    with pytest.raises(NanofedError, match=r"round 1 needs 2 clients, 1 can take part \(b: code x there, y here\)"):
        clients.wait(1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"quorum": 0}, "federation.quorum must be at least 1"),
        ({"quorum_seconds": 0}, "federation.quorum_seconds must be positive"),
        ({"grace_seconds": -1}, "federation.grace_seconds must be positive"),
        ({"trim": 0.5}, "federation.trim"),
        ({"max_norm_ratio": 1}, "federation.max_norm_ratio"),
        ({"merge": "median", "weighting": "tokens"}, "federation.merge=median"),
        ({"max_failed_rounds": 0}, "federation.max_failed_rounds"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FederationConfig(**wrong)
