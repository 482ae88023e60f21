from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning import Fabric

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row
from nanofed.data.streams import Batch, DataState
from nanofed.training import loop
from nanofed.training.loop import LoopResult, Stopwatch, train_steps
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe

LENGTH, ROWS = 8, 2
MICRO_TOKENS = LENGTH * ROWS


@pytest.fixture(autouse=True, scope="module")  # as fixtures of a module need it too: bits may depend on threads
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for n in range(1, number + 1):
        tokens = torch.randint(0, 60, (ROWS, LENGTH + 1), generator=generator)
        state = DataState(n * ROWS, {0: StreamState(Row(0, "s", n))})
        out.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), state))
    return out


class Setup:
    """A tiny real module on Fabric."""

    def __init__(self) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1)
        recipe = Recipe(batch_tokens=2 * MICRO_TOKENS, num_steps=50)
        numerics: dict[str, Any] = {"compute_dtype": "float32", "compile": False}
        self.inner = GPTModule(depth=1, sequence_len=LENGTH, vocab_size=60, recipe=recipe, **numerics)
        self.inner.configure_model()
        self.module, self.optimizer = self.fabric.setup(self.inner, self.inner.configure_optimizers())

    def train(self, data: Any, **options: Any) -> LoopResult:
        options = {"accumulation": 2, "step_tokens": 2 * MICRO_TOKENS, **options}
        return train_steps(self.fabric, self.module, self.optimizer, data, **options)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.inner.gpt.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


class Clock:
    """Time passes when a batch is read, and only then."""

    def __init__(self, seconds_a_batch: float = 1.0) -> None:
        self.now = 100.0
        self._step = seconds_a_batch

    def __call__(self) -> float:
        return self.now

    def reading(self, data: list[Batch], slow: dict[int, float] | None = None) -> Iterator[Batch]:
        for number, batch in enumerate(data):
            self.now += (slow or {}).get(number, self._step)
            yield batch


def test_it_takes_as_many_steps_as_asked_and_reads_no_further() -> None:
    setup, data = Setup(), iter(batches(20))
    result = setup.train(data, num_steps=3)
    assert (result.steps, result.tokens, result.exhausted) == (3, 6 * MICRO_TOKENS, False)
    assert len(result.losses) == 3 and setup.inner.clock.step == 3
    assert setup.inner.clock.tokens == 6 * MICRO_TOKENS
    assert setup.inner.data_state is not None and setup.inner.data_state.rows == 6 * ROWS
    assert len(list(data)) == 14
    assert all(p.grad is None for p in setup.inner.gpt.parameters())
    first = Setup()
    with torch.no_grad():
        losses = [float(first.inner.gpt(b.inputs, b.targets)) for b in batches(2)]
    assert result.losses[0] == pytest.approx(sum(losses) / 2, rel=1e-5), "the mean over a step's micro-batches"


