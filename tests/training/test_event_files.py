"""TensorBoard's event files of a run that goes on: every point once, in order, whatever was written before a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nanofed.training.event_files import CUT, cut_events


def write(folder: Path, first: int, last: int) -> None:
    """Write what a run writes at its steps, of 100 tokens and a tenth of a second each."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(first, last + 1):
            writer.add_scalar("train/loss", step / 7, step)
            writer.add_scalar("train/loss_by_tokens", step / 7, step * 100)
            writer.add_scalar("val/bpb_by_seconds", step / 7, step // 10)
            writer.add_text("sample/x", "text", step)
    number = len(list(folder.glob("*tfevents*")))  # files of one second sort by a counter without leading zeros
    newest = max(folder.glob("*tfevents*"), key=lambda file: file.stat().st_mtime_ns)
    newest.rename(folder / f"events.out.tfevents.{number:04}")


def curves(folder: Path) -> dict[str, list[int]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    found = {tag: [event.step for event in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    return found | {tag: [event.step for event in accumulator.Tensors(tag)] for tag in tags["tensors"]}


def expected(last: int) -> dict[str, list[int]]:
    steps = list(range(last + 1))
    return {
        "train/loss": steps,
        "train/loss_by_tokens": [step * 100 for step in steps],
        "val/bpb_by_seconds": [step // 10 for step in steps],
        "sample/x/text_summary": steps,
    }


def test_every_point_is_there_once_after_kills(tmp_path: Path) -> None:
    write(tmp_path, 0, 50)
    cut_events(tmp_path, 40)
    write(tmp_path, 41, 60)
    assert curves(tmp_path) == expected(60)
    cut_events(tmp_path, 55)
    cut_events(tmp_path, 20)  # further back than the last resume
    write(tmp_path, 21, 30)
    assert curves(tmp_path) == expected(30)


def test_what_is_taken_out_is_kept_where_tensorboard_does_not_look(tmp_path: Path) -> None:
    write(tmp_path, 0, 50)
    site = tmp_path / "sites" / "lab-a"
    write(site, 0, 50)
    cut_events(tmp_path, 40)
    cut_events(tmp_path, 30)
    for folder in (tmp_path, site):
        cut = sorted((folder / CUT).iterdir())
        assert [path.name[-2:] for path in cut] == [".0", ".1"] and not any("tfevents" in path.name for path in cut)
        assert curves(folder) == expected(30)
    cut_events(tmp_path, -1)
    assert curves(tmp_path) == {}


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_file_that_a_kill_has_torn_is_cut(tmp_path: Path, torn: int) -> None:
    write(tmp_path, 0, 50)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    file.write_bytes(file.read_bytes()[:-torn])
    cut_events(tmp_path, 10)
    write(tmp_path, 11, 12)
    assert curves(tmp_path) == expected(12)


def test_a_file_without_later_points_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    before = file.stat()
    cut_events(tmp_path, 5)
    assert file.stat() == before and not (tmp_path / CUT).exists()
