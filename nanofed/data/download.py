"""Shards of FineWeb-Edu, the corpus of nanochat, over HTTP."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from nanofed import runtime
from nanofed.data.manifest import Manifest, Recorded, read_manifest
from nanofed.data.shards import Dataset, open_dataset, read_shard, record, shard_names, verify_shard
from nanofed.data.transfer import TIMEOUT, Bearer, Retry, Transfer, length, reason
from nanofed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DATASET = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # the one for validation, as in nanochat
_PROBES = 3
_OFFLINE = "without a network build a corpus with `nanofed data demo` or `nanofed data pack PATH --output DIR`"


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{index:05d}.parquet"


def download(
    num_shards: int,
    *,
    output: Path | None = None,
    base_url: str | None = None,
    workers: int = 4,
    retry: Retry | None = None,
) -> Dataset:
    """Download the first `num_shards` training shards and the validation shard, those that are not there already.

    Partial files are resumed; another download into the same folder is waited for. A file counts only when it has the
    announced length and hash and can be read as a shard; when all do, `dataset.json` is written with their hashes.

    Args:
        num_shards: training shards; -1 for all 1,822.
        output: the folder; by default nanochat's, `<base>/base_data`.
        base_url: the address that holds the shards; by default the dataset's at `HF_ENDPOINT`.
        workers: the files to fetch at a time.
        retry: how often and when to try again.

    Raises:
        ConfigError: an argument is out of range.
        DataError: no network, no space, a shard that is not there or damaged, or `output` holds something else.
    """
    wanted = wanted_shards(num_shards)
    if not 1 <= workers <= 64:
        raise ConfigError(f"workers is {workers}; it has to be from 1 to 64")
    source = source_at(base_url)
    folder = output or runtime.dataset_dir("fineweb-edu")
    with locked(folder):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.provenance.get("source") != DATASET:
            raise DataError(f"{folder} holds shards from elsewhere ({manifest.provenance.get('source')})")
        known = dict(manifest.shards) if manifest else {}
        missing = [name for name in wanted if not _have(folder / name, known.get(name))]
        fetched: dict[str, Recorded] = {}
        if missing:
            estimate = _estimate(source, missing, retry or Retry())
            _check_space(folder, missing, estimate)
            fetched = _fetch(source, folder, missing, workers, retry or Retry(), estimate)
        shards = _record_all(folder, {**known, **fetched})
        Manifest(shard_name(LAST_SHARD), shards, {"source": DATASET, "base_url": source.base}).write(folder)
    return open_dataset(folder)


@dataclass(frozen=True)
class Source:
    """The address that shards stand below, and the token that is sent there."""

    base: str
    auth: Bearer | None


def source_at(base_url: str | None = None) -> Source:
    """Return where shards come from, by default the dataset at `HF_ENDPOINT`, with the token if it is that host's."""
    endpoint = runtime.huggingface_endpoint()
    base = (base_url or f"{endpoint}/datasets/{DATASET}/resolve/main").rstrip("/")
    address = urlsplit(base)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"{base!r} is no http or https address (base_url, or HF_ENDPOINT)")
    token = runtime.huggingface_token()
    # The token belongs to the hub that is configured, not to any mirror that a command line names.
    if not token or urlsplit(endpoint)[:2] != address[:2]:
        return Source(base, None)
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("HF_TOKEN has characters that no token has")  # never shown: it is a secret
    return Source(base, Bearer(token))


