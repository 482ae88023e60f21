from __future__ import annotations

import pytest

from nanofed.errors import ConfigError
from nanofed.model import GPTConfig
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe, accumulation_steps

D20 = GPTConfig.from_depth(20)  # 560,988,160 parameters at a vocabulary of 65,536


def test_the_default_is_nanochat_s_speedrun() -> None:
    recipe = Recipe()
    assert (recipe.batch_tokens, recipe.clip, recipe.weight_decay) == (524_288, 1.0, 0.0)
    assert (recipe.embedding_lr, recipe.head_lr, recipe.matrix_lr) == (0.2, 0.004, 0.02)
    assert recipe.schedule.beta2(recipe.batch_tokens) == 0.95
    assert recipe.steps(D20) == 21_400
    assert recipe.horizon(D20) == 11_219_763_200


def test_rates_and_decays_reach_the_optimizer() -> None:
    recipe = Recipe(embedding_lr=0.5, head_lr=0.25, matrix_lr=0.125, adamw_beta2=0.999, weight_decay=0.1)
    module = GPTModule(depth=1, sequence_len=16, vocab_size=64, recipe=recipe, compile=False)
    module.configure_model()
    optimizer = module.configure_optimizers()
    optimizer.step()
    groups = {group["name"]: group for group in optimizer.param_groups}
    width = (module.config.n_embd / 768) ** -0.5
    assert {name: group["initial_lr"] for name, group in groups.items()} == pytest.approx(
        {"head": 0.25 * width, "embedding": 0.5 * width, "matrices": 0.125}
    )
    assert all(
        (groups[name]["betas"], groups[name]["weight_decay"]) == ((0.8, 0.999), 0.1) for name in ("head", "embedding")
    )


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (Recipe(num_steps=7), 7),
        (Recipe(horizon_tokens=10 * 524_288), 10),
        (Recipe(horizon_tokens=11 * 524_288 - 1), 10),  # a part of a step is not taken
        (Recipe(horizon_tokens=1), 1),  # but the first one is
        (Recipe(tokens_per_parameter=20), 21_400),
        (Recipe(tokens_per_parameter=10), 10_700),
        (Recipe(tokens_per_parameter=20, batch_tokens=262_144), 42_800),
        (Recipe(horizon_flops=100 * 524_288 * 3_491_758_080), 100),
        (Recipe(horizon_flops=11_219_763_200 * 3_491_758_080), 21_400),  # the same run as of 20 tokens a parameter
    ],
)
def test_horizons(recipe: Recipe, steps: int) -> None:
    assert recipe.steps(D20) == steps
    assert recipe.horizon(D20) == steps * recipe.batch_tokens


def test_flops_of_a_token() -> None:
    # 6 for every parameter but the embedding, and 12 layers heads width length for attention (PaLM, appendix B).
    matmul = 560_988_160 - 65_536 * 1280
    assert D20.flops_per_token() == 6 * matmul + 12 * 20 * 10 * 128 * 2048 == 3_491_758_080


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "model.recipe.batch_tokens must be at least 1, not 0"),
        ({"tokens_per_parameter": 0}, "model.recipe.tokens_per_parameter must be positive, not 0"),
        ({"warmup_ratio": 0.5, "warmdown_ratio": 0.6}, "more than the whole horizon"),
        ({"num_steps": 1, "horizon_flops": 1e18}, r"horizon 2 times \(num_steps, horizon_flops\)"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)  # type: ignore[arg-type]


def test_the_schedule_has_the_recipe_s_ratios() -> None:
    schedule = Recipe(warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=0.1).schedule
    assert schedule.lr_multiplier(0.5) == 1.0
    assert schedule.lr_multiplier(0.8) == pytest.approx(0.55)  # half of the way from 1 to 0.1
    assert schedule.lr_multiplier(1.0) == pytest.approx(0.1)
    assert Recipe().schedule.lr_multiplier(0.9) == pytest.approx(0.5)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_few_ranks_accumulate_what_many_do_at_once(ranks: int, micro_batches: int) -> None:
    assert accumulation_steps(524_288, device_batch_size=32, sequence_len=2048, world_size=ranks) == micro_batches


@pytest.mark.parametrize(
    ("batch_tokens", "nearest"),
    [(500_000, "use 458,752 or 524,288"), (524_289, "use 524,288 or 589,824"), (1000, "use 65,536")],
)
def test_a_batch_that_does_not_divide_names_the_nearest(batch_tokens: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{nearest}$") as caught:
        accumulation_steps(batch_tokens, device_batch_size=32, sequence_len=2048, world_size=1)
    assert f"model.recipe.batch_tokens={batch_tokens:,}" in str(caught.value)
    assert "65,536" in str(caught.value)


@pytest.mark.parametrize(
    ("batch_tokens", "rows", "ranks", "named"),
    [
        (524_288, 32, 3, "use 393,216 or 589,824"),  # no rows of three ranks make a power of two
        (524_288, 24, 2, "use 491,520 or 589,824, or data.device_batch_size 16 or 32"),
        (524_288, 512, 2, "use 2,097,152, or data.device_batch_size 128"),
        (393_216, 10, 3, "use 368,640 or 430,080, or data.device_batch_size 8 or 16"),
        (2048, 5, 1, "use 10,240, or data.device_batch_size 1"),
    ],
)
def test_at_any_number_of_ranks_what_is_named_works(batch_tokens: int, rows: int, ranks: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}$"):
        accumulation_steps(batch_tokens, device_batch_size=rows, sequence_len=2048, world_size=ranks)
    batches, _, others = named.partition(", or data.device_batch_size ")
    for batch in batches.removeprefix("use ").split(" or "):
        accumulation_steps(int(batch.replace(",", "")), device_batch_size=rows, sequence_len=2048, world_size=ranks)
    for other in others.split(" or ") if others else ():
        accumulation_steps(batch_tokens, device_batch_size=int(other), sequence_len=2048, world_size=ranks)
