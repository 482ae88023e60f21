"""The fast scorer against the slow one on every example of a bundle, task by task in turns, in CPU seconds of one thread.

python -m tests.evaluation.measure_core ../shared/data/core-eval --tokenizer FOLDER [--depth 2] [--tasks copa ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from nanofed.evaluation.core.bundle import Bundle
from nanofed.tokenizer.bpe import Tokenizer
from tests.evaluation import slow_core
from tests.evaluation.test_core import fast_answers, small_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--sequence_len", type=int, default=256)
    parser.add_argument("--tasks", nargs="*", default=())
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, bundle = Tokenizer.load(args.tokenizer), Bundle.read(args.bundle)
    model = small_model(tokenizer, depth=args.depth, sequence_len=args.sequence_len)
    model(torch.zeros(1, 2, dtype=torch.int64))  # neither pays for the first call
    examples = differ = 0
    seconds = [0.0, 0.0]
    for task, listed in zip(bundle.tasks, slow_core.listed_tasks(args.bundle), strict=True):
        if args.tasks and task.label not in args.tasks:
            continue
        clock = [time.process_time()]
        fast = fast_answers(model, tokenizer, task)
        clock.append(time.process_time())
        slow = list(slow_core.answers(model, tokenizer, args.bundle, listed))
        clock.append(time.process_time())
        own = [clock[1] - clock[0], clock[2] - clock[1]]
        wrong = sum(a != b for a, b in zip(fast, slow, strict=True))
        examples, differ, seconds = (
            examples + len(slow),
            differ + wrong,
            [a + b for a, b in zip(seconds, own, strict=True)],
        )
        sys.stdout.write(
            f"{task.label:<34} {len(slow):>5} examples, {wrong} differ, {own[0]:7.2f} CPU seconds against {own[1]:7.2f}: "
            f"{own[1] / own[0]:.2f}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(
        f"{examples} examples, {differ} differ, {seconds[0]:.1f} CPU seconds against {seconds[1]:.1f}: "
        f"{seconds[1] / seconds[0]:.2f}\n"
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
