"""What a fake H100 counts: launches, host synchronisations, collectives, the allocator's peak, the code that inductor writes.

`bin/test --fake-gpu FOLDER tests/gpu` runs these, in about half an hour on two free cores; without the folder they are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanofed.model import GPTConfig
from nanofed.training.memory import Place, Setting
from tests.gpu.fake import FakeGPU

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]


@pytest.fixture
def card(request: pytest.FixtureRequest) -> FakeGPU:
    folder = request.config.getoption("--fake-gpu")
    if not folder:
        pytest.skip("bin/test --fake-gpu FOLDER names a fake H100")
    return FakeGPU(Path(folder).resolve())


# Launches of a micro-batch and of an update, and collectives of a step: no more than these.
@pytest.mark.parametrize(
    ("depth", "rows", "accumulation", "ranks", "forward_backward", "update", "collectives"),
    [(20, 32, 1, 1, 1007, 351, 0), (20, 32, 1, 8, 1019, 219, 21), (32, 8, 2, 1, 1541, 1034, 0)],
)
def test_a_step_waits_for_nothing_and_launches_no_more_than_it_did(
    card: FakeGPU,
    depth: int,
    rows: int,
    accumulation: int,
    ranks: int,
    forward_backward: int,
    update: int,
    collectives: int,
) -> None:
    counted = card.measure(depth=depth, rows=rows, accumulation=accumulation, ranks=ranks)
    micro, step = counted["micro_batches"], counted["update"]
    assert micro["syncs"] == step["syncs"] == 0
    assert micro["launches"] <= accumulation * forward_backward
    assert step["launches"] <= update
    assert micro["colls"] + step["colls"] <= collectives
    assert 1.0 <= estimate(depth, rows, accumulation, ranks) / counted["allocated"] <= 1.08


def estimate(depth: int, rows: int, accumulation: int, ranks: int, *, compiled: bool = True) -> int:
    config, place = GPTConfig.from_depth(depth), Place(torch.device("cuda"), ranks, sharded=True)
    tokens = rows * config.sequence_len * ranks * accumulation
    return Setting(config, rows, tokens, torch.bfloat16, compiled, place).estimate().peak


@pytest.mark.parametrize(("depth", "rows", "accumulation", "ranks"), [(20, 32, 1, 1), (20, 1, 2, 1), (12, 8, 2, 8)])
def test_an_eager_step_takes_its_estimate(card: FakeGPU, depth: int, rows: int, accumulation: int, ranks: int) -> None:
    counted = card.measure(depth=depth, rows=rows, accumulation=accumulation, ranks=ranks, compile=False)
    assert 1.0 <= estimate(depth, rows, accumulation, ranks, compiled=False) / counted["allocated"] <= 1.08


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_has_no_atomic_additions(card: FakeGPU, deterministic: bool, tmp_path: Path) -> None:
    options = {"depth": 2, "rows": 4, "sequence_len": 512, "vocab_size": 2048, "deterministic": deterministic}
    card.measure(**options, environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    atomic = [file for file in tmp_path.rglob("*.py") if "tl.atomic_add" in file.read_text()]
    assert bool(atomic) != deterministic


def test_kernels_are_chosen_as_they_are_named(card: FakeGPU) -> None:
    program = """
import torch
from nanofed import runtime
from nanofed.model import GPTConfig
from nanofed.model.attention import attention_kernel, decoding_kernels
config, device = GPTConfig.from_depth(20), torch.device("cuda")
print(attention_kernel(config, torch.bfloat16, device))
with decoding_kernels():
    print(attention_kernel(config, torch.bfloat16, device))
runtime.be_deterministic()
print(attention_kernel(config, torch.bfloat16, device))
"""
    ended = card.start(["-c", card.prelude + program])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines() == ["cuDNN", "FlashAttention 2", "FlashAttention 2"]


def test_gpu_check_ends(card: FakeGPU) -> None:
    ended = card.start(["bin/gpu-check", "--depth=4", "--rows=2", "--sequence_len=512"], seconds=5400)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    assert "this card computes nothing" in ended.stdout
    assert ended.stdout.splitlines()[-1].endswith(" 0 FAILED")
