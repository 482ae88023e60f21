"""`bin/study FILE.yaml`: a grid of small runs over texts and seeds, and how far each falls behind the one of reference.

A study's file names the options that all runs share, single runs, and axes whose entries are combined, each with options of its
own. Runs of one seed are paired: their gap is taken before it is averaged. One run takes one thread, and as many run at a time
as there are cores. A study that was stopped goes on: runs that have reached their horizon are not repeated. A study of `domains`
makes its text by itself, from equal parts of several corpora; its runs are scored on every part and on all of them pooled.

    vocab_size: 2048
    seeds: [1, 2]
    reference: data parallel
    common: {model.depth: 2, model.recipe.num_steps: 300}
    runs:
      data parallel: {command: fit}
    axes:
      - {M = 1: {federation.clients: 1}, M = 2: {federation.clients: 2}}
      - {FedAvg: {federation.outer_lr: 1, federation.outer_momentum: 0}, auto: {}}
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict

from nanofed import runtime
from nanofed.api import evaluate
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy.process import last_line
from nanofed.files import write_atomically
from nanofed.training.summary import AT_HORIZON, SUMMARY, Summary
from tests.benchmarks.corpus import default_data, equal_parts, tokenizer_folder
from tests.benchmarks.report import progress, table

SCORES = "scores.json"
ALWAYS = {"save_every": 0, "sample_every": 0, "model.compile": False}
Options = dict[str, Any]


class Study(BaseModel):
    """What a study's file says.

    Attributes:
        vocab_size: The size of the tokenizer that is trained on each text.
        domains: The folders of parts to be made, for options to name, and the corpus of each. The text is their union.
        seeds: The seeds with which every variant is run.
        reference: The label of the variant that the others are held against.
        common: The options of all runs.
        runs: The options of single runs by label; `command` is `fit` or, by default, `federate`.
        axes: Entries by label, each with its options; every combination of one entry an axis is a run.
    """

    model_config = ConfigDict(extra="forbid")

    vocab_size: int = 2048
    domains: dict[str, str] = {}
    seeds: list[int] = [1]
    reference: str | None = None
    common: Options = {}
    runs: dict[str, Options | None] = {}
    axes: list[dict[str, Options | None]] = []

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a study's file.

        Raises:
            ConfigError: It cannot be read, or is no study.
        """
        try:
            study = cls.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read as a study: {error}") from error
        labels = [label for label, _ in study.variants()]
        if study.reference is not None and study.reference not in labels:
            raise ConfigError(f"{file}: the reference {study.reference!r} is none of {', '.join(labels)}")
        return study

    def variants(self) -> Iterator[tuple[str, Options]]:
        """Yield label and options of each variant: the single runs, then every combination of the axes' entries."""
        for label, options in self.runs.items():
            yield label, self.common | (options or {})
        for entries in itertools.product(*(axis.items() for axis in self.axes)) if self.axes else ():
            merged = functools.reduce(operator.or_, ((options or {}) for _, options in entries), self.common)
            yield ", ".join(label for label, _ in entries), merged

    def plan(self, texts: Sequence[str]) -> list[Run]:
        """Return all runs, one seed and text after the other, so that what has been run can be compared at any time.

        Raises:
            ConfigError: A run's command is neither `fit` nor `federate`.
        """
        found = []
        for seed, text in itertools.product(self.seeds, texts):
            for label, options in self.variants():
                command = str(options.get("command", "federate"))
                if command not in ("fit", "federate"):
                    raise ConfigError(f"the command of {label!r} is fit or federate, not {command!r}")
                rest = {key: value for key, value in options.items() if key != "command"}
                found.append(Run(label, text, seed, command, {"data.path": text} | rest))
        return found


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        label: The name of its variant, the same for all texts and seeds.
        text: The folder of the corpus, with which its tokenizer belongs.
        seed: The seed of its weights and draws.
        command: `fit` or `federate`.
        options: Dotted options of that command.
    """

    label: str
    text: str
    seed: int
    command: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run's folder; with another option it is another run."""
        told = json.dumps([self.command, self.options], sort_keys=True, default=str)
        said = f"{Path(self.text).name} {self.label} {self.seed} {hashlib.sha256(told.encode()).hexdigest()[:6]}"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", said)


def result(run: Run, folder: Path) -> Summary | None:
    """Return what a run came to, None where it has not reached its horizon."""
    if not (folder / run.name / SUMMARY).is_file():
        return None
    summary = Summary.read(folder / run.name)
    return summary if summary.ended == AT_HORIZON else None