def wanted_shards(num_shards: int) -> list[str]:
    """Return the names of the validation shard and the first training shards (-1: all)."""
    if num_shards == -1:
        num_shards = LAST_SHARD
    if not 1 <= num_shards <= LAST_SHARD:
        raise ConfigError(f"{num_shards} shards cannot be downloaded: from 1 to {LAST_SHARD}, or -1 for all")
    return [shard_name(LAST_SHARD), *map(shard_name, range(num_shards))]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other downloads, which are waited for.

    Raises:
        DataError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another download into %s is running: waiting for it", folder)
            lock.acquire()
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _have(path: Path, recorded: Recorded | None) -> bool:
    if not path.exists():
        return False
    try:
        shard = read_shard(path)
    except DataError as error:
        logger.warning("%s: it does not count as a shard", error)
        return False
    if shard.num_rows and (recorded is None or (shard.num_bytes, shard.num_rows) == (recorded.bytes, recorded.rows)):
        return True
    logger.warning("%s has no rows, or is not what dataset.json records: it does not count as a shard", path)
    return False


def _record_all(folder: Path, known: dict[str, Recorded]) -> dict[str, Recorded]:
    """Return the entries of all shards of this dataset that are in the folder, whoever put them there."""
    ours = {shard_name(index) for index in range(LAST_SHARD + 1)}
    entries, unchecked = {}, []
    for name in shard_names(folder):
        if name in ours and _have(folder / name, known.get(name)):
            entries[name] = known.get(name) or record(folder / name)
            unchecked += [] if name in known else [name]
    if unchecked:
        named = ", ".join(unchecked[:3])
        logger.warning("%s: %d files of before are taken for shards by their names: %s", folder, len(unchecked), named)
    return entries


def _estimate(source: Source, names: Sequence[str], retry: Retry) -> int | None:
    """Return about how many bytes the shards have; None where the server does not say.

    The last one's size stands for all: the first is for validation, and that is what was left of the text.
    """
    for failures in range(1, _PROBES + 1):
        try:
            headers, url = {"Accept-Encoding": "identity"}, f"{source.base}/{names[-1]}"
            answer = requests.head(url, headers=headers, auth=source.auth, allow_redirects=True, timeout=TIMEOUT)
            break
        except requests.RequestException as error:
            if failures == _PROBES:
                raise DataError(f"cannot reach {source.base} ({reason(error)}); {_OFFLINE}") from error
            time.sleep(retry.wait(failures, None))
    linked = [hop.headers.get("X-Linked-Size", "") for hop in answer.history]
    size = next((int(value) for value in linked if value.isdecimal()), length(answer))
    return size * len(names) if answer.ok and size is not None else None


def _check_space(folder: Path, names: Sequence[str], estimate: int | None) -> None:
    parts = [folder / f"{name}.part" for name in names]
    needed = (estimate or 0) - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free, {len(names)} shards need about {needed / 1e9:.1f} GB: free some, "
            "ask for fewer with -n, or choose another disk with --output or NANOCHAT_BASE_DIR"
        )


def _fetch(
    source: Source,
    folder: Path,
    names: Sequence[str],
    workers: int,
    retry: Retry,
    estimate: int | None,
) -> dict[str, Recorded]:
    """Fetch all shards; the first failure, or Ctrl-C, stops the others, which keep what they have."""
    stop, counting, done = threading.Event(), threading.Lock(), dict[str, Recorded]()
    with tqdm(total=estimate, unit="B", unit_scale=True, desc=f"{len(names)} shards", disable=None) as bar:

        def advance(size: int) -> None:
            with counting:
                bar.update(size)

        def fetch(name: str) -> Recorded:
            Transfer(f"{source.base}/{name}", folder / name, _problem, advance, stop, retry, source.auth).run()
            return record(folder / name)

        executor = ThreadPoolExecutor(workers, thread_name_prefix="download")
        try:
            # The one for validation before the others: a folder that is still filling must not take another for it.
            validation = [name for name in names if name == shard_name(LAST_SHARD)]
            for some in (validation, [name for name in names if name not in validation]):
                futures = {executor.submit(fetch, name): name for name in some}
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    logger.info("%s is there (%d of %d)", futures[future], len(done), len(names))
        finally:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)
    return done


def _problem(path: Path) -> str | None:
    return verify_shard(path) or (None if read_shard(path).num_rows else f"{path} has no rows")
