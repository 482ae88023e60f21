"""`bin/bench NAME …`: the table of benchmarks; each is imported when it is called and gets the arguments behind its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "train": "a training step in its phases, against the plain path and against the machine's GEMM ceiling",
    "gemm": "the machine's GEMM ceiling at the shapes of a model",
    "optimizer": "the optimizer's step",
    "data": "tokens a second from parquet to batch",
    "tokenizer": "tokens a second encoded",
    "generate": "tokens a second read and generated, against transformers' generate on the same weights",
    "trainer": "Trainer.fit against a bare loop over the same module and data",
    "merge": "the server's merge against the speed of memory and against Flower's; codecs",
    "checkpoint": "seconds, bytes and memory of saving and loading",
    "startup": "seconds from `nanofed fit` to the first step, in its parts",
    "round": "a round over real SuperLink and SuperNodes beside its training: phases, bytes, memory; against FedAvg",
    "link": "rounds over lines of given rates, in network namespaces: utilisation by codec, against FedAvg and the plan",
    "speeds": "bits per byte and time of clients of several speeds, in rounds and merged when they come",
    "engine": "bits per byte at equal tokens: fit, clients in one process, clients over real SuperLink and SuperNodes",
    "repeats": "bits per byte of runs on what their context has said before, and on what is new",
    "time_to_bpb": "seconds to a given bits per byte, against the plain path on the same batches",
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in BENCHMARKS:
        width = max(map(len, BENCHMARKS))
        lines = [f"  {name:<{width}}  {what}" for name, what in BENCHMARKS.items()]
        text = "\n".join(["usage: bin/bench NAME [options]     (bin/bench NAME --help for the options)", "", *lines])
        if argv and argv[0] in ("-h", "--help"):
            print(text)
            return 0
        print(f"bench: there is no benchmark {argv[0]!r}\n\n{text}" if argv else text, file=sys.stderr)
        return 2
    result: int = importlib.import_module(f"tests.benchmarks.{argv[0]}").main(list(argv[1:]))
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
