"""CORE of a model: the mean over tasks of accuracy, each centred by what a random answer is worth (arXiv:2406.11794)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from nanofed import terminal
from nanofed.evaluation.core.bundle import Bundle, Task
from nanofed.evaluation.core.questions import question
from nanofed.evaluation.core.scoring import batches, judge
from nanofed.ranges import CountOrZero, check_number

if TYPE_CHECKING:
    from nanofed.model import GPT
    from nanofed.tokenizer.bpe import Tokenizer

DRAWS, DRAWS_SEED = 10_000, 0  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class TaskScore:
    """What a model came to on one task.

    Attributes:
        label: the task.
        kind: how it is asked.
        shots: solved examples before each question.
        examples: examples that were asked.
        published: examples of the whole task.
        accuracy: the share that was answered right.
        accuracy_interval: the lowest and highest accuracy between which 95 % of the bootstrap's draws lie.
        centred: 0 for what a random answer is worth, 1 for all right.
        centred_interval: the same interval of the centred accuracy.
    """

    label: str
    kind: str
    shots: int
    examples: int
    published: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    centred: float
    centred_interval: tuple[float, float]


@dataclass(frozen=True)
class CoreScore:
    """CORE, with what it is made of.

    Attributes:
        core: the mean of the tasks' centred accuracies.
        interval: the lowest and highest score between which 95 % of the draws of a bootstrap lie. It says how
            far the choice of examples decides, and nothing of the seed of a training.
        tasks: the score of every task that was asked.
        missing: CORE's tasks that were not asked.
        bundle: a SHA-256 of the bundle's files.
        seconds: how long it took.
    """

    core: float
    interval: tuple[float, float]
    tasks: tuple[TaskScore, ...]
    missing: tuple[str, ...]
    bundle: str
    seconds: float

    @property
    def partial(self) -> str | None:
        """What the score lacks to be the published CORE, None where it lacks nothing."""
        said = [f"without {len(self.missing)} of CORE's tasks ({', '.join(self.missing)})"] if self.missing else []
        cut = [task for task in self.tasks if task.examples < task.published]
        if cut:
            asked, whole = sum(task.examples for task in cut), sum(task.published for task in cut)
            said.append(f"with {asked:,} of the {whole:,} examples of {', '.join(task.label for task in cut)}")
        return "; ".join(said) or None

    def to_plain(self) -> dict[str, Any]:
        """Return what JSON can say of it."""
        return {**asdict(self), "partial": self.partial}

    def scalars(self) -> dict[str, float]:
        """Return TensorBoard's tags: CORE with its interval, and the centred accuracy of every task."""
        low, high = self.interval
        out = {"core/metric": self.core, "core/low": low, "core/high": high}
        return out | {f"core/task/{task.label}": task.centred for task in self.tasks}

    def line(self) -> str:
        """Return CORE with its interval in a few words."""
        low, high = self.interval
        share = " (partial)" if self.partial else ""
        return f"CORE {self.core:.4f}{share}, 95 % within {low:.4f}..{high:.4f}, {self.seconds:.0f} s"

    def table(self) -> str:
        """Return a table of the tasks with CORE below, and what it lacks."""
        width = max(len("CORE"), *(len(task.label) for task in self.tasks))
        lines = [f"{'task':<{width}}  shots  examples  accuracy     95 % interval  centred     95 % interval"]
        for task in self.tasks:
            accuracy = f"{task.accuracy:8.4f}  {_within(task.accuracy_interval)}"
            centred = f"{task.centred:7.4f}  {_within(task.centred_interval)}"
            lines.append(f"{task.label:<{width}}  {task.shots:>5}  {task.examples:>8,}  {accuracy}  {centred}")
        lines.append(f"{'CORE':<{width}}  {'':<42}  {self.core:7.4f}  {_within(self.interval)}")
        return "\n".join([*lines, *([f"partial: {self.partial}"] if self.partial else [])])


def _within(interval: tuple[float, float]) -> str:
    return f"{interval[0]:7.4f}..{interval[1]:7.4f}"


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    examples: int = 0,
    progress: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> CoreScore:
    """Score a model on every task of a bundle, over all ranks where there are several, and leave its training mode as it was.

    Args:
        model: A GPT with weights; every rank has the same.
        tokenizer: the model's.
        bundle: the tasks to ask.
        examples: How many examples of each task are asked, from the first one in nanochat's order on; 0 asks all.
        progress: whether the first rank draws a bar where standard error is a terminal.
        on_batch: is called before each batch; what it raises ends the evaluation.

    Raises:
        ConfigError: `examples` is out of its range.
        DataError: an example cannot be used.
        NanofedError: the model's logits are not finite.
    """
    check_number("CORE: examples", examples, CountOrZero)
    started = time.monotonic()
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    training = model.training
    model.eval()
    scores, bar = [], tqdm(unit="example", disable=not (progress and rank == 0 and terminal.on_terminal()), leave=False)
    try:
        for task in bundle.tasks:
            asked = task.examples(examples)
            bar.set_description(f"CORE: {task.label}", refresh=False)
            bar.reset(len(asked))
            numbers = range(rank, len(asked), ranks)
            questions = [
                question(task, asked, number, tokenizer, max_positions=model.max_positions) for number in numbers
            ]
            right = torch.zeros(len(asked), dtype=torch.int32)
            for batch in batches(questions):
                on_batch()
                right[[question.number for question in batch]] = torch.tensor(judge(model, batch), dtype=torch.int32)
                bar.update(min(len(batch) * ranks, len(asked) - bar.n))
            if ranks > 1:
                right = right.to(model.device)
                dist.all_reduce(right)
            scores.append((task, right.cpu().numpy().astype(bool)))
    finally:
        bar.close()
        model.train(training)
    return summarise(scores, bundle, seconds=time.monotonic() - started)


def summarise(
    scores: Sequence[tuple[Task, np.ndarray[Any, np.dtype[np.bool_]]]], bundle: Bundle, *, seconds: float
) -> CoreScore:
    """Return CORE of the answers to every task, booleans (n,) each, with its intervals.

    The intervals are the percentiles of a bootstrap: every task's answers are drawn anew, as many as there are, with
    replacement. The number of right ones among n such draws is binomial, and is drawn as that.
    """
    random = np.random.default_rng(DRAWS_SEED)
    tasks, drawn_centred = [], []
    for task, right in scores:
        accuracy, count = float(right.mean()), len(right)
        drawn = random.binomial(count, accuracy, DRAWS) / count
        drawn_centred.append((drawn - task.baseline) / (1 - task.baseline))
        centred = (accuracy - task.baseline) / (1 - task.baseline)
        tasks.append(
            TaskScore(
                task.label,
                task.kind,
                task.shots,
                count,
                task.published,
                accuracy,
                _interval(drawn),
                centred,
                _interval(drawn_centred[-1]),
            )
        )
    core = float(np.mean([task.centred for task in tasks]))
    interval = _interval(np.mean(drawn_centred, axis=0))
    return CoreScore(core, interval, tuple(tasks), bundle.missing, bundle.fingerprint(), round(seconds, 3))


def _interval(drawn: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    low, high = np.percentile(drawn, INTERVAL)
    return float(low), float(high)
