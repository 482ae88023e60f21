"""The deployment of `test_deployment.py` with a third site that is another model's, behind a bad link and on a full disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanofed.federated.deploy.superlink import APP, FLWR, LINK, write_app
from nanofed.federated.flower import flower_environment
from nanofed.federated.server.scheduling import LEARN
from nanofed.federated.wire.bundle import code_hash
from tests.faults.deployment import GRACE, Deployment
from tests.faults.disks import fill, free, seen_by, small_disk
from tests.faults.link import CUT, STALLED, Link
from tests.federated.tiny import make_corpus
from tests.ranks import in_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1 << 20
PART = 64 << 10  # bytes of an upload: more than anything else that a site sends in a round, and less than its weights


def test_a_site_of_another_model_and_tokenizer_is_refused_with_both_values(federation: Deployment) -> None:
    since, before = time.time(), federation.round()
    make_corpus(federation.folder / "other", 200, vocab_size=290)
    federation.site("lab-c", "--model.depth=2", f"--data.tokenizer={federation.folder / 'other' / 'tokenizer'}")
    federation.until(lambda: bool(federation.events("lab-c", since, "hello")), "refusal", in_time(60))
    reason = federation.events("lab-c", since, "hello")[0]["reason"]
    assert "model.n_layer 2 there, 1 here" in reason
    hashes = reason.partition("tokenizer ")[2].split()
    assert hashes[1] == "there," and hashes[3].startswith("here") and hashes[0] != hashes[2]
    federation.reach(before + 1)
    assert federation.processes.pop("lab-c").stop() == 143


@pytest.fixture(scope="module")
def link(federation: Deployment) -> Iterator[Link]:
    """`lab-c`, on a small disk behind a link."""
    link = Link(federation.port)
    folder = federation.folder / "lab-c"
    folder.mkdir(exist_ok=True)
    federation.site("lab-c", port=link.port, before=small_disk(24 * MIB, folder))
    federation.takes_part("lab-c")
    yield link
    link.close()


def test_an_upload_that_stalls_holds_nobody_up(federation: Deployment, link: Link) -> None:
    """The round ends by the server's clock, without it; whether Flower still delivers the answer later depends on its own."""
    federation.until(lambda: federation.is_training("lab-c"), "round that lab-c trains", 60)
    since, before, merged = time.time(), federation.round(), federation.merged("lab-c")
    link.stall(after=PART)
    federation.until(lambda: link.state == STALLED, "upload", in_time(60))
    assert federation.reach(before + 1, in_time(90)) < in_time(3 + GRACE + 10)
    assert federation.merged("lab-c") == merged
    kinds = [event["kind"] for event in federation.events("lab-c", since)]
    assert kinds and {*kinds} <= {"silent", "failed"}
    link.heal()
    federation.takes_part("lab-c")
    assert {event["kind"] for event in federation.events("lab-c", since)} <= {"silent", "failed", "late"}
    federation.no_row_is_merged_twice()


def test_an_upload_that_is_cut_off_is_not_merged_by_halves(federation: Deployment, link: Link) -> None:
    """Flower sends again what was lost: merged whole, or not at all."""
    since = time.time()
    federation.until(lambda: federation.is_training("lab-c"), "round that lab-c trains", 60)
    link.cut(after=PART)
    federation.until(lambda: link.state == CUT, "upload", in_time(60))
    link.heal()
    federation.takes_part("lab-c")
    assert {event["kind"] for event in federation.events("lab-c", since)} <= {"silent", "failed", "late"}
    federation.no_row_is_merged_twice()


def test_a_slow_link_costs_training_time_and_no_round(federation: Deployment, link: Link) -> None:
    since = time.time()
    link.bytes_per_second = 200e3
    federation.takes_part("lab-c")
    link.heal()
    weights = federation.manifest().files["model.safetensors"]["bytes"]
    assert federation.state()["pace"]["overhead"]["lab-c"] > LEARN * 2 * weights / 200e3
    assert {event["kind"] for event in federation.events("lab-c", since)} <= {"silent", "late"}
    federation.no_row_is_merged_twice()


