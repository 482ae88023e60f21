"""CORE the slow way: one option, one whole forward pass, no batch, no cache; it shares no line with what it checks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from nanofed.model import GPT
from nanofed.tokenizer.bpe import Tokenizer


def listed_tasks(bundle: Path) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    return tasks


def answers(model: GPT, tokenizer: Tokenizer, bundle: Path, task: dict[str, Any], most: int = 0) -> Iterator[bool]:
    """Yield of every example of a task, in order, whether the model gets it right."""
    with (bundle / "eval_data" / task["dataset_uri"]).open(encoding="utf-8") as file:
        data = [json.loads(line) for line in file]
    random.Random(1337).shuffle(data)
    data = data[:most] if most else data
    between = task.get("continuation_delimiter", " ")
    judge = {"multiple_choice": choice, "schema": schema, "language_modeling": continuation}[task["icl_task_type"]]
    for index, item in enumerate(data):
        others = [i for i in range(len(data)) if i != index]
        shown = random.Random(1234 + index).sample(others, task["num_fewshot"][0])
        solved = "".join(answered(data[i], between) + "\n\n" for i in shown)
        yield judge(model, tokenizer, solved, between, item)


def answered(item: dict[str, Any], between: str) -> str:
    if "choices" in item:
        return str(item["query"] + between + item["choices"][item["gold"]])
    if "context_options" in item:
        return str(item["context_options"][item["gold"]] + between + item["continuation"])
    return str(item["context"].strip() + between + item["continuation"])


def choice(model: GPT, tokenizer: Tokenizer, solved: str, between: str, item: dict[str, Any]) -> bool:
    texts = [read(model, tokenizer, solved + item["query"] + between + option) for option in item["choices"]]
    start = 0
    while all(len(ids) > start for ids in texts) and len({ids[start] for ids in texts}) == 1:
        start += 1
    costs = [mean_cost(model, ids, start) for ids in texts]
    return costs.index(min(costs)) == int(item["gold"])


def schema(model: GPT, tokenizer: Tokenizer, solved: str, between: str, item: dict[str, Any]) -> bool:
    texts = [
        read(model, tokenizer, solved + option + between + item["continuation"]) for option in item["context_options"]
    ]
    same = 0
    while all(len(ids) > same for ids in texts) and len({ids[-1 - same] for ids in texts}) == 1:
        same += 1
    costs = [mean_cost(model, ids, len(ids) - same) for ids in texts]
    return costs.index(min(costs)) == int(item["gold"])


def continuation(model: GPT, tokenizer: Tokenizer, solved: str, between: str, item: dict[str, Any]) -> bool:
    context = solved + item["context"].strip() + between
    ids = read(model, tokenizer, context + item["continuation"])
    start = len(read(model, tokenizer, context.strip()))
    assert ids[:start] == read(model, tokenizer, context.strip()) and start < len(ids)
    begin = max(0, len(ids) - model.max_positions)
    expected = logits_of(model, ids[begin:]).argmax(-1).tolist()
    return all(expected[place - begin - 1] == ids[place] for place in range(start, len(ids)))


def read(model: GPT, tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text)]


def mean_cost(model: GPT, ids: list[int], start: int) -> float:
    if start == len(ids):
        return math.nan  # which min() keeps where it comes first
    begin = max(0, len(ids) - model.max_positions)
    logits = logits_of(model, ids[begin:])
    places = list(range(start, len(ids)))
    return float(F.cross_entropy(logits[[place - begin - 1 for place in places]], torch.tensor(ids[start:])))


@torch.no_grad()
def logits_of(model: GPT, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]))
    return logits[0]
