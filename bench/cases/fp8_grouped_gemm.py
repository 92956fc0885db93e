"""fp8_grouped_gemm and fp8_grouped_wgrad: the products alone, of operands that are quantised before.  Sizes as in grouped_gemm.py.

The oracle multiplies the dequantised operands in fp64, eager in fp32.  The rivals are bf16 on the dequantised operands, and PyTorch's grouped product
with one scale per row, which is another, coarser quantisation: its error is beside it in the JSON row.
"""

import torch
from case import Case

from athanor import kernels as K
from athanor.kernels.fp8_grouped_gemm import fp8_grouped_matmul_reference, fp8_grouped_wgrad_reference
from athanor.kernels.fp8_quantize import Quantized, dequantize, fp8_quantize

from .grouped_gemm import group_ends, library, on, rn

# T, E, N, K: forward of the goal, its dx, an expert layer of Qwen3-30B-A3B, and both matrices of its layer in a decode step of 256 sequences with 8
# experts each, on an H200 95 + 47 us by bytes and 160 by the goal
SIZES = {
    "cuda": [(32768, 8, 2048, 7168), (32768, 8, 7168, 2048), (131072, 128, 1536, 2048), (2048, 128, 1536, 2048),
             (2048, 128, 2048, 768)],
    "cpu": [(512, 4, 96, 256), (512, 4, 256, 96)],
}
WGRADS = {"cuda": [(32768, 8, 2048, 7168)], "cpu": [(512, 4, 96, 64)]}
E4M3 = torch.float8_e4m3fn


def quantised(x: torch.Tensor, block: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits, which no case converts to its dtype, and scales."""
    q, scales = fp8_quantize(x.float(), block=block, backend=None if x.is_cuda else "reference")
    return q.view(torch.uint8), scales


def prepared(function, prepare):
    """A rival that is timed without the preparation of its operands."""

    def run(**inputs):
        return (function(*prepare(**inputs)),)

    def timed(**inputs):
        operands = prepare(**inputs)
        return lambda: function(*operands)

    run.timed = timed
    return run


def rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (x / scale).to(E4M3), scale.squeeze(-1)


def case(T: int, E: int, N: int, D: int) -> Case:
    ends = group_ends(T, E, 128 if T >= 128 * E else 1)

    def make(g):
        x, xs = quantised(rn(g, T, D), (1, 128))
        w, ws = quantised(rn(g, E, N, D) / D**0.5, (128, 128))
        return {"x": x, "xs": xs, "w": w, "ws": ws}

    def wide(x, xs, w, ws, dtype):
        return dequantize(Quantized(x.view(E4M3), xs), (1, 128), dtype), dequantize(Quantized(w.view(E4M3), ws), (128, 128), dtype)

    def run(x, xs, w, ws, backend):
        return (K.fp8_grouped_matmul(Quantized(x.view(E4M3), xs), Quantized(w.view(E4M3), ws), on(x, ends), backend=backend),)

    def eager(x, xs, w, ws):
        out_dtype = torch.float64 if xs.dtype == torch.float64 else torch.bfloat16
        return (fp8_grouped_matmul_reference(x.view(E4M3), xs, w.view(E4M3), ws, ends, None, out_dtype),)

    def half(x, xs, w, ws):
        return *wide(x, xs, w, ws, torch.bfloat16), on(x, ends)

    def coarse(x, xs, w, ws):
        (a, sa), (b, sb) = (rowwise(t) for t in wide(x, xs, w, ws, torch.float32))
        return a, b, sa, sb, on(x, ends)

    rivals = {
        "bf16 torch._grouped_mm": prepared(lambda a, b, offs: library("_grouped_mm")(a, b.transpose(1, 2), offs=offs), half),
        "torch._scaled_grouped_mm": prepared(
            lambda a, b, sa, sb, offs: library("_scaled_grouped_mm")(a, b.transpose(1, 2), sa, sb, offs=offs, out_dtype=torch.bfloat16), coarse),
    }  # fmt: skip
    return Case("fp8_grouped_gemm", {"T": T, "E": E, "N": N, "K": D}, torch.bfloat16, make, run, eager,
                "1 product of 2 T N K; reads x and weights in one byte each, writes y in two", fp32=("xs", "ws"),
                bytes=T * D + min(E, T) * N * D + 2 * T * N, flops=2 * T * N * D, rivals=rivals if torch.cuda.is_available() else {})  # fmt: skip


def wgrad_case(T: int, E: int, N: int, D: int) -> Case:
    ends = group_ends(T, E, 128)

    def make(g):
        (dy, dys), (x, xs) = (quantised(rn(g, T, n), (128, 1)) for n in (N, D))
        return {"dy": dy, "dys": dys, "x": x, "xs": xs}

    def run(dy, dys, x, xs, backend):
        return (K.fp8_grouped_wgrad(Quantized(dy.view(E4M3), dys), Quantized(x.view(E4M3), xs), on(x, ends), E, backend=backend),)

    def eager(dy, dys, x, xs):
        out_dtype = torch.float64 if xs.dtype == torch.float64 else torch.bfloat16
        return (fp8_grouped_wgrad_reference(dy.view(E4M3), dys, x.view(E4M3), xs, ends, E, out_dtype),)

    def half(dy, dys, x, xs):
        return *(dequantize(Quantized(q.view(E4M3), s), (128, 1), torch.bfloat16) for q, s in ((dy, dys), (x, xs))), on(x, ends)

    rivals = {"bf16 torch._grouped_mm": prepared(lambda dy, x, offs: library("_grouped_mm")(dy.T, x, offs=offs), half)}
    return Case("fp8_grouped_wgrad", {"T": T, "E": E, "N": N, "K": D}, torch.bfloat16, make, run, eager,
                "1 product of 2 T N K; reads x and dy in one byte each, writes dW in two", fp32=("dys", "xs"),
                bytes=T * D + 2 * E * N * D + T * N, flops=2 * T * N * D, rivals=rivals if torch.cuda.is_available() else {})  # fmt: skip


def cases(device: str) -> list[Case]:
    return [case(*size) for size in SIZES[device]] + [wgrad_case(*size) for size in WGRADS[device]]