def test_a_site_whose_disk_is_full_trains_on_and_says_so(federation: Deployment, link: Link) -> None:
    since, site = time.time(), federation.processes["lab-c"]
    place, worker = seen_by(site.process.pid, federation.folder / "lab-c"), site.pids("site.worker")
    fill(place)
    federation.takes_part("lab-c")
    federation.takes_part("lab-c")
    federation.until(lambda: bool(federation.events("lab-c", since, "disk")), "event of the full disk", 60)
    assert str(federation.folder / "lab-c" / "state") in site.output
    free(place)
    states = place / "state" / "lab-c" / federation.state()["run"]
    newest = max(states.glob("round_*.pt"), default=Path())
    federation.until(lambda: max(states.glob("round_*.pt"), default=Path()) > newest, "state on disk", in_time(60))
    assert site.pids("site.worker") == worker, "it was started anew"
    federation.no_row_is_merged_twice()


ATTACK = """
import json
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

OUT = Path({out!r})
if {site!r} in str(Path.cwd()):
    OUT.with_suffix(".ran").touch()
client = ClientApp()
server = ServerApp()


@server.main()
def main(grid, context):
    content = RecordDict({{"getpropertiesins.config": ConfigRecord({{}})}})
    asked = [Message(content, node, "get_properties", ttl=60.0, group_id="1") for node in grid.get_node_ids()]
    replies = [reply for message in asked for reply in grid.send_and_receive([message], timeout=60)]
    OUT.with_suffix(".tmp").write_text(json.dumps([r.error.reason if r.has_error() else "" for r in replies]))
    OUT.with_suffix(".tmp").replace(OUT)
"""


def test_a_bundle_that_nobody_trusts_is_refused_with_both_hashes(federation: Deployment) -> None:
    """Whoever can submit a run to the SuperLink cannot have code run at a site, though its round loops run any."""
    before, out = federation.round(), federation.folder / "answers.json"
    app = write_app(federation.folder / "attack")
    settings = app / "pyproject.toml"
    settings.write_text(settings.read_text().replace(APP, "attack"))
    (app / "attack.py").write_text(ATTACK.format(out=str(out), site="lab-"))
    environment = flower_environment(federation.run / "server" / "home")
    command = [*FLWR, "run", str(app), LINK, "--format", "json"]
    said = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert '"success": true' in said.stdout, said.stdout + said.stderr
    federation.until(out.exists, "answers to the foreign run", in_time(90))
    answers = json.loads(out.read_text())
    assert len(answers) == len(federation.processes) - 1
    for answer in answers:
        assert f"this site runs only the nanofed that is installed here, code {code_hash()[:16]}" in answer
        assert "attack.py" in answer
    federation.reach(before + 1)
    federation.no_row_is_merged_twice()


def test_a_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(federation: Deployment) -> None:
    """All of the run's folder is on the disk: checkpoints, SuperLink's database, everybody's logs."""
    assert federation.processes.pop("server").stop() == 143
    before, outside = federation.round(), federation.run
    for folder in sorted((outside / "checkpoints").glob("round_*"))[
        :-2
    ]:  # all were kept, more than the disk is to hold
        shutil.rmtree(folder)
    server = federation.serve(before=small_disk(64 * MIB, outside.parent))
    federation.run = seen_by(server.process.pid, outside)
    federation.reach(before + 1)
    fill(federation.run.parent)
    full, rows = federation.round(), federation.merged_rows()
    # Whoever is the first to need room: a checkpoint, the round's weights, or the SuperLink, whose run ends then.
    words = (
        (f"{outside / 'checkpoints'}/round_", "is not saved, the run goes on"),
        (f"the round's weights cannot be kept in {outside}/server/weights",),
        (f"{outside}/server is full",),
    )
    federation.until(
        lambda: any(all(word in server.output for word in said) for said in words), "word of the full disk", in_time(90)
    )
    assert federation.round() <= full + 1
    federation.manifest()  # what was saved is whole
    free(federation.run.parent)
    federation.reach(full + 2)
    assert federation.merged_rows() > rows
    if words[0][1] in server.output or words[1][0] in server.output:
        assert any(kind == "disk" and client == "server" for kind, client, *_ in federation.state()["events"])
    federation.no_row_is_merged_twice()


def test_everything_ends_in_order(federation: Deployment) -> None:
    assert federation.manifest().kind == "federated"  # its disk goes with the server
    for name in sorted(federation.processes):
        assert federation.processes.pop(name).stop() == 143
