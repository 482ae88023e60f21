"""The estimate of a run's memory against measured peaks, what a machine has, and what is suggested where it is too little."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.model import GPTConfig
from nanofed.training import memory
from nanofed.training.memory import (
    MIB,
    MemoryEstimate,
    Place,
    Setting,
    available_bytes,
    check_memory,
    suggest,
)
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe

GB = 10**9
H100 = 83 * GB  # free on an empty one of 80 GB (79.6 GiB)
CPU = torch.device("cpu")


def on_gpu(depth: int, rows: int, *, ranks: int = 8, sharded: bool = True) -> MemoryEstimate:
    place = Place(torch.device("cuda"), ranks, sharded=sharded)
    return Setting(GPTConfig.from_depth(depth), rows, 524_288, torch.bfloat16, True, place).estimate()


def test_what_is_known_to_fit_a_gpu_of_80_gb_fits() -> None:
    # nanochat (karpathy/nanochat, runs/speedrun and run1000): d20 at 32 rows takes 75 GiB, d32 fits at 8 rows.
    assert 70 * GB < on_gpu(20, 32).peak < H100
    assert on_gpu(20, 32, ranks=1).peak < H100
    assert on_gpu(32, 8).peak < H100
    assert on_gpu(32, 32).peak > 2 * H100
    assert on_gpu(20, 64).peak > H100


def test_states_are_divided_over_ranks_only_where_they_are_sharded() -> None:
    config = GPTConfig.from_depth(20)
    one, eight, ddp = on_gpu(20, 8, ranks=1), on_gpu(20, 8), on_gpu(20, 8, sharded=False)
    matrices = config.num_parameters - 2 * config.num_embedding_parameters
    assert one.optimizer == 4 * matrices + 8 * 2 * config.num_embedding_parameters
    assert eight.optimizer == one.optimizer // 8
    assert ddp.optimizer == one.optimizer
    assert one.weights == one.gradients == eight.weights == 4 * config.num_parameters
    assert one.communication == 0 < eight.communication < ddp.communication


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_more_of_anything_needs_more(device: str, dtype: torch.dtype, compiled: bool) -> None:
    place = Place(torch.device(device))
    small = Setting(GPTConfig.from_depth(4, vocab_size=4096, sequence_len=512), 8, 2**16, dtype, compiled, place)
    least = small.estimate().peak
    assert replace(small, device_batch_size=16).estimate().peak > least
    assert replace(small, config=replace(small.config, n_layer=5)).estimate().peak > least
    assert replace(small, config=replace(small.config, vocab_size=8192)).estimate().peak > least
    assert replace(small, config=replace(small.config, sequence_len=1024)).estimate().peak > least
    assert replace(small, place=replace(place, clients=4)).estimate().peak > least
    assert replace(small, batch_tokens=small.device_batch_size * 512).estimate().peak < least  # nothing accumulates


def test_the_parts_are_named() -> None:
    parts = str(on_gpu(32, 8, ranks=1))
    assert parts.startswith("activations 4")
    for part in ("optimizer 8.6 GB", "weights 7.5 GB", "gradients 7.5 GB", "head ", "floor "):
        assert part in parts


# Peaks of PyTorch's allocator over a step after two others, bytes: `bin/test --fake-gpu` measures some of them again.
# depth, rows, accumulation, ranks, sequence_len, vocab_size, dtype, compiled
MEASURED = {
    (20, 32, 1, 1, 2048, 65_536, "bfloat16", True): 68_343_716_352,
    (20, 32, 1, 8, 2048, 65_536, "bfloat16", True): 65_816_517_120,
    (4, 8, 2, 1, 2048, 65_536, "bfloat16", True): 1_956_061_184,
    (12, 8, 4, 1, 2048, 65_536, "bfloat16", True): 9_371_077_632,
    (20, 32, 1, 1, 2048, 65_536, "bfloat16", False): 70_490_778_112,
    (20, 4, 1, 1, 2048, 65_536, "bfloat16", False): 16_912_837_120,
    (20, 1, 2, 1, 2048, 65_536, "bfloat16", False): 12_118_263_808,
    (12, 8, 2, 8, 2048, 65_536, "bfloat16", False): 10_456_322_048,
    (12, 4, 1, 4, 1024, 32_768, "bfloat16", False): 3_895_429_632,
    (12, 32, 1, 1, 2048, 4096, "bfloat16", False): 25_931_102_720,
    (12, 32, 1, 1, 512, 65_536, "float32", False): 15_399_426_560,
    (12, 1, 2, 1, 2048, 65_536, "bfloat16", False): 5_284_816_896,
    (12, 1, 1, 8, 2048, 65_536, "bfloat16", False): 3_513_770_496,
    (4, 8, 1, 1, 2048, 65_536, "bfloat16", False): 3_931_679_232,
}


@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_a_gpu_takes_what_was_estimated_and_hardly_less(
    setting: tuple[int, int, int, int, int, int, str, bool],
) -> None:
    depth, rows, accumulation, ranks, sequence_len, vocab_size, dtype, compiled = setting
    config = GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len)
    place = Place(torch.device("cuda"), ranks, sharded=True)
    tokens = rows * sequence_len * ranks * accumulation
    estimate = Setting(config, rows, tokens, getattr(torch, dtype), compiled, place).estimate()
    assert 1.0 <= estimate.peak / MEASURED[setting] <= 1.08, (estimate.peak / MEASURED[setting], str(estimate))


# --- what would fit


def d20(rows: int = 32, ranks: int = 1) -> Setting:
    on = Place(torch.device("cuda"), ranks, sharded=True)
    return Setting(GPTConfig.from_depth(20), rows, 524_288, torch.bfloat16, True, on)


@pytest.mark.parametrize(
    ("available", "suggestion"),
    [
        (48 * GB, "take data.device_batch_size 16"),
        (24 * GB, "take data.device_batch_size 4"),
        (8 * GB, "take model.depth "),
        (GB // 2, "no model of this vocabulary fits"),
    ],
)
def test_the_largest_that_fits_is_suggested(available: int, suggestion: str) -> None:
    suggested = suggest(d20(), available)
    assert suggested.startswith(suggestion)
    if suggested.startswith("take data.device_batch_size"):
        rows = int(suggested.split()[-1])
        assert d20(rows).divides() and d20(rows).estimate().peak <= available < d20(2 * rows).estimate().peak


def test_only_rows_that_divide_the_batch_are_suggested() -> None:
    setting = replace(d20(ranks=3, rows=24), batch_tokens=3 * 24 * 2048)
    rows = int(suggest(setting, 48 * GB).split()[-1])
    assert 24 % rows == 0 and rows < 24


def test_fp32_may_become_bf16() -> None:
    suggested = suggest(replace(d20(rows=1), compute_dtype=torch.float32), d20(rows=1).estimate().peak)
    assert suggested == "take model.compute_dtype bfloat16"


def module_and_data() -> tuple[GPTModule, TokenDataModule]:
    recipe = Recipe(batch_tokens=2**15, num_steps=1)
    return GPTModule(4, 512, 4096, recipe, compile=False), TokenDataModule("x", device_batch_size=32, sequence_len=512)


def test_too_little_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module, data = module_and_data()
    monkeypatch.setattr(memory, "available_bytes", lambda device, sharing: 10**9 // sharing)
    with pytest.raises(ConfigError, match=r"needs .* 1\.0 GB are free \(activations .*device_batch_size .*--force"):
        check_memory(module, data, Place(CPU), batch_tokens=2**15, force=False)
    with caplog.at_level(logging.WARNING):
        check_memory(module, data, Place(CPU), batch_tokens=2**15, force=True)
    assert caplog.messages[0].startswith("forced: the run needs about")
    monkeypatch.setattr(memory, "available_bytes", lambda device, sharing: 10 * GB // sharing)
    check_memory(module, data, Place(CPU), batch_tokens=2**15, force=False)
    with pytest.raises(ConfigError, match="are free on each of 8 ranks"):
        check_memory(module, data, Place(CPU, ranks=8, local_ranks=8), batch_tokens=2**17, force=False)


# --- what a machine has


def machine(root: Path, *, cgroup: str, files: dict[str, str]) -> Path:
    """Lay out what Linux shows of 8 GiB available, a process that holds 1 MiB, and control groups."""
    content = {
        "proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {8 * 2**20} kB\n",
        "proc/self/status": "Name: x\nVmRSS: 1024 kB\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 0\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "left_mib"),
    [
        ("", {}, 8192),
        ("0::/\n", V2, 8192),
        (
            "0::/job/step\n",
            {
                **{f"job/step/{name}": text for name, text in V2.items()},
                "job/memory.max": f"{3000 * MIB}\n",
                "job/memory.current": f"{1500 * MIB}\n",
                "job/memory.stat": f"anon 7\ninactive_file {500 * MIB}\n",
            },
            2000,
        ),
        (
            "5:cpu:/\n4:memory:/docker/abc\n0::/\n",  # the container's own group is mounted as the root
            {
                "memory/memory.limit_in_bytes": f"{1000 * MIB}\n",
                "memory/memory.usage_in_bytes": f"{400 * MIB}\n",
                "memory/memory.stat": f"cache 1\ntotal_inactive_file {100 * MIB}\n",
            },
            700,
        ),
        (
            "4:cpu,memory:/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "1\n",
                "memory/memory.stat": "",
            },
            8192,
        ),
    ],
)
def test_memory_is_what_machine_and_control_groups_leave(
    cgroup: str, files: dict[str, str], left_mib: int, tmp_path: Path
) -> None:
    root = machine(tmp_path, cgroup=cgroup, files=files)
    assert available_bytes(CPU, root=root) == (left_mib + 1) * MIB
    assert available_bytes(CPU, sharing=4, root=root) == (left_mib + 1) * MIB // 4


def test_a_machine_that_does_not_tell_is_not_asked_twice(tmp_path: Path) -> None:
    assert available_bytes(CPU, root=tmp_path) is None
    assert available_bytes(torch.device("meta")) is None


# --- measured


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"depth": 2, "sequence_len": 256, "vocab_size": 2048, "device_batch_size": 16},
        {"depth": 4, "sequence_len": 256, "vocab_size": 4096, "device_batch_size": 8},
        {"depth": 4, "sequence_len": 512, "vocab_size": 65_536, "device_batch_size": 2},
        {"depth": 2, "sequence_len": 256, "vocab_size": 2048, "device_batch_size": 32, "compile": "true"},
    ],
)
def test_the_estimate_is_near_the_measured_peak(options: dict[str, int | str]) -> None:
    arguments = [f"--{name}={value}" for name, value in options.items()]
    line = [sys.executable, "-m", "tests.training.measure_memory", *arguments]
    measured = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    depth, sequence_len, vocab_size, rows = map(int, list(options.values())[:4])
    config = GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len)
    compiled = "compile" in options
    estimate = Setting(config, rows, 2 * rows * sequence_len, torch.float32, compiled, Place(CPU)).estimate()
    assert 0.8 < estimate.peak / MIB / measured["peak_mib"] < 1.3, (estimate.peak / MIB, str(estimate), measured)
