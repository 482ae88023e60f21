"""The machine: devices, ranks, compute dtype, cache paths. The only reader of the environment."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nanofed.errors import ConfigError, NanofedError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_STREAMS = 8
_PARENT = os.getppid()  # on import, right after the start: whoever launched this process lives then

# PyTorch asks Linux for 2 MiB pages for large tensors on CPU; it reads this before its first one. A step is 10 to 14 %
# faster (notebooks/LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def base_dir() -> Path:
    """Return the folder of everything that is kept between runs: `NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`."""
    configured = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "nanochat"


def use_base_dir(folder: str) -> None:
    """Make `folder` this process's `base_dir()`: a process that another one started may have to be told."""
    os.environ["NANOCHAT_BASE_DIR"] = folder


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with changes, for a process to be started; None takes a variable out."""
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


def python_path(first: Path) -> str:
    """Return PYTHONPATH with `first` in front, in place of another folder beside it."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(first), *(part for part in path if part and Path(part).parent != first.parent)])


def become(first: Path, command: Sequence[str]) -> NoReturn:
    """Make this process one of `python -m` with `command`, and with `first` in front of all that Python imports from."""
    sys.stdout.flush()
    sys.stderr.flush()
    changed = environment(PYTHONPATH=python_path(first))
    try:
        os.execve(sys.executable, [sys.executable, "-P", "-m", *command], changed)
    except OSError as error:
        raise NanofedError(f"{sys.executable} cannot be started again: {error.strerror}") from error


def flower_home() -> Path:
    """Return the folder in which Flower keeps its connections: `FLWR_HOME`, by default `~/.flwr`."""
    configured = os.environ.get("FLWR_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".flwr"


def cpu_count() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dataset_dir(name: str) -> Path:
    """Return the folder of a dataset: `fineweb-edu` and `demo` live under `base_dir()`, anything else is a path."""
    named = {"fineweb-edu": base_dir() / "base_data", "demo": base_dir() / "demo" / "data"}
    return named.get(name, Path(name).expanduser())


def tokenizer_dir(dataset: str = "fineweb-edu") -> Path:
    """Return the folder of the tokenizer that belongs to a dataset when none is named."""
    return base_dir() / "demo" / "tokenizer" if dataset == "demo" else base_dir() / "tokenizer"


def config_file(name: str) -> Path:
    """Return one of nanofed's own configs: beside the package in a checkout, inside it where it was installed as a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs" / name
    return inside if inside.is_file() else package.parent / "configs" / name


def has_compiler() -> bool:
    """Tell whether the C++ compiler that torch.compile would call on CPU can be found."""
    return shutil.which(_compiler()) is not None


def _compiler() -> str:
    """Return the one C++ compiler that torch.compile looks for: `CXX`, by default g++ (clang++ on macOS)."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def why_not_compiled() -> str | None:
    """Return why torch.compile cannot work on this machine's CPU, None where it can."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = _compiler()
    if not has_compiler():
        if "CXX" not in os.environ:
            return f"there is no C++ compiler ({compiler})"
        hint = " (torch.compile takes it as the name of one program)" if len(compiler.split()) > 1 else ""
        return f"CXX names {compiler!r}, which cannot be run{hint}"
    if not header.is_file():
        return f"Python's own headers are not installed ({header})"
    if any(character.isspace() for character in sysconfig.get_path("purelib")):
        return "torch is installed under a path with a space, which the compiler commands of torch.compile break at"
    return compiler_fault(compiler, "c++", "-std=c++20", "-fopenmp")


@functools.cache
def compiler_fault(compiler: str, language: str, *options: str) -> str | None:
    """Return why a compiler cannot build an extension of Python, None where it can: it builds an empty one (0.4 s).

    Args:
        compiler: name or path of the program.
        language: as the compiler's option -x takes it, `c` or `c++`.
        options: further ones.
    """
    command = [compiler, "-x", language, *options, f"-I{sysconfig.get_path('include')}", "-shared", "-fPIC", "-", "-o"]
    try:
        with tempfile.TemporaryDirectory(prefix="nanofed-") as folder:
            built = subprocess.run(
                [*command, str(Path(folder) / "probe.so")],
                input="#include <Python.h>\n",
                text=True,
                errors="replace",
                capture_output=True,
                timeout=60,
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        return f"the compiler {compiler} cannot be run: {error}"
    if built.returncode == 0:
        return None
    said = built.stderr.strip().splitlines() or built.stdout.strip().splitlines()
    reason = next((line for line in said if "error" in line), said[0] if said else f"exit code {built.returncode}")
    return f"the compiler {compiler} cannot build a trivial program: {reason.strip()[:200]}"


def is_first_rank() -> bool:
    """Tell whether this process is the first one of a run: what a launcher (torchrun, Lightning) announces, else yes."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK"))


