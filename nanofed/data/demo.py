"""The demo corpus: real text on a machine without a network, from the running Python's standard library.

Documentation strings become prose, the code without them becomes source documents (so that no text of the validation
shard stands in a training shard as well), and the language reference that `help()` shows is added. The same Python
with the same pyarrow gives the same bytes.
"""

from __future__ import annotations

import ast
import inspect
import io
import logging
import platform
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from filelock import FileLock

from nanofed import runtime
from nanofed.data.manifest import read_manifest
from nanofed.data.shards import Dataset, all_texts, open_dataset, verify_shard
from nanofed.data.writing import check_output, write_shards
from nanofed.errors import DataError, NanofedError
from nanofed.tokenizer.storage import has_tokenizer
from nanofed.tokenizer.training import train_tokenizer

logger = logging.getLogger(__name__)

SOURCE = "demo: the standard library of Python"
RECIPE = 1  # goes up when the same Python would give another corpus
SEED = 1337
NUM_SHARDS = 8
MAX_BYTES = 20_000_000
GROUPS_PER_SHARD = 8
DEMO_VOCAB_SIZE = 2048  # the head is most of a tiny model's work
_MIN_CHARACTERS = 100
_SOURCE_CHARACTERS = 8192  # a source file longer than this becomes several documents, cut between statements
# Not text to learn from (tables, tests), not of the library itself, or different on every machine.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "pydoc_data", "site-packages", "test", "tests"}
)
_SKIPPED_FILES = ("_sysconfigdata", "config-", "encodings/cp", "encodings/iso8859", "encodings/mac_", "encodings/koi8")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def prepare_demo(*, tokenizer: bool = True) -> None:
    """Build the demo corpus and train its tokenizer where they are missing, offline, in seconds; the log says so in a line each.

    Args:
        tokenizer: whether the tokenizer is wanted as well as the corpus.

    Raises:
        NanofedError: something is missing and the cache folder cannot be written.
    """
    folder, tokenizer_folder = runtime.dataset_dir("demo"), runtime.tokenizer_dir("demo")
    try:
        runtime.make_folder(folder.parent)
    except NanofedError:
        if (folder / "dataset.json").is_file() and (not tokenizer or has_tokenizer(tokenizer_folder)):
            return  # a cache that others share and nobody may write: all that is wanted is there
        raise
    with FileLock(folder.parent / "prepare.lock"):
        if not (folder / "dataset.json").is_file():
            logger.info("building the demo corpus in %s", folder)
        dataset = build_demo_corpus(folder)
        if tokenizer and not has_tokenizer(tokenizer_folder):
            logger.info("training its tokenizer of %s tokens in %s", f"{DEMO_VOCAB_SIZE:,}", tokenizer_folder)
            texts = chain.from_iterable(map(all_texts, dataset.train))
            train_tokenizer(texts, vocab_size=DEMO_VOCAB_SIZE).save(tokenizer_folder)


