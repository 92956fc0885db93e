"""paged_attention: one decode step over a paged KV cache, alone and with a prefix that groups share.

The rival, in fp64 the oracle, is what PyTorch offers without a kernel of its own: gather each row's blocks, then attention on the dense copy.  It
cannot share a prefix.  Goals on an H200: 256 rows x 4096 tokens <= 1.10 ms; 16 groups of 16, prefix and own part 2048 each, <= 0.60 ms.
"""

import torch
from case import Case
from torch.nn import functional as F

from athanor import kernels as K
from athanor.kernels.paged_attention import CHUNK


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype, b = (torch.bfloat16, 2) if gpu else (torch.float32, 4)
    H, Hkv, d, block = (32, 8, 128, 64) if gpu else (4, 2, 24, 16)
    sizes = [(256, 1, 0, 4096), (256, 16, 2048, 2048)] if gpu else [(64, 1, 0, 300), (64, 8, 1024, 128)]

    def build(R: int, G: int, prefix: int, own: int, gate: Case | None = None) -> Case:
        length, groups = prefix + own, R // G
        shared, columns = prefix // block, (prefix + own + block - 1) // block
        blocks = groups * shared + R * (columns - shared)

        def make(g):
            order = torch.randperm(blocks, generator=g, dtype=torch.int32)
            common, rest = order[: groups * shared].view(groups, shared), order[groups * shared :].view(R, columns - shared)
            rn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
            # the layouts of empty_kv_cache
            keys = rn(blocks, Hkv, block, d) if gpu else rn(blocks, Hkv, d, block).transpose(2, 3)
            return {"q": rn(R, H, d), "keys": keys, "values": rn(blocks, Hkv, block, d),
                    "table": torch.cat((common.repeat_interleave(G, 0), rest), 1), "lens": torch.full((R,), length, dtype=torch.int32),
                    "offsets": torch.arange(0, R + 1, G, dtype=torch.int32),
                    "prefixes": torch.full((groups,), prefix, dtype=torch.int32)}  # fmt: skip

        def run(q, keys, values, table, lens, offsets, prefixes, backend):
            groups = {"group_offsets": offsets, "prefix_lens": prefixes} if G > 1 else {}
            return (K.paged_attention(q, keys, values, table, lens, **groups, backend=backend),)

        def eager(q, keys, values, table, lens, offsets, prefixes):
            k, v = (x[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length] for x in (keys, values))
            return (F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2),)

        chunks = -(-length // CHUNK)
        unique = R * length - (R - groups) * (prefix // CHUNK * CHUNK)  # tokens that must be read
        work = "reads each key and value once, those of a prefix once per group; query, output, and the partials of each row and chunk twice"
        named = {"R": R, "G": G, "prefix": prefix, "own": own, "H": H, "Hkv": Hkv, "d": d, "block": block}
        moved = 2 * b * unique * Hkv * d + 2 * b * R * H * d + 8 * R * H * chunks * (d + 2)
        return Case("paged_attention", named, dtype, make, run, eager, work, bytes=moved, flops=4 * R * length * H * d, gate=gate)

    if not gpu:
        return [build(*size) for size in sizes]
    # the sizes of the gate: the same grouping, with tiles and chunks that end in the middle
    return [build(*size, gate=build(16, size[1], min(size[2], 600), 300)) for size in sizes]
