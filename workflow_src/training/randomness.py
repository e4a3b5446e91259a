"""Training randomness as a function of (seed, step, global sample index, stream) and of nothing else.

Rank, worker, micro-batch and process count therefore change neither the data order nor the noise, and a resumed run
draws exactly what the uninterrupted one would have drawn. Philox is counter-based: step, sample and stream are words of
its counter, so no two of them overlap (the lowest word, which the generator advances, counts the drawn numbers).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_WORD = (1 << 64) - 1


def sample_generator(seed: int, step: int, index: int, stream: str = "") -> np.random.Generator:
    """The generator of one sample of one step; `stream` separates uses (noise, noise levels, clip choice, ...)."""
    counter = np.array([0, zlib.crc32(stream.encode()), step, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=int(seed) & _WORD, counter=counter))


def normal(seed: int, step: int, samples: Sequence[int], shape: tuple[int, ...], stream: str = "normal") -> np.ndarray:
    """Standard normal float32 (len(samples), *shape); row i depends on (seed, step, samples[i], stream) alone."""
    out = np.empty((len(samples), *shape), np.float32)
    for row, index in zip(out, samples):
        sample_generator(seed, step, int(index), stream).standard_normal(dtype=np.float32, out=row)
    return out


def uniform(seed: int, step: int, samples: Sequence[int], n: int, stream: str = "uniform") -> np.ndarray:
    """Uniform [0, 1) float64 (len(samples), n); row i depends on (seed, step, samples[i], stream) alone."""
    out = np.empty((len(samples), n), np.float64)
    for row, index in zip(out, samples):
        sample_generator(seed, step, int(index), stream).random(out=row)
    return out


def integers(seed: int, step: int, samples: Sequence[int], high: int, stream: str = "integers") -> np.ndarray:
    """Uniform int64 in [0, high), one per sample (len(samples),)."""
    return np.minimum((uniform(seed, step, samples, 1, stream)[:, 0] * high).astype(np.int64), high - 1)
