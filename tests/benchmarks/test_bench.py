"""The benchmarks run and say what they promise; their figures are no test's business."""

from __future__ import annotations

import importlib
import json
import math
import random
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nanofed
from nanofed.errors import ConfigError
from nanofed.federated.planning import GOODPUT
from nanofed.model import GPTConfig
from nanofed.training import gemm
from nanofed.training.laps import PHASES
from tests.benchmarks import link, repeats
from tests.benchmarks.__main__ import BENCHMARKS
from tests.benchmarks.corpus import tokenizer_folder
from tests.benchmarks.machine import ROOT
from tests.benchmarks.sides import Setting
from tests.benchmarks.time_to_bpb import seconds_to
from tests.benchmarks.training import Training
from tests.faults.link import HOST, Link
from tests.ranks import in_time

SMALL = ["--depth=1", "--sequence_len=32", "--device_batch_size=8", "--vocab_size=300"]


def run(capsys: pytest.CaptureFixture[str], name: str, *args: str) -> dict[str, Any]:
    """Run a benchmark as `bin/bench NAME ARGS --json` and return the object in its last line."""
    capsys.readouterr()
    assert importlib.import_module(f"tests.benchmarks.{name}").main([*args, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_bench_lists_its_benchmarks_from_anywhere(tmp_path: Path) -> None:
    bench = ROOT / "bin" / "bench"
    done = subprocess.run([bench, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in BENCHMARKS)
    done = subprocess.run([bench, "nonsense"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nonsense" in done.stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_main(name: str) -> None:
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)


@pytest.mark.slow
def test_train_against_the_reference(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--compile=false", "--steps=4", "--memory=false", "--gemm_seconds=0.01", "--against=reference"]
    result = run(capsys, "train", *SMALL, f"--data={corpus}", *options)
    assert {"mfu", "peak_memory_mb"} <= result.keys() and set(result["phases"]) == set(PHASES)
    for figure in ("ratio_forward_backward", "ratio_step", "tokens_per_second"):
        assert result[figure] > 0
    assert 0 < result["gemm_share"] < result["gemm_share_forward_backward"] < 1.5
    sides = result["sides"]
    assert result["ratio_step"] == pytest.approx(sides["reference"]["step_s"] / sides["ours"]["step_s"], rel=1e-3)
    for side in sides.values():  # the clocks of the phases and of whole steps agree
        assert sum(side["phases_ms"].values()) == pytest.approx(side["step_s"] * 1e3, rel=0.5)


@pytest.mark.slow
def test_both_sides_learn_the_same_from_the_same_batches(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--compile=false", "--steps=4", "--every=2", "--eval_batches=1", "--ns_dtype=float32", "--dtype=float32"]
    result = run(capsys, "time_to_bpb", *SMALL, f"--data={corpus}", *options)
    assert result["ratio_seconds"] > 0
    curves = result["curves"]
    assert [point["steps"] for point in curves["ours"]] == [0, 2, 4]
    assert curves["ours"][-1]["bits_per_byte"] < 0.95 * curves["ours"][0]["bits_per_byte"]
    assert result["largest_difference"] < 1e-3


@pytest.mark.slow
def test_trainer_and_the_bare_loop_take_turns(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--blocks=2", "--block=2", "--accumulation=2", "--compile=false", "--accelerator=cpu"]
    result = run(capsys, "trainer", "--size=nearly_nothing", *options, f"--data={corpus}")
    figures = result["sizes"]["nearly_nothing"]
    assert figures["micro_batches"] == 4
    assert figures["cpu"]["trainer_ms"]["median"] > 0 < figures["cpu"]["bare_ms"]["median"]


def test_merge_takes_turns_with_flower(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "merge", "--parameters=200e3", "--clients=2", "--turns=2")
    assert {"gb_per_second", "share_of_copy", "ratio_to_flower"} <= result.keys()
    for codec, worst in (("fp32", 1e-6), ("bf16", 0.05)):
        figures = result["codecs"][codec]
        assert figures["largest_difference"] < worst, "both sides come to the same weights"
        assert figures["gb_per_second"]["median"] > 0 < figures["ratio_to_flower"]["median"]
        assert figures["parts"]["fold"]["share_of_copy"] > 0 < figures["parts"]["flower"]["seconds"]["median"]


@pytest.mark.slow
def test_checkpoint_saves_and_loads(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "checkpoint", "--depth=1", "--vocab_size=300", "--repeat=1", f"--data={corpus}")
    sizes = result["sizes"]["d1"]
    assert sizes["bytes"] > 4 * sizes["parameters"] * 2
    assert sizes["save"]["wall"] > 0 < sizes["load"]["wall"]


@pytest.mark.slow
def test_generate_takes_turns_with_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = ["--vocab_size=300", "--prompt_tokens=8", "--max_tokens=4", "--repeat=1", "--dtypes=float32"]
    result = run(capsys, "generate", "--depths=2", "--batch_sizes=2", *options)
    (figures,) = result["results"]
    assert (figures["depth"], figures["dtype"], figures["batch_size"]) == (2, "float32", 2)
    for what in ("read", "decoded"):
        ours, theirs = (figures[side][what]["median"] for side in ("nanofed", "transformers"))
        assert figures[f"ratio_{what}"] == pytest.approx(ours / theirs, rel=1e-2)


@pytest.mark.slow
def test_startup_counts_all_parts(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, f"--data={corpus}", "--compile=false", "--repeat=1", "--", "--data.streams=2"]
    options.insert(0, "--json")  # behind -- all is the fit's
    capsys.readouterr()
    assert importlib.import_module("tests.benchmarks.startup").main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = {name: part["wall"] for name, part in result["parts"].items()}
    assert {"interpreter", "imports", "config", "data and tokenizer", "model", "optimizer"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(result["seconds"], abs=0.1)  # nothing is counted twice or left out


@pytest.mark.slow
def test_engine_compares_at_equal_tokens(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds=2", "--steps=2", "--eval_tokens=512", "--sides", "fit", "in-process"]
    result = run(capsys, "engine", *SMALL, *options, f"--data={corpus}")
    fit, federated = (result[side]["curve"] for side in ("fit", "in-process"))
    assert [point["tokens"] for point in fit] == [point["tokens"] for point in federated] == [0, 1024, 2048]
    assert fit[0]["bits_per_byte"] == pytest.approx(federated[0]["bits_per_byte"], rel=1e-6)
    assert all(side[-1]["bits_per_byte"] < 0.98 * side[0]["bits_per_byte"] for side in (fit, federated))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are watched through /proc")
@pytest.mark.slow
def test_round_counts_every_second_and_byte(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--depth=1", "--sequence_len=32", "--vocab_size=300", "--rounds=2", "--seconds=240"]
    result = run(capsys, "round", *options, f"--data={corpus}")
    assert 0 < result["overhead_seconds"] < result["round_seconds"]
    # One round is its own median.
    assert sum(result["phases"].values()) == pytest.approx(result["round_seconds"], rel=1e-6)
    payload = 2 * result["parameters"]
    for way in ("bytes_down", "bytes_up"):
        assert payload < result[way] < 1.1 * payload + 1e5
    seen = {"superlink", "serverapp", "supernode", "superexec", "worker"}
    assert seen <= result["peak_rss_mb"].keys()
    assert max(result["peak_rss_mb"].values()) < result["peak_rss_mb_together"]
    # A round of half a second may be over for one of them between two samples of their time. The others wait most of it.
    longer = run(capsys, "round", *options, f"--data={corpus}", "--rounds=8")
    assert all(longer["cpu_seconds"][name] > 0 for name in ("superlink", "serverapp", "worker"))


@pytest.mark.slow
def test_link_measures_rounds_over_limited_lines_and_holds_them_to_the_plan(corpus: str) -> None:
    """At 5 Mbit/s lines are all that counts; the other process of the benchmark leaves no namespace behind."""
    options = ["--depth=2", "--sequence_len=32", "--vocab_size=300", "--rounds=2", "--seconds=240", "--json"]
    lines = ["--sites=1", "--mbit=5", "--codecs=bf16/bf16", "--round_seconds=60"]
    command = [str(ROOT / "bin" / "bench"), "link", *options, *lines, f"--data={corpus}"]
    before = namespaces()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == link.SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (run,) = result["runs"]
    payload = 2 * result["parameters"]
    seconds = 8 * payload / (5e6 * GOODPUT)
    assert 0.8 * seconds < run["phases"]["client pulls"] and 0.8 * seconds < run["phases"]["client pushes"]
    assert run["utilisation"] == pytest.approx(1 - run["overhead_seconds"] / 60)
    assert run["planned_seconds"] > 2 * seconds
    assert namespaces() == before


def namespaces() -> list[str]:
    """The network namespaces of this machine that have a name."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.slow
def test_clients_of_several_speeds_lose_no_time_where_nobody_waits(
    corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of speeds 3 and 1, rounds in which both take the same steps take twice as long as they need."""
    options = ["--speeds", "3", "1", "--rounds=2", "--steps=4", "--eval_tokens=512", "--only=all take the same steps"]
    result = run(capsys, "speeds", *SMALL, f"--data={corpus}", *options)
    rounds, single = result["rounds, all take the same steps"], result["asynchronous, all take the same steps"]
    assert rounds["time"] == 2 and single["time"] < 1.6
    assert single["merges"] > rounds["merges"] == 2 and single["tokens"] >= rounds["tokens"] == 2 * 2 * 4 * 8 * 32


def test_a_far_link_holds_each_byte_back_and_loses_none() -> None:
    """Many are under way at a time: what is sent at once arrives at once."""
    with socket.create_server((HOST, 0)) as server:
        far = Link(server.getsockname()[1], delay=0.1)
        with socket.create_connection((HOST, far.port)) as here:
            there, _ = server.accept()
            with there:
                started, sent = time.monotonic(), random.Random(0).randbytes(1 << 20)
                sender = threading.Thread(target=here.sendall, args=(sent,))
                sender.start()
                arrived = bytearray()
                while len(arrived) < len(sent):
                    arrived += there.recv(1 << 16)
                seconds = time.monotonic() - started
                sender.join()
    far.close()
    assert arrived == sent and 0.1 <= seconds < in_time(2)


def test_a_target_repeats_a_pair_or_a_token_of_its_row_or_is_new() -> None:
    rows = torch.tensor([[1, 2, 3, 1, 2, 4, 2], [5, 5, 5, 6, 7, 8, 9]])
    found = repeats.kinds(rows[:, :-1], rows[:, 1:])
    assert [[repeats.KINDS[kind] for kind in row] for row in found] == [
        ["new", "new", "token", "pair", "new", "token"],
        ["token", "pair", "new", "new", "new", "new"],
    ]


@pytest.mark.slow
def test_repeats_scores_every_byte_as_one_kind(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.depth=1", "--model.sequence_len=32", "--model.compile=false", "--data.device_batch_size=8"]
    data = [f"--data.path={corpus}", f"--data.tokenizer={tokenizer_folder(corpus, 300)}", "--data.eval_tokens=1024"]
    steps = ["--model.recipe.batch_tokens=256", "--model.recipe.num_steps=2", f"--runs_dir={tmp_path}", "--name=two"]
    summary = nanofed.fit(args=[*options, *data, *steps])
    (found,) = run(capsys, "repeats", str(tmp_path / "two"), f"--data={corpus}", "--eval_tokens=1024").values()
    assert found["all"]["bits_per_byte"] == pytest.approx(summary.bpb_end, rel=1e-5)
    shares = [found[kind]["bytes"] for kind in repeats.KINDS]
    assert sum(shares) == pytest.approx(1) and all(shares)
    scores = [found[kind]["bits_per_byte"] for kind in repeats.KINDS]
    assert sum(map(math.prod, zip(shares, scores, strict=True))) == pytest.approx(found["all"]["bits_per_byte"])


def test_link_says_why_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(link, "UNSHARE", ("false",))
    assert link.main([]) == link.SKIPPED
    assert "skipped" in capsys.readouterr().err
    monkeypatch.setattr(link, "UNSHARE", ("no-such-program",))
    assert link.main([]) == link.SKIPPED
    assert "there is no no-such-program here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--mbit=fast", "--mbit=0", "--codecs=bf16", "--codecs=int8/bf17"])
def test_link_refuses_what_it_cannot_measure(option: str) -> None:
    with pytest.raises(ConfigError, match=option.split("=")[0]):
        link.main([option])


def test_memory_is_measured_after_a_reset(corpus: str) -> None:
    setting = Setting(corpus, depth=1, sequence_len=32, vocab_size=300, compile=False)
    peaks = Training("reference", setting).memory(steps=1)
    assert 0 < peaks["forward_backward"] <= peaks["step"] * 1.01


def test_seconds_to_a_figure_lie_between_two_scores() -> None:
    curve = [{"bits_per_byte": b, "wall": s} for b, s in ((4.0, 0.0), (3.0, 10.0), (2.0, 30.0))]
    assert seconds_to(3.5, curve, "wall") == 5.0
    assert seconds_to(2.5, curve, "wall") == 20.0
    assert seconds_to(1.0, curve, "wall") is None


def test_gemm_measures_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "CPU_FLOPS", 1e6)
    rates = gemm.ceiling(GPTConfig.from_depth(1, vocab_size=80), 48, torch.float32, torch.device("cpu"), 0.001)
    assert rates["best"]["wall"] == max(rate["wall"] for name, rate in rates.items() if name != "best")
    assert len(rates) == 6
