from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanofed.federated.wire.blocks import l2_norm
from tests.federated.arrays import odd_weights, vector


@pytest.mark.parametrize("threads", [1, 3])
def test_the_norm_of_any_arrays_is_numpys(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(3):
        arrays = odd_weights(seed)
        assert l2_norm(list(arrays.values())) == pytest.approx(float(np.linalg.norm(vector(arrays))), rel=1e-12)
    wide = [np.array([1e200, 1e200]), np.zeros((0, 2))]
    assert l2_norm(wide) == math.inf
    assert math.isnan(l2_norm([np.array([1.0, np.nan], np.float32)]))
    assert l2_norm([]) == 0
