"""Whether a run fits into the memory there is, said before it starts, and what would fit if it does not.

What a run needs is counted from what the code keeps, not fitted: every tensor that autograd saves in a block, the head's chunks,
the optimizer's states and its temporaries (`tests/training/measure_memory.py` lists them on a CPU, `tests/gpu/step.py --peak` on
CUDA). What allocators keep beyond that is one factor, calibrated there on measured peaks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from lightning import Trainer

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.model import GPTConfig
from nanofed.model.attention import BLOCKED_LONGEST
from nanofed.model.blocked_attention import BLOCK
from nanofed.model.loss import chunk_rows, fused_rows
from nanofed.optim.muon import STACK_ELEMENTS
from nanofed.training.module import DTYPES, GPTModule
from nanofed.training.strategy import ShardedStrategy

logger = logging.getLogger(__name__)

MASTER_BYTES = 4  # weights, gradients and optimizer states are fp32
MIB = 2**20
# A process that has imported everything and opened its data. On CUDA cuBLAS's workspaces (measured: 70 to 120 MB) and the code of
# libraries and kernels; the context is there before one asks how much memory is free.
FLOOR_BYTES = {"cpu": 450 * MIB, "cuda": 96 * MIB}
COMPILER_BYTES = {"cpu": 150 * MIB, "cuda": 0}  # what compiling leaves in the process
# Free blocks that do not fit the next request. glibc keeps all of them (`runtime.keep_freed_memory`): measured
# 1.40 to 1.45 at two to four layers, vocabularies of 2,048 to 65,536, eager and compiled. On CUDA it is what the count may be
# wrong by: PyTorch's allocator gives cached blocks back before it fails.
SLACK = {"cpu": 1.4, "cuda": 1.06}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device (on CPU: of one rank): the most at once, and by what they are for."""

    peak: int
    weights: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    head: int
    update: int
    floor: int

    def __str__(self) -> str:
        """Name every part, the largest first."""
        parts = sorted(((size, name) for name, size in vars(self).items() if name != "peak"), reverse=True)
        return ", ".join(f"{name} {format_bytes(size)}" for size, name in parts if size >= 50 * MIB)


@dataclass(frozen=True)
class Place:
    """Where an optimizer step is computed."""

    device: torch.device  # the device of this rank
    ranks: int = 1  # the ranks that share a step
    local_ranks: int = 1  # those of the ranks that run on this machine: on CPU they share its memory
    sharded: bool = False  # whether the optimizer's states are divided over the ranks
    clients: int = 1  # the clients of a federation that take turns here, each with an optimizer state of its own
    # Whether ranks will be forked from this process (in a notebook), which must not have touched CUDA then.
    forks: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> Place:
        """Return where a Trainer computes."""
        ranks = trainer.world_size
        sharded = ranks > 1 and isinstance(trainer.strategy, ShardedStrategy)
        launcher = trainer.strategy.launcher
        forks = launcher is not None and launcher.is_interactive_compatible
        return cls(trainer.strategy.root_device, ranks, min(ranks, trainer.num_devices), sharded, forks=forks)

    @property
    def owners(self) -> int:
        """The ranks over which the optimizer's states are divided (ZeRO-2); 1 where each rank has all of them."""
        return self.ranks if self.sharded else 1


@dataclass(frozen=True)
class Setting:
    """What the memory of a run follows from."""

    config: GPTConfig  # the sizes of the model
    device_batch_size: int  # rows of `config.sequence_len` tokens a micro-batch
    batch_tokens: int  # tokens an optimizer step, over all ranks
    compute_dtype: torch.dtype  # the dtype of activations and matmuls
    compiled: bool  # whether the model is compiled
    place: Place  # the device and the ranks

    def estimate(self) -> MemoryEstimate:
        """Return what the run needs on one device.

        The most at once is all activations and the head, or all gradients and the optimizer's temporaries. Gradients of earlier
        micro-batches are there while the next one's activations are. What a sharded optimizer receives is there for its update
        only, DDP's buckets always.
        """
        config, place, device = self.config, self.place, self.place.device.type
        masters = MASTER_BYTES * config.num_parameters
        # Embedding and head are AdamW's, with two states; the rest is Muon's, with one.
        tables = MASTER_BYTES * 2 * config.num_embedding_parameters
        optimizer = place.clients * (masters + tables) // place.owners
        # The parts that a sharded optimizer receives, or DDP's buckets.
        communication = masters // place.owners if place.ranks > 1 else 0
        received, buckets = (communication, 0) if place.sharded else (0, communication)
        activations, head, update = activation_bytes(self), head_bytes(self), update_bytes(self)
        accumulated = masters if self.batch_tokens >= 2 * self._tokens_at_once else 0
        moving = max(activations + head + accumulated, masters + received + update)
        floor = FLOOR_BYTES[device] + (COMPILER_BYTES[device] if self.compiled else 0)
        peak = floor + masters + optimizer + buckets + int(SLACK[device] * moving)
        return MemoryEstimate(
            peak=peak,
            weights=masters,
            gradients=masters,
            optimizer=optimizer,
            communication=communication,
            activations=activations,
            head=head,
            update=update,
            floor=floor,
        )

    def divides(self) -> bool:
        """Tell whether the batch is a whole number of micro-batches."""
        return self.batch_tokens % self._tokens_at_once == 0

    @property
    def _tokens_at_once(self) -> int:
        return self.device_batch_size * self.config.sequence_len * self.place.ranks


