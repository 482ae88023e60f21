"""The command line: a lazy table of commands. Each command parses its options and calls the API; no logic lives here."""

from __future__ import annotations

import importlib
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from nanofed import streams

# Command -> (module with `main(argv) -> int | None`, one line of help). A module is imported only when its command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("nanofed.cli.fit", "train on one machine or cluster with Lightning"),
    "validate": ("nanofed.cli.fit", "bits per byte of a checkpoint on the validation shard"),
    "profile": ("nanofed.cli.profile", "where the time of a training step goes, with a trace for the browser"),
    "federate": ("nanofed.cli.federate", "train across clients with Flower"),
    "server": ("nanofed.cli.server", "serve a federation of sites; write their keys (server init)"),
    "site": ("nanofed.cli.site", "take part in a federation with this machine's devices"),
    "status": ("nanofed.cli.status", "how far a federated run is, who is here, what was refused and why"),
    "data": ("nanofed.cli.data", "download, build, list and verify parquet shards"),
    "tokenizer": ("nanofed.cli.tokenizer", "train and evaluate the BPE tokenizer"),
    "evaluate": ("nanofed.cli.evaluate", "bits per byte and CORE of runs and checkpoints"),
    "generate": ("nanofed.cli.generate", "sample text from a checkpoint"),
    "export": ("nanofed.cli.export", "a trained model for transformers, nanochat, or as one safetensors file"),
    "import": ("nanofed.cli.export", "a model of nanochat's or transformers', as a run to start from"),
    "compare": ("nanofed.cli.compare", "runs beside each other: bits per byte at equal tokens, seconds and bytes"),
    "info": ("nanofed.cli.info", "what this machine has: devices, caches, data, versions"),
    "completion": ("nanofed.cli.completion", "a script with which bash or zsh completes commands and options"),
}

# Commands that are run for what they print. The others go on where nobody reads it any more, or where it has no room.
OUTPUT_IS_ALL = {"", "-h", "--help", "help", "-V", "--version", "data list", "data verify", "tokenizer eval"} | {
    *("validate", "status", "evaluate", "generate", "profile", "compare", "info", "completion")
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: nanofed COMMAND [options]\n\n"
        "Pretrain the nanochat GPT on one cluster with Lightning, or across sites with Flower.\n\n"
        f"commands:\n{rows}\n\n"
        "nanofed COMMAND --help lists a command's options. Start with: nanofed federate"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code.

    0 done, 1 failed, 2 usage or configuration, 3 data or network unavailable, 129, 130 and 143 on SIGHUP, SIGINT and SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda unraisable: None  # what a library's destructor raises ends nothing: it is no news
    streams.secure(lasting=OUTPUT_IS_ALL.isdisjoint((args[0], " ".join(args[:2])) if args else ("",)))
    try:
        try:
            return _run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if argv is None:  # an impatient second one would kill the process while it ends, and change its exit code
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"nanofed {args[0]}: interrupted", file=sys.stderr)
        return 130
    except streams.ReaderGone:
        return 0
    except Exception as error:
        return _failed(args[0] if args else "", error)


def _failed(command: str, error: Exception) -> int:
    """Say what has ended the command, in one line, and return the exit code that it means."""
    from nanofed import runtime
    from nanofed.errors import NanofedError, in_one_line

    time.sleep(runtime.seconds_to_hold_back())
    known = isinstance(error, NanofedError)
    if runtime.wants_tracebacks():
        traceback.print_exception(error)
    hint = "" if known or runtime.wants_tracebacks() else " (NANOFED_DEBUG=1 shows the traceback)"
    print(f"nanofed {command}: {in_one_line(error)}{hint}", file=sys.stderr)
    return error.exit_code if isinstance(error, NanofedError) else 1


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from nanofed import __version__

        print(f"nanofed {__version__}")
        return 0
    if args[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"nanofed: there is no command {args[0]!r}{hint} (nanofed --help lists them)", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[args[0]][0]).main(args) or 0)
