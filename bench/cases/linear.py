"""linear: a decode step and a packed batch, forward alone, which is where strict mode differs, and forward with backward.

On a GPU the row triton is what strict mode takes; reference and eager are cuBLAS.  Predictions are in kernels/linear_triton.py.
"""

import torch
from case import Case, differentiated
from torch.nn import functional as F

from athanor import kernels as K

# T, K, N, bias, backward.  GPU: output, qkv and gate and up projection of an 8B model; CPU: gate and up of the default recipe
SIZES = {
    "cuda": [(64, 4096, 4096, 0, 0), (64, 4096, 6144, 1, 0), (64, 4096, 24576, 0, 0), (256, 4096, 4096, 0, 0), (256, 4096, 24576, 0, 0),
             (8192, 4096, 4096, 0, 0), (8192, 4096, 4096, 0, 1)],
    "cpu": [(64, 96, 512, 1, 0), (2048, 96, 512, 0, 1)],
}


def linear_case(T: int, D: int, N: int, bias: int, backward: int, dtype: torch.dtype) -> Case:
    def make(g):
        rn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        return {"x": rn(T, D), "w": rn(N, D) / D**0.5, "b": rn(N), "dy": rn(T, N)}

    def called(function, x, w, b, dy):
        if backward:
            return differentiated(lambda x, w: function(x, w, b if bias else None), x, w, upstream=dy)
        with torch.no_grad():
            return (function(x, w, b if bias else None),)

    work = "3 products of 2 T K N; reads x, weight and dy, writes y and two gradients" if backward else "1 product; reads x and weight, writes y"
    return Case("linear", {"T": T, "K": D, "N": N, "bias": bias, "backward": backward}, dtype, make,
                lambda x, w, b, dy, backend: called(lambda *leaves: K.linear(*leaves, backend=backend), x, w, b, dy),
                lambda x, w, b, dy: called(F.linear, x, w, b, dy),
                work, bytes=(2 if backward else 1) * (T * D + N * D + T * N) * dtype.itemsize, flops=(6 if backward else 2) * T * D * N)  # fmt: skip


def cases(device: str) -> list[Case]:
    return [linear_case(*size, torch.bfloat16 if device == "cuda" else torch.float32) for size in SIZES[device]]
