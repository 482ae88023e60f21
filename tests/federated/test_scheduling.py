"""How fast a client is: what it is asked to do, what it may claim, and how many of its tokens count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nanofed.federated.server.scheduling import LEAST_SECONDS, SPEED_ROUNDS, ClientSpeeds
from nanofed.federated.server.validation import RefusedReply
from tests.federated.replies import report


def learned(seconds: float = 10.0, elapsed: float = 16.0) -> ClientSpeeds:
    speeds = ClientSpeeds()
    for _ in range(SPEED_ROUNDS):
        speeds.learn(report(tokens=1000, seconds=seconds), elapsed)
    return speeds


def test_a_round_is_shorter_by_what_messages_and_merge_take() -> None:
    speeds = learned()
    speeds.learn_merge(2.0)
    assert speeds.budget("client-0", 60.0) == pytest.approx(60 - 6 - 2)
    assert speeds.budget("new", 60.0) == pytest.approx(58)
    speeds.learn(report(tokens=1000, seconds=10.0), 1010.0)
    assert speeds.budget("client-0", 60.0) == pytest.approx(6.0), "a tenth, whatever the messages take"


def test_more_time_than_has_passed_is_refused() -> None:
    with pytest.raises(RefusedReply, match=r"claims 10.0 s of training, 5.0 s after it was asked"):
        ClientSpeeds().check(report(seconds=10.0), 5.0)
    ClientSpeeds().check(report(seconds=5.5), 5.0)


def test_in_a_round_of_two_seconds_one_of_them_may_go_to_messages_or_not() -> None:
    speeds = learned(elapsed=2.0)
    speeds.check(report(tokens=2000, seconds=1.5), 2.0)
    with pytest.raises(RefusedReply, match=r"1.5 times its speed so far give 2250"):
        speeds.check(report(tokens=2300, seconds=1.5), 2.0)


def test_more_tokens_than_the_speed_so_far_gives_are_refused_until_it_is_believed() -> None:
    speeds = learned(elapsed=10.0)
    speeds.check(report(tokens=1500, seconds=9.0), 10.0)
    honest_on_a_new_machine = report(tokens=4000, seconds=9.0)
    for _ in range(3):
        with pytest.raises(RefusedReply, match=r"claims 4000 tokens within 10.0 s, 1.5 times its speed so far"):
            speeds.check(honest_on_a_new_machine, 10.0)
    speeds.check(honest_on_a_new_machine, 10.0)


def test_what_was_trained_before_a_round_is_of_the_time_before_it() -> None:
    speeds = learned(elapsed=10.0)
    early = report(tokens=2400, steps=24, ahead=12, seconds=9.0)
    speeds.check(early, 10.0, before=8.0)
    with pytest.raises(RefusedReply, match=r"claims 2400 tokens within 11.0 s"):
        speeds.check(early, 10.0, before=1.0)
    speeds = learned(elapsed=10.0)
    with pytest.raises(RefusedReply, match=r"within 10\.0 s"):
        speeds.check(replace(early, ahead=0), 10.0, before=8.0)
    speeds.learn(early, 10.0, before=8.0)
    assert speeds.rate["client-0"] == pytest.approx(2400 / 18)


def test_a_site_whose_transfers_are_long_is_believed() -> None:
    """It trains through all of the round, and only a third of that after the weights are there."""
    speeds = ClientSpeeds()
    whole = report(tokens=3000, steps=30, ahead=20, seconds=4.0)
    for _ in range(SPEED_ROUNDS + 1):
        speeds.check(whole, 12.0, before=1.0)
        speeds.learn(whole, 12.0, before=1.0)
    assert speeds.overhead["client-0"] == 8.0


def test_a_server_that_has_started_again_does_not_know_when_a_site_began() -> None:
    speeds = learned(elapsed=10.0)
    early = report(tokens=2400, steps=24, ahead=12, seconds=9.0)
    speeds.check(early, 10.0, before=math.inf)
    before = speeds.rate["client-0"]
    speeds.learn(early, 10.0, before=math.inf)
    assert speeds.rate["client-0"] == before > 0


def test_tokens_that_are_not_counted_are_not_counted_as_trained_ahead_either() -> None:
    reports = [report(client=f"client-{n}", tokens=100, steps=1) for n in (1, 2)]
    fast = report(tokens=16_000, steps=160, ahead=120)
    mine, *_ = ClientSpeeds().believed([fast, *reports])
    assert (mine.tokens, mine.steps, mine.ahead) == (800, 8, 6)


def test_speed_is_of_the_servers_seconds() -> None:
    """Whatever a site says of its own: it may say that it needs no time at all."""
    assert learned(seconds=1e-300, elapsed=16.0).rate["client-0"] == pytest.approx(1000 / 16)
    alone = ClientSpeeds()
    alone.learn(report(tokens=1000, seconds=1e-300), None)
    assert alone.rate["client-0"] == 1000 / LEAST_SECONDS


def test_tokens_are_counted_up_to_eight_times_what_others_did_a_device() -> None:
    speeds = ClientSpeeds(devices={"b": 4})
    honest = [report(client="a", tokens=100, steps=10), report(client="b", tokens=2800, steps=280)]
    assert speeds.believed(honest) == honest, "seven times the speed a device"
    liar = report(client="liar", tokens=100_000, steps=10_000)
    *rest, counted = speeds.believed([*honest, liar])
    assert rest == honest and (counted.tokens, counted.steps) == (8 * 100, 80)
    assert speeds.believed([liar]) == [liar], "nobody to compare with"
    speeds.learn(honest[0], None)
    assert speeds.believed([liar])[0].tokens == 800, "who is away has a word, too"


def test_the_speed_of_the_first_rounds_binds_nobody() -> None:
    speeds = ClientSpeeds()
    speeds.learn(report(tokens=10, seconds=10.0), 10.0)  # it compiled
    speeds.check(report(tokens=10_000, seconds=10.0), 10.0)


def test_who_was_late_trains_for_a_tenth_and_then_longer_again() -> None:
    speeds = learned()
    speeds.hurry("client-0", 60.0)
    assert speeds.budget("client-0", 60.0) == pytest.approx(6)
    speeds.learn(report(tokens=1000, seconds=6.0), 6.0 + 20.0)
    assert speeds.budget("client-0", 60.0) == pytest.approx(60 - 40)


def test_it_is_saved() -> None:
    speeds = learned()
    assert ClientSpeeds(**json.loads(json.dumps(speeds.state_dict()))) == speeds
