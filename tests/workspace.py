"""A folder in which the README's commands and the docstrings' examples run as they stand, in seconds."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nanofed import cli
from tests.evaluation.small_bundle import write_bundle
from tests.support import REPOSITORY

STEPS, ROUND_STEPS = 8, 4


def shrink(config: Path) -> None:
    """Make a config's model one layer of 512 tokens a step, or of half of that for each of two clients."""
    content = yaml.safe_load(config.read_text())
    clients = content.get("federation", {}).get("clients", 1)
    recipe = {"batch_tokens": 512 // clients, "num_steps": STEPS * clients}
    content["model"] |= {"depth": 1, "sequence_len": 32, "recipe": recipe}
    content["data"] |= {"device_batch_size": 8, "eval_tokens": 512}
    if clients > 1:
        content["federation"]["round_steps"] = ROUND_STEPS
    config.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with small `tiny` configs, own text, CORE tasks and, in a cache of its own, the demo corpus."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for name in ("tiny", "tiny_federated"):
        shrink(folder / "configs" / f"{name}.yaml")
    write_bundle(folder / "my-bundle")
    (folder / "my-texts").mkdir()
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    for n in range(160):
        (folder / "my-texts" / f"{n}.txt").write_text(source[n * 600 : (n + 1) * 600], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "cache"))
        patch.setenv("MPLBACKEND", "agg")
        patch.chdir(folder)
        assert cli.main(["data", "demo", "-n", "2", "--max_bytes", "1000000"]) == 0
        assert cli.main(["tokenizer", "train", "--data", "demo", "--vocab_size", "400"]) == 0
        yield folder
