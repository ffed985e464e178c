"""Sample the noise that torch samples on the CPU, with numpy alone."""

import math

import numpy as np
import numpy.typing as npt

_BLOCK = 16  # torch turns uniform numbers into normal ones in blocks of this size


def standard_normal(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Return what `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` returns, to 1e-6.

    Args:
        shape: shape of the noise.
        seed: seed, 0 or above, of which torch's generator of the CPU uses the lowest 32 bits.
    """
    generator, count = np.random.MT19937(), math.prod(shape)
    # The older generator of numpy is seeded as torch's is, and MT19937 itself in another way.
    generator.state = np.random.RandomState(seed % 2**32).get_state(legacy=False)  # type: ignore[assignment]
    if count < _BLOCK:
        return _double_pairs(generator, -(-count // 2))[:count].astype(np.float32).reshape(shape)
    uniform = _uniform(generator, count)
    whole = count - count % _BLOCK
    noise = np.empty(count, np.float32)
    noise[:whole] = _box_muller(uniform[:whole])
    if whole < count:  # torch samples the last block again, where it is not full.
        noise[-_BLOCK:] = _box_muller(_uniform(generator, _BLOCK))
    return noise.reshape(shape)


def _uniform(generator: np.random.MT19937, count: int) -> npt.NDArray[np.float32]:
    """Return uniform numbers of 24 bits in [0, 1)."""
    return (generator.random_raw(count) & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return normal numbers made of uniform ones; half of a block gives the radii, and half gives the angles."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


def _double_pairs(generator: np.random.MT19937, pairs: int) -> npt.NDArray[np.float64]:
    """Return the normal numbers of double precision, two for each pair, of which torch makes fewer than a block."""
    raw = generator.random_raw(4 * pairs).astype(np.uint64).reshape(-1, 2)
    joined = (raw[:, 0] << np.uint64(32)) | raw[:, 1]
    uniform = (joined & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[1::2])), 2 * math.pi * uniform[0::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
