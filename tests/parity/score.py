"""Run under torchrun: score one checkpoint as `fit` and `validate` do, with micro-batches of several sizes.

Arguments: a file for the figures, the checkpoint, a folder for runs, the sizes with commas between, and options of a fit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nanofed import api
from nanofed.training.summary import Summary


def figures(checkpoint: str, runs: Path, sizes: list[int], options: list[str], ranks: int) -> dict[str, float]:
    """Return bits per byte of the checkpoint by command, ranks and micro-batch."""
    found = {}
    for size in sizes:
        args = [*options, f"--data.device_batch_size={size}", "--trainer.accelerator=cpu", f"--trainer.devices={ranks}"]
        found[f"validate, {ranks} ranks, {size} rows"] = api.validate(args=[*args, f"--ckpt_path={checkpoint}"])
        name = f"fit-{ranks}-{size}"
        api.fit(args=[*args, f"--name={name}", f"--runs_dir={runs}", f"--init_from={checkpoint}"])
        found[f"fit, {ranks} ranks, {size} rows"] = Summary.read(runs / name).curve[0].bpb
    return found


if __name__ == "__main__":
    output, checkpoint, runs, sizes, *options = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    found = figures(checkpoint, Path(runs), [int(size) for size in sizes.split(",")], options, ranks)
    if os.environ["RANK"] == "0":
        Path(output).write_text(json.dumps(found))
