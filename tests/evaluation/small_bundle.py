"""A bundle of CORE's tasks of a few kilobytes, one of each kind, in nanochat's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "mix", "potions"]
PUBLISHED = {"copa": 12, "winograd": 9, "lambada_openai": 12, "piqa": 12}
BASELINES = {"copa": 50, "winograd": 50, "lambada_openai": 0, "piqa": 25}


def sentences(random_: random.Random, count: int) -> str:
    return " ".join(random_.choices(WORDS, k=count))


def write_bundle(folder: Path) -> Path:
    """Write it into a new folder."""
    draw = random.Random(0)
    choices: list[dict[str, Any]] = [
        {
            "query": sentences(draw, 5) + (" " if n % 3 else ""),
            "choices": [sentences(draw, 1 + k) for k in range(4)],
            "gold": n % 4,
        }
        for n in range(12)
    ]
    choices[3]["choices"][1:3] = ["the quick", "the quick fox"]
    choices[4]["choices"] = ["the quick", "the quick fox"]  # all that the first one has is in the other, too
    choices[4]["gold"] = 0
    schemas = [
        {
            "context_options": [f"{sentences(draw, 4)} {word}" for word in draw.sample(WORDS, 2)],
            "continuation": sentences(draw, 3),
            "gold": n % 2,
        }
        for n in range(9)
    ]
    texts = [{"context": f" {sentences(draw, 9)} \n", "continuation": sentences(draw, 1)} for _ in range(12)]
    data = {"copa": choices, "winograd": schemas, "lambada_openai": texts, "piqa": choices}
    kinds = {"copa": "multiple_choice", "winograd": "schema", "lambada_openai": "language_modeling"}
    tasks: list[dict[str, Any]] = []
    for label, examples in data.items():
        path = folder / "eval_data" / "few" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        shots = {"winograd": 0, "piqa": 5}.get(label, 2)
        task = {"label": label, "dataset_uri": f"few/{label}.jsonl", "num_fewshot": [shots]}
        tasks.append({**task, "icl_task_type": kinds.get(label, "multiple_choice")})
    tasks[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}, sort_keys=False))
    table = [f"{label},some category,some kind,0,{n},{BASELINES[label]}" for label, n in PUBLISHED.items()]
    header = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline"
    (folder / "eval_meta_data.csv").write_text("\n".join([header, *table]) + "\n")
    return folder
