"""`nanofed status`, and runs with other shardings and codecs from end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanofed.cli import main
from nanofed.federated.server.status import FILE, read_status_file
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Instructions, Report
from tests.federated.tiny import Fit, federation, train
from tests.support import BATCH


def burning(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
    if (asked.client, asked.round) == ("client-1", 2):
        raise OSError("it burns \x1b[31m")
    return fit(arrays, asked)


@pytest.mark.parametrize("sharding", ["shards", "full", "local"])
def test_the_status_of_a_run(
    sharding: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"rounds": 3, "eval_every": 3, "sharding": sharding, "up_codec": "bf16", "down_codec": "bf16"}
    config = federation(tiny_corpus, tmp_path, "run", **options)
    loop, _ = train(config, hook=burning)
    bpb = [point.bpb for point in loop.metrics.summary.curve]
    assert bpb[-1] < bpb[0] and loop.metrics.summary.tokens == 5 * BATCH
    assert main(["status", str(config.folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["round"], status["tokens"], status["bpb"]) == (3, 5 * BATCH, bpb[-1])
    assert status["server"]["alive"] is False and status["server"]["phase"] == "ended"
    assert {name: site["rounds"] for name, site in status["sites"].items()} == {"client-0": 3, "client-1": 2}
    assert sum(site["tokens"] for site in status["sites"].values()) == 5 * BATCH
    assert status["events"]["client-1"]["failed"]["count"] == 1
    prefixes = ("client-0/", "client-1/") if sharding == "local" else ("",)
    assert set(status["shards"]) == {f"{prefix}shard_0000{n}.parquet" for prefix in prefixes for n in range(4)}
    rows = {shard.name: shard.num_rows for shard in loop._data.dataset.train}
    merged = sum(shard["epochs_merged"] * rows[name.rpartition("/")[2]] for name, shard in status["shards"].items())
    assert merged == pytest.approx(loop.state.ledger.merged_rows())
    assert main(["status", str(config.folder)]) == 0
    said = capsys.readouterr().out
    assert "round 3, 0.00 M tokens merged of 0.51 M (0%)" in said and r"it burns \x1b[31m" in said
    assert "server: does not run" in said and all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize(
    "said", ["", "{", "[1]", '{"since": "x"}', '{"when": []}', '{"horizon": "x"}', '{"clients": 3}']
)
def test_what_a_server_says_of_itself_may_be_damaged(said: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(said)
    assert read_status_file(tmp_path) is None


@pytest.mark.parametrize(("make", "says"), [(False, "is no run's folder"), (True, "holds no federated run")])
def test_a_folder_of_no_run_is_refused(
    make: bool, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if make:
        (tmp_path / "config.yaml").write_text("name: run\n")
    assert main(["status", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
