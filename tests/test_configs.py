"""The configurations in configs/: each parses, its model builds, and its numbers are the recipe's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nanofed.federated.config import Arguments, FederationConfig
from nanofed.training.lightning_cli import FitCLI
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe, accumulation_steps
from tests.support import REPOSITORY

CONFIGS = REPOSITORY / "configs"
VOCAB_SIZE = 65_536


class Parsed(FitCLI):
    """The command line up to the resolved config: no tokenizer is loaded, no device asked for."""

    def instantiate_classes(self) -> None:
        pass


@dataclass(frozen=True)
class Expected:
    parameters: int
    num_steps: int
    horizon_tokens: int
    ranks: int
    accumulation: int


FITS = {
    "tiny": Expected(17_170_432, 200, 819_200, 1, 1),
    "d4": Expected(36_700_160, 22_400, 734_003_200, 1, 4),
    "d12": Expected(185_597_952, 7_080, 3_711_959_040, 1, 8),
    "d20": Expected(560_988_160, 21_400, 11_219_763_200, 8, 1),
    "d32": Expected(1_879_048_192, 71_680, 37_580_963_840, 8, 4),
}
FEDERATIONS = {
    "tiny_federated": Expected(17_170_432, 400, 819_200, 1, 1),
    "d20_federated": Expected(560_988_160, 21_400, 11_219_763_200, 1, 8),
}


def parsed(name: str) -> Any:
    path = str(CONFIGS / f"{name}.yaml")
    return Arguments.from_args(["--config", path]).config if name in FEDERATIONS else Parsed(["--config", path]).config


def on_meta(config: Any) -> GPTModule:
    options = {**vars(config.model), "recipe": Recipe(**vars(config.model.recipe)), "vocab_size": VOCAB_SIZE}
    module = GPTModule(**options)
    with torch.device("meta"):
        module.configure_model()
    return module


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*FITS, *FEDERATIONS, "sites"}  # test_planning.py


@pytest.mark.parametrize(("name", "expected"), [*FITS.items(), *FEDERATIONS.items()])
def test_parses_builds_and_has_the_recipe_s_numbers(name: str, expected: Expected) -> None:
    config = parsed(name)
    module = on_meta(config)
    ranks = config.fabric.devices if name in FEDERATIONS else config.trainer.devices
    assert {p.device.type for p in module.gpt.parameters()} == {"meta"}
    assert sum(p.numel() for p in module.gpt.parameters()) == expected.parameters
    assert (module.num_steps, module.clock.horizon_tokens) == (expected.num_steps, expected.horizon_tokens)
    assert (1 if ranks == "auto" else ranks) == expected.ranks
    accumulation = accumulation_steps(
        module.recipe.batch_tokens,
        device_batch_size=config.data.device_batch_size,
        sequence_len=config.data.sequence_len,
        world_size=expected.ranks,
    )
    assert accumulation == expected.accumulation
    assert config.name == name  # so that two configs never meet in one run folder
    assert config.data.sequence_len == config.model.sequence_len
    assert config.data.streams % expected.ranks == 0


@pytest.mark.parametrize("name", ["d12", "d20", "d32", "d20_federated"])
def test_the_large_ones_are_october_nanochat_s(name: str) -> None:
    config = parsed(name)
    recipe = Recipe(**vars(config.model.recipe))
    assert recipe == Recipe(batch_tokens=524_288, tokens_per_parameter=20.0)
    assert (config.model.sequence_len, config.data.path, config.model.compute_dtype) == (2048, "fineweb-edu", "auto")
    assert config.data.eval_tokens == 20 * 524_288


@pytest.mark.parametrize("name", FEDERATIONS)
def test_federations(name: str) -> None:
    federation = FederationConfig(**vars(parsed(name).federation))
    assert (federation.outer, federation.outer_lr, federation.outer_momentum) == ("auto", None, None)
    assert federation.clients == 2


def test_a_federation_is_the_training_of_its_twin() -> None:
    for one, other in (("tiny", "tiny_federated"), ("d20", "d20_federated")):
        models = parsed(one).model, parsed(other).model
        assert on_meta(parsed(one)).clock.horizon_tokens == on_meta(parsed(other)).clock.horizon_tokens
        batch = {"recipe": None}  # of a client may be smaller, and its steps more
        assert vars(models[0]) | batch == vars(models[1]) | batch
        micro_batch = {"device_batch_size": 0}  # of a client may be smaller: they share a batch
        assert vars(parsed(one).data) | micro_batch == vars(parsed(other).data) | micro_batch
