"""Figures for people and for programs: medians with quartiles, tables, one line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any


def progress(message: str) -> None:
    """Say what goes on, beside the result."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits)}


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Lay rows out in columns: the first to the left, the others to the right."""
    cells = [list(map(str, header)), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for index, row in enumerate(cells):
        aligned = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(("  ".join(aligned)).rstrip())
        if index == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def cell(value: object) -> str:
    """Write a value with as many digits as it deserves; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_json(result: dict[str, Any]) -> None:
    """Print one object as the last line."""
    print(json.dumps(result), flush=True)
