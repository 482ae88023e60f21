"""From an example to the rows of tokens that a model reads, and the tokens of each that are judged.

The definition is that of DCLM's CORE (Li et al. 2024, arXiv:2406.11794) as nanochat evaluates it (karpathy/nanochat at dfc8833,
`nanochat/core_eval.py`): the same examples are shown before a question, and the same tokens are judged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanofed.errors import DataError
from nanofed.evaluation.core.bundle import Example, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nanofed.tokenizer.bpe import Tokenizer

SHOTS_SEED = 1234  # plus the number of the example


@dataclass(frozen=True)
class Row:
    """One text to be read."""

    ids: NDArray[np.int32]  # the tokens (n,), int32; the first one begins a document
    start: int  # tokens from here on are judged, each by what the model expects after those before it; at least 1


@dataclass(frozen=True)
class Question:
    """An example as it is put to a model."""

    number: int  # its number within its task
    rows: tuple[Row, ...]  # one row for each option
    # The number of the option that must be the likeliest; None where the only option's every token must be.
    gold: int | None
    shared: int  # tokens that all rows begin with and of which none predicts a judged token: they can be read once


def prompts(task: Task, examples: Sequence[Example], number: int) -> tuple[str, list[str]]:
    """Return the solved examples that stand before a question, as text, and the whole text of every option."""
    # Drawn from all examples but the one that is asked: as if from a list without it, which need not be made.
    drawn = random.Random(SHOTS_SEED + number).sample(range(len(examples) - 1), task.shots)
    shown = [examples[index + (index >= number)] for index in drawn]
    solved = [task.delimiter.join(example.options[example.gold]) + "\n\n" for example in shown]
    before = "".join(solved)
    return before, [before + task.delimiter.join(option) for option in examples[number].options]


def question(
    task: Task, examples: Sequence[Example], number: int, tokenizer: Tokenizer, *, max_positions: int
) -> Question:
    """Put an example of a task into tokens.

    What is judged: of a multiple choice, the tokens after those that all options begin with; of a schema, those that all
    options end with; of language modelling, those that the continuation adds to its context. Of a row that is longer than the
    model can read, the last tokens are kept.

    Raises:
        DataError: there is no token to judge, or what is to be judged does not fit into the model's positions.
    """
    before, texts = prompts(task, examples, number)
    encoded = [tokenizer.encode_document(text) for text in texts]
    if task.kind == "multiple_choice":
        starts = [_common(encoded)] * len(encoded)
    elif task.kind == "schema":
        common = _common([ids[::-1] for ids in encoded])
        starts = [max(1, len(ids) - common) for ids in encoded]
    else:
        context = (before + examples[number].options[0][0] + task.delimiter).strip()
        starts = [_common([tokenizer.encode_document(context), *encoded])]
        if starts[0] == len(encoded[0]):
            raise DataError(
                f"{task.path}: the continuation {examples[number].options[0][1]!r:.60} has no token of its own"
            )
    rows = []
    for ids, start in zip(encoded, starts, strict=True):
        cut = max(0, len(ids) - max_positions)
        if start - cut < 1:
            raise DataError(
                f"{task.path}: {len(ids) - start:,} tokens are to be judged, and this model reads {max_positions:,} positions"
            )
        rows.append(Row(ids[cut:], start - cut))
    read = [row.ids for row in rows]
    # Where all options are alike no token is judged; one is left to be read even so.
    alike = min(_common(read), max(map(len, read)) - 1, *(row.start for row in rows)) if len(rows) > 1 else 0
    return Question(
        number, tuple(rows), None if task.kind == "language_modeling" else examples[number].gold, max(0, alike - 1)
    )


def _common(sequences: Sequence[NDArray[np.int32]]) -> int:
    """Return how many tokens all sequences begin with."""
    length = min(map(len, sequences))
    differs = np.zeros(length, bool)
    for other in sequences[1:]:
        differs |= other[:length] != sequences[0][:length]
    return int(differs.argmax()) if differs.any() else length
