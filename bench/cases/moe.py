"""Routing and permutation of a mixture of experts, and the decode step of latent attention: sizes of Qwen3-30B-A3B and of DeepSeek-V3.

eager routes with torch.topk and sorts with torch.sort, as model code does.  Of equal scores topk takes any, so no two logits of a token are
equal: they are the same E numbers in another order.
Goal on an H200: routing and places of T = 16384, k = 8, E = 128 in 25 us together.
"""

import torch
from case import Case, differentiated

from athanor import kernels as K
from athanor.kernels.moe_permute import Places

# T, E, k, scoring, groups
ROUTES = {
    "cuda": [(16384, 128, 8, "softmax", (1, 1)), (16384, 256, 8, "sigmoid", (8, 4)), (256, 256, 8, "sigmoid", (8, 4))],
    "cpu": [(512, 16, 2, "softmax", (1, 1)), (512, 16, 2, "sigmoid", (4, 2))],
}
# T, E, k, D
PERMUTES = {"cuda": [(16384, 128, 8, 2048), (256, 256, 8, 7168)], "cpu": [(512, 16, 2, 96)]}
# R, H, rank, rotated, tokens, block, rows of a group, tokens that they share.  Goal of the last on an H200: 90 us
DECODES = {
    "cuda": [(128, 128, 512, 64, 8192, 64, 1, 0), (128, 16, 512, 64, 8192, 64, 1, 0), (128, 16, 512, 64, 9216, 64, 16, 8192)],
    "cpu": [(64, 4, 32, 8, 300, 16, 1, 0), (64, 4, 32, 8, 300, 16, 8, 256)],
}


def rn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def choices(g, T: int, E: int, k: int) -> torch.Tensor:
    return torch.rand(T, E, generator=g).topk(k, dim=1).indices.to(torch.int32)


def route_case(T: int, E: int, k: int, scoring: str, groups: tuple[int, int], dtype: torch.dtype) -> Case:
    n_group, topk_group = groups
    sigmoid = scoring == "sigmoid"

    def weights_of(logits, bias):
        if not sigmoid:
            w = logits.softmax(-1).topk(k).values
            return w / w.sum(-1, keepdim=True)
        scores = logits.sigmoid()
        keys = (scores.detach() + bias).unflatten(1, (n_group, -1))
        best = keys.topk(2).values.sum(-1).topk(topk_group).indices
        open_groups = torch.zeros(len(logits), n_group, dtype=torch.bool, device=logits.device).scatter(1, best, True)
        w = scores.gather(1, keys.masked_fill(~open_groups[..., None], -torch.inf).flatten(1).topk(k).indices)
        return w / w.sum(-1, keepdim=True)

    def routed(logits, bias, backend):
        return K.moe_route(logits, k, scoring=scoring, bias=bias if sigmoid else None, groups=groups, backend=backend).weights

    return Case("moe_route", {"T": T, "E": E, "k": k, "groups": n_group}, dtype,
                lambda g: {"logits": 6 * torch.rand(T, E, generator=g).argsort(1).double() / E - 3, "bias": 0.1 * rn(g, E), "dw": rn(g, T, k)},
                lambda logits, bias, dw, backend: differentiated(lambda z: routed(z, bias, backend), logits, upstream=dw),
                lambda logits, bias, dw: differentiated(lambda z: weights_of(z, bias), logits, upstream=dw.to(logits.dtype)),
                "forward reads the logits, writes ids and weights; backward reads all three and the weights' gradient, writes the logits'",
                bytes=3 * T * E * dtype.itemsize + 20 * T * k, fp32=("bias", "dw"), slack=8)  # fmt: skip


def places_case(T: int, E: int, k: int) -> Case:
    def eager(ids):
        order = ids.flatten().sort(stable=True).indices
        return order, order.argsort().view(T, k), torch.bincount(ids.flatten(), minlength=E).cumsum(0)

    def run(ids, backend):
        places = K.moe_places(ids, E, backend=backend)
        return places.source, places.inverse, places.offsets[1:]

    return Case("moe_places", {"T": T, "E": E, "k": k}, torch.float32, lambda g: {"ids": choices(g, T, E, k)}, run, eager,
                "reads the ids, writes source and inverse", bytes=12 * T * k)  # fmt: skip


