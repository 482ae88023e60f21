"""`bin/bench round`: what a round costs beside training, over a real SuperLink and SuperNodes on loopback, in its phases.

A round lasts from the first push of its weights to that of the next. Without --train the sites' workers train nothing (see
`echo_rounds`): what is left is the way of the weights. Memory and CPU time are those of all processes, supervisors too; CPU
seconds are for busy machines, on which others mean little.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from nanofed.errors import ConfigError
from nanofed.federated.config import FederationConfig
from nanofed.federated.deploy.process import ended_by_signals
from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import load_tokenizer
from tests.benchmarks import machine
from tests.benchmarks.corpus import tokenizer_folder
from tests.benchmarks.options import options, training
from tests.benchmarks.report import progress, show
from tests.benchmarks.round_fleet import Fleet, ours, stock
from tests.benchmarks.round_phases import PHASES

CPU = torch.device("cpu")
DOWN, UP = (get_args(get_type_hints(FederationConfig)[name]) for name in ("down_codec", "up_codec"))


def fleet_options(name: str, description: str | None, *, round_seconds: float, sites: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark of whole federations, with the options that say which."""
    size = {"vocab_size": 65_536, "sequence_len": 128, "device_batch_size": 8}
    parser = options(name, description, data=True, **size, sites=sites)
    add = parser.add_argument
    add("--depth", type=int, default=4, help="d20 takes 14 GB of memory and 14 GB of disk; stock d12 11 GB of memory")
    add("--rounds", type=int, default=4, help="that count; one more is run")
    add("--train", action="store_true", help="with the real worker, for rounds of --round_seconds")
    add("--round_seconds", type=float, default=round_seconds)
    add("--against", choices=("stock",), help="then Flower's own FedAvg in fp32, with the same sites and shapes")
    add("--set", action="append", default=[], metavar="--KEY=VALUE", help="further options of nanofed federate")
    add("--environment", action="append", default=[], metavar="NAME=VALUE", help="of all processes")
    add("--folder", type=Path, help="where runs and logs go (default: a temporary folder); kept if named")
    add("--seconds", type=float, default=1800.0, help="after which a side is given up")
    return parser


def fleet(args: argparse.Namespace) -> Fleet:
    """Return what the options ask for."""
    vocab_size = load_tokenizer(tokenizer_folder(args.data, args.vocab_size)).vocab_size
    config = GPTConfig.from_depth(args.depth, vocab_size=vocab_size, sequence_len=args.sequence_len)
    rows = args.device_batch_size * args.sequence_len
    arguments = training(args, batch_tokens=rows, num_steps=10_000_000, eval_tokens=rows)
    arguments += [f"--eval_every={1 << 30}", "--save_every=1", "--keep_checkpoints=1", "--fabric.accelerator=cpu"]
    rounds = {"clients": args.sites, "round_seconds": args.round_seconds, "down_codec": args.down, "up_codec": args.up}
    rounds["max_norm_ratio"] = "null"  # an echo is of no training
    if not args.train:
        rounds["round_steps"] = 1
    arguments += [*(f"--federation.{key}={value}" for key, value in rounds.items()), *args.set]
    environment = dict(pair.split("=", 1) for pair in args.environment)
    return Fleet(config, arguments, args.sites, args.rounds, args.train, args.secure, environment, args.seconds)


def lines(result: dict[str, Any]) -> list[list[object]]:
    """Return the rows of the table: a figure, and each side's value."""
    sides = [result, result["stock"]] if "stock" in result else [result]
    rows: list[list[object]] = [
        [name, *(side[name] for side in sides)]
        for name in ("overhead_seconds", "overhead_seconds_first", "round_seconds", "bytes_down", "bytes_up")
    ]
    rows += [[f"  {phase}", *(side["phases"][phase] for side in sides)] for phase in PHASES]
    names = sorted({name for side in sides for name in side["peak_rss_mb"]})
    rows += [[f"CPU s {name}", *(side["cpu_seconds"].get(name) for side in sides)] for name in names]
    rows += [["CPU s together", *(sum(side["cpu_seconds"].values()) for side in sides)]]
    rows += [[f"MB {name}", *(side["peak_rss_mb"].get(name) for side in sides)] for name in names]
    return [*rows, ["MB together", *(side["peak_rss_mb_together"] for side in sides)]]


@contextmanager
def work_folder(args: argparse.Namespace, payload: int) -> Iterator[Path]:
    """Yield the folder of runs and logs, with room for weights of so many bytes; what was started is stopped at the end."""
    if args.rounds < 1 or args.sites < 1:
        raise ConfigError("--rounds and --sites must be at least 1")
    folder = args.folder.absolute() if args.folder else Path(tempfile.mkdtemp(prefix="nanofed-round-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 8 * payload:
            raise ConfigError(f"{8 * payload / 1e9:.0f} GB must be free in {folder}: name another --folder")
        with ended_by_signals():
            yield folder
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    parser = fleet_options("round", __doc__, round_seconds=5.0, sites=1)
    add = parser.add_argument
    add("--down", choices=DOWN, default="bf16", help="codec of the weights")
    add("--up", choices=UP, default="bf16", help="codec of the updates")
    add("--secure", action="store_true", help="TLS and keys")
    args = parser.parse_args(argv)
    setting = fleet(args)
    with work_folder(args, 4 * setting.config.num_parameters) as folder:
        progress(f"d{args.depth}: {setting.config.num_parameters:,} parameters, {args.sites} sites")
        result = ours(setting, folder / "ours")
        if args.against:
            shutil.rmtree(folder / "ours" / "runs")
            progress("Flower's FedAvg")
            result["stock"] = stock(setting, folder / "stock")
            result["ratio_seconds"] = result["overhead_seconds"] / result["stock"]["overhead_seconds"]
    result |= {name: getattr(args, name) for name in ("depth", "sites", "rounds", "down", "up", "train", "secure")}
    result |= {"parameters": setting.config.num_parameters, **machine.describe(CPU)}
    header = ["median after the first round", "ours", *(["stock"] if args.against else [])]
    show(result, lines(result), header, as_json=args.json)
    return 0
