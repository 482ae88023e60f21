"""What every gloo rank does for tests/optim/test_sharded.py: run all scenarios and write down the results."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, DistMuonAdamW, MuonAdamW, Schedule, buckets, parameter_groups

CONFIG = GPTConfig(sequence_len=16, vocab_size=61, n_layer=6, n_head=2, n_kv_head=1, n_embd=32)
ROWS = 12  # of a global batch: divides into 1, 2 and 3 ranks, each with 2 micro-batches
STEPS = 20

Results = dict[str, Any]


class Odd(nn.Module):
    """Shapes that no number of ranks divides: one element, three dimensions, five matrices alike and one alone.

    In fp64: matrices this small are so badly conditioned that fp32's order of sums would hide a mistake.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(1,), (7, 3), (2, 3, 5), (4, 6)]

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.others = nn.ParameterList([draw(s) for s in shapes])
        self.matrices = nn.ParameterList([draw((6, 4)) for _ in range(5)])
        self.alone = nn.Parameter(draw((3, 8)))
        self.unused = nn.Parameter(draw((5,)))
        self.unused_matrix = nn.Parameter(draw((6, 4)))

    def groups(self) -> list[dict[str, Any]]:
        adamw = {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}
        return [
            {"params": [*self.others, self.unused], **adamw},
            {"params": [*self.matrices, self.alone, self.unused_matrix], "kind": "muon", "lr": 0.02},
        ]

    def forward(self, rows: Tensor) -> Tensor:
        """Reach every parameter but the unused ones; rows (N, 6) give every rank gradients of its own."""
        hidden = rows @ self.others[3].T
        for matrix in self.matrices:
            hidden = torch.tanh(hidden @ matrix.T @ matrix)
        hidden = hidden @ self.alone[:, :4].T
        loss: Tensor = (hidden * self.others[0]).square().mean() + sum(
            torch.outer(rows.mean(1), p.flatten()).sin().mean() for p in [*list(self.others)[1:3], self.alone]
        )
        return loss


def optimizer(
    groups: list[dict[str, Any]], *, clip: float | None = 1.0, dtype: torch.dtype = torch.float32
) -> MuonAdamW:
    """The sharded optimizer where there are ranks, else the plain one."""
    kind = DistMuonAdamW if dist.is_initialized() else MuonAdamW
    clock = Clock(step_tokens=ROWS * 16, horizon_tokens=ROWS * 16 * 30)
    return kind(groups, schedule=Schedule(muon_momentum_steps=10), clock=clock, clip=clip, ns_dtype=dtype)


def gpt(**settings: Any) -> tuple[GPT, MuonAdamW]:
    model = GPT(CONFIG)
    model.init_weights(0)
    return model, optimizer(parameter_groups(model, weight_decay=0.01), **settings)


