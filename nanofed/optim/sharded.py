"""Muon and AdamW with gradients, state and work sharded over ranks (ZeRO-2)."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.optim.buckets import Bucket, make_buckets
from nanofed.optim.optimizer import MuonAdamW

GATHERED_AHEAD = 3  # buckets whose all-gather may still run while the next is updated: each has a buffer


class DistMuonAdamW(MuonAdamW):
    """`MuonAdamW` for parameters that all ranks hold and whose gradients nobody else reduces.

    Gradients are averaged over ranks, moved once: each rank receives the part that it owns, updates it, and sends the
    parameters back. What the ranks hold afterwards is equal bit by bit; it differs from one rank's result on the same
    global batch only by the order of sums. State takes 1/ranks of the memory.

    A bucket of gradients leaves while the backward pass is still at others: in a backward pass outside of `no_sync()`,
    which must be the last one before the step. The first step learns the order in which buckets get ready, on the first rank
    (as DDP does), and all leave in that order ever after, so ranks cannot disagree. A gradient that has left is None.
    Updates overlap the all-gathers of the buckets before them. No update can begin before all gradients are there,
    because all are clipped by their common norm.

    It takes `MuonAdamW`'s arguments, the same on all ranks, and contiguous parameters. `clip` is against the norm of the averaged
    gradients.

    Attributes:
        grad_norm: norm of the averaged gradients before clipping, the same on all ranks.

    Raises:
        ConfigError: no process group is initialized, or a parameter is not contiguous.
    """

    def __init__(self, param_groups: list[dict[str, Any]], **settings: Any) -> None:
        if not dist.is_initialized():
            raise ConfigError("optimizer: sharding needs torch.distributed to be initialized")
        super().__init__(param_groups, **settings)
        self._ranks = dist.get_world_size()
        self._buckets: list[list[Bucket]] = []  # a list a group
        self._bucket_of: dict[Tensor, Bucket] = {}
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.requires_grad]
            if any(not p.is_contiguous() for p in trained):
                raise ConfigError("optimizer: sharding needs contiguous parameters")
            self._buckets.append(make_buckets(trained, group["kind"]))
        for bucket in self._all():
            for param in bucket.params:
                self._bucket_of[param] = bucket
                param.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket))  # type: ignore[no-untyped-call]
        self._order = self._all()
        self._order_is_learnt = False
        self._no_sync = False
        self._absent: set[Tensor] = set()
        self._arrived: dict[Bucket, set[Tensor]] = defaultdict(set)
        self._ready: list[Bucket] = []

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes only accumulate: for all micro-batches of a step but the last."""
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, those too that have left already in a step that was not finished."""
        for bucket in self._order:
            if bucket.reducing:
                bucket.drop()
        self._arrived.clear()
        self._ready.clear()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state on the first rank, equal in form to `MuonAdamW`'s, and {} on the others.

        All ranks must call it. Tensors arrive on the CPU one parameter after the other, so a device never holds more
        than one of another's.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        flags = torch.tensor([float(p in self.state) for p in parameters], device=parameters[0].device)
        dist.all_reduce(flags)
        known = {p for p, ranks in zip(parameters, flags.tolist(), strict=True) if ranks}
        states = dict(pair for bucket in self._all() for pair in bucket.whole_states(self.state, known))
        if dist.get_rank() != 0:
            return {}
        return {**super().state_dict(), "state": {i: states[p] for i, p in enumerate(parameters) if p in states}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this rank's part of a whole state, `MuonAdamW`'s or the first rank's of any number of ranks.

        Raises:
            ValueError: groups, parameters or shapes differ.
            KeyError: the state dict has no clock.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        parts = {}
        for i, param in enumerate(parameters):
            whole = state_dict["state"].get(i)
            part = self._bucket_of[param].shard_state(param, whole) if whole else None
            if part is not None:
                parts[i] = part
        super().load_state_dict({**state_dict, "state": parts})

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a sharded optimizer cannot be copied or pickled: save its state_dict()")

    def _all(self) -> list[Bucket]:
        return [bucket for buckets in self._buckets for bucket in buckets]

    @torch.no_grad()
    def _on_gradient(self, bucket: Bucket, param: Tensor) -> None:
        if self._no_sync:
            return
        arrived = self._arrived[bucket]
        if param in arrived or bucket.reducing:
            raise RuntimeError(
                "a second backward pass after the gradients have left for the other ranks: put all micro-batches of a "
                "step but the last under optimizer.no_sync()"
            )
        arrived.add(param)
        if len(arrived) == len(bucket.params):
            self._ready.append(bucket)
        if self._order_is_learnt:
            for following in self._order:
                if not following.reducing:
                    if following not in self._ready:
                        break
                    following.reduce()

    def _clip_gradients(self) -> None:
        for bucket in self._order:
            if not bucket.reducing:
                bucket.reduce()
        if not self._order_is_learnt:
            self._learn_order()
        self._arrived.clear()
        self._ready.clear()
        shards = [bucket.shard() for bucket in self._order]
        missing = {p for bucket in self._order for p in bucket.missing}
        # One all-reduce: squares of the owned parts, and how many ranks have each gradient.
        squares = torch.stack(torch._foreach_norm(shards)).square().sum().view(1)
        present = torch.ones(len(self._bucket_of), device=squares.device)
        for i, param in enumerate(self._bucket_of) if missing else ():
            present[i] = float(param not in missing)
        sums = torch.cat([squares, present])
        dist.all_reduce(sums)
        self.grad_norm = sums[0].sqrt() / self._ranks
        scale = torch.full_like(self.grad_norm, 1.0 / self._ranks)
        if self.clip is not None:
            scale *= (self.clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(shards, scale)
        # What has a gradient here has one somewhere; only for what has none here must the device be asked.
        counts = sums[1:].tolist() if missing else []
        self._absent = {p for p, ranks in zip(self._bucket_of, counts, strict=False) if not ranks}

    def _learn_order(self) -> None:
        position = {bucket: i for i, bucket in enumerate(self._order)}
        late = [bucket for bucket in self._order if bucket not in self._ready]
        device = next(iter(self._bucket_of)).device
        order = torch.tensor([position[bucket] for bucket in [*self._ready, *late]], device=device)
        dist.broadcast(order, src=0)
        self._order = [self._order[i] for i in order.tolist()]
        self._order_is_learnt = True

    def _update_all(self, momentum: float) -> None:
        on_the_way: deque[Bucket] = deque()
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            for bucket in buckets:
                owned = [triple for triple in bucket.owned() if triple[0] not in self._absent]
                params = [part for _, part, _ in owned]
                self._update(group, params, [grad for *_, grad in owned], [self.state[p] for p, *_ in owned], momentum)
                bucket.gather()
                on_the_way.append(bucket)
                if len(on_the_way) > GATHERED_AHEAD:
                    on_the_way.popleft().finish()
        for bucket in on_the_way:
            bucket.finish()
