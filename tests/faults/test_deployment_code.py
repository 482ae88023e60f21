"""A server with newer code: sites that trust the key which signed it start anew with that, the others refuse it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanofed.federated.server.keys import init
from nanofed.federated.wire.signature import SIGNATURE, Signature
from tests.faults.deployment import Deployment, config, deployment
from tests.federated.tiny import make_corpus
from tests.ranks import REPOSITORY, in_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLLOWS, STAYS = "lab-a", "lab-b"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with another nanofed in it."""
    folder = tmp_path_factory.mktemp("newer")
    shutil.copytree(REPOSITORY / "nanofed", folder / "nanofed", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "nanofed" / "federated" / "site" / "app.py").open("a") as app:
        app.write("# newer\n")
    return folder


def run_from(folder: Path) -> list[str]:
    return ["env", f"PYTHONPATH={folder}"]


def sign(keys: Path, sources: Path) -> Signature:
    """Sign a nanofed by its own command."""
    command = [*run_from(sources), sys.executable, "-P", "-m", "nanofed", "server", "sign", str(keys)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    signature = Signature.from_json((keys / SIGNATURE).read_bytes())
    assert f"signed code {signature.digest[:16]} as number {signature.number}" in said
    return signature


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("code")
    corpus = make_corpus(folder / "corpus", 6000)
    keys = init(folder / "keys", ["localhost"], [FOLLOWS, STAYS]).folder
    sign(keys, REPOSITORY)
    with deployment(folder, config(corpus, folder, **{"federation.round_seconds": 1.0}), keys) as made:
        made.serve()
        made.site(FOLLOWS, "--trust", str(keys / "code.pub"))
        made.site(STAYS)
        made.reach(1, 300)
        for name in (FOLLOWS, STAYS):
            made.takes_part(name)
        yield made


def test_the_site_that_trusts_the_key_follows_and_the_other_stays(federation: Deployment, newer: Path) -> None:
    assert federation.keys is not None
    old = (federation.keys / SIGNATURE).read_bytes()
    first = Signature.from_json(old)
    assert federation.processes.pop("server").stop() == 143
    second = sign(federation.keys, newer)
    assert second.number > first.number and second.digest != first.digest
    since, supervisor = time.time(), federation.processes[FOLLOWS].process.pid
    federation.serve(before=run_from(newer))
    federation.takes_part(FOLLOWS)
    unpacked = federation.folder / FOLLOWS / "code" / second.digest
    site = federation.processes[FOLLOWS]
    assert f"the site starts anew with the signed nanofed in {unpacked}" in site.output
    assert site.process.poll() is None and site.process.pid == supervisor
    for word in ("nanofed site", "site.service", "site.supernode"):
        for pid in site.pids(word):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert any(variable.startswith(f"PYTHONPATH={unpacked}".encode()) for variable in environment), word
    federation.until(lambda: bool(_refusals(federation, since, "installed here")), "refusal", in_time(60))
    assert "nanofed/federated/site/app.py" in _refusals(federation, since, "installed here")[0]
    assert not (federation.folder / STAYS / "code").exists()

    # The older one, signed by the same key, comes again: refused by whoever has run the newer one.
    assert federation.processes.pop("server").stop() == 143
    (federation.keys / SIGNATURE).write_bytes(old)
    since = time.time()
    federation.serve()
    federation.takes_part(STAYS)
    why = f"number {first.number} is older than {second.number}"
    federation.until(lambda: bool(_refusals(federation, since, why)), "refusal of the older one", in_time(60))
    federation.no_row_is_merged_twice()


def test_a_signature_of_other_code_does_not_start_a_server(federation: Deployment, newer: Path) -> None:
    assert federation.processes.pop("server").stop() == 143
    server = federation.serve(before=run_from(newer))
    assert server.process.wait(in_time(60)) == 2
    assert "sign it with `nanofed server sign" in " ".join(server.output.split())
    del federation.processes["server"]


def test_all_end_in_order(federation: Deployment) -> None:
    for name in sorted(federation.processes):
        assert federation.processes.pop(name).stop() == 143


def _refusals(federation: Deployment, since: float, words: str) -> list[str]:
    return [event["reason"] for event in federation.events("", since, "hello") if words in event["reason"]]
