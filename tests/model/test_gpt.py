from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig


def test_module_names_are_nanochats(model: GPT) -> None:
    expected = {"transformer.wte.weight", "lm_head.weight"}
    for i in range(model.config.n_layer):
        expected |= {f"transformer.h.{i}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")}
        expected |= {f"transformer.h.{i}.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    assert set(model.state_dict()) == expected


def test_initial_weights_have_octobers_spread() -> None:
    model = GPT(GPTConfig.from_depth(4, vocab_size=2048, sequence_len=16))
    model.init_weights(0)
    for name, weight in model.named_parameters():
        if name == "lm_head.weight" or name.endswith("c_proj.weight"):
            assert not weight.any(), name
        else:
            rows, columns = weight.shape
            expected = 1.0 if "wte" in name else min(1, math.sqrt(rows / columns)) / math.sqrt(columns)
            assert weight.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(weight.mean().item()) < 0.02 * expected, name


def test_grouped_query_projections_start_smaller() -> None:
    model = GPT(GPTConfig(sequence_len=8, vocab_size=8, n_layer=1, n_head=8, n_kv_head=2, n_embd=512))
    model.init_weights(0)
    weight = model.get_parameter("transformer.h.0.attn.c_k.weight")  # (128, 512)
    assert weight.std().item() == pytest.approx(0.5 / math.sqrt(512), rel=0.02)


def test_a_seed_gives_the_same_weights_whatever_the_global_generator_does() -> None:
    config = GPTConfig.from_depth(2, vocab_size=64, sequence_len=8)
    first, second, other = GPT(config), GPT(config), GPT(config)
    first.init_weights(7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second.init_weights(7)
    assert torch.equal(before, torch.get_rng_state())
    other.init_weights(8)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])


def test_first_loss_is_that_of_a_uniform_guess(ids: Tensor) -> None:
    model = GPT(GPTConfig.from_depth(2, vocab_size=97, sequence_len=32))
    model.init_weights(0)
    assert model(ids, ids).item() == pytest.approx(math.log(97), rel=1e-6)


def test_logits_are_capped_fp32_and_give_the_loss(model: GPT, ids: Tensor) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # far beyond the cap
    targets = ids.roll(-1, 1)
    logits = model(ids)
    assert logits.shape == (2, 20, 97)
    assert logits.dtype == torch.float32
    assert 14 < logits.abs().max() <= 15
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert torch.allclose(model(ids, targets, reduction="none"), expected)
    assert torch.allclose(model(ids, targets), expected.mean())


def test_ignored_targets_do_not_count(model: GPT, ids: Tensor) -> None:
    targets = ids.clone()
    targets[:, ::2] = -1
    losses = model(ids, targets, reduction="none")
    assert losses.shape == (40,)
    assert not losses[(targets == -1).flatten()].any()
    assert torch.allclose(model(ids, targets), losses[(targets != -1).flatten()].mean())


def test_no_position_sees_a_later_one(model: GPT, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert not difference[:10].any()
    assert difference[10:].all()


def test_gradient_reaches_every_parameter(model: GPT, ids: Tensor) -> None:
    model(ids, ids.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert p.grad.abs().sum() > 0, name


def test_bf16_matmuls_leave_weights_gradients_and_logits_in_fp32(model: GPT, ids: Tensor) -> None:
    half = copy.deepcopy(model)
    half.compute_dtype = torch.bfloat16
    seen: list[torch.dtype] = []
    for block in half.transformer.h:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    loss = half(ids, ids.roll(-1, 1))
    loss.backward()
    assert seen == [torch.bfloat16] * 3
    assert loss.dtype == torch.float32
    for p in half.parameters():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32
    full = model(ids, ids.roll(-1, 1))
    assert loss.item() == pytest.approx(full.item(), rel=0.01)
    assert loss.item() != full.item()


def test_sequences_beyond_the_rotary_tables_are_refused(model: GPT) -> None:
    model(torch.zeros(1, 320, dtype=torch.long))
    with pytest.raises(ConfigError, match="321 tokens"):
        model(torch.zeros(1, 321, dtype=torch.long))


class TestRotaryTables:
    """They are in no checkpoint, so every way to get a model must leave them right."""

    def test_they_are_not_saved(self, model: GPT) -> None:
        assert not {"cos", "sin"} & set(model.state_dict())

    def test_values(self, model: GPT) -> None:
        position, pair, width = 37, 3, model.config.head_dim
        angle = position / 10_000 ** (2 * pair / width)
        assert model.cos.dtype == torch.bfloat16
        assert model.cos[position, 0, pair] == torch.tensor(math.cos(angle)).bfloat16()
        assert model.sin[position, 0, pair] == torch.tensor(math.sin(angle)).bfloat16()

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    def test_after_meta_and_a_state_dict(self, model: GPT, ids: Tensor, assign: bool, nested: bool) -> None:
        with torch.device("meta"):
            loaded = GPT(model.config)
        owner: torch.nn.Module = torch.nn.ModuleDict({"net": loaded}) if nested else loaded
        state: dict[str, Any] = dict(model.state_dict())
        if nested:
            state = {f"net.{name}": value for name, value in state.items()}
        if not assign:
            owner.to_empty(device="cpu")
        owner.load_state_dict(state, strict=True, assign=assign)
        assert torch.equal(loaded(ids), model(ids))

    def test_after_meta_and_initialisation(self, ids: Tensor) -> None:
        config = GPTConfig.from_depth(2, vocab_size=97, sequence_len=32)
        with torch.device("meta"):
            late = GPT(config)
        with pytest.raises(ConfigError, match="to_empty"):
            late.init_weights(3)
        late.to_empty(device="cpu").init_weights(3)
        early = GPT(config)
        early.init_weights(3)
        assert torch.equal(late.cos, early.cos)
        assert torch.equal(late.sin, early.sin)
        assert all(torch.equal(a, b) for a, b in zip(late.parameters(), early.parameters(), strict=True))

    def test_after_a_change_of_dtype(self, model: GPT, ids: Tensor) -> None:
        before = model(ids)
        model.rotary_dtype = torch.float32
        model.bfloat16().float()
        exact = torch.outer(torch.arange(320.0), 1 / 10_000 ** (torch.arange(0, 16, 2) / 16))
        assert torch.allclose(model.cos[:, 0], exact.cos(), atol=1e-6)
        assert not torch.equal(before, model(ids))

    def test_after_a_copy(self, model: GPT, ids: Tensor) -> None:
        assert torch.equal(copy.deepcopy(model)(ids), model(ids))


@pytest.mark.slow
@pytest.mark.skipif(runtime.why_not_compiled() is not None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compiles_in_place_without_a_graph_break(model: GPT, ids: Tensor) -> None:
    names = list(model.state_dict())
    targets = ids.roll(-1, 1)
    plain = model(ids, targets)
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.compile(fullgraph=True)
    loss = model(ids, targets)
    loss.backward()
    assert torch.allclose(loss, plain, rtol=1e-5)
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, grad, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == names
