"""`nanofed export` and `nanofed import`: trained models in other projects' formats."""

from __future__ import annotations

import argparse

from nanofed.cli.numbers import add_number
from nanofed.ranges import CountOrZero

TARGETS = """\
targets:
  hf        a folder that transformers' AutoModelForCausalLM and AutoTokenizer load, with a model card
  nanochat  a NANOCHAT_BASE_DIR of nanochat's (October 2025): weights, optimizer state where the checkpoint has one, tokenizer
  torch     one safetensors file: nanochat's names, with sizes, tokenizer and the training's figures in its metadata
"""
SOURCES = """\
A nanochat checkpoint that holds the optimizers' whole state becomes a run that goes on:
  nanofed fit --config CONFIG --name NAME --ckpt_path last
Every other model is one to start from: nanofed fit --config CONFIG --init_from runs/NAME
"""


def main(argv: list[str]) -> int:
    """Run `nanofed export` or `nanofed import`, as argv[0] says."""
    args = (_export_parser() if argv[0] == "export" else _import_parser()).parse_args(argv[1:])

    from nanofed import api
    from nanofed.cli.output import show_progress

    show_progress(lightning=False)
    if argv[0] == "export":
        print(
            "exported to",
            api.export(args.run, args.output, to=args.to, dtype=args.dtype, licence=args.license, push=args.push),
        )
    else:
        run = {"runs_dir": args.runs_dir, "tokenizer": args.tokenizer, "step": args.step}
        print("imported as", api.import_model(args.source, args.name, **run))
    return 0


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nanofed export",
        description="Write a trained model in another project's format, all of it or nothing.",
        epilog=TARGETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="the folder or file to make; nothing may be there yet")
    parser.add_argument("--to", choices=("hf", "nanochat", "torch"), default="hf", help="default: %(default)s")
    dtypes = ("float32", "bfloat16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="dtype of the exported weights (default: %(default)s)"
    )
    licence = "the licence that the model card names: an identifier such as apache-2.0 (default: %(default)s)"
    parser.add_argument("--license", default="unknown", metavar="ID", help=licence)
    push = "upload it to this repository of the Hugging Face Hub, too; a new one is private"
    parser.add_argument("--push", metavar="OWNER/NAME", help=push)
    return parser


def _import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nanofed import",
        description="Make a run of a model that was trained elsewhere. Nothing in its files is run.",
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = "a nanochat checkpoint or NANOCHAT_BASE_DIR, a folder of transformers' NanoChat, or a file of --to torch"
    parser.add_argument("source", metavar="DIR", help=source)
    parser.add_argument("--name", required=True, help="name of the new run, which may not be there yet")
    parser.add_argument("--runs_dir", default="runs", help="folder of all runs (default: %(default)s)")
    beside = "folder of a nanochat checkpoint's tokenizer (default: beside the checkpoint, or beside base_checkpoints)"
    parser.add_argument("--tokenizer", metavar="FOLDER", help=beside)
    add_number(parser, "--step", kind=CountOrZero, help="which of several nanochat checkpoints (default: the last)")
    return parser