def activation_bytes(setting: Setting) -> int:
    """Return the bytes that all blocks keep of a micro-batch for the backward pass.

    A block saves for each token: its input, the residual after attention and both normed (4 widths); queries and keys
    before and after their norm, values, the mixed values; MLP's activations before and after squaring (8 widths). The whole
    attention matrix is never kept. In bf16 the matrices' casts are.

    CUDA's norms and attention keep a number of fp32 for each row beside that. On a CPU the blocked kernel keeps the causal
    half of the attention matrix, and eager norms keep what they are made of: queries and keys before the rotation, in bf16
    copies in fp32 of what is normed.
    """
    config, compute_dtype, size = setting.config, setting.compute_dtype, setting.compute_dtype.itemsize
    tokens = setting.device_batch_size * config.sequence_len
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    elements = 4 * config.n_embd + 3 * queries + 3 * keys + 8 * config.n_embd
    matrices = config.num_parameters - 2 * config.num_embedding_parameters
    casts = matrices * size if compute_dtype != torch.float32 else 0
    if setting.place.device.type == "cuda":
        saved = tokens * (elements * size + MASTER_BYTES * (2 + 2 * config.n_head + config.n_kv_head))
        around = tokens * 3 * config.n_embd * size  # the embedding, normed, and what goes into the head
        return config.n_layer * saved + around + casts
    if not setting.compiled:
        elements += queries + keys if compute_dtype == torch.float32 else 2 * config.n_embd + queries + keys
    saved = tokens * elements * size
    if config.sequence_len <= BLOCKED_LONGEST.get(compute_dtype, 0):
        pairs = config.sequence_len * (config.sequence_len + BLOCK) // 2
        saved += setting.device_batch_size * config.n_head * pairs * size
    residual = tokens * config.n_embd * (size + (MASTER_BYTES if size != MASTER_BYTES else 0))  # of the embedding
    # Backward, a block's gradients live beside what it saved: those of the MLP's two activations, the residual's.
    working = tokens * 9 * config.n_embd * size
    return config.n_layer * saved + residual + casts + working


def head_bytes(setting: Setting) -> int:
    """Return the bytes of the loss head: a chunk of logits, and the gradients that it makes together with the loss.

    On CUDA it is the most that is there at once beside the activations: while the head makes the loss, while its gradients
    are multiplied by the one of the loss, or while the last block, whose activations are all there still, goes backward.
    """
    config, size, device = setting.config, setting.compute_dtype.itemsize, setting.place.device.type
    rows = setting.device_batch_size * config.sequence_len
    rounds = setting.compute_dtype != torch.float32
    table = config.num_embedding_parameters  # elements of the head's weight
    hidden = rows * config.n_embd * size
    logits = chunk_rows(rows, config.vocab_size, device) * config.vocab_size * size
    fused = fused_rows(rows, config.vocab_size, device) * config.vocab_size * MASTER_BYTES
    if device == "cuda":
        # Where logits become gradients: without a compiler the capped logits (fp32 ones in place) and their exponentials; then
        # a chunk's part of the weight's gradient.
        fused = max(0 if setting.compiled else fused * (2 if rounds else 1), table * size if rounds else 0)
        loss = logits + fused + table * (MASTER_BYTES + (size if rounds else 0)) + hidden
        scaled = 2 * MASTER_BYTES * table + 2 * hidden
        block = MASTER_BYTES * table + 9 * hidden  # gradients of the MLP's activations and of the residual
        return max(loss, scaled, block)
    # A number of fp32 each where logits become gradients: the capped logit, its exponential, without a compiler their product.
    cast = table * size if rounds else 0
    return logits + fused * (2 if setting.compiled else 3) + 2 * MASTER_BYTES * table + cast + 2 * hidden


