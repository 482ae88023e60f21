"""CORE: the fast scorer against the slow one, what is asked, and what the score says of itself."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import nanofed
from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.evaluation.core.bundle import CORE_TASKS, Bundle, Example, Task
from nanofed.evaluation.core.questions import prompts, question
from nanofed.evaluation.core.score import evaluate_core, summarise
from nanofed.evaluation.core.scoring import SPREAD, batches, judge
from nanofed.model import GPT, GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.training import train_tokenizer
from tests.evaluation import slow_core
from tests.evaluation.small_bundle import WORDS, write_bundle


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of many small matmuls, several threads make slower ones where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.read(write_bundle(tmp_path_factory.mktemp("core") / "bundle"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def small_tokenizer() -> Tokenizer:
    texts = [" ".join(WORDS), "Question: which of these is it?\nAnswer: the fox and the dog, 12 of 34"]
    return train_tokenizer(texts * 3, vocab_size=300)


def small_model(tokenizer: Tokenizer, *, depth: int = 2, sequence_len: int = 64) -> GPT:
    """One whose answers differ: at nanochat's first weights every token costs the same."""
    model = GPT(GPTConfig.from_depth(depth, vocab_size=tokenizer.vocab_size, sequence_len=sequence_len))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "lm_head.weight" or name.endswith("c_proj.weight"):
                weight.normal_(std=0.1, generator=generator)
    return model.eval()


def fast_answers(model: GPT, tokenizer: Tokenizer, task: Task, most: int = 0) -> list[bool]:
    """Return the answers to the first `most` examples, of all; 0 for all."""
    examples = task.examples()
    asked = [
        question(task, examples, n, tokenizer, max_positions=model.max_positions) for n in range(most or len(examples))
    ]
    found: dict[int, bool] = {}
    for batch in batches(asked):
        found |= dict(zip([question.number for question in batch], judge(model, batch), strict=True))
    return [found[number] for number in range(most or len(examples))]


@pytest.mark.parametrize("sequence_len", [64, 9])  # the second reads 90 tokens: longer rows lose their beginning
def test_it_agrees_with_the_slow_scorer(bundle: Bundle, tokenizer: Tokenizer, sequence_len: int) -> None:
    model = small_model(tokenizer, sequence_len=sequence_len)
    answers: list[bool] = []
    for task, listed in zip(bundle.tasks, slow_core.listed_tasks(bundle.path), strict=True):
        slow = list(slow_core.answers(model, tokenizer, bundle.path, listed))
        assert fast_answers(model, tokenizer, task) == slow, task.label
        answers += slow
    assert len(answers) == 45 and 0 < sum(answers) < 45


@pytest.mark.slow
def test_it_agrees_with_the_slow_scorer_on_real_tasks(shared_data: Path) -> None:
    folder = shared_data / "core-eval"
    if not folder.is_dir():
        pytest.skip("needs the real tasks of ../shared/data/core-eval beside the checkout")
    bundle = Bundle.read(folder)
    texts = [task.delimiter.join(e.options[e.gold]) for task in bundle.tasks for e in task.examples()[:60]]
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    model = small_model(tokenizer, sequence_len=128)
    for task, listed in zip(bundle.tasks, slow_core.listed_tasks(folder), strict=True):
        slow = list(itertools.islice(slow_core.answers(model, tokenizer, folder, listed), 2))
        assert fast_answers(model, tokenizer, task, 2) == slow, task.label


def test_the_whole_score_is_of_the_slow_answers(bundle: Bundle, tokenizer: Tokenizer) -> None:
    model = small_model(tokenizer).train()
    score = evaluate_core(model, tokenizer, bundle)
    assert model.training
    assert score.core == pytest.approx(np.mean([task.centred for task in score.tasks]))
    for task, listed in zip(score.tasks, slow_core.listed_tasks(bundle.path), strict=True):
        slow = list(slow_core.answers(model.eval(), tokenizer, bundle.path, listed))
        assert task.accuracy == pytest.approx(sum(slow) / len(slow)) and task.examples == len(slow)
    assert evaluate_core(model, tokenizer, bundle).tasks == score.tasks


def test_a_model_that_is_not_finite_has_no_score(bundle: Bundle, tokenizer: Tokenizer) -> None:
    model = small_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NanofedError, match="not finite"):
        evaluate_core(model, tokenizer, bundle)


