"""grouped_gemm and grouped_wgrad: an expert layer of DeepSeek-V3's kind on 8 experts, one of Qwen3-30B-A3B, and a decode step of the latter.

eager is a loop of library products; its host knows the sizes, which in a model costs a wait for the device.
"""

import functools

import torch
from case import Case, differentiated

from athanor import kernels as K
from athanor.kernels.grouped_gemm import grouped_gemm_reference, grouped_wgrad_reference

# T, E, N, K, backward
SIZES = {
    "cuda": [(32768, 8, 2048, 7168, 0), (32768, 8, 2048, 7168, 1), (131072, 128, 1536, 2048, 0), (2048, 128, 1536, 2048, 0)],
    "cpu": [(512, 4, 96, 64, 0), (512, 4, 96, 64, 1)],
}
WGRADS = {"cuda": [(32768, 8, 2048, 7168), (131072, 128, 1536, 2048)], "cpu": [(512, 4, 96, 64)]}


def group_ends(T: int, E: int, multiple: int) -> torch.Tensor:
    """(E,) int32: sizes from half to one and a half of the mean, in multiples of `multiple`, always the same ones."""
    weights = 0.5 + torch.rand(E, generator=torch.Generator("cpu").manual_seed(E), device="cpu")
    ends = (weights.cumsum(0) / weights.sum() * T / multiple).round() * multiple
    ends[-1] = T
    return ends.to(torch.int32)


def on(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return copied(tuple(ends.tolist()), x.device)


@functools.cache
def copied(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied once: a copy in each call would wait for the device."""
    return torch.tensor(ends, dtype=torch.int32, device=device)


def library(name: str):
    if not hasattr(torch, name):
        raise NotImplementedError(f"torch {torch.__version__} has no {name}")
    return getattr(torch, name)


def rn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def case(T: int, E: int, N: int, D: int, backward: int, dtype: torch.dtype) -> Case:
    ends = group_ends(T, E, 128 if T >= 128 * E else 1)

    def called(function, x, w, dy):
        if backward:
            return differentiated(function, x, w, upstream=dy)
        with torch.no_grad():
            return (function(x, w),)

    def grouped_mm(x, w, dy):
        return called(lambda x, w: library("_grouped_mm")(x, w.transpose(1, 2), offs=on(x, ends)), x, w, dy)

    return Case("grouped_gemm", {"T": T, "E": E, "N": N, "K": D, "backward": backward}, dtype,
                lambda g: {"x": rn(g, T, D), "w": rn(g, E, N, D) / D**0.5, "dy": rn(g, T, N)},
                lambda x, w, dy, backend: called(lambda x, w: K.grouped_gemm(x, w, on(x, ends), backend=backend), x, w, dy),
                lambda x, w, dy: called(lambda x, w: grouped_gemm_reference(x, w, ends), x, w, dy),
                "3 products of 2 T N K" if backward else "1 product of 2 T N K; reads x and weights, writes y",
                bytes=(2 if backward else 1) * (T * D + E * N * D + T * N) * dtype.itemsize, flops=(6 if backward else 2) * T * N * D,
                rivals={"torch._grouped_mm": grouped_mm} if dtype == torch.bfloat16 else {})  # fmt: skip


def wgrad_case(T: int, E: int, N: int, D: int, dtype: torch.dtype) -> Case:
    ends = group_ends(T, E, 128 if T >= 128 * E else 1)
    return Case("grouped_wgrad", {"T": T, "E": E, "N": N, "K": D}, dtype, lambda g: {"dy": rn(g, T, N), "x": rn(g, T, D)},
                lambda dy, x, backend: (K.grouped_wgrad(dy, x, on(x, ends), E, backend=backend),),
                lambda dy, x: (grouped_wgrad_reference(dy, x, ends, E),),
                "1 product of 2 T N K; reads x and dy, writes dW", bytes=(T * D + E * N * D + T * N) * dtype.itemsize, flops=2 * T * N * D,
                rivals={"torch._grouped_mm": lambda dy, x: (library("_grouped_mm")(dy.T, x, offs=on(x, ends)),)}
                if dtype == torch.bfloat16 else {})  # fmt: skip


def cases(device: str) -> list[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [case(*size, dtype) for size in SIZES[device]] + [wgrad_case(*size, dtype) for size in WGRADS[device]]
