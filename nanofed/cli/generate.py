"""`nanofed generate`: text from a checkpoint, as it is sampled: after one prompt, after each of a file, or in a dialogue.

Without --prompt and --prompts, a terminal asks for prompts until Ctrl-D; /help lists what it knows, and Ctrl-C ends a text.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanofed.cli.numbers import add_number, read_number
from nanofed.errors import ConfigError, DataError
from nanofed.ranges import Count, CountOrZero, Factor, Nucleus, Seed

if TYPE_CHECKING:
    from nanofed.api import Loaded

NUMBERS: dict[str, tuple[Any, float, str]] = {  # option -> kind, default, help; a dialogue sets them as /NAME VALUE
    "max_tokens": (CountOrZero, 256, "tokens at most"),
    "temperature": (Factor, 0.8, "0 takes the likeliest token"),
    "top_k": (CountOrZero, 50, "draw among the k likeliest; 0: all"),
    "top_p": (Nucleus, 1.0, "draw among the fewest of the likeliest whose probabilities add up to this"),
    "seed": (Seed, 42, "the same seed draws the same tokens"),
}


def main(argv: list[str]) -> int:
    """Write what the model makes of one prompt, of a file of prompts, or of those that are typed."""
    parser = _parser()
    args = parser.parse_args(argv[1:])
    if args.prompt is not None and args.prompts is not None:
        raise ConfigError("--prompt and --prompts: give one of them")
    options = {name: getattr(args, name) for name in NUMBERS} | {"stop": args.stop}
    if args.prompts is not None:
        return _of_a_file(args, options)
    if args.jsonl:
        raise ConfigError("--jsonl writes what follows a file of prompts: give it as --prompts FILE")
    if args.prompt is not None:
        return _of_one_prompt(args, options)
    if sys.stdin is None or not sys.stdin.isatty():
        parser.error("give --prompt or --prompts: standard input is no terminal, where prompts could be asked for")

    from nanofed import api

    return _dialogue(api.load(args.checkpoint, device=device(args.device)), options)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "nanofed generate", description=__doc__, allow_abbrev=False, formatter_class=formatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder (its newest), one checkpoint, or an exported model",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to go on from; - reads standard input")
    parser.add_argument("--prompts", metavar="FILE", help="text file of prompts, one a line; - reads standard input")
    parser.add_argument("--jsonl", action="store_true", help="with --prompts: one JSON object a line, in their order")
    add = functools.partial(add_number, parser)
    add(
        "--batch_size",
        kind=Count,
        default=16,
        help="prompts of --prompts that are generated side by side (default: %(default)s)",
    )
    for name, (kind, default, meaning) in NUMBERS.items():
        add(f"--{name}", kind=kind, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TOKEN", help="text of a token that ends a text; may be repeated"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    return parser


def _of_one_prompt(args: argparse.Namespace, options: dict[str, Any]) -> int:
    prompt = _standard_input("--prompt").removesuffix("\n") if args.prompt == "-" else args.prompt
    _go_on(args.checkpoint, prompt, options, device=device(args.device))
    return 0


def _go_on(model: str | Loaded, prompt: str, options: dict[str, Any], **where: Any) -> None:
    """Write a prompt and what follows it. The next text is drawn with the next seed."""
    from nanofed import api

    pieces = api.generate(model, prompt, **_sampled(options), **where)
    options["seed"] += 1
    # What is wrong with the request shows before the first line of output: everything up to here has been checked.
    _write(prompt)
    for piece in pieces:
        _write(piece)
    sys.stdout.write("\n")


def _of_a_file(args: argparse.Namespace, options: dict[str, Any]) -> int:
    text = _standard_input("--prompts") if args.prompts == "-" else _read(Path(args.prompts))
    prompts = text.removesuffix("\n").split("\n") if text else []

    from nanofed import api

    batches = {"batch_size": args.batch_size, "device": device(args.device)}
    for done in api.complete(args.checkpoint, prompts, **_sampled(options), **batches):
        _write(f"{json.dumps(asdict(done)) if args.jsonl else done.prompt + done.text}\n")
    return 0


def _sampled(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as the API takes them: 0 stands for no limit of the likeliest."""
    return options | {"top_k": options["top_k"] or None}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _standard_input(option: str) -> str:
    if sys.stdin is None:
        raise ConfigError(f"{option} -: standard input is closed")
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} -: standard input is not UTF-8 text ({error})") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the first prompt
    except OSError as error:
        raise DataError(f"--prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts {path} is not UTF-8 text ({error})") from error


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


def _dialogue(loaded: Loaded, options: dict[str, Any]) -> int:
    """Ask for prompts in a terminal and write what follows each; lines that begin with / change the options.

    Ctrl-C ends the text that is being written, or empties the line that is typed; Ctrl-D and /quit end the dialogue.
    """
    import readline  # noqa: F401 (input() has a history and edits lines with it)

    _write("Each line is a prompt. /help lists what else there is; Ctrl-D ends.\n")
    while True:
        try:
            line = input("> ")
            if line == "/quit":
                return 0
            if line.startswith("/"):
                _command(line[1:], options)
            elif line:
                _go_on(loaded, line, options)
        except EOFError:
            _write("\n")
            return 0
        except KeyboardInterrupt:
            _write("\n")
        except ConfigError as error:
            _write(f"{error}\n")


def _command(text: str, options: dict[str, Any]) -> None:
    name, _, value = text.partition(" ")
    if name == "help":
        shown = [(f"/{name} {options[name]}", meaning) for name, (_, _, meaning) in NUMBERS.items()]
        shown += [("/help", "this"), ("/quit", "end, as Ctrl-D does")]
        _write("".join(f"  {what:<18} {meaning}\n" for what, meaning in shown))
        return
    if name not in NUMBERS:
        raise ConfigError(f"there is no /{name}: /help lists what there is")
    options[name] = read_number(f"/{name}", value, NUMBERS[name][0])
