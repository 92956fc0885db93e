"""Random numbers as pure functions of what they are for: (run seed, stage, prompt, sample), never of when they were drawn.

That makes a run resumable at any step and independent of the batch, the order and the number of ranks.
"""

import hashlib

import numpy as np


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (run seed, stage, step)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little") >> 1


def sample_seeds(n: int, *key: int | str) -> np.ndarray:
    """(n,) int64 seeds, one for each sample of the prompt named by `key`."""
    return np.array([derive_seed(*key, i) for i in range(n)], np.int64)
