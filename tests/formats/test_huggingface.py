"""transformers loads what is exported, and computes the same; its folders are read back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nanofed
from nanofed.errors import ConfigError
from nanofed.formats import convert, huggingface
from nanofed.formats.pretrained import Pretrained
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.model import GPT, GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest, read_weights, write_checkpoint
from nanofed.training.summary import Summary
from tests.cli.conftest import TEXTS

RUNS = ["fit_run", "federated_run", "wild"]


def transformers_of(folder: Path) -> tuple[Any, Any]:
    """Load an exported folder as a user of transformers does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def with_fp32_tables(model: GPT) -> GPT:
    """Return the same GPT with the rotary tables that transformers has."""
    twin = GPT(model.config, rotary_dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@pytest.fixture(scope="session")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Export a fixture's run once; return the run and the folder."""
    made: dict[str, tuple[Path, Path]] = {}

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            run = request.getfixturevalue(name)
            made[name] = run, nanofed.export(run, tmp_path_factory.mktemp("hf") / name, licence="cc0-1.0")
        return made[name]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_transformers_computes_the_same(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    run, folder = exported(name)
    loaded = nanofed.load(run, compute_dtype=torch.float32)
    ours, (theirs, tokenizer) = with_fp32_tables(loaded.model), transformers_of(folder)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    ids = torch.randint(0, ours.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids)
        assert logits.abs().max() > 0.1
        assert (logits - theirs(ids).logits).abs().max() <= 1e-5
    prompt = tokenizer("the quick naïve", return_tensors="pt")
    start = prompt["input_ids"][0].tolist()
    greedy, stop_ids = Sampling(temperature=0.0), {loaded.tokenizer.bos_token_id}
    expected = [row[0] for row in Engine(ours).generate([start], greedy, max_tokens=16, stop_ids=stop_ids)]
    made = theirs.generate(**prompt, max_new_tokens=16, do_sample=False)[0, len(start) :].tolist()
    assert made[: len(expected)] == expected
    for text in [*TEXTS[:50], "", "  naïve\n\n\t日本語 12345 it's"]:
        assert tokenizer(text)["input_ids"] == loaded.tokenizer.encode_document(text).tolist()
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == loaded.tokenizer.encode(text)


@pytest.mark.slow
def test_a_conversation_has_the_ids_that_nanochat_gives_it(exported: Callable[[str], tuple[Path, Path]]) -> None:
    run, folder = exported("wild")
    ours, (_, theirs) = nanofed.load(run).tokenizer, transformers_of(folder)
    messages = [
        {"role": "system", "content": "quick"},
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}]},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": [{"type": "python_output", "text": "2"}]},
    ]
    parts = [
        *("<|bos|>", "<|user_start|>", "quick\n\nfox", "<|user_end|>"),
        *("<|assistant_start|>", "a", "<|python_start|>", "1+1", "<|python_end|>", "<|assistant_end|>"),
        *("<|user_start|>", "dog", "<|user_end|>"),
        *("<|assistant_start|>", "<|output_start|>", "2", "<|output_end|>", "<|assistant_end|>", "<|assistant_start|>"),
    ]
    special = ours.special_tokens
    expected = [id_ for part in parts for id_ in ([special[part]] if part in special else ours.encode(part))]
    made = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert made == expected
    with pytest.raises(Exception, match="alternate"):
        theirs.apply_chat_template(messages[2:], tokenize=False)


@pytest.mark.parametrize("name", ["fit_run", "federated_run"])
def test_the_numbers_of_the_card_are_the_runs(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    run, folder = exported(name)
    manifest, summary = read_manifest(find_checkpoint(run)), Summary.read(run)
    assert manifest.data is not None
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["library_name"]) == ("cc0-1.0", "transformers")
    for said in (
        f"| tokens | {summary.tokens:,} |",
        f"| bits per byte, validation | {summary.bpb_end:.4f} |",
        f"| data (fingerprint) | {manifest.data.fingerprint()} |",
        "| tokens in a step | 512 |",
        "matrix_lr 0.02",
    ):
        assert said in card
    assert ("| trained | across 2 clients in 2 rounds |" in card) == (name == "federated_run")
    assert f'from_pretrained("{folder.name}")' in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exported_is_read_back(dtype: Any, wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_SIZE", "100KB")  # as with weights beyond 5 GB
    folder = nanofed.export(wild, tmp_path / "model", dtype=dtype)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert (folder / huggingface.INDEX).is_file()
    there, here = convert.read(folder), Pretrained.from_checkpoint(wild)
    assert there.config == here.config
    assert there.tokenizer.fingerprint == here.tokenizer.fingerprint
    assert there.weights.keys() == here.weights.keys()
    for name, weight in here.weights.items():
        assert torch.equal(there.weights[name], weight.to(getattr(torch, dtype)).float())


def test_parts_that_transformers_cannot_express_are_named(wild: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_00000001"
    path.parent.mkdir()
    weights = {**read_weights(wild), "value_embeds.1.weight": torch.zeros(3), "resid_lambdas": torch.zeros(3)}
    config, tokenizer = read_manifest(wild).model, Tokenizer.load(wild / "tokenizer")
    write_checkpoint(path, kind="fit", weights=weights, state={}, config=config, tokenizer=tokenizer, step=1, tokens=1)
    with pytest.raises(ConfigError, match=r"cannot express: resid_lambdas, value_embeds\.1\.weight; export it with"):
        nanofed.export(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type llama there, nanochat here"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping None there, 15.0 here"),
        ({"rope_parameters": {"rope_theta": 1e5}}, "rope_theta 100000.0 there, 10000.0 here"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type linear there, default here"),
        ({"rope_parameters": [1]}, "cannot be read"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 there"),
        ({"intermediate_size": 100}, "intermediate_size 100 there, 256 here"),
        ({"num_key_value_heads": 3}, "n_kv_head 3 must divide"),
        ({"hidden_size": "wide"}, "hidden_size|intermediate_size"),
        ({"vocab_size": 321}, "ask for"),
        ({"num_hidden_layers": 2}, r"this GPT has no model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"lacks weights of this GPT: transformer\.h\.3"),
    ],
)
def test_another_model_is_refused_by_what_differs(
    changes: dict[str, Any], said: str, exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = exported("wild")
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=said):
        nanofed.load(tmp_path)


def test_sizes_that_the_config_does_not_know_are_named(wild: Path) -> None:
    @dataclass(frozen=True)
    class Windowed(GPTConfig):
        window_pattern: str = "SSSL"

        def __post_init__(self) -> None:
            pass

    here = Pretrained.from_checkpoint(wild)
    config = Windowed(**vars(here.config))
    with pytest.raises(ConfigError, match="cannot express: window_pattern"):
        huggingface.renamed(replace(here, config=config))
