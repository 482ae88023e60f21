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


def quartiles(spread: dict[str, float], digits: int = 0) -> str:
    """Write a median with its quartiles."""
    return f"{spread['median']:,.{digits}f} ({spread['q1']:,.{digits}f}-{spread['q3']:,.{digits}f})"


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Lay rows out in columns: the first to the left, the others to the right."""
    cells = [list(map(str, header)), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for index, row in enumerate(cells):
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]).rstrip())
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


def show(result: dict[str, Any], rows: Sequence[Sequence[object]], header: Sequence[str], *, as_json: bool) -> None:
    """Print one object as the last line, or the table."""
    print_json(result) if as_json else print(table(rows, header))


def print_json(result: dict[str, Any]) -> None:
    """Print one object as the last line."""
    print(json.dumps(result), flush=True)
