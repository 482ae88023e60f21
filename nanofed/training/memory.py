"""The memory that a training run will need, told before it starts: pure functions of its sizes, and what a machine has.

Counted from what the code keeps, not fitted: every tensor that autograd saves in a block, the head's chunks, the optimizer's
states and its temporaries (`tests/training/measure_memory.py` lists them on a CPU, `tests/gpu/step.py --peak` on CUDA). What
allocators keep beyond that is one factor, calibrated there on measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from nanofed.model import GPTConfig
from nanofed.model.attention import BLOCKED_LONGEST
from nanofed.model.blocked_attention import BLOCK
from nanofed.model.loss import chunk_rows, fused_rows
from nanofed.optim.muon import STACK_ELEMENTS

MASTER_BYTES = 4  # weights, gradients and optimizer states are fp32
MIB = 2**20
# A process that has imported everything and opened its data. On CUDA cuBLAS's workspaces (measured: 70 to 120 MB) and the code of
# libraries and kernels; the context is there before one asks how much memory is free.
FLOOR_BYTES = {"cpu": 450 * MIB, "cuda": 96 * MIB}
COMPILER_BYTES = {"cpu": 150 * MIB, "cuda": 0}  # what compiling leaves in the process
# Blocks that are free and do not fit what is asked for next. glibc keeps all of them (`runtime.keep_freed_memory`): measured
# 1.40 to 1.45 at two to four layers, vocabularies of 2,048 to 65,536, eager and compiled. On CUDA it is what the count may be
# wrong by: PyTorch's allocator gives cached blocks back before it fails.
SLACK = {"cpu": 1.4, "cuda": 1.06}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device (on CPU: of one rank), by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    head: int
    update: int
    floor: int
    accumulates: bool
    sharded: bool
    slack: float

    @property
    def peak(self) -> int:
        """The most at once: all activations and the head, or all gradients and the optimizer's temporaries.

        Gradients of earlier micro-batches are there while the next one's activations are. What a sharded optimizer receives is
        there for its update only, DDP's buckets always.
        """
        received, buckets = (self.communication, 0) if self.sharded else (0, self.communication)
        micro_batch = self.activations + self.head + (self.gradients if self.accumulates else 0)
        moving = max(micro_batch, self.gradients + received + self.update)
        return self.floor + self.weights + self.optimizer + buckets + int(self.slack * moving)

    def __str__(self) -> str:
        """Name every part, the largest first."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        named = sorted(((size, name) for name, size in parts.items() if size >= 50 * MIB), reverse=True)
        return ", ".join(f"{name} {format_bytes(size)}" for size, name in named)


def estimate_memory(
    config: GPTConfig,
    *,
    device_batch_size: int,
    compute_dtype: torch.dtype,
    compiled: bool,
    device: str,
    accumulation: int = 1,
    ranks: int = 1,
    sharded: bool = True,
    clients: int = 1,
) -> MemoryEstimate:
    """Estimate the peak of a training run on one device.

    Args:
        config: the sizes of the model.
        device_batch_size: rows of `config.sequence_len` tokens a micro-batch.
        compute_dtype: of activations and matmuls.
        compiled: whether the model is compiled.
        device: `cpu` or `cuda`.
        accumulation: micro-batches an optimizer step.
        ranks: that share a step.
        sharded: whether the optimizer's states are divided over the ranks (ZeRO-2), or whole on each (`ddp`).
        clients: that take turns on the model and keep an optimizer state each.
    """
    masters = MASTER_BYTES * config.num_parameters
    # Embedding and head are AdamW's, with two states; the rest is Muon's, with one.
    tables = MASTER_BYTES * 2 * config.num_embedding_parameters
    owners = ranks if sharded else 1
    communication = 0 if ranks == 1 else masters // ranks if sharded else masters  # received parts, or DDP's buckets
    return MemoryEstimate(
        weights=masters,
        gradients=masters,
        optimizer=clients * (masters + tables) // owners,
        communication=communication,
        activations=activation_bytes(
            config, device_batch_size=device_batch_size, compute_dtype=compute_dtype, compiled=compiled, device=device
        ),
        head=head_bytes(
            config,
            rows=device_batch_size * config.sequence_len,
            compute_dtype=compute_dtype,
            compiled=compiled,
            device=device,
        ),
        update=update_bytes(config, ns_dtype=compute_dtype, owners=owners),
        floor=FLOOR_BYTES[device] + (COMPILER_BYTES[device] if compiled else 0),
        accumulates=accumulation > 1,
        sharded=sharded,
        slack=SLACK[device],
    )


