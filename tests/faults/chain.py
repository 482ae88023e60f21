"""Whether the checkpoints of a federation follow from each other: each one outer step on, and every token counted once.

From one checkpoint to the next the momentum tells the pseudo-gradient, and that must carry the old weights to the new ones. The
ledger's merged rows, and what its clients have used of rows that they stand in, must have grown by the tokens of the round.
"""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanofed.data.shards import all_texts, open_dataset
from nanofed.federated.server.ledger import MERGED
from nanofed.federated.server.scheduling import DEVICE_MARGIN
from nanofed.tokenizer.bpe import load_tokenizer
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_manifest, read_state, read_weights

Lengths = dict[str, npt.NDArray[np.int64]]  # shard -> tokens of each of its rows
ROUNDING = 1e-6  # of the largest value: weights and momentum are saved in fp32


def row_lengths(corpus: Path) -> Lengths:
    """Return the tokens of every training row."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    return {
        shard.name: np.array([len(tokenizer.encode_document(text)) for text in all_texts(shard)])
        for shard in open_dataset(corpus / "data").train
    }


def check_chain(run: Path, lengths: Lengths, lr: float = 0.7, momentum: float = 0.6) -> int:
    """Check all checkpoints of a run whose rounds are all kept, by its outer rate and momentum; return how many there are."""
    found = checkpoints(run)
    for before, after in itertools.pairwise(found):
        check_link(before, after, lengths, lr, momentum)
    return len(found)


def check_link(before: Path, after: Path, lengths: Lengths, lr: float, momentum: float) -> None:
    """Check that a checkpoint is whole and follows from the one before."""
    where = f"{before.name} to {after.name}"
    old, new = read_state(before), read_state(after)
    clock, manifest = new["clock"], read_manifest(after)  # hashes every file
    assert f"round_{clock['round']:08d}" == after.name, where
    assert manifest.tokens == clock["tokens"] == sum(new["pace"]["tokens"].values()), f"{where}: tokens of the sites"
    assert new["run"] == old["run"], where
    check_step(before, after, old, new, lr, momentum)
    check_rows(old["ledger"], new["ledger"], where)
    used = {name: used_of_rows(client) for name, client in old["ledger"]["clients"].items()}
    # Who left gave back the row that it stood in: what it had used of it is trained once more by another one.
    lost = {sum(some) for n in range(len(used) + 1) for some in itertools.combinations(used.values(), n)}
    grown = counted(new["ledger"], lengths) - counted(old["ledger"], lengths)
    trained = clock["tokens"] - old["clock"]["tokens"]
    assert trained > 0, where
    assert trained - grown in lost or (trained < grown and is_capped(old["pace"], new["pace"])), (
        f"{where}: {trained} tokens were merged, the ledger has grown by {grown}"
    )


def is_capped(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether a site was so much faster than the others, a device, that not all of its tokens were counted."""
    for client, tokens in new["tokens"].items():
        others = [each for other, each in new["a_device"].items() if other != client]
        usual = statistics.median_low(others) * new["devices"].get(client, 1) if others else math.inf
        if tokens - old["tokens"].get(client, 0) == max(1, int(min(DEVICE_MARGIN * usual, 1e18))):
            return True
    return False


def check_step(before: Path, after: Path, old: dict[str, Any], new: dict[str, Any], lr: float, momentum: float) -> None:
    """Check that the outer optimizer carries the old weights to the new ones."""
    weights, next_weights = read_weights(before), read_weights(after)
    assert weights.keys() == next_weights.keys()
    moved = 0.0
    for name, weight in weights.items():
        velocity, last = new["outer"][name].double(), old["outer"][name].double()
        gradient = velocity - momentum * last
        expected = weight.double() - lr * (gradient + momentum * velocity)
        scale = max(float(t.abs().max()) for t in (weight, next_weights[name], velocity, last))
        apart = float((expected - next_weights[name].double()).abs().max())
        assert apart <= ROUNDING * scale, f"{before.name} to {after.name}: {name} is {apart / scale:.1e} off"
        moved = max(moved, float((next_weights[name] - weight).abs().max()) / scale)
    assert moved > 10 * ROUNDING, f"{before.name} to {after.name}: nothing has moved"


def check_rows(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Check that what was merged stays merged."""
    now = {(epoch, shard): expand(runs) for epoch, shard, runs in new["rows"]}
    for epoch, shard, runs in old["rows"]:
        if (epoch, shard) in now:
            merged = now[epoch, shard][expand(runs) == MERGED]
            assert (merged == MERGED).all(), f"{where}: merged rows of {shard} are free again"
        else:
            assert epoch < new["epoch"][shard], f"{where}: {shard} is forgotten before its epoch {epoch} is over"
    for shard, epoch in old["epoch"].items():
        opened = {at for at, name, _ in old["rows"] if name == shard}
        again = {at for at, name, _ in new["rows"] if name == shard and at < epoch} - opened
        assert not again, f"{where}: epochs {again} of {shard}, merged whole, are open again"


def counted(ledger: dict[str, Any], lengths: Lengths) -> int:
    """Return the tokens of all merged rows, and of what the clients have used of the rows that they stand in."""
    total = sum(used_of_rows(client) for client in ledger["clients"].values())
    for shard, epoch in ledger["epoch"].items():
        opened = {at: expand(runs) for at, name, runs in ledger["rows"] if name == shard}
        total += int(lengths[shard].sum()) * sum(at not in opened for at in range(epoch))
        total += sum(int(lengths[shard][rows == MERGED].sum()) for rows in opened.values())
    return total


def used_of_rows(client: dict[str, Any]) -> int:
    """Return how many tokens a client has used of the rows that its streams stand in."""
    data = client["data"]
    return sum(offset for _, _, _, offset in data["streams"]) if data else 0


def expand(runs: list[list[int]]) -> npt.NDArray[np.int64]:
    """Return a value for each row."""
    return np.repeat(*np.array(runs, np.int64).reshape(-1, 2).T)
