"""The machine: devices, ranks, compute dtype, cache paths. The only reader of the environment."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from nanofed.errors import ConfigError, NanofedError
from nanofed.streams import hold_descriptors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_STREAMS = 8
_PARENT = os.getppid()  # on import, right after the start: whoever launched this process lives then

# PyTorch asks Linux for 2 MiB pages for large tensors on CPU; it reads this before its first one. A step is 10 to 14 %
# faster (notebooks/LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
hold_descriptors()


LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that Linux and its file systems take


def user_path(given: str | Path) -> Path:
    """Return a path as a person wrote it, with `~` resolved.

    Raises:
        ConfigError: no file can have that path: this user has no home folder, or a name in it is too long or no text.
    """
    said = repr(str(given)) if len(str(given)) <= 80 else f"{str(given)[:76]!r}…"
    try:
        path = Path(given).expanduser()
        sizes = [len(os.fsencode(part)) for part in (*path.parts, str(path))]
    except RuntimeError:
        raise ConfigError(f"{said}: this user has no home folder; give the full path in the place of ~") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{said} is no text that can name a file") from None
    if "\0" in str(given):
        raise ConfigError(f"{said} is no text that can name a file")
    if max(sizes[:-1], default=0) > LONGEST_NAME or sizes[-1] > LONGEST_PATH:
        raise ConfigError(
            f"{said} is too long a path: a name has {LONGEST_NAME} bytes at most, and all of it {LONGEST_PATH:,}"
        )
    return path


def base_dir() -> Path:
    """Return the folder of everything that is kept between runs: `NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`.

    Raises:
        ConfigError: neither is there: the user has no home folder.
    """
    if configured := os.environ.get("NANOCHAT_BASE_DIR"):
        return user_path(configured)
    try:
        return Path.home() / ".cache" / "nanochat"
    except RuntimeError:
        raise ConfigError("this user has no home folder: set NANOCHAT_BASE_DIR to a folder for what is kept") from None


def make_folder(path: Path, *, mode: int = 0o777) -> Path:
    """Make a folder and those above it, where they are not there yet, and return it.

    Raises:
        NanofedError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
        tempfile.TemporaryFile(dir=path).close()  # a folder that is there may be on a disk that only reads
    except OSError as error:
        raise NanofedError(f"{path} cannot be written: {error.strerror}") from error
    return path


def use_base_dir(folder: str) -> None:
    """Make `folder` this process's `base_dir()`: a process that another one started may have to be told."""
    os.environ["NANOCHAT_BASE_DIR"] = folder


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with changes, for a process to be started; None takes a variable out.

    An empty part of PYTHONPATH, as `$PYTHONPATH:/lib` leaves it, is taken out: to Python it is the working directory.
    """
    changed = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    if "PYTHONPATH" in changed:
        changed["PYTHONPATH"] = os.pathsep.join(filter(None, changed["PYTHONPATH"].split(os.pathsep)))
    return changed


def python(*arguments: str) -> list[str]:
    """Return the command of a Python process of this environment: `python("-m", "nanofed", "info")`.

    Every Python process that nanofed starts is started with this. With `-P` Python imports nothing from the working directory,
    where a file such as `h11.py` of anybody would be run with this user's keys.
    """
    return [sys.executable, "-P", *arguments]


def flower_home() -> Path:
    """Return the folder in which Flower keeps its connections: `FLWR_HOME`, by default `~/.flwr`."""
    configured = os.environ.get("FLWR_HOME")
    return user_path(configured or "~/.flwr")


def wants_tracebacks() -> bool:
    """Tell whether an error's traceback is to be printed besides its line: `NANOFED_DEBUG` is set, and not to 0."""
    return os.environ.get("NANOFED_DEBUG", "0") not in ("", "0")


