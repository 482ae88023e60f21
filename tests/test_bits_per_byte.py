from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from nanofed.errors import DataError
from nanofed.evaluation.bits_per_byte import BitsPerByte, evaluate_bits_per_byte
from nanofed.model import GPT, GPTConfig

TOKEN_BYTES = torch.tensor([0, 1, 2, 4, 0])  # 0 and 4 are special


def test_it_is_nats_over_bytes_of_what_counts() -> None:
    metric = BitsPerByte(TOKEN_BYTES)
    metric.update(torch.tensor([1.0, 2.0, 3.0, 100.0, 100.0]), torch.tensor([1, 2, 3, 0, -1]))
    assert metric.sum_nats.item() == 6.0
    assert metric.sum_bytes.item() == 7
    assert metric.compute().item() == pytest.approx(6 / (7 * math.log(2)))


def test_losses_of_uncounted_positions_cannot_spoil_it() -> None:
    metric = BitsPerByte(TOKEN_BYTES)
    metric.update(torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([-1, 0, 1]))
    assert metric.compute().item() == pytest.approx(1 / math.log(2))
    metric.update(torch.tensor([math.nan]), torch.tensor([1]))  # this one counts and must not be hidden
    assert math.isnan(metric.compute().item())


def test_no_order_of_adding_changes_a_bit() -> None:
    """As plain fp64 sums they differ, and dividing by a rounded number of bytes would be off by 1e-8."""
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(50_000, generator=generator) * torch.tensor([1e-3, 1.0, 30.0]).repeat_interleave(20_000)[:50_000]
    targets = torch.randint(1, 4, (50_000,), generator=generator)
    found, plain = set(), set()
    for parts in (1, 3, 8, 1000):
        for order in (torch.arange(50_000), torch.randperm(50_000, generator=generator)):
            metric, total = BitsPerByte(TOKEN_BYTES), 0.0
            for part in order.tensor_split(parts):
                metric.update(nats[part], targets[part])
                total += float(nats[part].double().sum())
            found.add(metric.compute().item())
            plain.add(total)
    assert len(found) == 1 and len(plain) > 1
    lengths = TOKEN_BYTES[targets].sum().item()
    assert found.pop() == pytest.approx(math.fsum(nats.tolist()) / (math.log(2) * lengths), rel=1e-9)


def test_sums_are_exact_where_fp32_would_lose_them() -> None:
    metric = BitsPerByte(TOKEN_BYTES)
    metric.sum_nats += 2.0**30
    for _ in range(64):
        metric.update(torch.tensor([0.25]), torch.tensor([1]))
    assert metric.sum_nats.item() == 2.0**30 + 16


def test_it_follows_the_module_it_belongs_to() -> None:
    owner = nn.ModuleDict({"bpb": BitsPerByte(TOKEN_BYTES)}).to("meta")
    metric = owner["bpb"]
    assert isinstance(metric, BitsPerByte)
    assert {t.device.type for t in (metric.token_bytes, metric.sum_nats, metric.sum_bytes)} == {"meta"}
    assert not owner.state_dict()


class Recorder(nn.Module):
    """Gives every position the loss of its input, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
        assert reduction == "none"
        self.modes.append((self.training, torch.is_grad_enabled()))
        return inputs.flatten().float()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was_and_starts_anew(training: bool) -> None:
    model, metric = Recorder().train(training), BitsPerByte(TOKEN_BYTES)
    batches = [(torch.tensor([[3, 5]]), torch.tensor([[1, 0]])), (torch.tensor([[1, 1]]), torch.tensor([[2, -1]]))]
    first = evaluate_bits_per_byte(model, batches, metric, "cpu")
    second = evaluate_bits_per_byte(model, batches, metric, "cpu")
    assert first == second == pytest.approx(4 / (3 * math.log(2)))
    assert model.modes == [(False, False)] * 4
    assert model.training is training


def test_mode_is_restored_after_an_error() -> None:
    def broken() -> list[tuple[Tensor, Tensor]]:
        return [(torch.tensor([[1]]), torch.tensor([[99]]))]  # no such token

    model = Recorder().train()
    with pytest.raises(IndexError):
        evaluate_bits_per_byte(model, broken(), BitsPerByte(TOKEN_BYTES), "cpu")
    assert model.training


@pytest.mark.parametrize("batches", [[], [(torch.tensor([[1]]), torch.tensor([[0]]))]])
def test_nothing_to_score_is_an_error(batches: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(DataError, match="no text to score"):
        evaluate_bits_per_byte(Recorder(), batches, BitsPerByte(TOKEN_BYTES), "cpu")


def test_a_fresh_model_costs_the_entropy_of_its_vocabulary() -> None:
    config = GPTConfig.from_depth(1, vocab_size=64, sequence_len=8)
    model = GPT(config)
    model.init_weights(0)
    rows = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    metric = BitsPerByte(torch.full((64,), 3))
    value = evaluate_bits_per_byte(model, [(rows[:, :-1], rows[:, 1:])], metric, "cpu")
    assert value == pytest.approx(math.log2(64) / 3)


def score_a_share(rank: int, shares: list[list[int]], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # token 1 is 1 byte and costs 1 nat here, token 3 is 4 bytes and costs 3
    batches = [(torch.tensor([[token]]), torch.tensor([[token]])) for token in shares[rank]]
    value = evaluate_bits_per_byte(Recorder(), batches, BitsPerByte(TOKEN_BYTES), "cpu")
    Path(folder, str(rank)).write_text(repr(value))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "nats", "length"), [([[3], [1, 1, 1]], 6, 7), ([[], [3, 1]], 4, 5)])
def test_ranks_add_up_nats_and_bytes(tmp_path: Path, shares: list[list[int]], nats: int, length: int) -> None:
    spawn(score_a_share, args=(shares, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        assert float((tmp_path / str(rank)).read_text()) == pytest.approx(nats / (length * math.log(2)))