def execute(run: Run, folder: Path, vocab_size: int) -> None:
    """Run it in a process of one thread, unless it has been run."""
    if result(run, folder) is not None:
        return
    options = {
        **ALWAYS,
        **run.options,
        "seed_everything": run.seed,
        "data.path": runtime.dataset_dir(run.options["data.path"]),
        "data.tokenizer": tokenizer_folder(run.text, vocab_size),
        "runs_dir": folder,
        "name": run.name,
        "overwrite": True,
    }
    ours, others = ("trainer", ("federation", "fabric")) if run.command == "fit" else ("fabric", ("trainer",))
    options.setdefault(f"{ours}.accelerator", "cpu")
    written = {
        key: value if isinstance(value, str | Path) else json.dumps(value)
        for key, value in options.items()
        if key.partition(".")[0] not in others  # what all runs share is for either command
    }
    command = [sys.executable, "-m", "nanofed", run.command, *(f"--{key}={value}" for key, value in written.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    log = folder / f"{run.name}.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    summary = result(run, folder) if done.returncode == 0 else None
    failed = f"failed: {last_line(log)}; see {log}"
    said = failed if summary is None else f"{summary.bpb_end:.4f} in {summary.seconds:.0f} s"
    progress(f"{run.name}: {said}")


def collect(runs: Sequence[Run], folder: Path, study: Study) -> pa.Table:
    """Return what is there of the study: a row a run, with its gap to the reference of the same text and seed."""
    found = [(run, summary) for run in runs if (summary := result(run, folder)) is not None]
    scores = {run.name: _scores(run, folder, summary, [*study.domains]) for run, summary in found}
    rows = []
    bpb = {(run.text, run.seed, run.label): scores[run.name]["bpb"] for run, _ in found}
    for run, summary in found:
        base, score = bpb.get((run.text, run.seed, study.reference or "")), scores[run.name]
        rows.append(
            {
                "text": Path(run.text).name,
                "variant": run.label,
                "seed": run.seed,
                "bpb": score["bpb"],
                "domains": list(score["texts"].values()),
                "gap": score["bpb"] / base - 1 if base and score["bpb"] else None,
                "tokens": summary.tokens,
                "seconds": summary.seconds,
                "curve": [[point.tokens, point.bpb] for point in summary.curve],
                "options": json.dumps(run.options, default=str),
            }
        )
    return pa.Table.from_pylist(rows)


def _scores(run: Run, folder: Path, summary: Summary, domains: Sequence[str]) -> dict[str, Any]:
    """Return a run's bits per byte, `bpb`, and those of each domain, `texts`; on domains it is scored once, here."""
    if not domains:
        return {"bpb": summary.bpb_end, "texts": {}}
    file = folder / run.name / SCORES
    if not file.is_file():
        scores = evaluate(folder / run.name, domains, eval_tokens=run.options.get("data.eval_tokens"))
        write_atomically(file, scores.to_json())
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def summarise(results: pa.Table) -> str:
    """Return the table of a study: mean bits per byte and gap of each variant, with the range over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results.to_pylist():
        groups.setdefault((row["variant"], row["text"]), []).append(row)
    rows = []
    for (variant, text), found in groups.items():
        gaps = [100 * row["gap"] for row in found if row["gap"] is not None]
        figures = [
            statistics.mean(figures) for figures in zip(*([row["bpb"], *row["domains"]] for row in found), strict=True)
        ]
        mean = ", ".join(f"{figure:.4f}" for figure in figures)
        gap = f"{statistics.mean(gaps):+.2f}" if gaps else "-"
        span = f"{min(gaps):+.2f} … {max(gaps):+.2f}" if len(gaps) > 1 else "-"
        rows.append([variant, text, len(found), mean, gap, span])
    return table(rows, ["variant", "text", "seeds", "bits per byte", "gap, %", "of seeds"])


def plot(results: pa.Table, path: Path) -> None:
    """Draw the curves of each text, averaged by eye: one line a run, one colour a variant."""
    from matplotlib import pyplot

    rows = results.to_pylist()
    texts = sorted({row["text"] for row in rows})
    colours = {variant: f"C{index}" for index, variant in enumerate(dict.fromkeys(row["variant"] for row in rows))}
    figure, axes = pyplot.subplots(1, len(texts), figsize=(7 * len(texts), 5), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        labelled: set[str] = set()
        for row in (row for row in rows if row["text"] == text):
            tokens, bpb = zip(*row["curve"], strict=True)
            label = None if row["variant"] in labelled else row["variant"]
            axis.plot(tokens, bpb, color=colours[row["variant"]], label=label, linewidth=1)
            labelled.add(row["variant"])
        axis.set(title=text, xlabel="tokens", ylabel="bits per byte", xscale="log", yscale="log")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/study", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="the study, in YAML; configs/studies/ has some")
    parser.add_argument("--data", nargs="+", default=[default_data()], help="folders of parquet shards, or demo")
    parser.add_argument("--folder", type=Path, help="of runs and results (default: runs/study-NAME)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--only", default="", help="regular expression: only variants whose label it is found in")
    args = parser.parse_args(argv)
    try:
        study = Study.read(args.file)
        data = [equal_parts(study.domains)] if study.domains else args.data
        runs = study.plan(data)
        for text in data:
            tokenizer_folder(text, study.vocab_size)
    except NanofedError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    folder = (args.folder or Path("runs") / f"study-{args.file.stem}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in runs if re.search(args.only, run.label)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: execute(run, folder, study.vocab_size), chosen))
    results = collect(runs, folder, study)
    if not results.num_rows:
        progress(f"no run has reached its horizon: see the logs in {folder}")
        return 1
    pq.write_table(results, folder / "results.parquet")
    text = summarise(results)
    (folder / "results.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    try:
        plot(results, folder / "results.png")
    except ImportError:
        progress("no plot: matplotlib is not installed (it comes with the extra `notebooks`)")
    return 0 if all(result(run, folder) is not None for run in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
