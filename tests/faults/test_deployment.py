"""A server and two sites over TLS, as people start them, and everything in it that can be killed: the round goes on.

One deployment serves all tests of this file and of `test_deployment_links.py`, in their order: each does its harm and waits until
the federation is well again. `lab-a` trains on one device, `lab-b` on two gloo ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from nanofed.federated.site.inbox import ACQUIRE, ACQUIRE_ANY
from tests.faults.chain import check_chain, row_lengths
from tests.faults.deployment import Deployment, worker_options
from tests.faults.soak import Soak, leaks
from tests.ranks import in_time

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_both_sites_train_and_bits_per_byte_fall(federation: Deployment) -> None:
    federation.more(2)
    # A round may be over before the weights before it are measured.
    measured = federation.bits_per_byte
    federation.until(lambda: measured()[-1] < 0.9 * measured()[0], "better weights", in_time(60))
    federation.no_row_is_merged_twice()
    assert not [event for event in federation.events() if event["kind"] not in ("failed", "silent", "late", "quorum")]


@pytest.mark.parametrize("moment", ["between two rounds", "while it trains", "in its upload"])
def test_a_worker_is_killed(federation: Deployment, moment: str) -> None:
    lab = federation.processes["lab-a"]
    federation.until(lambda: federation.is_training("lab-a"), "round that lab-a trains", in_time(60))
    if moment == "in its upload":
        lab.kill("deploy.supernode", signal.SIGSTOP)  # what the answer goes to waits for its end
    if moment != "while it trains":
        federation.until(lambda: not federation.is_training("lab-a"), "end of the training", in_time(60))
        time.sleep(1.0)
    since, before, merged = time.time(), federation.round(), federation.merged("lab-a")
    (killed,) = lab.kill("site.worker")
    if moment == "in its upload":
        lab.kill("deploy.supernode", signal.SIGCONT)
    federation.until(  # one that dies often is started later each time
        lambda: bool(set(lab.pids("site.worker")) - {killed}), "worker in place of the killed one", in_time(20)
    )
    federation.reach(before + 1, in_time(45))  # with the other site's update
    if moment == "while it trains":  # the SuperNode answers for it after ten seconds
        federation.until(
            lambda: bool({"failed", "silent"} & {event["kind"] for event in federation.events("lab-a", since)}),
            "event of the killed worker",
            in_time(45),
        )
        assert federation.merged("lab-a") <= merged + federation.round() - before - 1
    federation.takes_part("lab-a")
    federation.no_row_is_merged_twice()


def test_one_rank_of_a_worker_is_killed(federation: Deployment) -> None:
    lab = federation.processes["lab-b"]
    ranks = lab.pids("site.worker")
    lab.kill("site.worker")
    federation.until(lambda: len(set(lab.pids("site.worker")) - set(ranks)) >= 2, "ranks in place of them", in_time(30))
    federation.takes_part("lab-b")


def test_a_worker_hangs(federation: Deployment) -> None:
    lab = federation.processes["lab-a"]
    hung = lab.kill("site.worker", signal.SIGSTOP)
    federation.until(lambda: bool(pids := lab.pids("site.worker")) and not set(hung) & set(pids), "another worker", 60)
    assert "has said nothing" in lab.output
    federation.takes_part("lab-a")


def test_a_worker_ends_before_it_has_read_the_message_that_it_took(federation: Deployment) -> None:
    """The SuperNode answers for it; Flower's own waits for that answer for ever, and the site takes part no more."""
    lab = federation.processes["lab-a"]
    (worker,) = lab.kill("site.worker", signal.SIGSTOP)
    options = worker_options(worker)

    def connect(auth: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor) -> RuntimeHttpClient:
        known = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), auth]
        return RuntimeHttpClient.from_server_address(options.supernode, True, None, known)

    taker = connect(
        SuperExecAuthHttpInterceptor(master_secret=options.secret.read_bytes(), protected_methods={ACQUIRE})
    )
    deadline = time.monotonic() + 25
    with closing(taker):
        while not (token := taker.AcquireTask(ACQUIRE_ANY).token):
            assert time.monotonic() < deadline, f"no message\n{federation.tails()}"
            time.sleep(0.05)
    with closing(connect(RuntimeTokenHttpInterceptor(token))) as task:
        task.PullTaskInput(PullTaskInputRequest())
    lab.kill("site.worker", signal.SIGCONT)
    federation.takes_part("lab-a")


def test_a_supernode_is_killed(federation: Deployment) -> None:
    lab = federation.processes["lab-a"]
    lab.kill("deploy.supernode")
    federation.more(1)  # the other site goes on
    federation.takes_part("lab-a", 240)  # its key is refused for a minute


def test_a_site_that_joins_late(federation: Deployment) -> None:
    before = federation.round()
    federation.site("lab-c")
    federation.takes_part("lab-c")
    assert federation.round() > before
    assert federation.processes.pop("lab-c").stop() == 143