def launched_ranks() -> tuple[int, int] | None:
    """Return the ranks of this machine and the number of machines where torchrun has launched this process, else None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


def seconds_to_hold_back() -> float:
    """Return how long this rank keeps to itself an error that the others may have too: before the ranks have met.

    The first rank does not wait, and a launcher ends all ranks of a node as soon as one has ended: then it is said once. Where
    only other nodes have it, their first rank says it; where only this rank has it, nobody ends it before it speaks.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if is_first_rank() or (distributed is not None and distributed.is_available() and distributed.is_initialized()):
        return 0.0
    return 10.0 + int(os.environ.get("LOCAL_RANK", "0"))


def launcher_is_gone() -> bool:
    """Tell whether this process is a rank whose launcher has ended: torchrun's agent, or the first rank of the node.

    A first rank that a person started is nobody's child in this sense: it may outlive its terminal.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
    return launched and os.getppid() != _PARENT


def huggingface_endpoint() -> str:
    """Return the address of the Hugging Face hub: `HF_ENDPOINT`, by default https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def huggingface_token() -> str | None:
    """Return `HF_TOKEN` where it is set: sent as a bearer token with downloads."""
    return os.environ.get("HF_TOKEN") or None


def default_compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of matmuls that is fast on a device: bf16 where the hardware multiplies it natively, else fp32."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def should_compile(wanted: bool | str, device: torch.device | str) -> bool:
    """Decide whether to compile: as asked, and under `auto` where compiling for the device can work.

    Where it cannot, `auto` warns in one line, since an eager model is several times slower.

    Raises:
        ConfigError: compiling is asked for and cannot work.
    """
    import torch

    kind = torch.device(device).type
    if not wanted or (wanted == "auto" and kind == "meta"):
        return False
    why_not = None if kind in ("cuda", "meta") else why_not_compiled()
    if why_not and wanted != "auto":
        raise ConfigError(f"model.compile {wanted}: torch.compile cannot work here, since {why_not}")
    if why_not:
        logger.warning("the model runs eager, which is slower: %s", why_not)
    return why_not is None


def keep_compiled_code() -> None:
    """Have torch.compile keep its kernels under `base_dir()`, where a reboot leaves them, unless a place is set already."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base_dir() / "inductor"))


# Dense bf16 matmul peaks in FLOP/s, from the vendors' data sheets (without sparsity).
_PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device | str) -> float | None:
    """Return the device's bf16 peak in FLOP/s, None where it is not known (CPUs among them)."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), None)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next step: training on CPU allocates the same ones every step.

    By default each of them is mapped and returned to the kernel anew, and its page faults take up to 40 % of a step (tiny
    model, 2 cores: 9,100 tokens/s before, 15,900 after). Blocks of 32 MiB and more still go back: kept, they fragment the
    heap (vocabulary 65,536, d4: 1.7 GB instead of 1.3). Where there is no glibc nothing happens.
    """
    _set_malloc(mmap_threshold=1 << 25, trim_threshold=(1 << 31) - 1)


def return_freed_memory() -> None:
    """Let glibc give blocks of 1 MiB and more back as soon as they are freed, for what needs large ones but once a round.

    Kept, as `keep_freed_memory` has it and glibc itself after the first of them, they fragment the heap of whatever else is
    allocated meanwhile.
    """
    _set_malloc(mmap_threshold=1 << 20, trim_threshold=1 << 17)


def _set_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in (
        (-3, mmap_threshold),
        (-1, trim_threshold),
    ):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        mallopt(parameter, value)
