"""Each public name's docstring has an example, which runs as it stands."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import nanofed

pytest_plugins = ["tests.workspace"]

PUBLIC = [name for name in nanofed.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def tiny_run(workspace: Path) -> None:
    nanofed.fit("configs/tiny.yaml")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of(name: str, tiny_run: None) -> None:
    names = {"nanofed": nanofed, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(nanofed, name), name, globs=names)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert said == [], "".join(said)
