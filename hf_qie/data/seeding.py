"""Random numbers as functions of (seed, purpose, numbers) alone, never of a global generator."""

import hashlib

import numpy as np


def draw_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """The generator of (seed, purpose, numbers): the same in every process, release and order of calls.

    Hashed, because numpy's SeedSequence takes (1,) and (1, 0) for the same seed and Python's hash differs by process.
    """
    key = repr((int(seed), purpose, *map(int, numbers)))
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32))