@pytest.mark.parametrize("number", [5, 7])
def test_half_an_accumulation_is_dropped_and_the_data_goes_back(number: int) -> None:
    ended, exact = Setup(), Setup()
    result = ended.train(batches(number))
    assert (result.steps, result.exhausted) == (number // 2, True)
    exact.train(batches(number - 1))
    assert same(ended.weights(), exact.weights()), "the odd micro-batch moved nothing"
    assert ended.inner.data_state is not None and ended.inner.data_state.rows == (number - 1) * ROWS
    assert all(p.grad is None for p in ended.inner.gpt.parameters()) and ended.inner.pop_losses() == []
    assert ended.inner.clock.step == number // 2


def test_too_little_data_for_one_step_changes_nothing() -> None:
    setup = Setup()
    before, state = setup.weights(), DataState(6, {})
    setup.inner.data_state = state
    for data in (batches(1), []):
        result = setup.train(data)
        assert result == LoopResult(0, 0, result.seconds, (), True)
        assert same(setup.weights(), before) and setup.inner.data_state is state and setup.inner.clock.step == 0


@pytest.mark.parametrize(("seconds", "steps"), [(10.0, 5), (11.9, 5), (12.0, 6), (2.0, 1), (0.5, 1), (0.0, 1)])
def test_a_budget_ends_at_a_full_step_in_time_but_not_before_the_first(seconds: float, steps: int) -> None:
    setup, clock = Setup(), Clock()
    result = setup.train(clock.reading(batches(40)), seconds=seconds, stopwatch=Stopwatch(clock=clock))
    assert result.steps == steps and result.seconds == 2.0 * steps and not result.exhausted
    assert setup.inner.data_state is not None and setup.inner.data_state.rows == 2 * steps * ROWS
    assert setup.inner.clock.step == steps


def test_time_before_the_training_counts_too() -> None:
    setup, clock = Setup(), Clock()
    watch = Stopwatch(clock=clock)
    clock.now += 5  # the weights were loaded
    result = setup.train(clock.reading(batches(40)), seconds=10.0, stopwatch=watch)
    assert result.steps == 2 and result.seconds == 9.0


def test_a_slow_step_makes_the_next_ones_wary() -> None:
    setup, clock = Setup(), Clock()
    data = clock.reading(batches(40), slow={2: 5.0})  # the second step takes 6 s: steps then take 4 s in the mean
    result = setup.train(data, seconds=11.0, stopwatch=Stopwatch(clock=clock))
    assert result.steps == 2 and result.seconds == 8.0


@pytest.mark.parametrize(("speed", "steps"), [(1.0, 10), (0.5, 5), (2.0, 20), (0.25, 2)])
def test_a_client_of_another_speed_does_so_many_steps_in_the_same_time(speed: float, steps: int) -> None:
    setup, clock = Setup(), Clock()
    watch = Stopwatch(speed, clock)
    result = setup.train(clock.reading(batches(80)), seconds=20.0, stopwatch=watch)
    assert result.steps == steps and result.seconds == pytest.approx(2.0 * steps / speed)


def test_whichever_ends_first() -> None:
    setup, clock = Setup(), Clock()
    watch = Stopwatch(clock=clock)
    assert setup.train(clock.reading(batches(40)), seconds=20.0, num_steps=4, stopwatch=watch).steps == 4


def test_the_cut_into_stretches_does_not_matter() -> None:
    whole, cut = Setup(), Setup()
    result = whole.train(batches(12), num_steps=6)
    data = iter(batches(12))
    losses = list(itertools.chain.from_iterable(cut.train(data, num_steps=n).losses for n in (1, 3, 2)))
    assert same(whole.weights(), cut.weights()) and list(result.losses) == losses


def test_gradients_of_a_stretch_that_broke_are_not_stepped_along() -> None:
    broken, clean = Setup(), Setup()

    def cut() -> Iterator[Batch]:
        yield batches(1)[0]
        raise OSError("a row group cannot be read")

    with pytest.raises(OSError, match="row group"):
        broken.train(cut())
    assert any(p.grad is not None for p in broken.inner.gpt.parameters())
    broken.train(batches(4), num_steps=2)
    clean.train(batches(4), num_steps=2)
    assert same(broken.weights(), clean.weights())


def test_the_deadline_waits_for_the_backward_pass_and_lets_the_update_run(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, order = Setup(), list[str]()

    class Event:
        def __init__(self, device: torch.device) -> None:
            self._event = None

        def mark(self) -> None:
            order.append("mark")

        def wait(self) -> None:
            order.append("wait")

    update, backward = setup.optimizer.step, setup.fabric.backward
    monkeypatch.setattr(loop, "_BackwardEnd", Event)
    monkeypatch.setattr(setup.optimizer, "step", lambda: [order.append("update"), update()])  # type: ignore[func-returns-value]
    monkeypatch.setattr(setup.fabric, "backward", lambda loss: [order.append("backward"), backward(loss)])  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a number is read: that waits for the device"))
    setup.train(batches(20), seconds=1e9, num_steps=2)
    step = ["backward", "backward", "mark", "update"]
    assert order == [*step, "wait", *step]
    order.clear()
    setup.train(batches(20), num_steps=2)
    assert "wait" not in order and "mark" not in order
