"""The one deployment that all tests of real processes share: it takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanofed.federated.deploy.keys import init
from tests.faults.deployment import Deployment, config, deployment
from tests.federated.tiny import make_corpus


@pytest.fixture(scope="package")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server with TLS, `lab-a` on one device and `lab-b` on two gloo ranks; there are keys for `lab-c`, too."""
    folder = tmp_path_factory.mktemp("deployment")
    corpus = make_corpus(folder / "corpus", 6000)
    keys = init(folder / "keys", ["localhost"], ["lab-a", "lab-b", "lab-c"]).folder
    with deployment(folder, config(corpus, folder, keep_checkpoints=0), keys) as made:
        made.serve()
        made.site("lab-a")
        made.site("lab-b", "--devices", "2")
        made.until(lambda: made.round() > 0 and bool(made.merged("lab-a") and made.merged("lab-b")), "both sites", 300)
        yield made
