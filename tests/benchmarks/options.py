"""The options that benchmarks share, and the arguments of `nanofed` that they come to."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanofed import runtime
from tests.benchmarks.corpus import default_data, tokenizer_folder

HELP = {
    "sequence_len": "tokens a row",
    "device_batch_size": "rows a micro-batch",
    "accumulation": "micro-batches an optimizer step, of each client and rank",
    "threads": "of the CPU, in each process",
}


def options(name: str, description: str | None, *, data: bool = False, **numbers: int) -> argparse.ArgumentParser:
    """Return the parser of `bin/bench NAME` with whole numbers and their defaults, `--json` and, if asked, `--data`."""
    parser = argparse.ArgumentParser(prog=f"bin/bench {name}", description=description)
    for number, default in numbers.items():
        parser.add_argument(f"--{number}", type=int, default=default, help=HELP.get(number))
    if data:
        parser.add_argument("--data", default=default_data(), help="folder of shards, demo or fineweb-edu")
    parser.add_argument("--json", action="store_true", help="print one object on the last line instead of tables")
    return parser


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text}")
    return text.lower() == "true"


def training(
    args: argparse.Namespace, *, batch_tokens: int, num_steps: int, eval_tokens: int, compile: bool = False
) -> list[str]:
    """Return arguments of `nanofed` that train a model of the options' size on the options' corpus."""
    given: dict[str, object] = {
        "model.depth": args.depth,
        "model.sequence_len": args.sequence_len,
        "model.compile": str(compile).lower(),
        "model.recipe.batch_tokens": batch_tokens,
        "model.recipe.num_steps": num_steps,
        "data.path": runtime.dataset_dir(args.data),
        "data.tokenizer": tokenizer_folder(args.data, args.vocab_size),
        "data.device_batch_size": args.device_batch_size,
        "data.eval_tokens": eval_tokens,
    }
    return [f"--{key}={value}" for key, value in given.items()]


def tokenizer_of(args: argparse.Namespace) -> Path:
    """Return the folder that `--tokenizer` names, else of one of `--vocab_size` that is trained on the data and kept."""
    return Path(args.tokenizer) if args.tokenizer else tokenizer_folder(args.data, args.vocab_size)
