"""One safetensors file: everything is in it, and what is not one of ours is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nanofed
from nanofed.training.checkpoint.atomic import CheckpointError


@pytest.mark.parametrize("name", ["fit_run", "federated_run", "wild"])
def test_a_file_is_the_run(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = request.getfixturevalue(name)
    path = nanofed.export(run, tmp_path / "model.safetensors", to="torch")
    there, here = nanofed.load(path), nanofed.load(run)
    assert there.model.config == here.model.config
    assert there.tokenizer.fingerprint == here.tokenizer.fingerprint
    prompt = "the quick naïve"
    written = ["".join(nanofed.generate(loaded, prompt, max_tokens=20, seed=1)) for loaded in (there, here)]
    assert written[0] == written[1]
    for name_, weight in here.model.state_dict().items():
        assert torch.equal(there.model.get_parameter(name_), weight)


def test_the_metadata_say_what_it_is(fit_run: Path, tmp_path: Path) -> None:
    path = nanofed.export(fit_run, tmp_path / "model.safetensors", to="torch", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model_config"])["n_embd"] == 64
    assert json.loads(metadata["training"])["tokens"] == f"{4 * 512:,}"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "has no 'model_config' in its metadata"),
        ({"model_config": "{}", "tokenizer": "{}"}, "cannot be read: a field is missing"),
        ({"model_config": '{"n_layers": 1}', "tokenizer": "{}"}, "cannot be read: .*n_layers"),
    ],
)
def test_another_file_is_refused(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=said):
        nanofed.load(path)


def test_a_damaged_file_is_refused(wild: Path, tmp_path: Path) -> None:
    path: Any = nanofed.export(wild, tmp_path / "model.safetensors", to="torch")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        nanofed.load(path)
