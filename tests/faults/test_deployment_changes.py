"""A deployment whose weights go down as what changed: sites that come late or lose their worker, and a server that goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanofed.federated.wire.codec import CODECS
from nanofed.training.checkpoint.format import find_checkpoint, read_weights
from tests.faults.deployment import Deployment, config, deployment
from tests.federated.tiny import make_corpus
from tests.ranks import in_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CODEC = "int8"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server without keys, `lab-a` on one device and `lab-b` on two gloo ranks."""
    folder = tmp_path_factory.mktemp("changes")
    corpus = make_corpus(folder / "corpus", 6000)
    codecs = {"federation.down_codec": CODEC, "federation.up_codec": "int4"}
    with deployment(folder, config(corpus, folder, keep_checkpoints=0, **codecs)) as made:
        made.serve()
        made.site("lab-a")
        made.site("lab-b", "--devices", "2")
        made.until(lambda: made.round() > 0 and bool(made.merged("lab-a") and made.merged("lab-b")), "both sites", 300)
        yield made


def sent(federation: Deployment, site: str) -> list[bool]:
    """Tell of each merged round of a site whether it was sent what changed."""
    folder = federation.run / "sites" / site
    if not folder.exists():
        return []
    figures = EventAccumulator(str(folder))
    figures.Reload()
    weights = {name: tensor.numpy() for name, tensor in read_weights(find_checkpoint(federation.run)).items()}
    kinds = {CODECS[CODEC].nbytes(weights): True, CODECS["bf16"].nbytes(weights): False}
    merged = "fed/bytes_down" in figures.Tags()["scalars"]  # the file is there before its first round is
    return [kinds[int(event.value)] for event in figures.Scalars("fed/bytes_down")] if merged else []


def test_sites_are_sent_what_changed(federation: Deployment) -> None:
    for site in ("lab-a", "lab-b"):
        federation.until(lambda site=site: sent(federation, site)[-2:] == [True, True], "changes", in_time(60))  # type: ignore[misc]
        assert not sent(federation, site)[0]
    assert not federation.events(kind="failed") and not federation.events(kind="weights")
    measured = federation.bits_per_byte
    federation.until(lambda: measured()[-1] < 0.9 * measured()[0], "better weights", in_time(60))


def test_a_site_that_joins_late_is_sent_whole_weights_first(federation: Deployment) -> None:
    federation.site("lab-c")
    federation.until(lambda: sent(federation, "lab-c")[-1:] == [True], "changes", in_time(120))
    assert not sent(federation, "lab-c")[0]
    assert federation.processes.pop("lab-c").stop() == 143


@pytest.mark.parametrize("site", ["lab-a", "lab-b"])
def test_a_worker_that_has_lost_its_weights_is_sent_them_whole(federation: Deployment, site: str) -> None:
    since, before = time.time(), len(sent(federation, site))
    lab = federation.processes[site]
    lab.kill("site.worker")
    federation.until(lambda: False in sent(federation, site)[before:], "whole weights", in_time(120))
    federation.until(lambda: sent(federation, site)[-1:] == [True], "changes", in_time(60))
    assert federation.events(site, since), "the round in which it was killed, or the next one, was lost"


def test_a_round_loop_that_goes_on_sends_whole_weights_first(federation: Deployment) -> None:
    # The figures of a round that was not saved are cut off again.
    before = {site: len(sent(federation, site)) - 1 for site in ("lab-a", "lab-b")}
    federation.processes["server"].kill("flwr-serverapp")
    for site, number in before.items():
        federation.until(lambda s=site, n=number: False in sent(federation, s)[n:], "whole weights", in_time(120))  # type: ignore[misc]
        federation.until(lambda s=site: sent(federation, s)[-1:] == [True], "changes", in_time(60))  # type: ignore[misc]
    federation.no_row_is_merged_twice()
    assert not federation.unusual_events("weights", "lease")
