"""Noise sampled with numpy, against torch's own generator of the CPU."""

import numpy as np
import pytest
import torch

from d2f_fast.export.noise import standard_normal


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1,), (5,), (8,), (15,), (16,), (17,), (40,), (1, 4, 3, 5), (2, 4, 64, 64)], ids=str)
def test_noise_equals_that_of_torch(shape: tuple[int, ...], seed: int) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    got = standard_normal(shape, seed)
    assert got.shape == shape and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
