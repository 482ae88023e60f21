"""`nanofed generate`: text from a checkpoint, as it is sampled."""

from __future__ import annotations

import argparse
import functools
import sys

from nanofed.cli.numbers import add_number
from nanofed.errors import ConfigError
from nanofed.ranges import CountOrZero, Factor, Seed


def main(argv: list[str]) -> int:
    """Write the prompt and what the model makes of it, piece by piece."""
    args = _parser().parse_args(argv[1:])
    prompt = _prompt(args.prompt)

    from nanofed import api

    pieces = api.generate(
        args.checkpoint,
        prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k or None,
        seed=args.seed,
        device=device(args.device),
    )
    # What is wrong with the request shows before the first line of output: everything up to here has been checked.
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("nanofed generate", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest) or one checkpoint"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from; - reads standard input")
    add = functools.partial(add_number, parser)
    add("--max_tokens", kind=CountOrZero, default=256, help="tokens at most (default: %(default)s)")
    add("--temperature", kind=Factor, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top_k", kind=CountOrZero, default=50, help="draw among the k likeliest; 0: all (default: %(default)s)")
    add("--seed", kind=Seed, default=42, help="of the draws (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    return parser


def _prompt(given: str) -> str:
    if given != "-":
        return given
    if sys.stdin is None:
        raise ConfigError("--prompt -: standard input is closed")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt -: standard input is not UTF-8 text ({error})") from error


def device(wanted: str) -> str:
    """Return the device that `--device` names; `auto` is a GPU where there is one.

    Raises:
        ConfigError: it cannot be used here.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # an unknown name, a device that is not there, a build without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {wanted} cannot be used here: {reason}") from error
    return wanted
