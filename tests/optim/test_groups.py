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


def test_decay_reaches_only_adamw() -> None:
    for group in parameter_groups(meta_gpt(4), weight_decay=0.1):
        assert group.get("weight_decay") == (0.1 if group["kind"] == "adamw" else None)


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
