"""Bits per byte by the sites: the figures are the server's own, and measuring them changes nothing of the training."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanofed.api import evaluate
from nanofed.cli import main
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server import evaluation
from nanofed.federated.server.evaluation import ServerModel
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.policy import SITES
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.scheduling import ClientSpeeds
from nanofed.federated.site.client import client_app
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Evaluation, Instructions, Report
from nanofed.federated.wire.weight_transport import WeightTransport
from nanofed.training.module import GPTModule
from tests.federated.tiny import Fit, Site, federation, make_corpus, same_bits, train

pytestmark = pytest.mark.slow

BY_SITES = {"evaluation": "sites", "eval_every": 1}
TEXT = {"data.eval_tokens": 1280, "eval_every": 1}  # 40 rows of 32 tokens


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose validation shard holds more than is read of it."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), 500)


def figures(loop: RoundLoop) -> list[tuple[int, int, float]]:
    return [(point.step, point.tokens, point.bpb) for point in loop.metrics.summary.curve]


@pytest.mark.parametrize(("clients", "every"), [(1, 1), (2, 2), (3, 1)])
def test_sites_measure_what_the_server_would(clients: int, every: int, tiny_corpus: Path, tmp_path: Path) -> None:
    """To the last bit: 8 forward passes of 5 rows, of which a client has 8, 4, or 3, 3 and 2."""
    options = {**TEXT, "clients": clients, "rounds": 3, "eval_every": every}
    here, alone = train(federation(tiny_corpus, tmp_path, "server", **options))
    there, site = train(federation(tiny_corpus, tmp_path, "sites", **options, evaluation="sites"))
    assert figures(there) == figures(here) and len(figures(here)) == (4 if every == 1 else 3)
    assert same_bits(here, there) and not there.state.events.total()
    assert not alone.measured and len(site.asked) == 3 * clients == len(alone.asked)
    assert [asked.round for asked in site.measured[::clients]] == ([1, 2, 3, 3] if every == 1 else [1, 3, 3])


class Killed(BaseException):
    """The server dies."""


@pytest.mark.parametrize("when", ["before the site trains", "after it"])
def test_a_killed_server_goes_on_to_the_same_figures(when: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """The figure of the last saved round was on its way: it is asked for again."""
    options = {**TEXT, **BY_SITES, "rounds": 4}
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", **options))

    def dying(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if asked.round == 3 and when == "before the site trains":
            raise Killed
        answer = fit(arrays, asked)
        if (asked.round, asked.client) == (3, "client-1"):
            raise Killed
        return answer

    with pytest.raises(Killed):
        train(federation(tiny_corpus, tmp_path, "run", **options), hook=dying)
    resumed, site = _resume(federation(tiny_corpus, tmp_path, "run", ckpt_path="last", **options))
    assert [asked.round for asked in site.measured] == [3, 3, 4, 4, 4, 4]
    assert figures(resumed) == figures(whole) and len(figures(whole)) == 5 and same_bits(resumed, whole)
    again, site = _resume(federation(tiny_corpus, tmp_path, "run", ckpt_path="last", **options))
    assert figures(again) == figures(whole) and not site.measured, "all has been measured"


def _resume(config: Federation) -> tuple[RoundLoop, Site]:
    site = Site(config.trainer())
    names = config.federation.client_names
    config.open()
    loop = config.loop(InProcessGrid(client_app(lambda context: site), names))
    loop.train()
    loop.metrics.close()
    return loop, site


def test_sites_with_text_of_their_own_show_both_domains(
    tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each measures the validation shard that only it has; the pool weighs them by bytes."""
    other = tmp_path / "other"
    texts = ["zeta eta theta iota kappa " * (3 + n % 20) for n in range(160)]
    write_shards(texts, other, num_shards=4, rows_per_group=16)
    texts = [str(tiny_corpus / "data"), str(other)]
    options = {**TEXT, **BY_SITES, "rounds": 2, "sharding": "local", "client_data": json.dumps(texts)}
    config = federation(tiny_corpus, tmp_path, "run", **options)
    sums: dict[str, Any] = {"client-0": [], "client-1": []}

    def judge(found: Evaluation) -> Evaluation:
        sums[found.client].append(found)
        return found

    with caplog.at_level(logging.INFO, logger="nanofed"):
        loop, site = train(config, judge=judge)
    assert {asked.shares for asked in site.measured} == {1}
    for number, point in enumerate(loop.metrics.summary.curve):
        parts = [found[number] for found in sums.values()]
        expected = sum(part.nats for part in parts) / math.log(2) / sum(part.bytes for part in parts)
        assert point.bpb == pytest.approx(expected, rel=1e-12) and parts[0].bytes != parts[1].bytes
    last = {name: found[-1].nats / math.log(2) / found[-1].bytes for name, found in sums.items()}
    assert abs(last["client-0"] - last["client-1"]) > 0.1
    scored = evaluate(config.folder, texts, eval_tokens=TEXT["data.eval_tokens"], compute_dtype=torch.float32)
    assert scored.bpb == loop.metrics.summary.bpb_end
    assert [*scored.texts.values()] == pytest.approx([*last.values()])
    assert f" ({texts[0]} {last['client-0']:.4f}, {texts[1]} {last['client-1']:.4f})" in scored.text()
    line = f"(client-0 {last['client-0']:.4f}, client-1 {last['client-1']:.4f})"
    assert any(line in record.getMessage() for record in caplog.records)
    for name, bpb in last.items():
        events = EventAccumulator(str(config.folder / "sites" / name)).Reload()
        assert [event.step for event in events.Scalars("val/bpb")] == [0, 1, 2]
        assert events.Scalars("bpb/by_tokens")[-1].value == pytest.approx(bpb)
    assert main(["status", str(config.folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert {name: (site["bpb"], site["bpb_round"]) for name, site in status["sites"].items()} == {
        name: (pytest.approx(bpb), 2) for name, bpb in last.items()
    }
    assert main(["status", str(config.folder)]) == 0
    assert f" {last['client-1']:.4f}" in capsys.readouterr().out


def test_a_site_too_slow_to_measure_keeps_its_training(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TEXT, **BY_SITES, "rounds": 2}
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", **options))
    monkeypatch.setattr(evaluation, "SHARE_OF_GRACE", 1e-12)
    slow, _ = train(federation(tiny_corpus, tmp_path, "slow", **options))
    assert same_bits(whole, slow) and figures(slow) == [], "a part of the text makes no figure"
    for name in ("client-0", "client-1"):
        event = slow.state.events.last("evaluation", name)
        assert event is not None and event.count == 2 + 1 and "0 batches took more than 3e-10 s" in event.reason
    nobody = slow.state.events.last("evaluation", SERVER)
    assert nobody is not None and nobody.count == 3 and "none of the 2 sites" in nobody.reason


def test_a_disk_that_is_full_at_the_end_costs_the_last_figure_only(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = WeightTransport.encode, itertools.count(1)

    def encode(self: WeightTransport, *args: Any) -> Arrays:
        if next(calls) > 2:
            raise NanofedError("the round's weights cannot be kept: no space left on device")
        return real(self, *args)

    monkeypatch.setattr(WeightTransport, "encode", encode)
    options = {**TEXT, **BY_SITES, "rounds": 2}
    loop, _ = train(federation(tiny_corpus, tmp_path, "run", **options))
    assert loop.state.clock.round == 2 and len(figures(loop)) == 2
    event = loop.state.events.last("evaluation", SERVER)
    assert event is not None and "no space left on device" in event.reason
    resumed, _ = _resume(federation(tiny_corpus, tmp_path, "run", ckpt_path="last", **options))
    assert same_bits(resumed, loop), "the last round is saved"


def test_the_time_of_an_evaluation_is_not_the_trainings(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a client's seconds of training nor what its messages are thought to take grow by it."""
    real, learned = FabricTrainer._measure, []

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return real(*args, **options)

    def learn(self: Any, report: Report, elapsed: float | None, before: float) -> None:
        learned.append((report.seconds, elapsed))

    monkeypatch.setattr(FabricTrainer, "_measure", slowly)
    monkeypatch.setattr(ClientSpeeds, "learn", learn)
    config = federation(tiny_corpus, tmp_path, "run", **(TEXT | BY_SITES), clients=1, rounds=2)
    site = Site(config.trainer())
    grid = InProcessGrid(client_app(lambda context: site), ["client-0"])
    config.open()
    loop = config.loop(grid, policy=SITES)
    loop.train()
    loop.metrics.close()
    assert len(learned) == 2 and len(figures(loop)) == 3
    assert all(seconds < 0.4 and elapsed is not None and elapsed < 0.5 for seconds, elapsed in learned)


def test_a_round_that_fails_asks_again_and_one_below_its_quorum_waits(tiny_corpus: Path, tmp_path: Path) -> None:
    tries: list[int] = []

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        tries.append(asked.round)
        if tries == [1, 1] or tries == [1]:
            raise OSError("the disk is gone")
        return fit(arrays, asked)

    options = {**TEXT, **BY_SITES, "rounds": 5, "availability": 0.5, "quorum": 1, "seed_everything": 3}
    loop, site = train(federation(tiny_corpus, tmp_path, "run", **options), hook=hook)
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", **options))
    assert loop.state.events.total("failed") == 2
    assert figures(loop)[0][0] == 0, "the weights that the failed round had were measured later"
    empty = {1, 2, 3, 4, 5} - {asked.round for asked in site.asked}
    assert empty and not {step for step, _, _ in figures(loop)} & (empty - {5})
    assert whole.state.clock.round == 5


def test_a_model_of_the_servers_own_takes_memory_while_it_is_measured_only(tiny_corpus: Path, tmp_path: Path) -> None:
    def evaluator(*, shared: bool) -> tuple[ServerModel, GPTModule]:
        module, data = federation(tiny_corpus, tmp_path, "run", **TEXT).build()
        return ServerModel(module, data, torch.device("cpu"), shared=shared), module

    shared, model = evaluator(shared=True)
    generator = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in model.gpt.state_dict().items()}
    weights = {name: generator.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    shared.load(weights)
    figure = shared.bits_per_byte()
    shared.release()
    assert shared.bits_per_byte() == figure
    own, module = evaluator(shared=False)
    for _ in range(2):
        own.release()
        assert sum(parameter.numel() for parameter in module.gpt.parameters()) == 0
        own.load(weights)
        assert own.bits_per_byte() == figure
    next(iter(weights.values()))[:] = 0
    assert own.bits_per_byte() == figure, "what becomes of the weights afterwards is not measured"


def test_what_cannot_be_is_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation"):
        federation(tiny_corpus, tmp_path, "run", evaluation="nobody")
    config = federation(tiny_corpus, tmp_path, "run", **BY_SITES, sample_every=2)
    with pytest.raises(ConfigError, match="--sample_every 2: text samples are taken where the server measures"):
        config.open()
    assert not config.folder.exists()


def test_no_gradient_and_no_mode_is_left_behind(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", **(TEXT | BY_SITES), clients=1, rounds=1)
    _, site = train(config)
    gpt = site.real._module.gpt  # type: ignore[attr-defined]
    assert gpt.training and all(p.requires_grad for p in gpt.parameters())
    assert torch.is_grad_enabled()
