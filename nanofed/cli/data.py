"""`nanofed data`: download, build, list and verify the parquet shards that training reads."""

from __future__ import annotations

import argparse
import functools
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

from nanofed import runtime, terminal
from nanofed.cli.numbers import add_number
from nanofed.errors import ConfigError, DataError
from nanofed.ranges import Count, CountOrZero, Range, Seed

if TYPE_CHECKING:
    from nanofed.data.shards import Dataset, Shard


def main(argv: list[str]) -> int:
    """Run `nanofed data COMMAND`."""
    args = _parser().parse_args(argv[1:])
    # On a terminal the progress bar tells; in a log every finished shard does.
    level = logging.WARNING if terminal.on_terminal() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    from nanofed.training.signals import Signals

    with Signals():  # a signal ends a command as an error does: no half of a dataset is left
        return int(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("nanofed data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False)

    download = add(
        "download",
        help="shards of FineWeb-Edu; CORE's tasks",
        description="Download FineWeb-Edu shards, or CORE's tasks.",
    )
    what = download.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--core",
        action="store_true",
        help="the bundle of CORE's tasks, for `nanofed evaluate --core`, in the place of shards",
    )
    add_number(
        what,
        "-n",
        "--num_shards",
        kind=Annotated[int, Range(-1, 1 << 20)],
        help="training shards of about 100 MB (the one for validation comes too); -1: all 1,822",
    )
    download.add_argument(
        "--output",
        type=runtime.user_path,
        help="folder (default: base_data, of the bundle eval_bundle, under NANOCHAT_BASE_DIR)",
    )
    download.add_argument(
        "--base_url", help="address that holds the shards (default: the dataset at HF_ENDPOINT), or of the zip file"
    )
    workers = Annotated[int, Range(1, 64)]
    add_number(download, "--workers", kind=workers, default=4, help="files at a time (default: %(default)s)")
    download.add_argument("--background", action="store_true", help="go on detached and write a log")
    download.set_defaults(run=_download)

    demo = add("demo", help="an offline corpus", description="Build a corpus from this Python's standard library.")
    demo.add_argument("--output", type=runtime.user_path, help="folder (default: demo/data under NANOCHAT_BASE_DIR)")
    number = functools.partial(add_number, demo, kind=Count)
    number("-n", "--num_shards", help="training shards (default: those of the corpus there, or 8)")
    number("--max_bytes", help="most bytes of text (default: of the corpus there, or 20000000)")
    demo.add_argument("--force", action="store_true", help="replace a demo corpus of other options")
    demo.set_defaults(run=_demo)

    pack = add(
        "pack",
        help="shards from your own text",
        description="Pack txt, md, jsonl (also .gz, .zst, .bz2) and parquet files into shards.",
    )
    pack.add_argument(
        "paths", nargs="+", type=runtime.user_path, metavar="PATH", help="files, and folders to search for them"
    )
    pack.add_argument("--output", type=runtime.user_path, required=True, help="folder for the shards")
    number = functools.partial(add_number, pack)
    number("-n", "--num_shards", kind=Count, help="training shards (default: one for every 200 MB, at least 8)")
    number("--rows_per_group", kind=Count, default=256, help="documents of a row group (default: %(default)s)")
    pack.add_argument(
        "--key",
        "--text_column",
        default="text",
        help="key of the text in jsonl objects, and its column in parquet files; a.b: the entry b of a "
        "(default: %(default)s)",
    )
    number(
        "--shuffle_buffer",
        kind=CountOrZero,
        default=10_000,
        help="documents to draw from at random; 0: keep the order (default: %(default)s)",
    )
    number("--seed", kind=Seed, default=0, help="of that draw (default: %(default)s)")
    pack.add_argument("--force", action="store_true", help="replace the shards in the output folder")
    pack.set_defaults(run=_pack)

    listing = add("list", help="shards, rows, bytes", description="List the shards of a dataset.")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)
    verify = add(
        "verify", help="read everything and compare hashes", description="Verify every shard; exit 3 if any is bad."
    )
    verify.set_defaults(run=_verify)
    for command in (listing, verify):
        command.add_argument(
            "--data", default="fineweb-edu", metavar="NAME", help="demo, fineweb-edu or a folder (default: %(default)s)"
        )
    return parser


def _download(args: argparse.Namespace) -> int:
    from nanofed.data.download import download, source_at, wanted_shards

    if args.core:
        return _download_core(args)
    if args.background:
        wanted_shards(args.num_shards), source_at(args.base_url)  # a mistake shows here, not in the log
        return _in_background(args)
    dataset = download(args.num_shards, output=args.output, base_url=args.base_url, workers=args.workers)
    print(_summary(dataset))
    return 0


