"""The plan of a federation: its formulas by hand, what moves them which way, and the file that it reads."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from nanofed.errors import ConfigError
from nanofed.federated.config import FederationConfig
from nanofed.federated.planning import (
    CODEC_PAIRS,
    GOODPUT,
    MOST_STEPS,
    Costs,
    Line,
    Model,
    Places,
    Plan,
    PlannedSite,
    Setting,
    overheads,
    shared,
    transfer_seconds,
)
from nanofed.model import GPTConfig
from tests.support import REPOSITORY

NOTHING = Costs(fixed=0, round_trips=0, fetch=0, deliver=0, site=0, merge=0, step=0)
COSTS = Costs(fixed=1, round_trips=10, fetch=2, deliver=3, site=4, merge=5, step=6)
MODEL = Model("d0", 10**9, {"fp32": 4 * 10**9, "bf16": 2 * 10**9, "int8": 10**9, "int4": 5 * 10**8})
SITE = PlannedSite(down_mbit=1000, up_mbit=100, tokens_per_second=1e5, delay_ms=50)
SETTING = Setting(MODEL, batch_tokens=10**6, horizon_tokens=10**10, round_seconds=300)


def test_codec_pairs_are_options_of_a_federation() -> None:
    known = [get_args(get_type_hints(FederationConfig)[name]) for name in ("down_codec", "up_codec")]
    assert all(down in known[0] and up in known[1] for down, up in CODEC_PAIRS)
    sizes = Model.of(GPTConfig.from_depth(2, vocab_size=512)).payload_bytes
    total = [sizes[down] + sizes[up] for down, up in CODEC_PAIRS]
    assert total == sorted(total, reverse=True)


def test_the_bytes_of_d20_are_those_that_travel() -> None:
    model = Model.of(GPTConfig.from_depth(20))
    assert (model.name, model.parameters) == ("d20", 560_988_160)
    assert model.payload_bytes["fp32"] == 2 * model.payload_bytes["bf16"] == 4 * 560_988_160
    assert model.payload_bytes["int8"] == pytest.approx(0.5613e9, rel=1e-2)
    assert model.payload_bytes["int4"] == pytest.approx(0.2893e9, rel=1e-2)


def test_a_line_of_200_mbit_passes_24_mb_a_second() -> None:
    assert transfer_seconds(25 * 10**6, 200) == pytest.approx(1 / GOODPUT)
    assert transfer_seconds(0, 1) == 0


def test_a_round_by_hand() -> None:
    cost = overheads(MODEL, Places({"a": SITE, "b": replace(SITE, delay_ms=0)}), "bf16", "int8", COSTS)["a"]
    assert cost.down == pytest.approx(16 / GOODPUT)
    assert cost.up == pytest.approx(80 / GOODPUT)
    assert cost.site == 4
    assert cost.server == pytest.approx(1 + 2 * 5 + 6 + 10 * 0.05)
    assert cost.seconds == pytest.approx(96 / GOODPUT + 4 + 17.5)


def test_a_line_faster_than_its_ends_takes_what_they_take() -> None:
    fast = Places({"a": replace(SITE, down_mbit=1e6, up_mbit=1e6)})
    cost = overheads(MODEL, fast, "bf16", "int8", COSTS)["a"]
    assert (cost.down, cost.up) == (2 * 2, 3 * 1)


@pytest.mark.parametrize(
    ("rates", "whole", "each"),
    [
        ({"a": 100, "b": 50}, 1000, {"a": 100, "b": 50}),
        ({"a": 100, "b": 100}, 100, {"a": 50, "b": 50}),
        ({"a": 500, "b": 20, "c": 500}, 220, {"a": 100, "b": 20, "c": 100}),
        ({"a": 5}, float("inf"), {"a": 5}),
    ],
)
def test_a_servers_line_is_shared_and_none_of_it_is_left_idle(
    rates: dict[str, float], whole: float, each: dict[str, float]
) -> None:
    assert shared(rates, whole) == each


def test_what_the_server_receives_is_what_sites_send() -> None:
    slow = Places({"a": SITE}, server=Line(down_mbit=10, up_mbit=500))
    cost = overheads(MODEL, slow, "bf16", "int8", NOTHING)["a"]
    assert cost.down == pytest.approx(transfer_seconds(2 * 10**9, 500))
    assert cost.up == pytest.approx(transfer_seconds(10**9, 10))


def test_utilisation_by_hand() -> None:
    """Two sites of 10 and 30 s beside training; the one of three times the speed counts three times."""
    sites = {
        "fast": PlannedSite(down_mbit=800 / GOODPUT, up_mbit=1e12, tokens_per_second=3e5, delay_ms=0),
        "slow": PlannedSite(down_mbit=800 / GOODPUT / 3, up_mbit=1e12, tokens_per_second=1e5, delay_ms=0),
    }
    plan = Plan.of(
        replace(SETTING, model=replace(MODEL, payload_bytes=dict.fromkeys(MODEL.payload_bytes, 10**9))),
        Places(sites),
        NOTHING,
    )
    one = plan.recommended
    assert one.utilisation(100) == pytest.approx({"fast": 0.9, "slow": 0.7})
    assert one.utilisation_of_all(100) == pytest.approx(0.85)
    assert one.length_for(0.95) == pytest.approx(15 / 0.05)
    assert one.steps(100) == pytest.approx({"fast": 27, "slow": 7})
    assert one.length_of(27) == pytest.approx(100)
    # Shorter than the slow one's transfers: it still trains a tenth, and the round lasts as long as that takes.
    assert one.utilisation(20) == pytest.approx({"fast": 10 / 32, "slow": 2 / 32})
    assert (plan.round_seconds, one.down, one.up) == (300, "fp32", "fp32")


def test_the_most_exact_codecs_that_reach_the_target_are_taken() -> None:
    """Per Mbit/s of line, fp32 both ways is 64 Gbit, bf16 32, bf16 and int8 24, int8 16, int8 and int4 12."""

    def chosen(mbit: float, speed: float = 1e5) -> tuple[str, str, float]:
        site = PlannedSite(down_mbit=mbit, up_mbit=mbit, tokens_per_second=speed, delay_ms=0)
        plan = Plan.of(SETTING, Places({"a": site}), NOTHING)
        share = plan.recommended.utilisation_of_all(plan.round_seconds)
        assert plan.recommended.steps(plan.round_seconds)["a"] <= MOST_STEPS
        assert ("more would take more than 500 steps" in plan.sentence()) == (share < 0.95 - 1e-9)
        return plan.recommended.down, plan.recommended.up, plan.round_seconds

    assert chosen(5000 / GOODPUT) == ("fp32", "fp32", 256)
    assert chosen(2500 / GOODPUT) == ("bf16", "bf16", 256)
    assert chosen(1800 / GOODPUT) == ("bf16", "int8", 267)
    assert chosen(1400 / GOODPUT) == ("int8", "int8", 229)
    assert chosen(1000 / GOODPUT) == ("int8", "int4", 240)
    assert chosen(500 / GOODPUT) == ("int8", "int4", 480), "none fits 300 s"
    assert chosen(1400 / GOODPUT, speed=1e8) == ("int8", "int4", 13), "500 steps are 5 s"


@pytest.mark.parametrize("change", [{"down_mbit": 500}, {"up_mbit": 50}, {"delay_ms": 500}])
def test_a_worse_line_costs_more_and_asks_for_longer_rounds(change: dict[str, float]) -> None:
    def first(site: PlannedSite) -> tuple[float, float, float]:
        one = Plan.of(SETTING, Places({"a": site}), COSTS).rounds[0]
        return one.overheads["a"].seconds, one.length_for(0.95), -one.utilisation_of_all(300)

    assert all(worse > better for worse, better in zip(first(replace(SITE, **change)), first(SITE), strict=True))


def test_more_sites_take_longer_to_merge_and_share_the_servers_line() -> None:
    server = Line(down_mbit=150, up_mbit=1500)
    one, three = (
        overheads(MODEL, Places({f"{n}": SITE for n in range(count)}, server), "bf16", "int8", COSTS)["0"]
        for count in (1, 3)
    )
    assert three.server == one.server + 2 * 5
    assert three.down == pytest.approx(2 * one.down)
    assert three.up == pytest.approx(2 * one.up)


def test_the_text_has_a_row_a_pair_and_a_site_and_the_options_to_set() -> None:
    plan = Plan.of(replace(SETTING, notes=["A note."]), Places({"berlin": SITE, "oslo": SITE}), COSTS)
    text = plan.text()
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[3:8]] == [list(pair) for pair in CODEC_PAIRS]
    assert [line.split()[0] for line in lines if line.startswith(("berlin", "oslo"))] == ["berlin", "oslo"]
    assert f"--federation.round_seconds={plan.round_seconds:.0f}" in text and "A note." in lines


GOOD = {"sites": {"berlin": {"tokens_per_second": 9e5, "down_mbit": 1000, "up_mbit": 200, "delay_ms": 30}}}


def places(tmp_path: Path, content: object) -> Places:
    file = tmp_path / "sites.yaml"
    file.write_text(yaml.safe_dump(content))
    return Places.read(str(file))


def test_the_file_is_read(tmp_path: Path) -> None:
    read = places(tmp_path, GOOD)
    assert read.sites == {"berlin": PlannedSite(1000, 200, 9e5, 30)} and read.server is None
    assert list(places(tmp_path, {"sites": {date(2026, 12, 1): GOOD["sites"]["berlin"]}}).sites) == ["2026-12-01"]
    read = Places.read(str(REPOSITORY / "configs" / "sites.yaml"))
    assert list(read.sites) == ["berlin", "oslo"] and read.server == Line(1000, 1000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_per_second": None}, "sites.berlin.tokens_per_second is missing; `nanofed fit` logs it as tok/s"),
        ({"delay_ms": None}, "sites.berlin.delay_ms is missing"),
        ({"up_mbit": 0}, "sites.berlin.up_mbit is 0: input should be greater than 0"),
        ({"up_mbit": "fast"}, "sites.berlin.up_mbit is 'fast': input should be a valid number"),
        ({"up_mbit": True}, "sites.berlin.up_mbit is True: input should be a valid number"),
        (
            {"upmbit": 3},
            "there is no key sites.berlin.upmbit: known are down_mbit, up_mbit, tokens_per_second, delay_ms",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    site = {key: value for key, value in (GOOD["sites"]["berlin"] | change).items() if value is not None}
    with pytest.raises(ConfigError, match=r"sites\.yaml: ") as error:
        places(tmp_path, {"sites": {"berlin": site}})
    assert str(error.value).endswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "sites is missing"),
        ({"sites": {}}, "sites is {}: dictionary should have at least 1 item"),
        ({**GOOD, "server": {"down_mbit": 1}}, "server.up_mbit is missing"),
        ({**GOOD, "servers": {}}, "there is no key servers: known are sites, server"),
        ([1], "is no mapping of keys to values"),
    ],
)
def test_what_is_wrong_around_the_sites_is_named(content: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sites\.yaml") as error:
        places(tmp_path, content)
    assert said in str(error.value)