# --- what is asked


def task(kind: str = "multiple_choice", shots: int = 1, delimiter: str = " -> ") -> Task:
    return Task("t", kind, shots, delimiter, 0.25, 3, Path("t.jsonl"))  # type: ignore[arg-type]


def test_solved_examples_stand_before_the_question() -> None:
    examples = [Example((("2+2", "3"), ("2+2", "4")), 1), Example((("1+1", "2"), ("1+1", "5")), 0)]
    before, texts = prompts(task(), examples, 1)
    assert before == "2+2 -> 4\n\n"
    assert texts == ["2+2 -> 4\n\n1+1 -> 2", "2+2 -> 4\n\n1+1 -> 5"]


def test_what_is_shown_is_drawn_as_from_a_list_without_the_question() -> None:
    examples = [Example(((f"question {n}", f"answer {n}"),), 0) for n in range(30)]
    for number in (0, 13, 29):
        others = [n for n in range(30) if n != number]
        drawn = random.Random(1234 + number).sample(others, 10)
        before, _ = prompts(task("language_modeling", 10, " "), examples, number)
        assert before == "".join(f"question {n} answer {n}\n\n" for n in drawn)


def judged(kind: str, options: list[tuple[str, str]], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each option that is judged."""
    asked = question(task(kind, 0, " "), [Example(tuple(options), 0)], 0, tokenizer, max_positions=999)
    assert all(row.ids[0] == tokenizer.bos_token_id for row in asked.rows)
    for row in asked.rows:
        assert list(row.ids[: asked.shared]) == list(asked.rows[0].ids[: asked.shared])
        assert asked.shared < row.start
    return [tokenizer.decode(row.ids[row.start :].tolist()) for row in asked.rows]


def test_what_is_judged(tokenizer: Tokenizer) -> None:
    options = [("over a", "lazy dog"), ("over a", "lazy fox jumps")]
    assert judged("multiple_choice", options, tokenizer) == [" dog", " fox jumps"]
    options = [("the lazy dog", "jumps over"), ("the quick fox", "jumps over")]
    assert judged("schema", options, tokenizer) == [" jumps over"] * 2
    assert judged("language_modeling", [("the quick", "brown fox")], tokenizer) == [" brown fox"]


def test_options_that_are_all_alike_are_answered_with_the_first(tokenizer: Tokenizer) -> None:
    for gold in range(2):
        examples = [Example((("the quick", "fox"),) * 2, gold)]
        asked = question(task("multiple_choice", 0, " "), examples, 0, tokenizer, max_positions=999)
        assert judge(small_model(tokenizer), [asked]) == [gold == 0]


def test_a_bad_task_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    for examples in (0, 3):  # 5 are shown before each question of the last task
        with pytest.raises((ConfigError if not examples else DataError), match=r"no checkpoint|5 before each question"):
            nanofed.evaluate(tmp_path / "nothing", core=True, core_data=bundle, core_examples=examples)


def test_what_cannot_be_judged_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no token of its own"):
        question(task("language_modeling", 0, ""), [Example((("the quick", ""),), 0)], 0, tokenizer, max_positions=999)
    with pytest.raises(DataError, match="tokens are to be judged, and this model reads 3 positions"):
        question(task("language_modeling", 0), [Example((("a", "fox " * 9),), 0)], 0, tokenizer, max_positions=3)


def test_batches_hold_every_question_once_and_what_is_alike(bundle: Bundle, tokenizer: Tokenizer) -> None:
    examples = bundle.tasks[3].examples()
    asked = [question(bundle.tasks[3], examples, n, tokenizer, max_positions=999) for n in range(len(examples))]
    found = list(batches(asked))
    assert sorted(question.number for batch in found for question in batch) == list(range(len(examples)))
    assert all(max(q.shared for q in batch) - min(q.shared for q in batch) <= SPREAD for batch in found)


# --- the bundle


def test_a_bundle_says_what_it_lacks(bundle: Bundle, tokenizer: Tokenizer) -> None:
    assert set(bundle.missing) == set(CORE_TASKS) - {"copa", "winograd", "lambada_openai", "piqa"}
    partial = evaluate_core(small_model(tokenizer), tokenizer, bundle, examples=6).partial
    assert partial is not None
    assert "without 18 of CORE's tasks (hellaswag_zeroshot, jeopardy," in partial
    assert "with 24 of the 45 examples of copa, winograd, lambada_openai, piqa" in partial
    right = np.ones(12, bool)
    whole = Bundle(bundle.path, tuple(Task(label, "schema", 0, " ", 0.5, 12, Path()) for label in CORE_TASKS), ())
    assert summarise([(task, right) for task in whole.tasks], bundle, seconds=0.0).partial is not None
    assert len(CORE_TASKS) == 22


def test_order_and_cut_are_nanochats(bundle: Bundle) -> None:
    lines = [json.loads(line) for line in bundle.tasks[2].path.read_text().splitlines()]
    random.Random(1337).shuffle(lines)
    found = bundle.tasks[2].examples(5)
    assert [example.options[0] for example in found] == [
        (line["context"].strip(), line["continuation"]) for line in lines[:5]
    ]


def test_a_task_without_its_file_is_missing(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "eval_data" / "few" / "piqa.jsonl").unlink()
    assert "piqa" in Bundle.read(folder).missing


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("core.yaml", "schema", "quiz", "winograd is of the kind 'quiz'"),
        ("core.yaml", "few/copa", "../../copa", "outside of eval_data"),
        ("core.yaml", "icl_tasks", "tasks", "does not list tasks"),
        ("eval_meta_data.csv", "copa", "copas", "does not say what a random answer to copa is worth"),
        ("eval_meta_data.csv", "50\n", "100\n", "a random baseline is from 0 to less than 100"),
        ("eval_meta_data.csv", "#datapoints", "rows", "no table of tasks"),
        ("eval_data/few/copa.jsonl", '"gold": 0', '"gold": 4', "copa.jsonl, line 1: .*gold is 4 of 4 options"),
        ("eval_data/few/copa.jsonl", '"query"', '"ask"', "copa.jsonl, line 1: no example of multiple_choice"),
        ("eval_data/few/copa.jsonl", "{", "[", "copa.jsonl, line 1: "),
    ],
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = Bundle.read(folder).fingerprint()
    path = folder / name
    text = path.read_text()
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=said):
        Bundle.read(folder).check()
    path.write_text(text)
    assert Bundle.read(folder).fingerprint() == before


def test_no_bundle_and_too_few_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nanofed data download --core"):
        Bundle.read(tmp_path)
    found = Bundle.read(write_bundle(tmp_path / "bundle"))
    with pytest.raises(DataError, match=r"2 examples are too few for a task that shows 2 .*: ask for more of them"):
        found.tasks[0].examples(2)


def test_a_negative_number_of_examples_is_refused(bundle: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="CORE: examples must be at least 0, not -3"):
        evaluate_core(small_model(tokenizer), tokenizer, bundle, examples=-3)


# --- the score


def test_scores_are_centred_and_their_intervals_are_of_the_examples(bundle: Bundle) -> None:
    answers = {"copa": [True] * 8 + [False] * 4, "winograd": [True] * 9, "lambada_openai": [False] * 12}
    answers["piqa"] = [True] * 3 + [False] * 9
    score = summarise([(task, np.array(answers[task.label])) for task in bundle.tasks], bundle, seconds=1.0)
    copa, winograd, lambada, piqa = score.tasks
    assert copa.centred == pytest.approx(1 / 3) and piqa.centred == 0.0
    assert (winograd.accuracy_interval, lambada.centred_interval) == ((1.0, 1.0), (0.0, 0.0))
    assert score.core == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)
    # of 12 answers of which two thirds are right: 0.667 +- 1.96 * 0.136
    assert copa.accuracy_interval[0] == pytest.approx(0.40, abs=0.09)
    assert copa.accuracy_interval[1] == pytest.approx(0.93, abs=0.09)
    half = (score.interval[1] - score.interval[0]) / 2
    parts = [(task.centred_interval[1] - task.centred_interval[0]) / 2 for task in score.tasks]
    assert half == pytest.approx(sum(part**2 for part in parts) ** 0.5 / 4, rel=0.15)
    assert json.loads(json.dumps(score.to_plain()))["tasks"][0]["accuracy"] == copa.accuracy
    assert "CORE" in score.table() and "partial: without 18" in score.table()
