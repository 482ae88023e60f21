"""Global weights that go down as what changed since those that a client holds.

Server and client hold the same weights R in bf16, to the bit. Of the global weights G of a round the server sends
d = codec(G - R), and both hold bf16(R + d) from then on. What the codec and bf16 round off is part of the next round's
difference, so errors do not add up (EF21-P: Gruntkowska, Tyurin and Richtarik 2022, arXiv:2209.15218). The new R goes whole to
those who do not hold the old one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nanofed.federated.wire.blocks import BLOCK, over_blocks
from nanofed.federated.wire.codec import Arrays, Codec, Weights


def changed(held: Arrays, changes: Arrays, codec: Codec, like: Weights, out: Arrays | None = None) -> Arrays:
    """Return held weights with what changed added to them, in the held weights' own codec.

    Each operation rounds to the nearest fp32 number, and the last one to bf16, so that all machines hold the same bits.

    Args:
        held: The held weights, `codec.whole` of weights.
        changes: What changed, `codec.pack(weights, codec.whole.parts(held, like))`.
        codec: The codec of the changes.
        like: Weights of the same names and shapes.
        out: The arrays that the result is written to, which may be `held`; new ones by default.

    Raises:
        WireError: The arrays do not fit. Nothing is written then.
    """
    whole = codec.whole
    out = [np.empty_like(array) for array in held] if out is None else out
    before, moves = whole.parts(held, like), codec.parts(changes, like)
    targets = [tensor.view(torch.bfloat16) for (tensor,) in whole.tensors(out, like)]
    names = list(like)

    def worker() -> Callable[[int, slice], None]:
        buffers = torch.empty(2, BLOCK)

        def add(index: int, part: slice) -> None:
            values, moved = buffers[:, : part.stop - part.start]
            before[names[index]](part, values)
            targets[index][part].copy_(values.add_(moves[names[index]](part, moved)))

        return add

    over_blocks([target.numel() for target in targets], worker)
    return out
