"""`nanofed evaluate`: bits per byte and CORE of runs and checkpoints."""

from __future__ import annotations

import argparse
import json

from nanofed import runtime
from nanofed.cli.generate import device
from nanofed.cli.numbers import add_number
from nanofed.errors import ConfigError
from nanofed.ranges import CountOrZero, Tokens


def main(argv: list[str]) -> int:
    """Print what each run came to, and write it as JSON where that is asked for."""
    args = _parser().parse_args(argv[1:])
    output = None if args.json is None else runtime.user_path(args.json)
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--json: there is no folder {output.parent}")
    if output is not None and output.is_dir():
        raise ConfigError(f"--json {output} is a folder: name a file")

    from nanofed import api
    from nanofed.files import write_atomically
    from nanofed.training.checkpoint.format import find_checkpoint
    from nanofed.training.evaluate import process_group

    for run in args.runs:
        if not runtime.user_path(run).exists():
            find_checkpoint(run)  # says that it is not there, before hours with the others
    found = []
    with process_group(device(args.device)) as place:
        for run in args.runs:
            evaluation = api.evaluate(
                run,
                args.data,
                bpb=args.bpb or not args.core,
                core=args.core,
                core_data=args.core_data,
                core_examples=args.core_examples,
                eval_tokens=args.eval_tokens,
                device=place,
                compute_dtype=args.dtype,
                progress=True,
            )
            found.append(evaluation.to_plain())
            if runtime.is_first_rank():
                print(evaluation.text())
                if output is not None:
                    write_atomically(output, json.dumps(found, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nanofed evaluate",
        description="Bits per byte on a run's own validation text, and CORE (DCLM's mean over tasks of centred accuracy), "
        "with 95 % intervals of a bootstrap over examples. Several ranks: torchrun --nproc_per_node=N -m nanofed evaluate ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--bpb", action="store_true", help="bits per byte; the default where --core is not given")
    parser.add_argument("--core", action="store_true", help="CORE; it is written into the run's TensorBoard as well")
    parser.add_argument(
        "--core_data",
        metavar="FOLDER",
        help="the bundle of tasks (default: what `nanofed data download --core` brings)",
    )
    add_number(
        parser, "--core_examples", kind=CountOrZero, default=0, help="examples asked of each task; 0: all (default: 0)"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME",
        help="bits per byte on demo, fineweb-edu or a folder of shards instead; given several times, on each and pooled by bytes",
    )
    scored = "tokens to score of each text (default: the run's number)"
    add_number(parser, "--eval_tokens", kind=Tokens, default=None, help=scored)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the matmuls (default: bfloat16 where the device multiplies it)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    return parser
