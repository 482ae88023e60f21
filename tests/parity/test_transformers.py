"""The same weights in transformers' NanoChatForCausalLM give the same logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.model import GPT, GPTConfig

# nanofed name -> transformers name, of one block
BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def reference(model: GPT, eps: float) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' and huggingface_hub's own deprecations
        from transformers import NanoChatConfig, NanoChatForCausalLM

        c = model.config
        theirs = NanoChatForCausalLM(
            NanoChatConfig(
                vocab_size=c.vocab_size,
                hidden_size=c.n_embd,
                intermediate_size=4 * c.n_embd,
                num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head,
                num_key_value_heads=c.n_kv_head,
                max_position_embeddings=c.sequence_len,
                rms_norm_eps=eps,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                pad_token_id=None,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i in range(c.n_layer):
        for ours, name in BLOCK.items():
            state[f"model.layers.{i}.{name}.weight"] = model.get_parameter(f"transformer.h.{i}.{ours}.weight")
    theirs.load_state_dict(state, strict=True)
    theirs.train(False)
    return theirs


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize(
    ("eps", "tolerance"),
    [
        (torch.finfo(torch.float32).eps, 1e-5),  # October's, which an exported config has to name
        (1e-6, 5e-5),  # transformers' default is another model by that much
    ],
)
def test_logits_equal(n_kv_head: int, eps: float, tolerance: float) -> None:
    config = GPTConfig(sequence_len=64, vocab_size=211, n_layer=4, n_head=4, n_kv_head=n_kv_head, n_embd=128)
    model = GPT(config, rotary_dtype=torch.float32)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 211, (2, 64), generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any():  # head and c_proj start at zero, which would hide every difference
                p.normal_(std=2 / p.size(1) ** 0.5 if name == "lm_head.weight" else 0.08, generator=generator)
        ours, theirs = model(ids), reference(model, eps)(ids).logits
    assert ours.abs().max() > 3
    assert (ours - theirs).abs().max() <= tolerance


def test_bf16_tables_are_what_separates_the_two_by_default() -> None:
    config = GPTConfig(sequence_len=64, vocab_size=211, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    rounded = GPT(config)
    rounded.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 211, (2, 64), generator=generator)
    with torch.no_grad():
        for p in rounded.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=generator)
        difference = (rounded(ids) - reference(rounded, 1e-6)(ids).logits).abs().max()
    assert 1e-5 < difference < 0.05


def test_greedy_generation_equals_generate() -> None:
    config = GPTConfig(sequence_len=64, vocab_size=211, n_layer=4, n_head=4, n_kv_head=2, n_embd=128)
    model = GPT(config, rotary_dtype=torch.float32)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 211, (3, 9), generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2, generator=generator)
    theirs: Any = reference(model, torch.finfo(torch.float32).eps)
    theirs.generation_config.eos_token_id = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    steps = Engine(model).generate(ids.tolist(), Sampling(temperature=0.0), max_tokens=30)
    assert torch.tensor(list(steps)).T.tolist() == expected[:, 9:].tolist()