def cpu_count() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dataset_dir(name: str) -> Path:
    """Return the folder of a dataset: `fineweb-edu` and `demo` live under `base_dir()`, anything else is a path."""
    if name == "fineweb-edu":
        return base_dir() / "base_data"
    return base_dir() / "demo" / "data" if name == "demo" else user_path(name)


def tokenizer_dir(dataset: str = "fineweb-edu") -> Path:
    """Return the folder of the tokenizer that belongs to a dataset when none is named."""
    return base_dir() / "demo" / "tokenizer" if dataset == "demo" else base_dir() / "tokenizer"


def core_dir() -> Path:
    """Return the folder of the CORE bundle when none is named: nanochat's own place."""
    return base_dir() / "eval_bundle"


def config_file(name: str) -> Path:
    """Return one of nanofed's own configs: beside the package in a checkout, inside it where it was installed as a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs" / name
    return inside if inside.is_file() else package.parent / "configs" / name


def why_not_compiled(device: torch.device | str = "cpu") -> str | None:
    """Return why torch.compile cannot work on this machine for a device, None where it can.

    On a CPU it calls the C++ compiler that `CXX` names, by default g++ (clang++ on macOS). On a GPU Triton calls the C compiler
    that `CC` names, by default the first of gcc and clang that there is.
    """
    kind = str(device).partition(":")[0]
    if kind == "meta":
        return None
    if kind == "cuda":
        variable, language = "CC", "C"
        default = "clang" if shutil.which("clang") and not shutil.which("gcc") else "gcc"
    else:
        variable, language, default = "CXX", "C++", "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get(variable) or default
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler) is None:
        if not os.environ.get(variable):
            return f"there is no {language} compiler ({compiler})"
        hint = " (torch.compile takes it as the name of one program)" if len(compiler.split()) > 1 else ""
        return f"{variable} names {compiler!r}, which cannot be run{hint}"
    if not header.is_file():
        return f"Python's own headers are not installed ({header})"
    if kind == "cuda":
        import torch

        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"Triton has no code for a GPU of compute capability {major}.{minor}"
        return compiler_fault(compiler, "c")
    if any(character.isspace() for character in sysconfig.get_path("purelib")):
        return "torch is installed under a path with a space, which the compiler commands of torch.compile break at"
    return compiler_fault(compiler, "c++", "-std=c++20", "-fopenmp")


@functools.cache
def compiler_fault(compiler: str, language: str, *options: str) -> str | None:
    """Return why a compiler cannot build an extension of Python, None where it can: it builds an empty one (0.4 s).

    Args:
        compiler: the program's name or path.
        language: `c` or `c++`, as the compiler's option -x takes it.
        options: further options of the compiler.
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


@dataclass(frozen=True)
class Launch:
    """How this process was started, and as which rank."""

    # `torchrun`, `srun`, `jsrun`, `mpirun`, `lightning` (which starts ranks itself, or whoever sets the variables of its free
    # clusters), `env` (one process a node, torch's `env://` variables: Kubeflow), or nothing: alone.
    by: str = ""
    # This process's number among all ranks; the node's number where only Lightning knows how many ranks a node has.
    rank: int = 0
    local_rank: int = 0  # this process's number among the ranks of its node


RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")  # that Lightning and torch read whoever has set them