def _download_core(args: argparse.Namespace) -> int:
    from nanofed.data.core_download import URL, download_core
    from nanofed.evaluation.core.bundle import Bundle

    if args.background:
        raise ConfigError("--background: --core brings one small file, in the foreground")
    folder = download_core(
        lambda path: Bundle.read(path).check(), output=args.output, url=URL if args.base_url is None else args.base_url
    )
    bundle = Bundle.read(folder)
    lacks = f", without {', '.join(bundle.missing)}" if bundle.missing else ""
    print(f"{folder}: {len(bundle.tasks)} of CORE's tasks{lacks}")
    return 0


def _in_background(args: argparse.Namespace) -> int:
    folder = (args.output or runtime.dataset_dir("fineweb-edu")).absolute()
    command = runtime.python("-m", "nanofed", "data", "download", f"--num_shards={args.num_shards}")
    command += [f"--output={folder}", f"--workers={args.workers}"]
    command += [f"--base_url={args.base_url}"] if args.base_url else []
    log = folder / "download.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=runtime.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        raise DataError(f"cannot write {log}: {error.strerror or error}") from error
    print(f"downloading in the background as process {process.pid}; log: {log}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from nanofed.data.demo import build_demo_corpus

    output = args.output or runtime.dataset_dir("demo")
    dataset = build_demo_corpus(output, num_shards=args.num_shards, max_bytes=args.max_bytes, force=args.force)
    print(_summary(dataset))
    return 0


def _pack(args: argparse.Namespace) -> int:
    from nanofed.data.pack import pack

    dataset = pack(
        args.paths,
        args.output,
        num_shards=args.num_shards,
        rows_per_group=args.rows_per_group,
        key=args.key,
        shuffle_buffer=args.shuffle_buffer,
        seed=args.seed,
        force=args.force,
    )
    print(_summary(dataset))
    return 0


def _summary(dataset: Dataset) -> str:
    shards = (*dataset.train, dataset.validation)
    rows, text = sum(s.num_rows for s in shards), sum(s.text_bytes for s in shards)
    return (
        f"{dataset.path}: {len(dataset.train)} training shards and {dataset.validation.name} for validation, "
        f"{rows:,} documents, {text / 1e6:,.1f} MB of text"
    )


def _list(args: argparse.Namespace) -> int:
    from nanofed.data.shards import open_dataset

    dataset = open_dataset(runtime.dataset_dir(args.data))
    shards = sorted((*dataset.train, dataset.validation), key=lambda shard: shard.name)
    print(_as_json(dataset, shards) if args.json else _as_table(dataset, shards))
    return 0


def _as_json(dataset: Dataset, shards: list[Shard]) -> str:
    import json

    rows = [
        {
            "name": shard.name,
            "rows": shard.num_rows,
            "row_groups": len(shard.row_group_rows),
            "bytes": shard.num_bytes,
            "text_bytes": shard.text_bytes,
            "validation": shard == dataset.validation,
        }
        for shard in shards
    ]
    content = {"path": str(dataset.path.absolute()), "fingerprint": dataset.fingerprint(), "shards": rows}
    return json.dumps(content, indent=1)


def _as_table(dataset: Dataset, shards: list[Shard]) -> str:
    width = max(len(shard.name) for shard in shards)
    lines = [f"{'shard':<{width}}{'rows':>14}{'row groups':>14}{'bytes':>18}{'text bytes':>18}"]
    for shard in shards:
        counts = f"{shard.num_rows:>14,}{len(shard.row_group_rows):>14,}{shard.num_bytes:>18,}{shard.text_bytes:>18,}"
        lines.append(f"{shard.name:<{width}}{counts}{'  validation' * (shard == dataset.validation)}")
    return "\n".join([*lines, "", _summary(dataset)])


def _verify(args: argparse.Namespace) -> int:
    from nanofed.data.manifest import read_manifest
    from nanofed.data.shards import open_dataset, shard_names, verify_shard

    folder = runtime.dataset_dir(args.data)
    if not folder.is_dir() or not (names := shard_names(folder)):
        open_dataset(folder)  # says what is missing and what to do
        raise DataError(f"{folder} holds no shards")
    manifest = read_manifest(folder)
    recorded = manifest.shards if manifest else {}
    names = sorted({*names, *recorded})
    problems = []
    for name in names:
        if problem := verify_shard(folder / name, recorded.get(name)):
            problems.append(name)
            print(f"BAD  {problem}")
        else:
            print(f"ok   {name}" + ("" if name in recorded else "  (readable; no hash is recorded of it)"))
    if problems:
        raise DataError(f"{len(problems)} of {len(names)} shards in {folder} are bad: {', '.join(problems)}")
    print(f"{len(names)} shards in {folder} are as they should be")
    return 0
