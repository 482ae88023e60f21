"""A deployment without rounds, one of its sites behind a slow link: nobody waits for it, and what is killed costs no row."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.faults.deployment import Deployment, config, deployment
from tests.faults.link import Link
from tests.federated.tiny import make_corpus
from tests.ranks import in_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GONE = 20.0  # seconds for five merges of the other site, less than the server waits for one that is gone


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("asynchronous")
    corpus = make_corpus(folder / "corpus", 6000)
    options = {"federation.asynchronous": True, "federation.round_steps": 4, "keep_checkpoints": 0}
    with deployment(folder, config(corpus, folder, **options)) as made:
        made.serve()
        link = Link(made.port)
        made.site("fast")
        made.site("slow", port=link.port)
        made.until(lambda: made.round() > 0 and bool(made.merged("fast") and made.merged("slow")), "both sites", 300)
        link.bytes_per_second = 200_000
        yield made
        link.close()


def well(federation: Deployment) -> None:
    federation.no_row_is_merged_twice()
    assert not federation.unusual_events()


def test_one_site_is_merged_many_times_while_another_is_once(sites: Deployment) -> None:
    sites.takes_part("slow")
    slow, fast = sites.merged("slow"), sites.merged("fast")
    sites.takes_part("slow")
    assert sites.merged("slow") - slow <= 2
    assert sites.merged("fast") - fast >= 3
    late = [int(age) for age in re.findall(r"slow, (\d+) merges late", sites.processes["server"].output)]
    assert max(late) >= 3
    well(sites)


@pytest.mark.parametrize("process", ["site.worker", "flwr-serverapp"])
def test_a_process_is_killed(sites: Deployment, process: str) -> None:
    where = sites.processes["fast" if process == "site.worker" else "server"]
    assert where.kill(process)
    for site in ("fast", "slow"):
        sites.takes_part(site)
    well(sites)


def test_a_site_that_is_gone_holds_up_nobody(sites: Deployment) -> None:
    sites.processes["slow"].end()
    sites.more(5, in_time(GONE))
    measured = sites.bits_per_byte()
    assert measured[-1] < 0.9 * measured[0]
    well(sites)
