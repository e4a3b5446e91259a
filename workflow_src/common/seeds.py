"""Every random number follows from the one configured seed and a name."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose that `names` spell out, independent of every other purpose's."""
    text = "\x1f".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A counter-based generator seeded by `derive(seed, *names)`."""
    return np.random.Generator(np.random.Philox(derive(seed, *names)))
