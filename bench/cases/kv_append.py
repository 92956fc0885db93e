"""kv_append and qkv_append: the token of one decode step into a paged cache, alone and with QK norm and rotation.

Both write in place; the same token again leaves the same cache, so repetitions need no copy.  The rival does it step by step with PyTorch's indexing.
"""

import torch
from case import Case

from athanor import kernels as K


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype, b = (torch.bfloat16, 2) if gpu else (torch.float32, 4)
    R, H, Hkv, d, block = (512, 32, 8, 128, 64) if gpu else (64, 4, 2, 24, 16)
    columns = 4
    sizes = {"R": R, "H": H, "Hkv": Hkv, "d": d, "block": block}

    def make(g):
        rn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        return {"q": rn(R, H, d), "k": rn(R, Hkv, d), "v": rn(R, Hkv, d), "cos": rn(R, d // 2), "sin": rn(R, d // 2), "qw": rn(d), "kw": rn(d),
                "keys": rn(R * columns, Hkv, block, d), "values": rn(R * columns, Hkv, block, d),
                "table": torch.randperm(R * columns, generator=g, dtype=torch.int32).view(R, columns),
                "positions": torch.randint(0, columns * block, (R,), generator=g, dtype=torch.int32)}  # fmt: skip

    def write(k, v, keys, values, table, positions):
        blocks = table.long().gather(1, (positions // block).long()[:, None]).squeeze(1)
        keys[blocks, :, positions.long() % block] = k
        values[blocks, :, positions.long() % block] = v
        return keys, values

    def normed(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    def rotate(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)

    def append(k, v, keys, values, table, positions, backend, **_):
        K.kv_append(k, v, keys, values, table, positions, backend=backend)
        return keys, values

    def fused(q, k, v, cos, sin, qw, kw, keys, values, table, positions, backend):
        q = K.qkv_append(q, k, v, cos, sin, keys, values, table, positions, q_weight=qw, k_weight=kw, backend=backend)
        return q, keys, values

    def eager(q, k, v, cos, sin, qw, kw, keys, values, table, positions):
        return rotate(normed(q, qw), cos, sin), *write(rotate(normed(k, kw), cos, sin), v, keys, values, table, positions)

    return [
        Case("kv_append", sizes, dtype, make, append, lambda k, v, keys, values, table, positions, **_: write(k, v, keys, values, table, positions),
             "reads and writes one key and one value per row", bytes=4 * b * R * Hkv * d),
        Case("qkv_append", sizes, dtype, make, fused, eager, "reads and writes query, key and value of each row",
             bytes=2 * b * R * d * (H + 2 * Hkv), slack=4),
    ]  # fmt: skip
