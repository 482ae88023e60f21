"""A CORE bundle in nanochat's layout: which tasks there are, how each is asked, and its examples.

eval_bundle/
core.yaml            the tasks: label, file, shots, kind, delimiter
eval_meta_data.csv   how many examples each task has, and its random baseline in percent
eval_data/**.jsonl   the examples, one JSON object a line
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from nanofed import runtime
from nanofed.errors import DataError
from nanofed.files import sha256

TASKS, TABLE, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"

# The 22 tasks of CORE (Li et al. 2024, arXiv:2406.11794), by nanochat's labels.
CORE_TASKS = (
    *("hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa"),
    *("piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages"),
    *("agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad"),
    *("coqa", "boolq", "bigbench_language_identification"),
)
# The table says 2,376 of arc_challenge, which is arc_easy's number; ARC's challenge test set has these (arXiv:1803.05457).
MISCOUNTED = {"arc_challenge": 1172}
SHUFFLE_SEED = 1337  # nanochat's: a task that is cut to its first examples has the same ones everywhere

Kind = Literal["multiple_choice", "schema", "language_modeling"]


@dataclass(frozen=True)
class Example:
    """One example: texts of which one is right."""

    # Pairs of a context and its continuation. A multiple choice has one context and many continuations, a schema many contexts
    # and one continuation, language modelling one of each.
    options: tuple[tuple[str, str], ...]
    gold: int  # the number of the right pair


@dataclass(frozen=True)
class Task:
    """One task of a bundle."""

    label: str  # the task's name
    kind: Kind  # how it is asked and judged
    shots: int  # solved examples that stand before each question
    delimiter: str  # stands between context and continuation
    baseline: float  # accuracy of a random answer, from 0 to 1
    published: int  # examples of the whole task, of which a bundle may hold fewer
    path: Path  # the file of its examples

    def examples(self, most: int = 0) -> list[Example]:
        """Return the task's examples in nanochat's order, the first `most` of them; 0 for all.

        Raises:
            DataError: the file cannot be read, a line of it is no example of this kind, or there are too few for the shots.
        """
        found = []
        with _reading(self.path):
            for number, line in enumerate(self.path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
                try:
                    found.append(_example(self.kind, json.loads(line)))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise DataError(f"{self.path}, line {number}: no example of {self.kind} ({error})") from error
        random.Random(SHUFFLE_SEED).shuffle(found)
        asked = found[:most] if most > 0 else found
        if len(asked) <= self.shots:
            more = f"; there are {len(found)}: ask for more of them" if len(asked) < len(found) else ""
            raise DataError(
                f"{self.path}: {len(asked)} examples are too few for a task that shows {self.shots} before each question{more}"
            )
        return asked


@dataclass(frozen=True)
class Bundle:
    """The tasks of a folder."""

    path: Path  # the folder
    tasks: tuple[Task, ...]  # its tasks, in the order of `core.yaml`
    missing: tuple[str, ...]  # labels of CORE's tasks that it does not hold

    @classmethod
    def read(cls, folder: str | Path | None = None) -> Bundle:
        """Read which tasks a bundle has; None is the one that `nanofed data download --core` brings.

        A task whose file of examples is not there counts as missing.

        Raises:
            DataError: there is no bundle, it is damaged, or it holds no task.
        """
        path = runtime.core_dir() if folder is None else runtime.user_path(folder)
        if not (path / TASKS).is_file():
            raise DataError(
                f"there is no CORE bundle in {path} (no {TASKS}): get it with `nanofed data download --core`, or name a folder"
            )
        table = _table(path / TABLE)
        with _reading(path / TASKS):
            try:
                listed = [_task(path, task, table) for task in yaml.safe_load((path / TASKS).read_bytes())["icl_tasks"]]
            except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
                raise DataError(f"{path / TASKS} does not list tasks as nanochat's does: {_said(error)}") from error
        tasks = tuple(task for task in listed if task.path.is_file())
        labels = [task.label for task in tasks]
        if not tasks or len(set(labels)) < len(labels):
            raise DataError(f"{path} holds no examples of any task, or those of one task twice")
        return cls(path, tasks, tuple(label for label in CORE_TASKS if label not in labels))

    def check(self, most: int = 0) -> None:
        """Read every example, or the first `most` of each task.

        Raises:
            DataError: one cannot be used.
        """
        for task in self.tasks:
            task.examples(most)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the files: scores can be held against each other where it is the same."""
        files = [self.path / TASKS, self.path / TABLE, *sorted({task.path for task in self.tasks})]
        names = [path.relative_to(self.path).as_posix() for path in files]
        return hashlib.sha256(json.dumps([names, [sha256(path) for path in files]]).encode()).hexdigest()


def _table(path: Path) -> dict[str, tuple[int, float]]:
    """Return the number of examples and the random baseline (0 to 1) of every task."""
    with _reading(path), path.open(encoding="utf-8", newline="") as file:
        try:
            rows = {
                row["Eval Task"]: (int(row["#datapoints"]), float(row["Random baseline"]) / 100)
                for row in csv.DictReader(file)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is no table of tasks as nanochat's is: {_said(error)}") from error
    if wrong := [label for label, (_, baseline) in rows.items() if not 0 <= baseline < 1]:
        raise DataError(f"{path}: a random baseline is from 0 to less than 100, of {wrong[0]} too")
    return rows


def _task(bundle: Path, listed: Mapping[str, Any], table: Mapping[str, tuple[int, float]]) -> Task:
    label, kind = str(listed["label"]), listed["icl_task_type"]
    shots, delimiter = listed["num_fewshot"][0], listed.get("continuation_delimiter", " ")
    path = bundle / DATA / str(listed["dataset_uri"])
    if kind not in get_args(Kind):
        raise ValueError(f"{label} is of the kind {kind!r}, and there are {', '.join(get_args(Kind))}")
    if type(shots) is not int or shots < 0 or not isinstance(delimiter, str):
        raise ValueError(f"{label} has num_fewshot {shots!r} and continuation_delimiter {delimiter!r}")
    if not path.resolve().is_relative_to((bundle / DATA).resolve()):
        raise ValueError(f"the examples of {label} are outside of {DATA}: {listed['dataset_uri']}")
    if label not in table:
        raise ValueError(f"{TABLE} does not say what a random answer to {label} is worth")
    published, baseline = table[label]
    return Task(label, kind, shots, delimiter, baseline, MISCOUNTED.get(label, published), path)


def _example(kind: Kind, found: Mapping[str, Any]) -> Example:
    if kind == "language_modeling":
        # Some data sets have blanks at the end of a context, where the delimiter is to stand.
        return Example(((_text(found["context"]).strip(), _text(found["continuation"])),), 0)
    if kind == "multiple_choice":
        options = [(_text(found["query"]), _text(choice)) for choice in found["choices"]]
    else:
        options = [(_text(context), _text(found["continuation"])) for context in found["context_options"]]
    gold = found["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold!r} of {len(options)} options")
    return Example(tuple(options), gold)


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value!r:.40} is no text")
    return str(value)


def _said(error: Exception) -> str:
    return f"{error} is not there" if isinstance(error, KeyError) else str(error)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
