"""Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers as a function of (key, counter).

key = the 64 bits of the seed, counter = (position low, position high, tile, stream).  The number for a token depends on its own seed and
position alone, never on the row of the batch it happens to sit in.  Streams: 0 = sample, 1 = linear_sample within a tile of the vocabulary,
2 = linear_sample's choice of the tile.
"""

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox_uniform(seeds: Tensor, positions: Tensor, *, tile: Tensor | int = 0, stream: int = 0) -> Tensor:
    """Draw one uniform number in [0, 1) with 53 random bits per (seed, position, tile, stream).

    seeds, positions, tile: int64 of shapes that broadcast together; tile and stream in [0, 2^32).  Returns float64 of the broadcast shape on the
    same device; bit-equal on all devices.
    """
    if seeds.device.type == "cpu":  # numpy: a tenth of torch's cost per small array, same integers
        seeds, positions, tile = np.broadcast_arrays(seeds.numpy(), positions.numpy(), np.asarray(tile, np.int64))
    else:
        seeds, positions, tile = torch.broadcast_tensors(seeds, positions, torch.as_tensor(tile, device=seeds.device))
    words = philox4x32(positions & _MASK, (positions >> 32) & _MASK, tile & _MASK, (tile & 0) + stream, seeds & _MASK, (seeds >> 32) & _MASK)
    uniform = ((words[0] >> 5) * 67108864.0 + (words[1] >> 6)) * 2.0**-53
    return torch.as_tensor(uniform, dtype=torch.float64) if isinstance(uniform, np.ndarray | np.floating) else uniform.double()


def philox4x32(c0, c1, c2, c3, k0, k1, rounds: int = 10):
    """Four 32-bit words for a counter of four and a key of two, all held in int64 arrays or tensors."""
    for _ in range(rounds):
        # the wrapped int64 product has the right low 64 bits, and masking after the arithmetic shift gives the high word
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (product1 >> 32) & _MASK ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) & _MASK ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3
