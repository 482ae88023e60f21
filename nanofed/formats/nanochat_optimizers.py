"""The states of nanochat's two optimizers (October 2025) and of our one, each made of the other.

nanochat saves the state dicts of AdamW, whose parameters are the head and the embedding, and of Muon. Muon's are the matrices of
the blocks, on one process in a group for each number of elements, on several in a group for each shape, and in a group in the
order of the model. `MuonAdamW` has head, embedding and all matrices in the order of the model. Several processes divide
nanochat's states, and it saves the first one's part only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nanofed.formats.pretrained import empty_model
from nanofed.model import GPTConfig
from nanofed.optim import Schedule, parameter_groups
from nanofed.training.checkpoint.atomic import CheckpointError

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
ONE_RANK = "holds the state of one rank of several, and the others' is nowhere"
MOMENTS = ("exp_avg", "exp_avg_sq")
# What a group's options are called by both.
OPTIONS = {"adamw": ("lr", "initial_lr", "betas", "eps", "weight_decay"), "muon": ("lr", "initial_lr", "ns_steps")}


class IncompleteError(CheckpointError):
    """There is no saved state, or only the part of one process of several."""


def read(saved: Any, config: GPTConfig) -> dict[str, Any]:
    """Return the state of `MuonAdamW`, without its clock, that goes on where nanochat's optimizers stood.

    Args:
        saved: nanochat's two state dicts.
        config: the sizes of the model.

    Raises:
        IncompleteError: several processes trained.
        KeyError, TypeError, ValueError, AttributeError: it is no state of these optimizers.
    """
    adamw, muon = saved
    groups = parameter_groups(empty_model(config))
    shapes = [parameter.shape for group in groups for parameter in group["params"]]
    states = {index: _adamw_state(adamw["state"].get(index, {})) for index in (0, 1)} | _muon_states(muon, shapes)
    for index, shape in enumerate(shapes):
        tensors = [value for value in states.get(index, {}).values() if isinstance(value, Tensor)]
        if not tensors or any(tensor.shape != shape for tensor in tensors):
            raise IncompleteError(ONE_RANK)
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(f"a moment of weight {index} is NaN or infinite")
    indices = iter(range(len(shapes)))
    param_groups = []
    for group, theirs in zip(groups, [*adamw["param_groups"], muon["param_groups"][0]], strict=True):
        options = {option: theirs[option] for option in OPTIONS[group["kind"]]}
        if not (math.isfinite(options["lr"]) and math.isfinite(options["initial_lr"])):
            raise ValueError(f"a learning rate of {group['name']} is NaN or infinite")
        params = list(islice(indices, len(group["params"])))
        param_groups.append({"name": group["name"], "kind": group["kind"], **options, "params": params})
    return {"state": states, "param_groups": param_groups}


def write(state: Mapping[str, Any], weights: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
    """Return the state dicts of nanochat's optimizers, as one process has them, that go on where `MuonAdamW` stood.

    Args:
        state: the state dict of `MuonAdamW`.
        weights: the model's weights in its order, as they are exported; moments take their dtypes.
        step: optimizer steps so far, which Muon's momentum follows.
    """
    head, embedding, matrices = state["param_groups"]
    adamw = torch.optim.AdamW([{"params": [weights[HEAD]]}, {"params": [weights[EMBEDDING]]}], fused=True)
    for group, ours in zip(adamw.param_groups, (head, embedding), strict=True):
        group |= {option: ours[option] for option in OPTIONS["adamw"]}
        (weight,), (index,) = group["params"], ours["params"]
        moments = {name: state["state"][index][name].to(weight.dtype) for name in MOMENTS}
        adamw.state[weight] = {"step": torch.tensor(float(state["state"][index]["step"])), **moments}

    blocks = {name: weight for name, weight in weights.items() if name not in (HEAD, EMBEDDING)}
    ours_of = dict(zip(blocks, matrices["params"], strict=True))
    options = {option: matrices[option] for option in OPTIONS["muon"]}
    options |= {"momentum": Schedule().momentum(max(0, step - 1)), "nesterov": True}
    groups: list[dict[str, Any]] = []
    buffers: dict[int, dict[str, Tensor]] = {}
    for elements in {weight.numel() for weight in blocks.values()}:  # in the order of the same set that nanochat makes
        names = [name for name, weight in blocks.items() if weight.numel() == elements]
        groups.append({**options, "params": list(range(len(buffers), len(buffers) + len(names)))})
        for name in names:
            buffers[len(buffers)] = {"momentum_buffer": state["state"][ours_of[name]]["momentum_buffer"]}
    return [adamw.state_dict(), {"state": buffers, "param_groups": groups}]


def _adamw_state(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if not theirs:
        raise IncompleteError(ONE_RANK)
    return {"step": int(theirs["step"]), **{name: theirs[name].float() for name in MOMENTS}}


def _muon_states(muon: Mapping[str, Any], shapes: list[torch.Size]) -> dict[int, dict[str, Any]]:
    """Return Muon's buffers by the number that each matrix has in `MuonAdamW`."""
    states: dict[int, dict[str, Any]] = {}
    for group in muon["param_groups"]:
        if any(index not in muon["state"] for index in group["params"]):
            raise IncompleteError(ONE_RANK)
        buffers = [muon["state"][index]["momentum_buffer"] for index in group["params"]]
        grouped = {buffer.shape for buffer in buffers}
        indices = [index for index, shape in enumerate(shapes) if index > 1 and shape in grouped]
        for index, buffer in zip(indices, buffers, strict=True):
            states[index] = {"momentum_buffer": buffer.float()}
    return states
