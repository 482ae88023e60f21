"""Runs beside each other: bits per byte at equal tokens, equal seconds and equal bytes, as a table, a page and a picture."""

from __future__ import annotations

import html
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nanofed.errors import ConfigError
from nanofed.files import write_atomically
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_manifest
from nanofed.training.config_diff import differences
from nanofed.training.summary import CONFIG, UNITS, Summary

TEXT = (
    "data.eval_tokens",
    "data.validation_shard",
    "model.sequence_len",
)  # which rows are measured, and how they are cut
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
WIDTH, HEIGHT, MARGIN = 460, 320, 56  # of a plot, in pixels


@dataclass(frozen=True)
class ComparedRun:
    """A run as it is compared."""

    folder: Path
    summary: Summary  # what it has come to so far
    config: dict[str, Any]  # its saved config
    text: tuple[str, str] | None  # the content of its validation shard and its tokenizer, where it has a checkpoint

    @classmethod
    def read(cls, folder: Path) -> ComparedRun:
        """Read a run's folder.

        Raises:
            ConfigError: It is no run, or nothing was measured in it yet.
        """
        summary = Summary.read(folder)
        if len(summary.curve) < 2:
            raise ConfigError(f"{folder} has no curve yet: it has measured bits per byte {len(summary.curve)} times")
        try:
            config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{folder / CONFIG} cannot be read: {error}") from error
        text = None
        with suppress(CheckpointError, IndexError):  # damaged, just pruned, or none yet
            manifest = read_manifest(checkpoints(folder)[-1], verify=False)
            if manifest.data is not None:
                text = manifest.data.validation.partition(":")[0], manifest.tokenizer
        return cls(folder, summary, config, text)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    def curve(self, axis: str) -> tuple[list[float], list[float]]:
        """Return the run's curve: where it was measured on an axis, ascending, and the bits per byte there."""
        return [float(getattr(p, axis)) for p in self.summary.curve], [p.bpb for p in self.summary.curve]

    def end(self, axis: str) -> float:
        """Return how far the run has come on an axis."""
        return self.curve(axis)[0][-1]

    def at(self, axis: str, place: float) -> float:
        """Return the bits per byte at a place on an axis, on a straight line between the two measurements around it."""
        return float(np.interp(place, *self.curve(axis)))


