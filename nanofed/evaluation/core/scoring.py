"""Questions judged in batches: what the rows of a question begin with is read once, and the head sees judged tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nanofed.errors import NanofedError
from nanofed.evaluation.core.questions import Question
from nanofed.model import GPT, KVCache
from nanofed.model.loss import IGNORED_TARGET, capped_logits, chunk_rows

TOKENS_AT_ONCE = 16_384  # of all rows of a batch: keys and values of a d20 are 100 KB a token in bf16
# Tokens: the shortest shared beginning of a batch is read once, and what others share beyond it in every row.
SPREAD = 32


def batches(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Yield questions of about the same length together, with at most `TOKENS_AT_ONCE` tokens unless a single one has more."""
    batch: list[Question] = []
    longest = rows = 0
    for question in sorted(questions, key=lambda question: (question.shared, _longest(question))):
        longest, rows = max(longest, _longest(question)), rows + len(question.rows)
        if batch and (longest * rows > TOKENS_AT_ONCE or question.shared - batch[0].shared > SPREAD):
            yield batch
            batch, longest, rows = [], _longest(question), len(question.rows)
        batch.append(question)
    if batch:
        yield batch


def _longest(question: Question) -> int:
    return max(len(row.ids) for row in question.rows)


@torch.no_grad()
def judge(model: GPT, batch: Sequence[Question]) -> list[bool]:
    """Tell of each question whether the model answers it right.

    A model chooses the option whose judged tokens cost the least on average, in nats a token, the first of equal ones. In
    language modelling it must expect every judged token. An option that another one begins with has no token of its own, and its
    mean is NaN: as in nanochat, it is chosen where it comes first, and not where it comes later.

    Raises:
        NanofedError: the model's logits are not finite.
    """
    shared = min(question.shared for question in batch)
    rows = [row for question in batch for row in question.rows]
    width = max(len(row.ids) for row in rows) - 1  # nothing is predicted from the last token
    cache = None
    if shared:
        beginnings = torch.stack([torch.from_numpy(question.rows[0].ids[:shared]) for question in batch])
        size = {"batch_size": len(batch), "length": shared}
        read = KVCache(model.config, **size, device=model.device, dtype=model.compute_dtype)
        model.hidden_states(beginnings.long().to(model.device), kv_cache=read)
        owners = [index for index, question in enumerate(batch) for _ in question.rows]
        cache = read.fork(torch.tensor(owners, device=model.device), length=width)
    inputs = torch.zeros(len(rows), width - shared, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED_TARGET)
    for row, into_inputs, into_targets in zip(rows, inputs, targets, strict=True):
        ids = torch.from_numpy(row.ids)
        into_inputs[: len(ids) - 1 - shared] = ids[shared:-1]
        into_targets[row.start - 1 - shared : len(ids) - 1 - shared] = ids[row.start :]
    hidden = model.hidden_states(inputs.to(model.device), kv_cache=cache)
    judged = targets != IGNORED_TARGET
    nats, expected = _judge_tokens(model, hidden[judged.to(model.device)], targets[judged].to(model.device))
    return _answers(batch, judged, nats.cpu(), expected.cpu())


def _judge_tokens(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each target (N,) costs in nats, and whether it is the likeliest token, from hidden states (N, n_embd)."""
    nats = torch.empty(len(targets), device=hidden.device)
    expected = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    size = chunk_rows(len(targets), model.config.vocab_size, hidden.device)
    for begin in range(0, len(targets), size):
        part = slice(begin, begin + size)
        logits = capped_logits(hidden[part], model.lm_head.weight)
        nats[part] = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        expected[part] = logits.argmax(-1) == targets[part]
    return nats, expected


def _answers(batch: Sequence[Question], judged: Tensor, nats: Tensor, expected: Tensor) -> list[bool]:
    if not nats.isfinite().all():
        raise NanofedError("CORE: the model's logits are not finite: no answer can be read from them")
    owners, lengths = judged.nonzero()[:, 0], judged.sum(1)
    sums = torch.zeros(len(judged), dtype=torch.float64).index_add_(0, owners, nats.double())
    costs = (sums / lengths).tolist()
    missed = torch.zeros(len(judged), dtype=torch.int64).index_add_(0, owners, (~expected).long()).tolist()
    right, row = [], 0
    for question in batch:
        options = slice(row, row + len(question.rows))
        if question.gold is None:
            right.append(missed[row] == 0)
        else:
            right.append(costs[options].index(min(costs[options])) == question.gold)
        row = options.stop
    return right
