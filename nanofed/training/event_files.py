"""TensorBoard's event files of a run that goes on from a checkpoint, without the points that lie after it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from nanofed.errors import NanofedError
from nanofed.files import write_atomically

PATTERN = "events.out.tfevents.*"
CUT = "superseded"  # folder of the run: TensorBoard shows only files with `tfevents` in their name
LENGTH = struct.Struct("<QI")  # of a record, and a checksum of that; another checksum follows the content
OTHER_AXES = ("by_tokens", "by_seconds", "by_bytes")  # written right after the same figure by steps


def cut_events(run: Path, step: int) -> None:
    """Take out of the event files of a run, and of its sites, every point after an optimizer step.

    A run that was killed has written points that its newest checkpoint does not know, and writes them again when it goes
    on from there. What is taken out is kept in `superseded/` under a name that TensorBoard does not read.

    Args:
        run: the run's folder.
        step: the checkpoint's optimizer step; -1 takes out everything.

    Raises:
        NanofedError: a file cannot be read or written.
    """
    for path in sorted([*run.glob(PATTERN), *run.glob(f"sites/*/{PATTERN}")]):
        try:
            kept, cut = _divided(path.read_bytes(), step)
            if not cut:
                continue
            folder = path.parent / CUT
            folder.mkdir(exist_ok=True)
            name = path.name.replace("tfevents", "cut")
            number = sum(other.name.startswith(name) for other in folder.iterdir())
            write_atomically(folder / f"{name}.{number}", cut)
            write_atomically(path, kept)
        except OSError as error:
            raise NanofedError(f"{path} cannot be cut at step {step:,}: {error.strerror or error}") from error


def _divided(content: bytes, step: int) -> tuple[bytes, bytes]:
    """Return the records up to a step, and those after it; a torn end counts as after it only where others are."""
    from tensorboard.compat.proto.event_pb2 import Event

    kept, cut, end, later = bytearray(), bytearray(), 0, False
    for start, end in _records(content):
        record = content[start:end]
        event = Event.FromString(record[LENGTH.size : -4])
        if any(not value.tag.endswith(OTHER_AXES) for value in event.summary.value):
            later = event.step > step
        (cut if later and event.HasField("summary") else kept).extend(record)
    return bytes(kept), bytes(cut + content[end:] if cut else cut)


def _records(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each whole record begins and ends; the last one of a killed process may be torn."""
    start = 0
    while start + LENGTH.size <= len(content):
        length, _ = LENGTH.unpack_from(content, start)
        end = start + LENGTH.size + length + 4
        if end > len(content):
            return
        yield start, end
        start = end