def rows_of(step: int) -> Tensor:
    """This rank's rows of a global batch."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randint(0, CONFIG.vocab_size, (ROWS, 17), generator=generator)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return whole.chunk(ranks)[rank]


def train(model: nn.Module, opt: MuonAdamW, steps: range, *, micro_batches: int = 1) -> list[float]:
    losses = []
    for step in steps:
        opt.zero_grad()
        total = torch.zeros(())
        parts = rows_of(step).chunk(micro_batches)
        for i, part in enumerate(parts):
            last = i == micro_batches - 1
            with contextlib.nullcontext() if last else waiting(opt):
                loss = model(part[:, :-1], part[:, 1:]) / micro_batches
                loss.backward()
            total += loss.detach()
        opt.step()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def waiting(opt: MuonAdamW) -> contextlib.AbstractContextManager[None]:
    return opt.no_sync() if isinstance(opt, DistMuonAdamW) else contextlib.nullcontext()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state_bytes(opt: MuonAdamW) -> int:
    return sum(t.nbytes for state in opt.state.values() for t in state.values() if isinstance(t, Tensor))


def one_step_from_a_warm_state(start: Path) -> Results:
    """Load what one rank left after five steps, and make the sixth."""
    model, opt = gpt()
    saved = torch.load(start, weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    train(model, opt, range(5, 6))
    return {"weights": weights(model), "state": opt.state_dict(), "norm": opt.grad_norm, "bytes": state_bytes(opt)}


def twenty_steps(**settings: Any) -> Results:
    micro_batches = settings.pop("micro_batches", 1)
    model, opt = gpt(**settings)
    losses, every, norms = [], [], []
    for step in range(STEPS):
        losses += train(model, opt, range(step, step + 1), micro_batches=micro_batches)
        every.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        norms.append(opt.grad_norm)
    return {"losses": losses, "weights": weights(model), "every": torch.stack(every), "norms": norms}


def odd_shapes(bucket_elements: int) -> Results:
    """Small buckets too, so that a shape takes several; and the state through a file into a fresh optimizer half-way."""
    before, buckets.BUCKET_ELEMENTS = buckets.BUCKET_ELEMENTS, bucket_elements
    torch.manual_seed(0)
    model = Odd()
    opt = optimizer(model.groups(), clip=0.5, dtype=torch.float64)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(6):
        if step == 3:
            states = [opt.state_dict()]
            if dist.is_initialized():
                dist.broadcast_object_list(states)  # as a checkpoint that every rank reads
            model = copy.deepcopy(model) if not dist.is_initialized() else fresh(model)
            opt = optimizer(model.groups(), clip=0.5, dtype=torch.float64)
            opt.load_state_dict(states[0])
        opt.zero_grad()
        rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(rows.chunk(ranks)[rank]).backward()
        opt.step()
    buckets.BUCKET_ELEMENTS = before
    return {"weights": weights(model), "state": opt.state_dict(), "norm": opt.grad_norm}


def fresh(model: nn.Module) -> Odd:
    twin = Odd()
    twin.load_state_dict(model.state_dict())
    return twin


def gradient_on_one_rank_only() -> Results:
    """A parameter that only the last rank's micro-batch reaches: its gradient is the mean with zeros."""
    parameter, matrix = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 2))
    kinds = {"adamw": parameter, "muon": matrix}
    opt = optimizer([{"params": [p], "kind": kind, "lr": 0.1} for kind, p in kinds.items()], clip=None)
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if last:
        (parameter * torch.arange(5.0)).sum().backward()  # type: ignore[no-untyped-call]
        (matrix * torch.arange(6.0).view(3, 2)).sum().backward()  # type: ignore[no-untyped-call]
    opt.step()
    return {"weights": {"parameter": parameter.detach(), "matrix": matrix.detach()}, "norm": opt.grad_norm}


def misuse() -> Results:
    """A second backward pass that should have been under no_sync, and a step that was given up and made again."""
    model, opt = gpt()
    reference, plain = gpt()
    train(model, opt, range(2))
    train(reference, plain, range(2))
    rows = rows_of(2)
    opt.zero_grad()
    model(rows[:, :-1], rows[:, 1:]).backward()
    gone = all(p.grad is None for p in model.parameters())
    message = ""
    try:
        model(rows[:, :-1], rows[:, 1:]).backward()
    except RuntimeError as error:
        message = str(error)
    train(model, opt, range(2, 4))  # zero_grad drops what has left
    train(reference, plain, range(2, 4))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    return {"gone": gone, "message": message, "same": same}


def scenarios(start: Path) -> Results:
    results = {
        "one step": one_step_from_a_warm_state(start),
        "twenty steps": twenty_steps(),
        "accumulation": twenty_steps(micro_batches=2),
        "clipping": twenty_steps(clip=0.05),
        "no clip": twenty_steps(clip=None),
        "bf16": twenty_steps(dtype=torch.bfloat16),
        "odd shapes": odd_shapes(2**26),
        "small buckets": odd_shapes(24),
        "one rank only": gradient_on_one_rank_only(),
    }
    if dist.is_initialized():
        results["misuse"] = misuse()
    return results


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    torch.save(scenarios(folder / "start.pt"), folder / f"{rank}of{ranks}.pt")
    dist.destroy_process_group()
