"""A deployment whose sites train on between rounds, one of them behind a slow link: what is killed costs a round and no row."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.faults.deployment import Deployment, config, deployment
from tests.faults.link import Link
from tests.federated.tiny import make_corpus
from tests.ranks import in_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EARLY = re.compile(r"round (\d+): (\d+) steps \((\d+) before its weights were here\)")


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("overlapping")
    corpus = make_corpus(folder / "corpus", 6000)
    options = {"federation.overlap": True, "federation.up_codec": "int8", "keep_checkpoints": 0}
    with deployment(folder, config(corpus, folder, **options)) as made:
        made.serve()
        link = Link(made.port)
        link.bytes_per_second = 100_000
        made.site("lab-a", port=link.port)
        made.site("lab-b")
        made.until(lambda: made.round() > 0 and bool(made.merged("lab-a") and made.merged("lab-b")), "both sites", 300)
        yield made
        link.close()


def early(federation: Deployment, site: str) -> list[int]:
    """Return how many steps of each round a site had taken before it had the round's weights."""
    log = (federation.folder / site / "worker.log").read_text(errors="replace")
    return [int(ahead) for _, _, ahead in EARLY.findall(log)]


def well(federation: Deployment) -> None:
    federation.no_row_is_merged_twice()
    assert not federation.unusual_events()


def test_sites_train_while_weights_are_under_way(overlapping: Deployment) -> None:
    overlapping.until(lambda: len(early(overlapping, "lab-a")) >= 2, "steps between rounds", in_time(60))
    overlapping.until(lambda: len(early(overlapping, "lab-b")) >= 2, "steps between rounds", in_time(60))
    measured = overlapping.bits_per_byte
    overlapping.until(lambda: measured()[-1] < 0.9 * measured()[0], "better weights", in_time(60))
    well(overlapping)


@pytest.mark.parametrize("process", ["site.worker", "flwr-serverapp"])
def test_a_process_is_killed_between_rounds(overlapping: Deployment, process: str) -> None:
    where = overlapping.processes["lab-a" if process == "site.worker" else "server"]
    assert where.kill(process)
    before = len(early(overlapping, "lab-a"))
    overlapping.takes_part("lab-a")
    overlapping.takes_part("lab-a")
    overlapping.until(lambda: len(early(overlapping, "lab-a")) > before, "steps between rounds again", in_time(60))
    well(overlapping)