def activation_bytes(
    config: GPTConfig, *, device_batch_size: int, compute_dtype: torch.dtype, compiled: bool, device: str
) -> int:
    """Return the bytes that all blocks keep of a micro-batch for the backward pass.

    A block saves for each token: its input, the residual after attention and both normed (4 widths); queries and keys
    before and after their norm, values, the mixed values; MLP's activations before and after squaring (8 widths). The whole
    attention matrix is never kept. In bf16 the matrices' casts are.

    CUDA's norms and attention keep a number of fp32 for each row beside that. On a CPU the blocked kernel keeps the causal
    half of the attention matrix, and eager norms keep what they are made of: queries and keys before the rotation, in bf16
    copies in fp32 of what is normed.
    """
    tokens = device_batch_size * config.sequence_len
    size = compute_dtype.itemsize
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    elements = 4 * config.n_embd + 3 * queries + 3 * keys + 8 * config.n_embd
    matrices = config.num_parameters - 2 * config.num_embedding_parameters
    casts = matrices * size if compute_dtype != torch.float32 else 0
    if device == "cuda":
        saved = tokens * (elements * size + MASTER_BYTES * (2 + 2 * config.n_head + config.n_kv_head))
        around = tokens * 3 * config.n_embd * size  # the embedding, normed, and what goes into the head
        return config.n_layer * saved + around + casts
    if not compiled:
        elements += queries + keys if compute_dtype == torch.float32 else 2 * config.n_embd + queries + keys
    saved = tokens * elements * size
    if config.sequence_len <= BLOCKED_LONGEST.get(compute_dtype, 0):
        pairs = config.sequence_len * (config.sequence_len + BLOCK) // 2
        saved += device_batch_size * config.n_head * pairs * size
    residual = tokens * config.n_embd * (size + (MASTER_BYTES if size != MASTER_BYTES else 0))  # of the embedding
    # Backward, a block's gradients live beside what it saved: those of the MLP's two activations, the residual's.
    working = tokens * 9 * config.n_embd * size
    return config.n_layer * saved + residual + casts + working


def head_bytes(config: GPTConfig, *, rows: int, compute_dtype: torch.dtype, compiled: bool, device: str) -> int:
    """Return the bytes of the loss head: a chunk of logits, and the gradients that it makes together with the loss.

    On CUDA it is the most that is there at once beside the activations: while the head makes the loss, while its gradients
    are multiplied by the one of the loss, or while the last block, whose activations are all there still, goes backward.
    """
    size = compute_dtype.itemsize
    rounds = compute_dtype != torch.float32
    table = config.num_embedding_parameters  # elements of the head's weight
    hidden = rows * config.n_embd * size
    logits = chunk_rows(rows, config.vocab_size, device) * config.vocab_size * size
    fused = fused_rows(rows, config.vocab_size, device) * config.vocab_size * MASTER_BYTES
    if device == "cuda":
        # Where logits become gradients: without a compiler the capped logits (fp32 ones in place) and their exponentials; then
        # a chunk's part of the weight's gradient.
        fused = max(0 if compiled else fused * (2 if rounds else 1), table * size if rounds else 0)
        loss = logits + fused + table * (MASTER_BYTES + (size if rounds else 0)) + hidden
        scaled = 2 * MASTER_BYTES * table + 2 * hidden
        block = MASTER_BYTES * table + 9 * hidden  # gradients of the MLP's activations and of the residual
        return max(loss, scaled, block)
    # A number of fp32 each where logits become gradients: the capped logit, its exponential, without a compiler their product.
    cast = table * size if rounds else 0
    return logits + fused * (2 if compiled else 3) + 2 * MASTER_BYTES * table + cast + 2 * hidden


def update_bytes(config: GPTConfig, *, ns_dtype: torch.dtype, owners: int) -> int:
    """Return the bytes of the optimizer's largest temporaries: Newton–Schulz of a stack, or AdamW's denominators."""
    layer = 4 * config.n_embd**2  # elements of an MLP matrix, the largest shape
    stacked = max(layer, min(STACK_ELEMENTS, config.n_layer * layer // owners))
    newton_schulz = 5 * stacked * ns_dtype.itemsize  # its input twice, Gram matrix and polynomial, output
    adamw = 2 * MASTER_BYTES * config.num_embedding_parameters // owners
    return max(newton_schulz, adamw)


def format_bytes(size: int) -> str:
    """Write a size in GB, or MB below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
