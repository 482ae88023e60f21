"""Where `fit` and `validate` build the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from nanofed import api, runtime
from nanofed.training.fit import start_from
from nanofed.training.module import GPTModule
from tests.cli.conftest import Corpus


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each model was built in the context of the Trainer's device, in order."""
    inside = False
    built: list[bool] = []
    enter, build = SingleDeviceStrategy.tensor_init_context, GPTModule.configure_model

    @contextmanager
    def context(strategy: Any, *args: Any, **options: Any) -> Iterator[None]:
        nonlocal inside
        with enter(strategy, *args, **options):
            inside = True
            yield
            inside = False

    def configure(module: GPTModule) -> None:
        if not hasattr(module, "gpt"):
            built.append(inside)
        build(module)

    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", context)
    monkeypatch.setattr(GPTModule, "configure_model", configure)
    return built


def test_weights_of_another_run_do_not_move_the_model_to_the_host(
    corpus: Corpus, fit_run: Path, built_in: list[bool], tmp_path: Path
) -> None:
    options = {"init_from": str(fit_run), "runs_dir": str(tmp_path), "name": "next", "model.recipe.num_steps": 1}
    summary = api.fit(corpus.fit, overrides=options)
    assert built_in == [True]
    assert summary.curve[0].bpb == pytest.approx(api.validate(corpus.fit, overrides={"ckpt_path": str(fit_run)}))


def test_a_validation_builds_its_model_on_the_device(corpus: Corpus, fit_run: Path, built_in: list[bool]) -> None:
    api.validate(corpus.fit, overrides={"ckpt_path": str(fit_run)})
    assert built_in == [True]


def test_dtype_is_that_of_the_models_device(fit_run: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def dtype(device: torch.device | str) -> torch.dtype:
        asked.append(str(device))
        return torch.float32

    monkeypatch.setattr(runtime, "default_compute_dtype", dtype)
    module = GPTModule(depth=1, sequence_len=32, vocab_size=api.load(fit_run).model.config.vocab_size, compile=False)
    asked.clear()
    start_from(module, fit_run)
    assert asked == []  # the weights wait for the device
    with torch.device("cpu:0"):
        module.configure_model()
    assert asked == ["cpu:0"]
    loaded = api.load(fit_run).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in module.gpt.state_dict().items())