def update_bytes(setting: Setting) -> int:
    """Return the bytes of the optimizer's largest temporaries: Newton–Schulz of a stack, or AdamW's denominators."""
    config, owners = setting.config, setting.place.owners
    layer = 4 * config.n_embd**2  # elements of an MLP matrix, the largest shape
    stacked = max(layer, min(STACK_ELEMENTS, config.n_layer * layer // owners))
    newton_schulz = 5 * stacked * setting.compute_dtype.itemsize  # its input twice, Gram matrix and polynomial, output
    adamw = 2 * MASTER_BYTES * config.num_embedding_parameters // owners
    return max(newton_schulz, adamw)


def format_bytes(size: int) -> str:
    """Write a size in GB, or MB below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def available_bytes(device: torch.device, *, sharing: int = 1, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may have on a device, None where the machine does not tell (macOS).

    On CUDA what the device has free. On CPU what Linux calls available, but no more than the least of what its control
    groups leave, divided among the processes that share it; what this process holds already counts as its own.

    Args:
        device: cpu or cuda; for any other the answer is None.
        sharing: processes on this machine that need as much, this one among them.
        root: where `proc` and `sys` lie.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is None:
        return None
    held = _field(root / "proc/self/status", "VmRSS") or 0
    return (min([available, *_left_in_groups(root)]) + held) // sharing


def _field(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what every control group above this process has left of its limit; page cache that can go counts as free.

    Version 2: `0::/path`, `memory.max`, `memory.current`. Version 1: `4:memory:/path`, `memory.limit_in_bytes`, ….
    Inside a container the path may be of the host's view: then the mounted root is the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inactive = "total_inactive_file" if controllers else "inactive_file"
        group = PurePosixPath(path.lstrip("/"))
        for folder in (base / group, *(base / parent for parent in group.parents)):
            try:
                limit, usage = ((folder / name).read_text().strip() for name in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":  # version 1 writes a number beyond all memory for none
                yield max(0, int(limit) - int(usage) + int(stat.get(inactive, "0")))


def check_memory(module: GPTModule, data: TokenDataModule, place: Place, *, batch_tokens: int, force: bool) -> None:
    """Refuse a run that needs more memory than its device has left, naming what the memory is for and what would fit.

    Raises:
        ConfigError: it does not fit, and `force` is not given.
    """
    if place.forks and place.device.type == "cuda":
        return
    available = available_bytes(place.device, sharing=place.local_ranks)
    if available is None:
        return
    wanted = module.compile_model
    setting = Setting(
        config=module.config,
        device_batch_size=data.device_batch_size,
        batch_tokens=batch_tokens,
        compute_dtype=DTYPES.get(module.compute_dtype, runtime.default_compute_dtype(place.device)),
        compiled=runtime.why_not_compiled(place.device) is None if wanted == "auto" else bool(wanted),
        place=place,
    )
    estimate = setting.estimate()
    if estimate.peak <= available:
        return
    each = f" on each of {place.local_ranks} ranks" if place.local_ranks > 1 else ""
    needs = (
        f"the run needs about {format_bytes(estimate.peak)} of memory and {format_bytes(available)} are free{each} "
        f"({estimate})"
    )
    if force:
        logger.warning("forced: %s", needs)
        return
    raise ConfigError(f"{needs}: {suggest(setting, available)}, or --force true")


def suggest(setting: Setting, available: int) -> str:
    """Return what to change so that a run fits: the rows of a micro-batch if that is enough, else more."""
    fitting = next((s for s in _smaller(setting) if s.estimate().peak <= available), None)
    if fitting is None:
        return "no model of this vocabulary fits, take a smaller one or more memory"
    changes = []
    if fitting.config != setting.config:
        changes.append(f"model.depth {fitting.config.n_layer}")
    if fitting.compute_dtype != setting.compute_dtype:
        changes.append("model.compute_dtype bfloat16")
    if fitting.device_batch_size != setting.device_batch_size:
        changes.append(f"data.device_batch_size {fitting.device_batch_size}")
    return f"take {' and '.join(changes)}"


def _smaller(setting: Setting) -> Iterator[Setting]:
    """Yield settings by what they cost: a smaller micro-batch nothing but time, another dtype rounding, a depth the model."""
    yield from _micro_batches(setting)
    if setting.compute_dtype == torch.float32:
        setting = replace(setting, compute_dtype=torch.bfloat16)
        yield from _micro_batches(setting)
    config = setting.config
    for depth in range((config.n_layer - 1) // 2 * 2, 0, -2):
        smaller = GPTConfig.from_depth(depth, vocab_size=config.vocab_size, sequence_len=config.sequence_len)
        yield from _micro_batches(replace(setting, config=smaller))


def _micro_batches(setting: Setting) -> Iterator[Setting]:
    """Yield the setting with fewer and fewer rows a micro-batch, those that divide the batch."""
    for rows in range(setting.device_batch_size, 0, -1):
        changed = replace(setting, device_batch_size=rows)
        if changed.divides():
            yield changed
