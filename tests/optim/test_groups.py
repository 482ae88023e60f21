from __future__ import annotations

import pytest
import torch
from torch import nn

from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig
from nanofed.optim import parameter_groups


def meta_gpt(depth: int) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(depth))


def test_d20_gets_octobers_rates() -> None:
    groups = {g["name"]: g for g in parameter_groups(meta_gpt(20))}
    scale = (1280 / 768) ** -0.5
    assert groups["head"]["lr"] == pytest.approx(0.004 * scale)
    assert groups["embedding"]["lr"] == pytest.approx(0.2 * scale)
    assert groups["matrices"]["lr"] == 0.02
    for name in ("head", "embedding"):
        assert groups[name]["kind"] == "adamw"
        assert (groups[name]["betas"], groups[name]["eps"], groups[name]["weight_decay"]) == ((0.8, 0.95), 1e-10, 0.0)
    assert groups["matrices"]["kind"] == "muon"
    assert "weight_decay" not in groups["matrices"]


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = meta_gpt(4)
    groups = parameter_groups(model)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert [len(g["params"]) for g in groups] == [1, 1, 24]


def test_scale_reaches_every_group_and_decay_only_adamw() -> None:
    model = meta_gpt(4)
    plain, scaled = parameter_groups(model), parameter_groups(model, lr_scale=0.5, weight_decay=0.1)
    for a, b in zip(plain, scaled, strict=True):
        assert b["lr"] == pytest.approx(a["lr"] / 2)
        assert b.get("weight_decay") == (0.1 if b["kind"] == "adamw" else None)


def test_a_parameter_that_fits_nowhere_is_named() -> None:
    model = meta_gpt(2)
    model.transformer.h[0].register_parameter("gain", nn.Parameter(torch.ones(3)))
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.gain"):
        parameter_groups(model)


def test_tied_weights_are_refused() -> None:
    model = meta_gpt(2)
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.raises(ConfigError, match="lm_head"):
        parameter_groups(model)
