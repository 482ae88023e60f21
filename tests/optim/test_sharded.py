"""The sharded optimizer on 2 and 3 gloo ranks against one rank on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from nanofed.errors import ConfigError
from nanofed.optim import Clock, DistMuonAdamW, Schedule
from tests.optim import ranks as on_ranks
from tests.optim.ranks import Results

pytestmark = pytest.mark.slow

TRAININGS = ["twenty steps", "accumulation", "clipping", "no clip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = on_ranks.gpt()
    on_ranks.train(model, optimizer, range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "start.pt")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    return on_ranks.scenarios(folder / "start.pt")


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def many(request: pytest.FixtureRequest, folder: Path) -> list[Results]:
    world = request.param
    spawn(on_ranks.main, (world, folder), nprocs=world)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}of{world}.pt", weights_only=True) for rank in range(world)]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of a parameter, relative to its norm."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def test_one_step_from_the_same_state(one: Results, many: list[Results]) -> None:
    for rank in many:
        assert distance(rank["one step"]["weights"], one["one step"]["weights"]) < 1e-6
        assert float(rank["one step"]["norm"]) == pytest.approx(float(one["one step"]["norm"]), rel=1e-6)


@pytest.mark.parametrize("name", TRAININGS)
def test_twenty_steps(name: str, one: Results, many: list[Results]) -> None:
    for rank in many:
        assert distance(rank[name]["weights"], one[name]["weights"]) < 1e-5
        assert rank[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-5)
    assert distance(one[name]["weights"], on_ranks.weights(on_ranks.gpt()[0])) > 0.1, "nothing that moved was compared"


def test_twenty_steps_with_bf16_newton_schulz(one: Results, many: list[Results]) -> None:
    for rank in many:
        assert rank["bf16"]["losses"] == pytest.approx(one["bf16"]["losses"], abs=1e-3)


def test_what_the_scenarios_are_for_happens(one: Results) -> None:
    norms = {name: torch.stack(one[name]["norms"]) for name in TRAININGS}
    assert (norms["clipping"] > 0.05).all() and (norms["twenty steps"] < 1).any()
    assert distance(one["clipping"]["weights"], one["no clip"]["weights"]) > 1e-3
    assert distance(one["bf16"]["weights"], one["twenty steps"]["weights"]) > 1e-4


@pytest.mark.parametrize("name", [*TRAININGS, "bf16"])
def test_ranks_are_equal_bit_by_bit_after_every_step(name: str, many: list[Results]) -> None:
    first, *others = many
    assert not torch.equal(first[name]["every"][0], first[name]["every"][-1])
    for rank in others:
        assert torch.equal(rank[name]["every"], first[name]["every"])
        assert torch.equal(torch.stack(rank[name]["norms"]), torch.stack(first[name]["norms"]))


def test_state_shrinks_by_the_number_of_ranks(one: Results, many: list[Results]) -> None:
    whole = one["one step"]["bytes"]
    for rank in many:
        # exact but for the padding of 61 x 32 elements
        assert whole / len(many) <= rank["one step"]["bytes"] < whole / len(many) + 64


def test_the_state_dict_is_the_plain_optimizers(one: Results, many: list[Results]) -> None:
    for name in ("one step", "odd shapes", "small buckets"):  # the odd ones went through state dicts half-way
        assert all(rank[name]["state"] == {} for rank in many[1:])
        ours, plain = many[0][name]["state"], one[name]["state"]
        assert ours.keys() == plain.keys() and list(ours["state"]) == list(plain["state"])
        assert ours["param_groups"] == plain["param_groups"] and ours["clock"] == plain["clock"]
        for i, state in plain["state"].items():
            assert ours["state"][i].keys() == state.keys()
            for key, value in state.items():
                mine = ours["state"][i][key]
                if isinstance(value, Tensor):
                    assert mine.shape == value.shape and mine.dtype == value.dtype and mine.device.type == "cpu"
                    assert mine.untyped_storage().nbytes() == mine.nbytes, "a view drags its whole into the checkpoint"
                    assert torch.allclose(mine, value, rtol=1e-4, atol=float(value.abs().max()) * 1e-5), (name, i, key)
                else:
                    assert mine == value


@pytest.mark.parametrize("name", ["odd shapes", "small buckets"])
def test_shapes_that_no_rank_count_divides(name: str, one: Results, many: list[Results]) -> None:
    before = on_ranks.weights(on_ranks.Odd())
    for rank in many:
        assert distance(rank[name]["weights"], one[name]["weights"]) < 1e-10
        unmoved = [n for n, weight in rank[name]["weights"].items() if torch.equal(weight, before[n])]
        assert unmoved == ["unused", "unused_matrix"]
        assert torch.equal(rank[name]["norm"], many[0][name]["norm"])


def test_a_gradient_on_one_rank_only_counts(many: list[Results]) -> None:
    world = len(many)
    expected = torch.cat([torch.arange(5.0), torch.arange(6.0)]).norm() / world
    for rank in many:
        result = rank["one rank only"]
        assert torch.allclose(result["norm"], expected)
        assert distance(result["weights"], many[0]["one rank only"]["weights"]) == 0
        assert (result["weights"]["parameter"][1:] < 0.95).all()
        assert (result["weights"]["matrix"] != 1).any()


def test_gradients_leave_during_the_backward_pass_and_misuse_is_said(many: list[Results]) -> None:
    for rank in many:
        assert rank["misuse"]["gone"]
        assert "no_sync" in rank["misuse"]["message"]


def test_without_a_process_group_it_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    group: dict[str, Any] = {"params": [parameter], "kind": "adamw", "lr": 0.1}
    with pytest.raises(ConfigError, match="initialized"):
        DistMuonAdamW([group], schedule=Schedule(), clock=Clock(step_tokens=1, horizon_tokens=1))