def launch() -> Launch:
    """Return how this process was started: the one answer, of which Lightning is told too (`strategy.cluster_environment`).

    An allocation of SLURM in which srun has not started this process (a shell in salloc, the script of sbatch) is no launch.

    Raises:
        ConfigError: a rank variable is set, and no launcher has started this process; or it is no number.
    """
    env = os.environ
    interactive = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "TORCHELASTIC_RUN_ID" in env:
        return Launch("torchrun", _rank("RANK"), _rank("LOCAL_RANK"))
    if {"SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID"} <= env.keys() and not interactive:
        return Launch("srun", _rank("SLURM_PROCID"), _rank("SLURM_LOCALID"))
    if {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"} <= env.keys():
        return Launch("jsrun", _rank("JSM_NAMESPACE_RANK"), _rank("JSM_NAMESPACE_LOCAL_RANK"))
    for size, rank, local in MPI:
        if env.get(size, "1") != "1":
            if importlib.util.find_spec("mpi4py") is None:
                raise ConfigError(
                    f"mpirun has started {env[size]} processes ({size}), and mpi4py is not installed: install it"
                )
            return Launch("mpirun", _rank(rank), _rank(local))
    if "MASTER_PORT" in env and ("LOCAL_RANK" in env or "NODE_RANK" in env):
        node, local_rank = _rank("NODE_RANK" if "NODE_RANK" in env else "GROUP_RANK"), _rank("LOCAL_RANK")
        return Launch("lightning", node or local_rank, local_rank)
    if {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= env.keys():
        return Launch("env", _rank("RANK"))
    if stray := [f"{name}={env[name]}" for name in RANKS if name in env]:
        names = " ".join(item.partition("=")[0] for item in stray)
        raise ConfigError(
            f"{' and '.join(stray)} is set in the environment, and no launcher (torchrun, srun, mpirun, jsrun) has started this "
            f"process: `unset {names}`, or start the ranks with torchrun"
        )
    return Launch()


MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)


def _rank(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ConfigError(f"the environment has {name}={value}, which is no rank: unset it, or let the launcher set it")
    return int(value)


def is_first_rank() -> bool:
    """Tell whether this process is the first one of a run.

    Raises:
        ConfigError: a rank variable is set, and no launcher has started this process.
    """
    return launch().rank == 0


def launched_ranks() -> tuple[int, int] | None:
    """Return the ranks of this machine and the number of machines where torchrun has launched this process, else None."""
    if launch().by != "torchrun":
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


def seconds_to_hold_back() -> float:
    """Return how many seconds this rank waits before it reports an error that other ranks may have as well.

    Before the ranks have met, the same mistake fails on each of them. The first rank reports at once, and a launcher ends all
    ranks of a node as soon as one of them has ended: so the error is reported once. An error that only this rank has is reported
    after the wait.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    try:
        launched = launch()
    except ConfigError:  # nobody has launched this process: there are no others
        return 0.0
    if launched.rank == 0 or (distributed is not None and distributed.is_available() and distributed.is_initialized()):
        return 0.0
    return 10.0 + launched.local_rank


def process_lives(pid: int) -> bool:
    """Tell whether a process of this machine is there, whoever's it is."""
    return psutil.pid_exists(pid)


def launcher_is_gone() -> bool:
    """Tell whether this process is a rank whose launcher has ended: torchrun's agent, or the first rank of the node.

    A first rank that a person started is nobody's child in this sense: it may outlive its terminal.
    """
    launched = launch()
    child = launched.by == "torchrun" or (launched.by == "lightning" and launched.local_rank > 0)
    return child and os.getppid() != _PARENT


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

    if not wanted or (wanted == "auto" and torch.device(device).type == "meta"):
        return False
    why_not = why_not_compiled(device)
    if why_not and wanted != "auto":
        raise ConfigError(f"model.compile {wanted}: torch.compile cannot work here, since {why_not}")
    if why_not:
        logger.warning("the model runs eager, which is slower: %s", why_not)
    return why_not is None


def be_deterministic() -> None:
    """Have PyTorch take kernels whose sums have one order, so that a GPU computes the same bits each time.

    By default the gradients of the embedding and of attention are summed by atomic additions, in whatever order they come.
    A CPU computes the same bits anyway. To be called before CUDA is in use.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Filling new memory is for finding bugs, and costs a pass over all of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_compiled_code() -> None:
    """Have torch.compile keep its kernels under `base_dir()`, where a reboot leaves them, unless a place is set already.

    Where that cannot be written they are kept as long as this process lives, which a warning says.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        folder = str(make_folder(base_dir() / "inductor"))
    except NanofedError as error:
        logger.warning("what is compiled is not kept for the next run: %s", error)
        folder = tempfile.mkdtemp(prefix="nanofed-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


# Dense bf16 matmul peaks in FLOP/s, from the vendors' data sheets (without sparsity), by what a GPU's name holds: the first
# that fits, so cards with less power (PCIe, NVL) stand before the SXM modules of their generation.
_PEAK_FLOPS = {
    r"H100 PCIe|H800 PCIe": 756e12,
    r"H100 NVL|H200 NVL": 835e12,
    r"H100|H200|GH200|H800": 989e12,
    r"H20\b": 148e12,
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"A100|A800": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"RTX 4090$": 165e12,
}


def peak_flops(device: torch.device | str) -> float | None:
    """Return the device's bf16 peak in FLOP/s, None where it is not known (CPUs and parts of a GPU among them)."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:
        return None
    return next((peak for pattern, peak in _PEAK_FLOPS.items() if re.search(pattern, name)), None)


# The oldest NVIDIA driver for the CUDA that a build of torch has, by CUDA's major version (NVIDIA's CUDA compatibility guide).
_DRIVERS = {12: 525, 13: 580}


def why_gpu_is_unused(root: Path = Path("/")) -> str | None:
    """Return why torch cannot use the NVIDIA GPU that is in this machine; None where it can, where none is, or none is wanted.

    Args:
        root: where `proc`, `sys` and `dev` lie.
    """
    import torch

    driver = nvidia_driver(root)
    # A scheduler sets it to a card's number.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if torch.cuda.is_available() or hidden or not (driver or _nvidia_devices(root)):
        return None
    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is a build without CUDA: install another one"
    least = _DRIVERS.get(int(version.split(".")[0]), 0)
    if driver is None:
        return f"no NVIDIA driver is loaded (torch {torch.__version__} needs {least} or newer)"
    if int(driver.split(".")[0]) < least:
        return (
            f"torch {torch.__version__} needs an NVIDIA driver of version {least} or newer and this one is {driver}: update the "
            "driver, or install a torch for an older CUDA (https://pytorch.org/get-started)"
        )
    return f"torch {torch.__version__} finds no GPU that it can open, with driver {driver}"


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Return the version of the NVIDIA driver that Linux has loaded, such as 580.65.06; None where it has none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _nvidia_devices(root: Path) -> list[str]:
    """Return the NVIDIA GPUs that Linux sees on its buses (PCI vendor 0x10de, class 0x03: display controllers)."""
    found = []
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            found.append(device.name)
    return found


@functools.cache  # once a process
def warn_of_unused_gpu(accelerator: str) -> None:
    """Say in one line (a warning) that a run trains on the CPU although a GPU is in the machine, unless `cpu` is asked for."""
    why = why_gpu_is_unused() if accelerator == "auto" else None
    if why and is_first_rank():
        logger.warning("training on the CPU although this machine has an NVIDIA GPU: %s", why)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next step: training on CPU allocates the same ones every step.

    By default each of them is mapped and returned to the kernel anew, and its page faults take up to 40 % of a step (tiny
    model, 2 cores: 9,100 tokens/s before, 15,900 after). Blocks of 32 MiB and more still go back: kept, they fragment the
    heap (vocabulary 65,536, d4: 1.7 GB instead of 1.3). Where there is no glibc nothing happens.
    """
    _set_malloc(mmap_threshold=1 << 25, trim_threshold=(1 << 31) - 1)


def return_freed_memory() -> None:
    """Let glibc give blocks of 1 MiB and more back as soon as they are freed, for what needs large ones but once a round.

    Blocks that are kept, as `keep_freed_memory` has it and glibc itself after the first of them, fragment the heap: at d20 the
    server's round loop holds 9.7 GB with this and 10.1 GB without.
    """
    _set_malloc(mmap_threshold=1 << 20, trim_threshold=1 << 17)


def _set_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD of malloc.h
    mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
