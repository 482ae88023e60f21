"""`nanofed tokenizer train | eval`."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from nanofed import runtime
from nanofed.cli.numbers import add_number
from nanofed.ranges import Count, Range
from nanofed.tokenizer.vocabulary import DOC_CAP, MAX_CHARS, SPECIAL_TOKENS, SPLIT_PATTERN, VOCAB_SIZE

if TYPE_CHECKING:
    from nanofed.data.shards import Shard

SAMPLE_CHARS = 5_000_000  # seconds of encoding, and bytes per token to about three digits


def main(argv: list[str]) -> None:
    """Run `nanofed tokenizer`; argv[0] is the command's name."""
    args = _parser().parse_args(argv[1:])
    if args.action == "train":
        _train(args)
    else:
        _evaluate(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanofed tokenizer", description="Train and evaluate the BPE tokenizer.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="train | eval")
    train = actions.add_parser("train", help="train one on a dataset's training shards")
    evaluate = actions.add_parser("eval", help="bytes per token, against GPT-2's where it is to be had")
    own = "folder (default: the dataset's own)"
    for action in (train, evaluate):
        action.add_argument(
            "--data",
            default="fineweb-edu",
            help="demo, fineweb-edu or a folder of parquet shards (default: %(default)s)",
        )
    number = functools.partial(add_number, train)
    vocab_size, size = Annotated[int, Range(1, 1 << 24)], "tokens, the special ones included (default: %(default)s)"
    number("--vocab_size", kind=vocab_size, default=VOCAB_SIZE, help=size)
    number("--max_chars", kind=Count, default=MAX_CHARS, help="most characters to train on (default: %(default)s)")
    number("--doc_cap", kind=Count, default=DOC_CAP, help="most characters used of a document (default: %(default)s)")
    train.add_argument(
        "--special_tokens",
        nargs="+",
        default=SPECIAL_TOKENS,
        metavar="TOKEN",
        help="the first starts every document (default: nanochat's nine)",
    )
    train.add_argument(
        "--split_pattern",
        default=SPLIT_PATTERN,
        help="regular expression whose matches are merged one by one (default: nanochat's)",
    )
    train.add_argument("--output", type=runtime.user_path, help=own)
    train.add_argument(
        "--force", action="store_true", help="replace a tokenizer that is in the folder; the old file is kept beside it"
    )
    evaluate.add_argument("--tokenizer", type=runtime.user_path, help=own)
    sample = "most characters to encode of validation and of training (default: %(default)s)"
    add_number(evaluate, "--max_chars", kind=Count, default=SAMPLE_CHARS, help=sample)
    return parser


def _train(args: argparse.Namespace) -> None:
    from nanofed.data.shards import open_dataset
    from nanofed.tokenizer.bpe import Tokenizer
    from nanofed.tokenizer.storage import check_writable
    from nanofed.tokenizer.training import train_tokenizer

    folder: Path = args.output or runtime.tokenizer_dir(args.data)
    dataset = open_dataset(runtime.dataset_dir(args.data))
    check_writable(folder, force=args.force)
    started = time.monotonic()
    tokenizer: Tokenizer = train_tokenizer(
        _with_progress(dataset.train, args.max_chars),
        vocab_size=args.vocab_size,
        max_chars=args.max_chars,
        doc_cap=args.doc_cap,
        special_tokens=args.special_tokens,
        split_pattern=args.split_pattern,
    )
    seconds = time.monotonic() - started
    tokenizer.save(folder, force=args.force)
    short = f", not the {args.vocab_size:,} asked for: the text gives no more" * (
        tokenizer.vocab_size < args.vocab_size
    )
    print(f"vocabulary       {tokenizer.vocab_size:,} tokens{short}")
    print(f"training time    {seconds:.1f} seconds")
    bytes_per_token = tokenizer.bytes_per_token(_sample([dataset.validation], SAMPLE_CHARS))
    print(f"bytes per token  {bytes_per_token:.3f} on {dataset.validation.name}")
    print(f"saved            {folder}")


def _evaluate(args: argparse.Namespace) -> None:
    from nanofed.data.shards import open_dataset
    from nanofed.errors import DataError
    from nanofed.tokenizer.bpe import Tokenizer

    folder: Path = args.tokenizer or runtime.tokenizer_dir(args.data)
    dataset = open_dataset(runtime.dataset_dir(args.data))
    tokenizers = {"this": Tokenizer.load(folder)}
    try:
        tokenizers["gpt2"] = Tokenizer.gpt2()
        missing = None
    except DataError as error:
        missing = str(error)
    print(f"tokenizer {folder}, {tokenizers['this'].vocab_size:,} tokens")
    print(f"{'bytes per token':<18}" + "".join(f"{name:>10}" for name in tokenizers))
    for name, shards in (("validation", [dataset.validation]), ("train", dataset.train)):
        found = [each.bytes_per_token(_sample(shards, args.max_chars)) for each in tokenizers.values()]
        gain = f"  {found[0] / found[1] - 1:+.1%} against gpt2" if len(found) == 2 and found[1] else ""
        print(f"{name:<18}" + "".join(f"{value:>10.3f}" for value in found) + gain)
    if missing:
        print(f"no comparison: {missing}")


def _with_progress(shards: Sequence[Shard], max_chars: int) -> Iterator[str]:
    from tqdm import tqdm

    from nanofed.data.shards import all_texts

    total = min(sum(shard.text_bytes for shard in shards), max_chars)
    with tqdm(total=total, unit="char", unit_scale=True, desc="reading", disable=None) as bar:
        for text in chain.from_iterable(map(all_texts, shards)):
            yield text
            bar.update(len(text))
        bar.set_description("merging")


def _sample(shards: Sequence[Shard], max_chars: int) -> Iterator[str]:
    """Yield the first documents of every shard, in turn, until so many characters have been read."""
    from nanofed.data.shards import all_texts

    share = max(1, max_chars // max(1, len(shards)))
    for shard in shards:
        left = share
        for text in all_texts(shard):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
