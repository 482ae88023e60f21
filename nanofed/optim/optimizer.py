"""One optimizer for the whole model, so that Lightning's automatic optimization sees one object and one state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.optim.adamw import adamw_update
from nanofed.optim.groups import ADAMW_BETAS
from nanofed.optim.muon import muon_update
from nanofed.optim.schedule import Clock, Schedule

_GROUP_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": ADAMW_BETAS, "eps": 1e-10, "weight_decay": 0.0},
    "muon": {"ns_steps": 5},
}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, clipped together and driven by one clock.

    A step takes rate, momentum and memory from the schedule at the clock's position before it (the first is at progress 0),
    clips all gradients by their common norm, updates, and moves the clock. The state dict is torch's with `clock`
    beside it; after a load the next step is bit-identical to the one that would have followed.

    Args:
        param_groups: Dicts with `params`, `lr` (the initial one) and `kind`: "adamw" (with `betas`, `eps`,
            `weight_decay`) or "muon" (with `ns_steps`; matrices only).
        schedule: Rate, momentum and AdamW's memory over the run.
        clock: Where the run is; shared with whoever drives it.
        clip: Greatest global gradient norm, None for no clipping.
        ns_dtype: What Newton–Schulz runs in; by default bf16 where the parameters' device multiplies it natively, else
            fp32.
        compiled: Compile Newton–Schulz on a GPU.

    Attributes:
        grad_norm: Global gradient norm of the last step before clipping, a tensor on the device (reading it waits for
            the device), None before the first step.

    Raises:
        ConfigError: a group is of no known kind, lacks its rate, or gives Muon something that is no matrix.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        schedule: Schedule,
        clock: Clock,
        clip: float | None = 1.0,
        ns_dtype: torch.dtype | None = None,
        compiled: bool = True,
    ) -> None:
        if clip is not None and not 0 < clip < math.inf:
            raise ConfigError(f"optimizer: clip must be positive or null, not {clip!r}")
        self.schedule = schedule
        self.clock = clock
        self.clip = clip
        self.ns_dtype = ns_dtype
        self.compiled = compiled
        self.grad_norm: Tensor | None = None
        super().__init__(param_groups, defaults={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of a known kind, filling in what that kind has defaults for."""
        kind = param_group.get("kind")
        if kind not in _GROUP_DEFAULTS:
            raise ConfigError(f"optimizer: group kind must be one of {', '.join(_GROUP_DEFAULTS)}, not {kind!r}")
        if not 0.0 <= param_group.get("lr", -1.0) < math.inf:
            raise ConfigError(f"optimizer: a {kind} group needs an lr of 0 or more, not {param_group.get('lr')!r}")
        super().add_param_group({**_GROUP_DEFAULTS[kind], "initial_lr": param_group["lr"], **param_group})
        if kind == "muon" and any(p.ndim != 2 for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ConfigError("optimizer: Muon moves matrices only; put other parameters into an adamw group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Run the closure if there is one (Lightning's forward and backward), then move all parameters once.

        Parameters without a gradient are left alone, their state too. Nothing here waits for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._clip_gradients()
        clock = self.clock
        multiplier = self.schedule.multiplier(
            clock.tokens, step_tokens=clock.step_tokens, horizon_tokens=clock.horizon_tokens
        )
        beta2 = self.schedule.beta2(clock.batch_tokens)
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "adamw" and group["betas"][1] != beta2:
                self._remember(group, beta2)
        self._update_all(self.schedule.momentum(clock.step))
        clock.advance()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict with `clock`: `{"step", "tokens"}` beside `state` and `param_groups`."""
        return {**super().state_dict(), "clock": {"step": self.clock.step, "tokens": self.clock.tokens}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parameters' states with AdamW's `betas`, which they were made with, and the clock's position.

        The clock's other values stay, and the groups' rates and decays: they are those of this run's config, which a resumed
        run may have changed.

        Raises:
            ValueError: groups or parameters differ in number (torch's check).
            KeyError: the state dict has no clock.
        """
        clock = state_dict["clock"]  # looked up first: a foreign state dict must not half-apply
        step, tokens = int(clock["step"]), int(clock["tokens"])
        options = [{name: own for name, own in group.items() if name != "betas"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, options, strict=True):
            group.update(own)
        self.clock.step, self.clock.tokens = step, tokens

    def _remember(self, group: dict[str, Any], beta2: float) -> None:
        """Change how long a group remembers; its second moments, corrected for their beginning at 0, stay what they are."""
        beta1, before = group["betas"]
        group["betas"] = (beta1, beta2)
        for param in group["params"]:
            if state := self.state.get(param):
                state["exp_avg_sq"] *= (1 - beta2 ** state["step"]) / (1 - before ** state["step"])

    def __getstate__(self) -> dict[str, Any]:
        # torch's own keeps three attributes only, so a copy would come out without schedule and clock
        mine = {
            name: getattr(self, name) for name in ("schedule", "clock", "clip", "ns_dtype", "compiled", "grad_norm")
        }
        return {**super().__getstate__(), **mine}

    # Sharding over ranks replaces the two methods that follow.

    def _clip_gradients(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip is not None and parameters:
            clip_grads_with_norm_(parameters, self.clip, self.grad_norm)

    def _update_all(self, momentum: float) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._update(group, params, [p.grad for p in params], [self.state[p] for p in params], momentum)

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        momentum: float,
    ) -> None:
        if not params:
            return
        if group["kind"] == "adamw":
            adamw_update(
                params,
                grads,
                states,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        else:
            muon_update(
                params,
                grads,
                states,
                lr=group["lr"],
                momentum=momentum,
                ns_steps=group["ns_steps"],
                ns_dtype=self.ns_dtype or runtime.default_compute_dtype(params[0].device),
                compiled=self.compiled and params[0].is_cuda,
            )
