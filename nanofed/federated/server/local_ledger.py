"""Text that only its own site has: a ledger a client, over what the site says of its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanofed.data.rows import RowRange
from nanofed.data.streams import DataState
from nanofed.errors import DataError
from nanofed.federated.server.ledger import Ledger
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import Report, SiteShard


class LocalLedger:
    """The ledgers of sites that each train on their own text, with the interface of one.

    The server knows names, sizes and fingerprints of a site's shards and leases rows of them; no text leaves the site.

    Args:
        streams: of every client.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._shards: dict[str, tuple[SiteShard, ...]] = {}
        self._ledgers: dict[str, Ledger] = {}

    def admit(self, client: str, shards: Sequence[SiteShard]) -> None:
        """Take up what a client says that it has; what it said first stays.

        Raises:
            DataError: it has no text, too few rows for its streams, or other text than it had.
        """
        if not shards or max(shard.num_rows for shard in shards) < self._streams:
            raise DataError(f"its own text has no shard of {self._streams} rows, one a stream")
        known = self._shards.setdefault(client, tuple(shards))
        if not all(shard.fingerprint for shard in known):  # an older nanofed saved them, and told text by its size
            told = {shard.name: shard.fingerprint for shard in shards}
            known = self._shards[client] = tuple(
                replace(shard, fingerprint=told.get(shard.name, "")) for shard in known
            )
        if {shard.name: shard for shard in known} != {shard.name: shard for shard in shards}:
            changed = sorted({shard.name for shard in set(known) ^ set(shards)})
            raise DataError(f"its own text is not what it was in this run: {', '.join(changed)[:200]} differ")
        if client not in self._ledgers:
            self._ledgers[client] = Ledger(known, self._streams)

    def forget_fingerprints(self) -> None:
        """Take up those that the clients tell next: an older nanofed, which told text by its size, has saved these."""
        for client, shards in self._shards.items():
            self._shards[client] = tuple(replace(shard, fingerprint="") for shard in shards)

    def share(self, client: str, clients: int) -> int:
        """Return about how many tokens the client's own shards have."""
        return self._ledgers[client].share(client, 1)

    def progress(self, shard: str) -> float:
        """Return how often a `client/shard` has been merged."""
        client, name = shard.split("/", 1)
        return self._ledgers[client].progress(name)

    def merged_rows(self) -> int:
        """Return the rows merged so far, over all clients."""
        return sum(ledger.merged_rows() for ledger in self._ledgers.values())

    def lease(
        self, client: str, tokens: int, *, spare_rows: int = 0, stride: tuple[int, int] | None = None
    ) -> tuple[RowRange, ...]:
        """Return rows of the client's own shards, in order."""
        return self._ledgers[client].lease(client, tokens, spare_rows=spare_rows)

    def clients(self) -> tuple[str, ...]:
        """Return the clients that hold rows."""
        return tuple(client for client, ledger in self._ledgers.items() if ledger.clients())

    def held(self, client: str) -> tuple[RowRange, ...]:
        """Return the rows that a client holds."""
        return self._ledgers[client].held(client) if client in self._ledgers else ()

    def data(self, client: str) -> DataState | None:
        """Return where a client's streams stand in what it holds; None at its begin."""
        return self._ledgers[client].data(client) if client in self._ledgers else None

    def text_bytes(self, client: str, state: DataState) -> float:
        """Return about how much text there is between what is merged and `state`."""
        return self._ledgers[client].text_bytes(client, state)

    def believed(self, report: Report) -> Report:
        """Return a client's report with no more tokens, and steps of them, than there are bytes of text in what it has read.

        Raises:
            RefusedReply: it has read no row.
        """
        possible = int(self.text_bytes(report.client, report.data))
        if possible < 1:
            raise RefusedReply("tokens", f"it claims {report.tokens} tokens and has read no row")
        steps = max(1, min(report.steps, possible * report.steps // report.tokens))
        return replace(report, tokens=min(report.tokens, possible), steps=steps)

    def commit(self, client: str, state: DataState) -> int:
        """Mark as merged what a client has read to its last token, and return the number of rows."""
        return self._ledgers[client].commit(client, state)

    def release(self, client: str) -> int:
        """Take back what a client holds and has not merged, and return the number of rows."""
        return self._ledgers[client].release(client) if client in self._ledgers else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the ledgers as plain values."""
        return {
            "local": {
                client: {
                    "shards": [list(vars(shard).values()) for shard in self._shards[client]],
                    "ledger": ledger.state_dict(),
                }
                for client, ledger in self._ledgers.items()
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved ledgers.

        Raises:
            DataError: they are of a run that leased the server's shards.
        """
        if "local" not in state:
            raise DataError(
                "the saved ledger leases the server's own shards: it was not made with federation.sharding=local"
            )
        for client, saved in state["local"].items():
            self._shards[client] = tuple(SiteShard(*shard) for shard in saved["shards"])
            self._ledgers[client] = Ledger(self._shards[client], self._streams)
            self._ledgers[client].load_state_dict(saved["ledger"])
