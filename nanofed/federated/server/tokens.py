"""How many tokens a client can have trained on: the text of its lease up to where it says that it stands."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Mapping

from nanofed.data.shards import Shard, read_texts
from nanofed.federated.server.reading import Rows, rows_between
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import Instructions, Report

BYTES_PER_TOKEN = 2.0  # fewer than tokenizers make of a lot of text; of a single document there may be one


def check_tokens(report: Report, instructions: Instructions, shards: Mapping[str, Shard], streams: int) -> None:
    """Refuse a report of more tokens than there is text between the client's old and new positions.

    Mean lengths settle it nearly always; where they do not (a few rows, one of them a book), the rows are read.

    Raises:
        RefusedReply: more tokens than bytes of text.
    """
    rows = rows_between(instructions.lease, streams, instructions.data, report.data)
    means = (len(found) * shards[name].text_bytes / shards[name].num_rows for (_, name), found in rows.items())
    if report.tokens * BYTES_PER_TOKEN <= sum(means):
        return
    text = text_bytes(rows, shards)
    if report.tokens > text:
        raise RefusedReply(
            "tokens",
            f"it claims {report.tokens} tokens; the {sum(map(len, rows.values()))} rows that it has read hold {text} bytes",
        )


def text_bytes(rows: Rows, shards: Mapping[str, Shard]) -> int:
    """Return the UTF-8 bytes of rows, with one more each for the token that begins a document."""
    total = 0
    for (_, name), found in rows.items():
        shard = shards[name]
        ends = list(itertools.accumulate(shard.row_group_rows))
        groups: dict[int, list[int]] = defaultdict(list)
        for row in found.tolist():
            groups[bisect.bisect_right(ends, row)].append(row)
        for group, wanted in groups.items():
            texts = read_texts(shard, group)
            first = ends[group] - len(texts)
            total += sum(len(texts[row - first].encode()) + 1 for row in wanted)
    return total
