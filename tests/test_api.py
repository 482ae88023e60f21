"""The API that notebooks import: overrides in Python's own terms."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nanofed.api import arguments
from nanofed.errors import ConfigError


class Merge(enum.Enum):
    MEDIAN = "median"


@pytest.mark.parametrize(
    ("value", "means"),
    [
        (Path("a/b"), "a/b"),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array([1.0, 0.5]), [1.0, 0.5]),
        (np.array(7), 7),
        (torch.tensor([1, 2]), [1, 2]),
        (None, None),
        (False, False),
        ((1, np.int32(2)), [1, 2]),
        (range(2), [0, 1]),
        (Merge.MEDIAN, "median"),
        ({"path": Path("d"), "rows": [np.int8(1), None]}, {"path": "d", "rows": [1, None]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_override_is_what_its_python_value_means(value: Any, means: Any) -> None:
    (argument,) = arguments(None, {"some.key": value})
    key, _, text = argument.partition("=")
    assert (key, yaml.safe_load(text)) == ("--some.key", means)


@pytest.mark.parametrize("value", [object(), b"bytes", 1j, np.array([1j]), np.int64, [object()], {"a": object()}])
def test_an_override_that_no_option_can_take_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"overrides: some\.key(\.a)? is a \w+, which no option can be set to"):
        arguments(None, {"some.key": value})