def permute_cases(T: int, E: int, k: int, D: int, dtype: torch.dtype) -> list[Case]:
    def permuted(x, ids):
        return x[ids.flatten().sort(stable=True).indices // k]

    def unpermuted(y, weights, inverse):
        return (y[inverse].to(weights.dtype) * weights[..., None]).sum(1).to(y.dtype)

    sizes, b = {"T": T, "E": E, "k": k, "D": D}, dtype.itemsize
    make = lambda g: {"x": rn(g, T, D), "ids": choices(g, T, E, k), "dy": rn(g, T * k, D)}  # noqa: E731

    def back(g):
        places = K.moe_places(choices(g, T, E, k), E, backend="reference")
        return {"y": rn(g, T * k, D), "weights": rn(g, T, k), "dout": rn(g, T, D)} | places._asdict()

    return [
        Case("moe_permute", sizes, dtype, make,
             lambda x, ids, dy, backend: differentiated(lambda x: K.moe_permute(x, ids, E, backend=backend)[0], x, upstream=dy),
             lambda x, ids, dy: differentiated(lambda x: permuted(x, ids), x, upstream=dy),
             "forward, places included, reads T rows and writes T k; backward the reverse", bytes=2 * T * (k + 1) * D * b, slack=4),
        Case("moe_unpermute", sizes, dtype, back,
             lambda y, weights, dout, offsets, source, inverse, backend: differentiated(
                 lambda y, w: K.moe_unpermute(y, w, Places(offsets, source, inverse), backend=backend), y, weights, upstream=dout),
             lambda y, weights, dout, offsets, source, inverse: differentiated(lambda y, w: unpermuted(y, w, inverse), y, weights, upstream=dout),
             "forward reads T k rows, writes T; backward reads both, writes T k",
             bytes=T * (4 * k + 3) * D * b, fp32=("weights",), slack=4),
    ]  # fmt: skip


def decode_case(R: int, H: int, rank: int, rotated: int, tokens: int, block: int, group: int, prefix: int, dtype: torch.dtype, gpu: bool) -> Case:
    d, columns, shared, P = rank + rotated, -(-tokens // block), prefix // block, R // group
    blocks = P * shared + R * (columns - shared)

    def make(g):
        shape = (blocks, 1, block, d)
        cache = rn(g, *shape) if gpu else rn(g, blocks, 1, d, block).transpose(2, 3)
        common, own = torch.randperm(blocks, generator=g, dtype=torch.int32).split((P * shared, blocks - P * shared))
        table = torch.cat((common.view(P, shared).repeat_interleave(group, 0), own.view(R, columns - shared)), 1)
        return {"q": rn(g, R, H, d), "cache": cache, "table": table, "lens": torch.full((R,), tokens, dtype=torch.int32),
                "offsets": torch.arange(0, R + 1, group, dtype=torch.int32), "prefixes": torch.full((P,), prefix, dtype=torch.int32)}  # fmt: skip

    def run(q, cache, table, lens, offsets, prefixes, backend):
        values = cache if gpu else cache.contiguous()
        groups = dict(group_offsets=offsets, prefix_lens=prefixes) if prefix else {}
        return (K.mla_decode(q, cache, values, table, lens, rank=rank, scale=d**-0.5, backend=backend, **groups),)

    def eager(q, cache, table, lens, offsets, prefixes):
        rows = cache[table.long(), 0].flatten(1, 2)[:, :tokens]
        return ((q @ rows.mT * d**-0.5).softmax(-1) @ rows[..., :rank],)

    def unshared(q, cache, table, lens, offsets, prefixes):
        return (K.mla_decode(q, cache, cache if gpu else cache.contiguous(), table, lens, rank=rank, scale=d**-0.5),)

    sizes = {"R": R, "H": H, "rank": rank, "rotated": rotated, "tokens": tokens, "block": block}
    sizes |= {"group": group, "prefix": prefix} if prefix else {}
    read = R * tokens - (R - P) * shared * block
    return Case("mla_decode", sizes, dtype, make, run, eager, "reads each cached row once; on a CPU the copy of the values is timed too",
                bytes=dtype.itemsize * (read * d + R * H * (d + rank)), flops=2 * R * tokens * H * (d + rank), slack=4,
                rivals={"unshared": unshared} if prefix else {})  # fmt: skip


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    routes = [route_case(*size, torch.float32 if size[3] == "sigmoid" else dtype) for size in ROUTES[device]]
    permutes = [case for size in PERMUTES[device] for case in permute_cases(*size, dtype)]
    return [*routes, *(places_case(*size[:3]) for size in PERMUTES[device]), *permutes,
            *(decode_case(*size, dtype, gpu) for size in DECODES[device])]  # fmt: skip
