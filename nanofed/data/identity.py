"""Which text a run reads, told by what the shards hold: where they lie and how that is spelled does not count.

A shard is told by a digest over its size, its parquet footer (rows, sizes and statistics of every row group) and 1 MiB of its
bytes; a smaller file is digested whole. The SHA-256 that `dataset.json` records of a shard is compared beside it where both
sides know one: it is checked when the shard is first read (`shards.read_texts`), so hashing whole files at every start would
add nothing to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanofed.errors import DataError

if TYPE_CHECKING:
    from nanofed.data.shards import Dataset, Shard

SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # stretches of a shard, evenly spaced, the first and the last bytes among them
DIGITS = 32  # hexadecimal ones kept of a SHA-256: 128 bits
NAMED = 3  # shards that a message names


@dataclass(frozen=True)
class DataIdentity:
    """The text of a dataset.

    Attributes:
        train: name -> content of every training shard, `DIGEST` or `DIGEST:SHA256`. Names count: they order what is read.
        validation: content of the validation shard, whose name does not count.
    """

    train: Mapping[str, str]
    validation: str

    @classmethod
    def of(cls, dataset: Dataset) -> DataIdentity:
        """Return the identity of a dataset.

        Raises:
            DataError: a shard cannot be read.
        """
        return cls({shard.name: _content(shard) for shard in dataset.train}, _content(dataset.validation))

    @classmethod
    def from_plain(cls, plain: Any) -> DataIdentity:
        """Rebuild an identity from `dataclasses.asdict`, which may have come from a file.

        Raises:
            ValueError: it is not of that form.
        """
        contents = [*plain["train"].values(), plain["validation"]] if isinstance(plain, dict) else [None]
        if set(plain) != {"train", "validation"} or not all(isinstance(content, str) for content in contents):
            raise ValueError("the identity of the data is not of the form that this nanofed writes")
        return cls(plain["train"], plain["validation"])

    def fingerprint(self) -> str:
        """Return a SHA-256 over all shards: equal where every shard's digest is, whether a `dataset.json` is there or not."""
        train = [[name, _digest(content)] for name, content in sorted(self.train.items())]
        return hashlib.sha256(json.dumps([train, _digest(self.validation)]).encode()).hexdigest()

    def differences(self, here: DataIdentity, *, training: bool = True) -> list[str]:
        """Say in what `here` differs from this one, a phrase each; nothing where both are the same text.

        Args:
            here: the other identity.
            training: whether the training shards count.
        """
        found = []
        if training:
            names = sorted(self.train.keys() & here.train.keys())
            replaced = [name for name in names if not _same(self.train[name], here.train[name])]
            for what, shards in (
                ("hold other text", replaced),
                ("are there no more", sorted(self.train.keys() - here.train.keys())),
                ("are new", sorted(here.train.keys() - self.train.keys())),
            ):
                if shards:
                    more = f" and {len(shards) - NAMED} more" if len(shards) > NAMED else ""
                    found.append(f"training shards {', '.join(shards[:NAMED])}{more} {what}")
        if not _same(self.validation, here.validation):
            found.append("the validation shard holds other text")
        return found


def _digest(content: str) -> str:
    return content.partition(":")[0]


def _same(a: str, b: str) -> bool:
    recorded = {content.partition(":")[2] for content in (a, b)} - {""}
    return _digest(a) == _digest(b) and len(recorded) < 2


def _content(shard: Shard) -> str:
    """Return a shard's content as `DataIdentity.train` has it."""
    recorded = f":{shard.sha256[:DIGITS]}" if shard.sha256 else ""
    try:
        status = shard.path.stat()
        return _sampled(shard.path, status.st_ino, status.st_size, status.st_mtime_ns) + recorded
    except OSError as error:
        raise DataError(f"{shard.path} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=4096)
def _sampled(path: Path, inode: int, size: int, changed_ns: int) -> str:
    """Digest a file, once a process for every state of it."""
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(SAMPLES):
                file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            file.seek(size - 8)  # of a parquet file: the footer's length, and PAR1
            footer = min(int.from_bytes(file.read(4), "little"), size - 8)
            file.seek(size - 8 - footer)
            digest.update(file.read(footer))
    return digest.hexdigest()[:DIGITS]