class Comparison:
    """Two or more runs, each held against the first.

    On an axis, runs are compared at the end of the one that ends first there; a run that begins later, as one of an imported
    model may, stands aside. On the bytes, runs that sent none stand aside.

    Args:
        folders: The folders of the runs; the first is the one that the others are held against.

    Raises:
        ConfigError: There are fewer than two runs, or one of them cannot be read.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise ConfigError("name two runs or more: each is compared with the first")
        self.runs = [ComparedRun.read(folder) for folder in folders]

    def common(self, axis: str) -> tuple[float, list[ComparedRun]] | None:
        """Return the place on an axis at which runs are compared, and those that have come there; None for fewer than two."""
        place = min((end for run in self.runs if (end := run.end(axis)) > 0), default=0.0)
        runs = [run for run in self.runs if run.curve(axis)[0][0] <= place <= run.end(axis)]
        return (place, runs) if place and len(runs) > 1 else None

    def coloured(self, axis: str) -> list[tuple[str, ComparedRun]]:
        """Return the runs that have come anywhere on an axis, each with its colour."""
        return [(_colour(index), run) for index, run in enumerate(self.runs) if run.end(axis) > 0]

    def rows(self) -> list[list[str]]:
        """Return the table: a header, then a row for each run, with its gap to the first run of each column in percent."""
        header = ["run", "kind", "tokens", "seconds", "sent", "bits per byte"]
        out = [
            [
                run.name,
                run.summary.kind,
                *(_short(run.end(axis), axis) for axis in UNITS),
                f"{run.summary.curve[-1].bpb:.4f}",
            ]
            for run in self.runs
        ]
        for axis in UNITS:
            found = self.common(axis)
            if found is None:
                continue
            place, runs = found
            header.append(f"at {_short(place, axis)}")
            first = runs[0].at(axis, place)
            for row, run in zip(out, self.runs, strict=True):
                bpb = run.at(axis, place)
                gap = "" if run is runs[0] else f" ({100 * (bpb / first - 1):+.2f} %)"
                row.append(f"{bpb:.4f}{gap}" if run in runs else "-")
        return [header, *out]

    def warnings(self) -> list[str]:
        """Return why figures of these runs cannot be held against each other; nothing where they can."""
        first, found = self.runs[0], []
        for run in self.runs:
            if before := run.summary.curve[0].tokens:
                found.append(
                    f"{run.name} began with a model of {before:,} tokens: what those took is not in its seconds"
                )
            if origin := run.summary.init_from:
                found.append(f"{run.name} began with the weights of {origin}, whose training is not counted")
        for run in self.runs[1:]:
            keys = [said for key, said in differences(first.config, run.config).items() if key in TEXT]
            if first.text and run.text and first.text != run.text:
                keys.append("the validation shard or the tokenizer is another one")
            if keys:
                found.append(f"{run.name} was measured on other text than {first.name}: {'; '.join(keys)}")
            if not (first.text and run.text):
                found.append(
                    f"{run.name} and {first.name} have no checkpoints that say what text they were measured on"
                )
        return found

    def differing(self) -> list[tuple[str, list[str]]]:
        """Return each run but the first with the options in which it differs from the first, `key there -> here`."""
        first = self.runs[0]
        return [(run.name, list(differences(first.config, run.config).values())) for run in self.runs[1:]]

    def text(self) -> str:
        """Return the table, the warnings and the differences of the configs, for a terminal."""
        table = self.rows()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines += ["", *(f"WARNING: {warning}" for warning in self.warnings())]
        for name, found in self.differing():
            lines += [
                f"{name} differs in {len(found)} {'option' if len(found) == 1 else 'options'}:",
                *(f"  {difference}" for difference in found),
            ]
        return "\n".join(lines)

    def page(self) -> str:
        """Return a page of HTML that needs nothing else: the plots, the table, the warnings, the differences of the configs."""
        head, *body = self.rows()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        plots = "".join(_plot(self.coloured(axis), axis) for axis in UNITS if self.common(axis))
        legend = "".join(
            f'<span><b style="color:{_colour(index)}">&#9644;</b> {html.escape(run.name)}</span>'
            for index, run in enumerate(self.runs)
        )
        warned = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in self.warnings())
        options = "".join(
            f"<h3>{html.escape(name)}</h3><ul>"
            + "".join(f"<li><code>{html.escape(difference)}</code></li>" for difference in found)
            + "</ul>"
            for name, found in self.differing()
        )
        title = html.escape(" and ".join(run.name for run in self.runs[:3]))
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f"<h1>{title}</h1>{warned}<p>{legend}</p><div>{plots}</div><table><tr>{cells}</tr>{rows}</table>"
            f"<h2>Options that differ from {html.escape(self.runs[0].name)}'s</h2>{options}</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page, or a picture of the plots, by the ending of the file's name: `.html` or `.png`.

        Raises:
            ConfigError: It has another ending, cannot be written, or matplotlib, which draws the picture, is not installed.
        """
        try:
            if path.suffix == ".html":
                write_atomically(path, self.page())
            elif path.suffix == ".png":
                self._draw(path)
            else:
                raise ConfigError(f"{path} must end in .html or .png")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "a .png needs matplotlib, which comes with the extra `notebooks`; .html does not"
            ) from error
        axes = [axis for axis in UNITS if self.common(axis)]
        figure = Figure(figsize=(6 * len(axes), 4.5), layout="constrained")
        for plot, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
            for colour, run in self.coloured(axis):
                plot.plot(*run.curve(axis), color=colour, label=run.name)
            plot.set(xlabel=UNITS[axis], ylabel="bits per byte")
            plot.legend()
        figure.savefig(path, dpi=120)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
    "svg{margin-right:1em}span{margin-right:1.5em}.warning{background:#fff3cd;padding:.5em 1em}"
    "text{font-size:12px}code{font-size:13px}"
)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _short(value: float, axis: str) -> str:
    """Write a place on an axis with its unit."""
    if axis == "seconds":
        return f"{value:,.0f} s"
    unit = " tokens" if axis == "tokens" else "B"
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return (
                f"{value / limit:.3g} {prefix}{unit.strip()}"
                if axis == "bytes"
                else f"{value / limit:.3g} {prefix}{unit}"
            )
    return f"{value:.0f}{unit if axis == 'tokens' else ' B'}"


def _plot(runs: Sequence[tuple[str, ComparedRun]], axis: str) -> str:
    """Return a plot of the curves as SVG; it starts at the first measurement after the start, which would flatten the rest."""
    curves = [tuple(part[1:] for part in run.curve(axis)) for _, run in runs]
    xs, ys = ([value for curve in curves for value in curve[part]] for part in (0, 1))
    left, right, low, high = 0.0, max(xs) or 1.0, min(ys), max(ys)
    pad = 0.05 * (high - low) or 0.01
    low, high = low - pad, high + pad

    def place(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 30)
        down = 10 + (high - y) / (high - low) * (HEIGHT - MARGIN)
        return f"{across:.1f},{down:.1f}"

    lines = ""
    for (colour, _), curve in zip(runs, curves, strict=True):
        places = [place(x, y) for x, y in zip(*curve, strict=True)]
        lines += f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(places)}"/>'
        for across, down in (point.split(",") for point in places):
            lines += f'<circle cx="{across}" cy="{down}" r="2.5" fill="{colour}"/>'
    marks = ""
    for part in range(5):
        x, y = right * part / 4, low + (high - low) * part / 4
        across, down = place(x, low).split(",")[0], place(left, y).split(",")[1]
        tick = _short(x, axis).removesuffix(" tokens")
        marks += f'<text x="{across}" y="{HEIGHT - MARGIN + 28}" text-anchor="middle">{tick}</text>'
        marks += f'<text x="{MARGIN - 6}" y="{down}" text-anchor="end">{y:.3f}</text>'
        marks += f'<line x1="{MARGIN}" x2="{WIDTH - 30}" y1="{down}" y2="{down}" stroke="#ddd"/>'
    caption = f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">bits per byte by {UNITS[axis]}</text>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{marks}{lines}{caption}</svg>'
