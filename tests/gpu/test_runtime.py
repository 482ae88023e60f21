"""What `runtime` says of a GPU that is in the machine: its driver, its compiler, its peak. None is needed for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanofed import runtime
from nanofed.data.writing import write_shards
from nanofed.errors import ConfigError
from nanofed.federated.config import Arguments
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.lightning_cli import FitCLI
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from tests.support import REPOSITORY

GPU = "0000:01:00.0"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runtime.warn_of_unused_gpu.cache_clear()
    yield
    runtime.warn_of_unused_gpu.cache_clear()


def machine(root: Path, *, driver: str | None = None, vendor: str | None = "0x10de", kind: str = "0x030200") -> Path:
    """Lay out what Linux shows of a card on the PCI bus and of a loaded driver."""
    if driver is not None:
        file = root / "proc/driver/nvidia/version"
        file.parent.mkdir(parents=True)
        version = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build"
        file.write_text(f"{version}\nGCC version: 12.3.0\n")
    if vendor is not None:
        device = root / "sys/bus/pci/devices" / GPU
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return root


def torch_is(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, *, works: bool = False) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)


@pytest.mark.parametrize(
    ("version", "cuda", "driver", "says"),
    [
        ("2.11.0+cu130", "13.0", "535.104.05", "needs an NVIDIA driver of version 580 or newer and this one is 535.104.05"),
        ("2.11.0+cu130", "13.0", "579.99", "driver of version 580 or newer"),
        ("2.11.0+cu128", "12.8", "470.82.01", "driver of version 525 or newer"),
        ("2.11.0+cu130", "13.0", "580.65.06", "finds no GPU that it can open, with driver 580.65.06"),
        ("2.13.0+cpu", None, "580.65.06", "is a build without CUDA"),
        ("2.13.0+cpu", None, None, "is a build without CUDA"),
        ("2.11.0+cu130", "13.0", None, "no NVIDIA driver is loaded"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_has_a_reason(
    version: str, cuda: str | None, driver: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_is(monkeypatch, version, cuda)
    why = runtime.why_gpu_is_unused(machine(tmp_path, driver=driver))
    assert why is not None and says in why


def test_a_gpu_that_is_used_hidden_or_not_there_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch_is(monkeypatch, "2.13.0+cpu", None)
    assert runtime.why_gpu_is_unused(tmp_path) is None  # no card at all
    assert runtime.why_gpu_is_unused(machine(tmp_path / "amd", vendor="0x1002")) is None
    assert runtime.why_gpu_is_unused(machine(tmp_path / "audio", kind="0x040300")) is None  # the card's sound device
    with_gpu = machine(tmp_path / "gpu", driver="535.104.05")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime.why_gpu_is_unused(with_gpu) is None  # a person has hidden it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert runtime.why_gpu_is_unused(with_gpu) is not None  # a scheduler has given it to this job
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    torch_is(monkeypatch, "2.11.0+cu130", "13.0", works=True)
    assert runtime.why_gpu_is_unused(with_gpu) is None


def test_falling_back_to_the_cpu_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "why_gpu_is_unused", lambda: "the driver is old")
    runtime.warn_of_unused_gpu("cpu")
    assert caplog.messages == []
    runtime.warn_of_unused_gpu("auto")
    runtime.warn_of_unused_gpu("auto")
    assert caplog.messages == ["training on the CPU although this machine has an NVIDIA GPU: the driver is old"]


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a Hopper card, Triton and Python's headers; compilers are what lies in the folder that is returned."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "include"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    compilers = tmp_path / "bin"
    compilers.mkdir()
    monkeypatch.setenv("PATH", str(compilers))
    runtime.compiler_fault.cache_clear()
    return compilers


def compiler(folder: Path, name: str, script: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_a_c_compiler_it_runs_eager_and_says_why(gpu_machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler(gpu_machine, "g++")  # of no use to Triton
    assert runtime.should_compile("auto", "cuda") is False
    assert caplog.messages == ["the model runs eager, which is slower: there is no C compiler (gcc)"]
    with pytest.raises(ConfigError, match=r"model.compile True: .* there is no C compiler"):
        runtime.should_compile(True, "cuda")
    compiler(gpu_machine, "clang")
    assert runtime.should_compile("auto", "cuda:1") is True


def test_a_compiler_that_compiles_nothing_is_none(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(gpu_machine, "gcc", "echo 'fatal error: stdio.h: No such file' >&2; exit 1")
    assert "the compiler gcc cannot build a trivial program: fatal error" in str(runtime.why_not_compiled("cuda"))
    monkeypatch.setenv("CC", "no-such-compiler")  # which is all that Triton looks for then
    assert "CC names 'no-such-compiler', which cannot be run" in str(runtime.why_not_compiled("cuda"))


def test_headers_triton_and_the_card_are_looked_at_too(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(gpu_machine, "gcc")
    assert runtime.why_not_compiled("cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "compute capability 6.1" in str(runtime.why_not_compiled("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert runtime.why_not_compiled("cuda") == "Triton is not installed"
    (gpu_machine.parent / "include/Python.h").unlink()
    assert "Python's own headers are not installed" in str(runtime.why_not_compiled("cuda"))


def test_newton_schulz_is_eager_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "why_not_compiled", lambda device: "there is no C compiler (gcc)")
    module = GPTModule(depth=1, sequence_len=8, vocab_size=16, recipe=Recipe(batch_tokens=8, num_steps=1))
    module.configure_model()
    assert not module.configure_optimizers().compiled


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of it
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_has_the_peak_of_its_own_kind(name: str, teraflops: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops("cuda") == (None if teraflops is None else teraflops * 1e12)
    assert runtime.peak_flops("cpu") is None


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_deterministic_true_is_for_both_paths(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Asked(Exception):
        pass

    def asked() -> None:
        raise Asked

    monkeypatch.setattr(runtime, "be_deterministic", asked)
    write_shards(["some words of text"] * 8, tmp_path / "data", num_shards=2)
    train_tokenizer(["some words of text"], vocab_size=270).save(tmp_path / "tokenizer")
    args = [f"--data.path={tmp_path / 'data'}", f"--data.tokenizer={tmp_path / 'tokenizer'}", f"--runs_dir={tmp_path}"]
    args += ["--model.depth=1", "--model.compile=false", "--deterministic=true"]
    with pytest.raises(Asked):
        FitCLI([*args, "--trainer.accelerator=cpu"]) if command == "fit" else Arguments.from_args(args).build()


def test_deterministic_means_what_torch_calls_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        runtime.be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_gpu_check_says_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ended = subprocess.run([sys.executable, REPOSITORY / "bin/gpu-check"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr.startswith("gpu-check: no GPU to check")
