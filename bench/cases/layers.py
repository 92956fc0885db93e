"""rmsnorm, rope, swiglu, attention: forward and backward.  On CPU the default recipe's sizes, on a GPU those of an 8B model.

Of attention's rows on a GPU, cuda is the default and triton what strict mode takes.
"""

import torch
from case import Case, differentiated
from torch.nn import functional as F

from athanor import kernels as K


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype, b = (torch.bfloat16, 2) if gpu else (torch.float32, 4)
    T, D, W, H, Hkv, d = (8192, 4096, 12288, 32, 8, 128) if gpu else (2048, 96, 256, 4, 2, 24)
    N = 32768 if gpu else 4096  # rows of the cases with a goal: rmsnorm with residual, swiglu
    lengths = [1024] * 8 if gpu else [16 + 4 * (i % 16) for i in range(44)]
    A = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)

    def rn(g, *shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def rotate(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)

    def normed(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    def qk_normed(q, k, q_weight, k_weight, cos, sin):
        return rotate(normed(q, q_weight), cos, sin), rotate(normed(k, k_weight), cos, sin)

    def causal(q, k, v):
        parts, repeat = [], H // Hkv
        for a, c, e in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            a, c, e = (x.transpose(0, 1)[None] for x in (a, c.repeat_interleave(repeat, 1), e.repeat_interleave(repeat, 1)))
            parts.append(F.scaled_dot_product_attention(a, c, e, is_causal=True)[0].transpose(0, 1))
        return torch.cat(parts)

    return [
        Case("rmsnorm", {"T": T, "D": D}, dtype, lambda g: {"x": rn(g, T, D), "w": rn(g, D), "dy": rn(g, T, D)},
             lambda x, w, dy, backend: differentiated(lambda x, w: K.rmsnorm(x, w, backend=backend), x, w, upstream=dy),
             lambda x, w, dy: differentiated(normed, x, w, upstream=dy),
             "forward reads x, writes y; backward reads x and dy, writes dx", bytes=5 * T * D * b,
             rivals={"F.rms_norm": lambda x, w, dy: differentiated(lambda x, w: F.rms_norm(x, (D,), w, 1e-6), x, w, upstream=dy)}),
        Case("rmsnorm", {"T": N, "D": D, "residual": 1}, dtype, lambda g: {"x": rn(g, N, D), "residual": rn(g, N, D), "w": rn(g, D)},
             lambda x, residual, w, backend: K.rmsnorm(x, w, residual=residual, backend=backend),
             lambda x, residual, w: (normed(x + residual, w), x + residual),
             "forward alone: reads x and residual, writes y and their sum", bytes=4 * N * D * b, rows=("x", "residual"),
             rivals={"F.rms_norm": lambda x, residual, w: (F.rms_norm(s := x + residual, (D,), w, 1e-6), s)}),
        Case("rope", {"T": T, "H": H, "Hkv": Hkv, "d": d}, dtype,
             lambda g: {"q": rn(g, T, H, d), "k": rn(g, T, Hkv, d), "cos": rn(g, T, d // 2), "sin": rn(g, T, d // 2), "dq": rn(g, T, H, d),
                        "dk": rn(g, T, Hkv, d)},
             lambda q, k, cos, sin, dq, dk, backend: differentiated(lambda q, k: K.rope(q, k, cos, sin, backend=backend), q, k, upstream=(dq, dk)),
             lambda q, k, cos, sin, dq, dk: differentiated(lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin)), q, k, upstream=(dq, dk)),
             "forward and backward each read and write q and k", bytes=4 * T * (H + Hkv) * d * b),
        Case("rope", {"T": T, "H": H, "Hkv": Hkv, "d": d, "norm": 1}, dtype,
             lambda g: {"q": rn(g, T, H, d), "k": rn(g, T, Hkv, d), "qw": rn(g, d), "kw": rn(g, d), "cos": rn(g, T, d // 2), "sin": rn(g, T, d // 2),
                        "dq": rn(g, T, H, d), "dk": rn(g, T, Hkv, d)},
             lambda q, k, qw, kw, cos, sin, dq, dk, backend: differentiated(
                 lambda q, k, qw, kw: K.rope(q, k, cos, sin, q_weight=qw, k_weight=kw, backend=backend), q, k, qw, kw, upstream=(dq, dk)),
             lambda q, k, qw, kw, cos, sin, dq, dk: differentiated(lambda *leaves: qk_normed(*leaves, cos, sin), q, k, qw, kw, upstream=(dq, dk)),
             "forward reads and writes q and k; backward reads them and their gradients, writes gradients", bytes=5 * T * (H + Hkv) * d * b),
        Case("swiglu", {"T": N, "F": W}, dtype, lambda g: {"x": rn(g, N, 2 * W), "dy": rn(g, N, W)},
             lambda x, dy, backend: differentiated(lambda x: K.swiglu(x, backend=backend), x, upstream=dy),
             lambda x, dy: differentiated(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], x, upstream=dy),
             "forward reads 2F, writes F; backward reads 2F + F, writes 2F", bytes=8 * N * W * b, rows=("x", "dy")),
        Case("attention", {"T": A, "S": len(lengths), "H": H, "Hkv": Hkv, "d": d}, dtype,
             lambda g: {"q": rn(g, A, H, d), "k": rn(g, A, Hkv, d), "v": rn(g, A, Hkv, d), "dy": rn(g, A, H, d),
                        "cu": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)},
             lambda q, k, v, dy, cu, backend: differentiated(lambda q, k, v: K.attention(q, k, v, cu, backend=backend), q, k, v, upstream=dy),
             lambda q, k, v, dy, cu: differentiated(causal, q, k, v, upstream=dy),
             "2 GEMMs forward, 5 backward over the causal half", flops=7 * 2 * pairs * H * d, slack=4),
    ]  # fmt: skip