@pytest.mark.parametrize("phase", ["starting", "waiting", "training", "merging", "saving"])
def test_the_round_loop_is_killed_in_a_phase(
    federation: Deployment, phase: str, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    server = federation.processes["server"]
    for attempt in range(count(1, 5)):
        if phase == "starting":
            server.kill("flwr-serverapp")
        catch(federation, phase)
        server.kill("flwr-serverapp")
        before, tokens, rows = federation.round(), federation.manifest().tokens, federation.merged_rows()
        seconds = federation.reach(before + 1, 240)
        record_property(f"round_after_seconds_{attempt}", round(seconds, 1))
        assert seconds < in_time(60)
        assert federation.round() >= before + 1
        assert federation.manifest().tokens > tokens
        assert federation.merged_rows() >= rows


def catch(federation: Deployment, phase: str) -> None:
    """Wait for the moment at which the server says that it enters a phase; merging and saving are over in milliseconds."""
    live = federation.run / "server.json"
    since = json.loads(live.read_text())["when"]

    def said() -> str:
        with contextlib.suppress(OSError, ValueError):
            now = json.loads(live.read_text())
            return str(now["phase"]) if now["when"] > since else ""
        return ""

    def wait(holds: Callable[[str], bool], pause: float) -> None:
        deadline = time.monotonic() + in_time(120)
        while not holds(said()):
            assert time.monotonic() < deadline, f"never {phase}\n{federation.tails()}"
            time.sleep(pause)

    if phase == "merging":
        wait(lambda now: now == "training", 0.01)
        wait(lambda now: now in ("merging", "waiting"), 0.0)
    elif phase == "saving":
        wait(lambda now: now == "saving", 0.0)
    else:
        wait(lambda now: now == phase, 0.001)


def test_the_launcher_of_round_loops_is_killed(federation: Deployment) -> None:
    server = federation.processes["server"]
    died = server.output.count("launcher died")
    server.kill("flower-superexec")
    federation.until(lambda: server.output.count("launcher died") > died, "word of the launcher's end", in_time(30))
    federation.reach(federation.round() + 2, 240)


def test_the_launcher_is_killed_between_two_runs(federation: Deployment) -> None:
    """Whoever begins to look for it with the next run never sees it."""
    server, before = federation.processes["server"], federation.round()
    ended = "the run ended (the round loop died"
    died, already = server.output.count("launcher died"), server.output.count(ended)
    server.kill("flwr-serverapp")
    federation.until(lambda: server.output.count(ended) > already, "end of the run", in_time(60))
    server.kill("flower-superexec")
    federation.reach(before + 2, 240)
    assert server.output.count("launcher died") > died


def test_the_superlink_is_killed(federation: Deployment) -> None:
    server = federation.processes["server"]
    before = federation.round()
    server.kill("superlink_process")
    federation.reach(before + 2, 240)
    assert "the SuperLink died" in server.output
    federation.no_row_is_merged_twice()


def test_what_the_server_keeps_beside_its_checkpoints_is_lost_and_made_anew(federation: Deployment) -> None:
    assert federation.keys is not None
    kept, rubbish = federation.run / "server", federation.keys / "sites" / "lab-x.pub"
    rubbish.write_text("no key")  # keeps nobody out
    shutil.rmtree(kept / "weights")
    (kept / "nodes.json").write_text('{"lab-a"')
    for name in ("lab-a", "lab-b"):
        federation.takes_part(name)
    (kept / "superlink.db").unlink()
    for name in ("lab-a", "lab-b"):
        federation.takes_part(name)
    said = federation.processes["server"].output
    assert "superlink.db, which the SuperLink was using, was removed or replaced" in said
    assert "lab-x.pub cannot be read as a public key" in said
    rubbish.unlink()
    federation.no_row_is_merged_twice()


def test_the_server_itself_is_killed_and_started_again(federation: Deployment) -> None:
    before = federation.round()
    federation.processes["server"].process.kill()
    federation.processes["server"].process.wait()
    federation.serve()
    federation.reach(before + 2, 240)
    federation.no_row_is_merged_twice()


def test_a_second_server_on_the_run_is_refused(federation: Deployment) -> None:
    first = federation.processes["server"]
    second = federation.serve()
    federation.processes["server"] = first
    assert second.process.wait(timeout=60) == 2
    assert "is in use by process" in second.log.read_text()


def test_a_second_site_of_one_name_is_refused(federation: Deployment) -> None:
    first = federation.processes["lab-a"]
    second = federation.site("lab-a")
    federation.processes["lab-a"] = first
    assert second.process.wait(timeout=60) == 2
    assert "two of one name cannot take part" in second.log.read_text()
    federation.takes_part("lab-a")


def test_all_sites_leave_and_come_back(federation: Deployment) -> None:
    for name in ("lab-a", "lab-b"):
        assert federation.processes.pop(name).stop() == 143
    left = federation.round()
    time.sleep(10)
    assert federation.round() <= left + 1
    federation.site("lab-a")
    federation.site("lab-b", "--devices", "2")
    federation.reach(left + 2, 300)
    assert federation.processes["server"].process.poll() is None


def test_soak_of_rounds_with_random_kills(
    federation: Deployment, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    record_property("seed", seed)
    logger.warning("seed %d", seed)  # shown where it fails
    rounds = count(4, 500)
    # What takes a minute to come back, by Flower's own clocks, has its tests above.
    quick = ["site.worker", "flwr-serverapp"]
    soak = Soak(federation, seed, None if rounds > 100 else quick)
    soak.run(rounds, every=2 if rounds < 100 else 10)
    record_property("kills", dict(soak.kills))
    assert not leaks(soak.watch.growths(least_rounds=40), memory=2.0, handles=1.0)  # fewer rounds are all warm-up


def test_after_all_that_every_checkpoint_follows_from_the_one_before(federation: Deployment) -> None:
    assert check_chain(federation.run, row_lengths(federation.folder / "corpus")) > 20
