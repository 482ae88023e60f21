from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from nanofed.training.event_files import cut_events
from nanofed.training.summary import CONFIG, Point
from nanofed.training.tensorboard import describe, write_point


def read(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text(
        "name: run\nmodel:\n  depth: 2\n  recipe: {clip: 1.5}\ndata: {streams: [1, 2]}\nnone: null\n"
    )
    return tmp_path


def test_bits_per_byte_stands_first_and_on_every_axis(run: Path) -> None:
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar("fed/bytes_down", 1.0, 0)
        for step in range(3):
            write_point(writer, Point(step, 1000 * step, 2.5 * step, 3.0 - step, 100 * step), 10 * step)
    events = read(run)
    assert sorted(events.Tags()["scalars"])[:3] == ["bpb/by_bytes", "bpb/by_seconds", "bpb/by_tokens"]
    assert points(events, "val/bpb") == [(0, 3.0), (10, 2.0), (20, 1.0)]
    assert points(events, "bpb/by_tokens") == [(0, 3.0), (1000, 2.0), (2000, 1.0)]
    assert points(events, "bpb/by_seconds") == [(0, 3.0), (2, 2.0), (5, 1.0)]
    assert points(events, "bpb/by_bytes") == [(100, 2.0), (200, 1.0)]
    cut_events(run, 10)
    for tag in ("val/bpb", "bpb/by_tokens", "bpb/by_seconds", "bpb/by_bytes"):
        assert points(read(run), tag)[-1][1] == 2.0, tag


def test_a_run_is_described_by_its_config_and_stays_so_when_it_goes_on(run: Path) -> None:
    for _ in range(2):  # two starts
        cut_events(run, 5)
        with SummaryWriter(str(run)) as writer:
            describe(writer, run)
            writer.add_scalar("val/bpb", 2.0, 5)
    events = read(run)

    def content(tag: str) -> Any:
        return events.SummaryMetadata(tag).plugin_data.content

    started = plugin_data_pb2.HParamsPluginData.FromString(content("_hparams_/session_start_info")).session_start_info
    told = {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}
    assert told == {"name": "run", "model.depth": 2.0, "model.recipe.clip": 1.5, "data.streams": "[1, 2]"}
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content("_hparams_/experiment")).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["val/bpb"]
    shown = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [chart.title for chart in shown.category[0].chart] == ["tokens", "seconds of training", "bytes sent"]
    (text,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    assert text.decode().splitlines()[:3] == ["    name: run", "    model:", "      depth: 2"]
