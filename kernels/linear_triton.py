"""Linear layer in Triton with row-independent bits; the equation is that of linear.py.

A program computes one tile of BM tokens x BN outputs: a running product over K in ascending steps of BK, never split.  Rows of a matrix product do
not depend on each other, and what lies behind the last row is read as 0: so the bits of a row follow from that row and the weights.  The instructions
add 16 of K at a time in whatever tile, so that sm_90 has tiles for few tokens and for many with the same bits.  The bias is added in fp32; y is
rounded once.

Programs are numbered so that those which run together share operands in L2: a band of GROUP token tiles meets one tile of weights after the other.

Backward: dx = dy weight, dweight = dy^T x by the library, whose choice of order changes no log-prob.

On an H200 in bf16, K = 4096, beside cuBLAS: T = 64 17.7 and 17.1 us (N = 4096), 22.8 and 22.5 (6144), 62.0 and 61.0 (24576); T = 256 26.2 and 23.0
(4096), 97.6 and 90.2 (24576); T = 8192 424 and 412 us (4096).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, entry_for, on_device_of
from .linear_logprob_triton import Tiles, _logits, operands

# Not measured.  There is no slice of a vocabulary.
TILES = {80: Tiles(64, 128, 32, 4, 4, 0), 100: Tiles(64, 128, 64, 4, 4, 0)}
# sm_90, the fastest of eleven on an H200; 64 rows are the least that its wgmma takes.  narrow: one program for each of 132 processors where N =
# 4096.  half: the same for a batch of rows.
HOPPER = {"narrow": Tiles(64, 32, 128, 4, 6, 0), "low": Tiles(64, 64, 128, 4, 5, 0), "half": Tiles(128, 64, 64, 4, 5, 0),
          "tall": Tiles(128, 128, 64, 8, 4, 0)}  # fmt: skip
TILES_FP32 = Tiles(64, 64, 16, 8, 3, 0)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 16, 16, 4, 1, 0, 2)


def tiles_of(x: Tensor, N: int) -> Tiles:
    """The tile for x (T, K) and N outputs; on sm_90 one of four, all of the same bits."""
    if not x.is_cuda:
        return TILES_INTERPRETER
    if x.dtype == torch.float32:
        return TILES_FP32
    if torch.cuda.get_device_capability(x.device)[0] == 9:
        if x.shape[0] <= 128:
            return HOPPER["narrow" if N <= 132 * 32 else "low"]
        return HOPPER["half" if triton.cdiv(x.shape[0], 128) * triton.cdiv(N, 128) < 132 else "tall"]
    return entry_for(TILES, x.device)


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return LinearFunction.apply(x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous(), weight, bias, out_dtype)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, out_dtype):
        T, N = x.shape[0], weight.shape[0]
        ctx.save_for_backward(x, weight)
        y = torch.empty(T, N, dtype=out_dtype, device=x.device)
        if y.numel():
            tiles = tiles_of(x, N)
            with on_device_of(x):
                linear_fwd_kernel[(triton.cdiv(T, tiles.BM) * triton.cdiv(N, tiles.BN),)](
                    bias_ptr=y if bias is None else bias.contiguous(), y_ptr=y, T=T, N=N, BIAS=bias is not None,
                    **operands(x, weight, tiles))  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return dy @ weight if need_x else None, dy.T @ x if need_weight else None, dy.sum(0) if need_bias else None, None


# The number of tokens and where they lie change from call to call: neither is specialised.
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["bias_ptr"])
def linear_fwd_kernel(
    hidden, weight, bias_ptr, y_ptr, T, N, D, hidden_stride, weight_stride,
    BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    band = GROUP * tl.cdiv(N, BN)
    width = tl.minimum(tl.cdiv(T, BM) - pid // band * GROUP, GROUP)
    row0 = (pid // band * GROUP + pid % band % width) * BM
    col0 = pid % band // width * BN
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    y = _logits(hidden, weight, rows, cols, row0, col0, T, N, D, hidden_stride, weight_stride, BM, BN, BK, DESCRIPTORS)
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < N)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    sizes = {"T": "i32", "N": "i32:16", "D": "i32:16", "hidden_stride": "i32:16", "weight_stride": "i32:16"}
    cases = []

    def add(name, tiles, capabilities, dtype, descriptors):
        for bias, out in dict.fromkeys([(False, dtype), (True, dtype), (False, "fp32")]):
            kinds = [f"tensordesc<{dtype}[{block}, {tiles.BK}]>" if descriptors else f"*{dtype}:16" for block in (tiles.BM, tiles.BN)]
            signature = dict(zip(("hidden", "weight"), kinds, strict=True)) | sizes | {"bias_ptr": f"*{dtype}", "y_ptr": f"*{out}:16"}
            constants = dict(BIAS=bias, BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, GROUP=tiles.GROUP, DESCRIPTORS=descriptors)
            cases.append(AheadOfTime(f"linear_fwd {name} bias {bias} out {out}", linear_fwd_kernel, signature, constants, tiles.num_warps,
                                     tiles.num_stages, registers=168, matrix=dtype != "fp32", capabilities=capabilities))  # fmt: skip

    for name, capability, tiles in [*(("", *item) for item in TILES.items()), *((f" {name}", 90, tiles) for name, tiles in HOPPER.items())]:
        for descriptors in (False, True) if capability >= 90 else (False,):
            for dtype in ("bf16", "fp16"):
                add(f"sm_{capability}{name} {dtype} {'descriptors' if descriptors else 'pointers'}", tiles, (capability,), dtype, descriptors)
    add("fp32", TILES_FP32, (80, 90, 100), "fp32", False)
    return cases
