"""What moves together between ranks: stacks of equally shaped matrices, and flat single parameters.

A bucket cuts its parameters into as many equal shards as there are ranks. It reduce-scatters their gradients, lets its owner
update the shard, and all-gathers the parameters (ZeRO-2: Rajbhandari et al. 2020, arXiv:1910.02054; whole matrices a rank
for Muon as in nanochat's DistMuon). Every collective is asynchronous; who asks for its result waits, a GPU in its stream only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 2**26  # matrices that move together: bounds the buffers, and starts moving before the backward ends

# torch 2.13 renamed both and warns about the old names
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

State = dict[str, Any]


class Bucket(ABC):
    """Parameters whose gradients move together, and the part of them that this rank owns.

    A gradient is gone from its parameter once its bucket is on the way. The order of calls is `reduce`, `shard`, an update
    of `owned()`, `gather`, `finish`; all ranks make them in the same order for the same buckets.

    Args:
        params: contiguous parameters of one dtype and device.

    Attributes:
        missing: the parameters that had no gradient here when the bucket left; zeros travelled in their place.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.missing: list[Tensor] = []
        self._rank = dist.get_rank()
        self._ranks = dist.get_world_size()
        self._grads: Tensor | None = None
        self._whole: Tensor | None = None
        self._work: Any = None

    @property
    def reducing(self) -> bool:
        """Whether the gradients have left."""
        return self._grads is not None

    def reduce(self) -> None:
        """Send the gradients off to be summed over ranks."""
        self.missing = [p for p in self.params if p.grad is None]
        flat = self._gradients()
        for param in self.params:
            param.grad = None
        self._grads = flat.new_empty(flat.numel() // self._ranks)
        self._work = _reduce_scatter(self._grads, flat, async_op=True)

    def shard(self) -> Tensor:
        """Return this rank's part of the summed gradients, flat, padded with zeros."""
        assert self._grads is not None
        self._wait()
        return self._grads

    def drop(self) -> None:
        """Forget the gradients that have left."""
        self._wait()
        self._grads = None

    @abstractmethod
    def owned(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what this rank updates: the parameter, the part of it to move in place, and that part's gradient."""

    def gather(self) -> None:
        """Send off the updated shard, once all of `owned()` has moved."""
        self._whole = self._updated()
        mine = self._whole.view(self._ranks, -1)[self._rank]
        self._work = _all_gather(self._whole.view(-1), mine, async_op=True)
        self._grads = None

    def finish(self) -> None:
        """Put the other ranks' updates into the parameters."""
        self._wait()
        assert self._whole is not None
        self._take(self._whole)
        self._whole = None

    @abstractmethod
    def shard_state(self, param: Tensor, state: Mapping[str, Any]) -> State | None:
        """Return this rank's part of a parameter's whole state, a copy; None if it has none."""

    @abstractmethod
    def whole_states(self, states: Mapping[Tensor, State], known: set[Tensor]) -> Iterator[tuple[Tensor, State]]:
        """Yield whole states on the first rank's CPU, parameter by parameter; all ranks must iterate.

        Args:
            states: this rank's.
            known: parameters that have a state on any rank.
        """

    @abstractmethod
    def _gradients(self) -> Tensor:
        """Return the gradients flat, padded to equal shards."""

    @abstractmethod
    def _updated(self) -> Tensor:
        """Return room for the whole bucket, of which this rank's shard is filled."""

    @abstractmethod
    def _take(self, whole: Tensor) -> None:
        """Copy what all ranks have updated into the parameters."""

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _collect(self, mine: Tensor) -> list[Tensor] | None:
        """Return every rank's tensor on the first rank, None elsewhere."""
        parts = [torch.empty_like(mine) for _ in range(self._ranks)] if self._rank == 0 else None
        dist.gather(mine, parts, dst=0)
        return parts


class MatrixBucket(Bucket):
    """Matrices of one shape, stacked; every rank owns the same number of whole ones, the last of them padding perhaps."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params)
        self._rows = math.ceil(len(params) / self._ranks)
        self._shape = (self._ranks * self._rows, *params[0].shape)
        self._mine = self._owned_by(self._rank)

    def _owned_by(self, rank: int) -> list[Tensor]:
        return self.params[rank * self._rows : (rank + 1) * self._rows]

    def owned(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield whole matrices."""
        grads = self.shard().view(self._rows, *self._shape[1:])
        yield from ((param, param, grad) for param, grad in zip(self._mine, grads, strict=False))

    def shard_state(self, param: Tensor, state: Mapping[str, Any]) -> State | None:
        """Return all of it on the owner."""
        if not any(param is mine for mine in self._mine):
            return None
        _check_shapes(param, state)
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def whole_states(self, states: Mapping[Tensor, State], known: set[Tensor]) -> Iterator[tuple[Tensor, State]]:
        """Collect one matrix of every rank at a time."""
        for row in range(self._rows):
            owners = {rank: owned[row] for rank in range(self._ranks) if row < len(owned := self._owned_by(rank))}
            if not any(param in known for param in owners.values()):
                continue
            mine = owners.get(self._rank)
            kept = states.get(mine) if mine is not None else None
            parts = self._collect(kept["momentum_buffer"] if kept else torch.zeros_like(self.params[0]))
            if parts is None:
                continue
            for rank, param in owners.items():
                if param in known:
                    yield param, {"momentum_buffer": parts[rank].to("cpu", copy=True)}

    def _gradients(self) -> Tensor:
        stack = self.params[0].new_empty(self._shape)
        for row, param in zip(stack, self.params, strict=False):
            row.zero_() if param.grad is None else row.copy_(param.grad)
        stack[len(self.params) :].zero_()
        return stack.view(-1)

    def _updated(self) -> Tensor:
        stack = self.params[0].new_empty(self._shape)
        rows = stack[self._rank * self._rows :]
        for row, param in zip(rows, self._mine, strict=False):
            row.copy_(param)
        rows[len(self._mine) : self._rows].zero_()
        return stack

    def _take(self, whole: Tensor) -> None:
        for row, param in zip(whole, self.params, strict=False):
            param.copy_(row)


class FlatBucket(Bucket):
    """One parameter of any shape, flattened; every rank owns an equal slice of it, the last ones padding perhaps."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params)
        (self._param,) = params
        self._numel = self._param.numel()
        self._slice = math.ceil(self._numel / self._ranks)
        self._divides = self._slice * self._ranks == self._numel
        self._flat: Tensor | None = None

    def owned(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield one slice: of the parameter itself where it divides, else of a padded copy."""
        self._flat = self._padded(self._param)
        yield self._param, self._cut(self._flat), self.shard()

    def shard_state(self, param: Tensor, state: Mapping[str, Any]) -> State:
        """Return a slice of every tensor in it."""
        _check_shapes(param, state)
        return {
            name: self._cut(self._padded(value)).clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def whole_states(self, states: Mapping[Tensor, State], known: set[Tensor]) -> Iterator[tuple[Tensor, State]]:
        """Collect one tensor at a time; what is no tensor is the same on all ranks."""
        if self._param not in known:
            return
        whole: State = {}
        for name, value in states[self._param].items():
            parts = self._collect(value) if isinstance(value, Tensor) else None
            if parts is not None:
                tensor = torch.empty(self._param.shape, dtype=value.dtype)
                for target, part in zip(torch.split(tensor.view(-1), self._slice), parts, strict=False):
                    target.copy_(part[: target.numel()])  # the last ones may be padding
                whole[name] = tensor
            elif not isinstance(value, Tensor):
                whole[name] = value
        if self._rank == 0:
            yield self._param, whole

    def _padded(self, tensor: Tensor) -> Tensor:
        if self._divides:
            return tensor.contiguous().view(-1)
        flat = tensor.new_zeros(self._slice * self._ranks)
        flat[: self._numel].copy_(tensor.reshape(-1))
        return flat

    def _cut(self, flat: Tensor) -> Tensor:
        return flat[self._rank * self._slice : (self._rank + 1) * self._slice]

    def _gradients(self) -> Tensor:
        grad = self._param.grad
        return self._param.new_zeros(self._slice * self._ranks) if grad is None else self._padded(grad)

    def _updated(self) -> Tensor:
        flat = self._padded(self._param) if self._flat is None else self._flat
        self._flat = None
        return flat

    def _take(self, whole: Tensor) -> None:
        if not self._divides:
            self._param.copy_(whole[: self._numel].view(self._param.shape))


def make_buckets(params: list[Tensor], kind: str) -> list[Bucket]:
    """Split a group's parameters: `adamw` ones move alone, `muon` ones in stacks of at most `BUCKET_ELEMENTS`."""
    if kind == "adamw":
        return [FlatBucket([param]) for param in params]
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for param in params:
        alike[param.shape, param.dtype, param.device].append(param)
    ranks = dist.get_world_size()
    buckets: list[Bucket] = []
    for same in alike.values():
        size = ranks * max(1, BUCKET_ELEMENTS // (ranks * same[0].numel()))
        buckets += [MatrixBucket(same[start : start + size]) for start in range(0, len(same), size)]
    return buckets


def _check_shapes(param: Tensor, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape != param.shape:
            raise ValueError(
                f"optimizer state {name} is {tuple(value.shape)}, but its parameter is {tuple(param.shape)}"
            )