def build_demo_corpus(
    output: Path, *, num_shards: int | None = None, max_bytes: int | None = None, force: bool = False
) -> Dataset:
    """Build the demo corpus, or return the one that is there and intact, whatever its size, Python or recipe.

    Args:
        output: the folder. A demo corpus in it that is damaged is built anew, as it was asked for then.
        num_shards: training shards (8 unless there is a corpus); one more is for validation.
        max_bytes: leave out documents beyond so many bytes of UTF-8 (20 MB unless there is a corpus; the library of
            Python 3.11 gives 10.6 MB).
        force: whether a demo corpus of other arguments is replaced.

    Raises:
        DataError: `output` holds something else, or without `force` a corpus of other arguments; or this Python has no
            sources.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        acquired = FileLock(output.parent / f".{output.name}.lock").acquire()
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror}") from error
    with acquired:
        check_output(output, replace=True)
        manifest = read_manifest(output)
        asked = {"num_shards": num_shards, "max_bytes": max_bytes}
        size = {"num_shards": NUM_SHARDS, "max_bytes": MAX_BYTES}
        if manifest is not None:
            if manifest.provenance.get("source") != SOURCE:
                raise DataError(f"{output} holds shards from elsewhere ({manifest.provenance.get('source')})")
            recorded = manifest.provenance.get("demo")
            there = recorded if isinstance(recorded, dict) else {}
            other = {name: there.get(name) for name, value in asked.items() if value not in (None, there.get(name))}
            if other and not force:
                named = " and ".join(f"{name} {value}" for name, value in other.items())
                raise DataError(
                    f"{output} holds a demo corpus of {named}: choose another folder, or replace it with --force"
                )
            if not other and all(verify_shard(output / name, shard) is None for name, shard in manifest.shards.items()):
                return open_dataset(output)
            logger.warning("%s: the demo corpus is replaced: %s", output, "as asked" if other else "it is damaged")
            size |= {name: there[name] for name in size if isinstance(there.get(name), int)}
        size |= {name: value for name, value in asked.items() if value is not None}
        documents = _select(size["max_bytes"])
        rows = -(-len(documents) // ((size["num_shards"] + 1) * GROUPS_PER_SHARD))
        provenance = {
            "source": SOURCE,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "demo": {"recipe": RECIPE, **size},
        }
        return write_shards(
            documents, output, num_shards=size["num_shards"], rows_per_group=rows, provenance=provenance, replace=True
        )


def _select(max_bytes: int) -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    documents = list(dict.fromkeys(_documents(library)))  # in order, each once
    if len(documents) < 100:
        raise DataError(
            f"this Python has no sources of its standard library in {library}; "
            "pack text of your own with `nanofed data pack PATH --output DIR`"
        )
    random.Random(SEED).shuffle(documents)
    kept, size = [], 0
    for text in documents:
        size += len(text.encode())
        if size > max_bytes:
            break
        kept.append(text)
    return kept


def _documents(library: Path) -> Iterator[str]:
    yield from _reference()
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.as_posix().startswith(_SKIPPED_FILES):
            yield from _of_module(path, relative)


def _reference() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield topics[name]


def _of_module(path: Path, relative: Path) -> Iterator[str]:
    content = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        source = io.TextIOWrapper(io.BytesIO(content), encoding).read()  # \r\n becomes \n, as Python reads it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # samples of broken code
        return
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    yield from _docstrings(tree, module)
    yield from _code(tree, source, relative)


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield the module's own text, and one document for every top-level function or class with what is in it."""
    own = [f"module {module}\n\n{text}"] if (text := ast.get_docstring(tree)) else []
    documents = [own, *(list(_described(node, module)) for node in tree.body if isinstance(node, _Documented))]
    for parts in documents:
        if len(document := "\n\n".join(parts)) >= _MIN_CHARACTERS:
            yield document


def _described(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Iterator[str]:
    name = f"{prefix}.{node.name}"
    if text := ast.get_docstring(node, clean=False):
        heading = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
        yield f"{heading}\n\n{inspect.cleandoc(text)}"
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _described(child, name)


def _code(tree: ast.Module, source: str, relative: Path) -> Iterator[str]:
    """Yield the source without its documentation strings, cut between top-level statements."""
    lines: list[str | None] = list(source.split("\n"))
    for node in _statements(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            first, last = text.lineno - 1, (text.end_lineno or text.lineno) - 1
            before, after = (lines[first] or "").encode(), (lines[last] or "").encode()  # columns count bytes
            if not before[: text.col_offset].strip() and not after[text.end_col_offset :].strip():
                lines[first : last + 1] = [None] * (last + 1 - first)
    start = 0
    for end in [*((node.end_lineno or node.lineno) for node in tree.body[:-1]), len(lines)]:
        piece = "\n".join(line for line in lines[start:end] if line is not None).strip("\n")
        if len(piece) >= _SOURCE_CHARACTERS or end == len(lines):
            if len(piece) >= _MIN_CHARACTERS:
                yield f"# {relative.as_posix()}\n{piece}\n"
            start = end


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree like `ast.walk` but not into expressions, where nearly all of its nodes are."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _statements(child)
