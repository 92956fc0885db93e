"""Grouped product of a mixture of experts in block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3):

y_t = sum over blocks k of 128 of  s_x[t, k] s_w[e, n / 128, k] sum over the block of q_x[t, .] q_w[e, n, .]

for the tokens t of expert e.  The inner sum is the tensor core's, which on Hopper keeps some 14 bits of it; the outer one is fp32, ascending.

`fp8_grouped_gemm` is the layer: it quantises x by 1 x 128 and w by 128 x 128 (whose transpose has the same numbers and serves dx), quantises dy by
1 x 128 for dx = dy W, and takes dW = dy^T x from the bf16 operands (`grouped_gemm`), or, if asked, from both quantised along tokens by 128 x 1:

dW[e, n, k] = sum over blocks b of 128 tokens of  s_dy[b, n] s_x[b, k] sum over the block of q_dy[., n] q_x[., k].
"""

import torch
from torch import Tensor

from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton
from .fp8_quantize import Quantized, dequantize, fp8_quantize, fp8_quantize_dual
from .grouped_gemm import check_groups, check_offsets, grouped_gemm_reference, grouped_wgrad, groups_of

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WGRADS = ("bf16", "fp8")


def fp8_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, *, weight: tuple[Quantized, Quantized] | None = None, wgrad: str = "bf16",
                     power_of_two: bool = True, backend: str | None = None) -> Tensor:  # fmt: skip
    """`grouped_gemm` in FP8: rows of x times the transposed weight of their expert, forward and dx in FP8.

    x: (T, K).  w: (E, N, K).  Both bf16, fp16 or fp32.  offsets: as in `grouped_gemm`.  weight: `fp8_quantize_dual(w, block=(128, 128))`, to quantise
    w once per optimizer step instead of in each call.  wgrad: "bf16" keeps x for dW and takes it in x's dtype; "fp8" keeps x in FP8, and every group
    must then start and end at a multiple of 128 rows (padding rows hold 0, or numbers that shall count).  power_of_two: the kind of scales.
    Returns (T, N) in x's dtype, differentiable in x and w; rows of no expert are 0.  Raises ValueError on a mismatch.
    """
    check_groups("fp8_grouped_gemm", x, w, offsets)
    check(x.dtype == w.dtype and x.dtype in OUT_DTYPES[:3],
          lambda: f"fp8_grouped_gemm: w is {w.dtype}, x is {x.dtype}; wanted bf16, fp16 or fp32 alike")  # fmt: skip
    check(wgrad in WGRADS, lambda: f"fp8_grouped_gemm: wgrad is {wgrad!r}; wanted one of {WGRADS}")
    check(weight is None or all(q.shape == w.shape for q, _ in weight),
          lambda: f"fp8_grouped_gemm: weight is {[tuple(q.shape) for q, _ in weight]}; wanted fp8_quantize_dual of w, {tuple(w.shape)}")  # fmt: skip
    return Fp8GroupedGemmFunction.apply(x, w, offsets, weight, wgrad, power_of_two, backend)


class Fp8GroupedGemmFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets, weight, wgrad, power_of_two, backend):
        # of the three operations the products alone have a cuda backend
        options = dict(power_of_two=power_of_two, backend=None if backend == "cuda" else backend)
        need_x, need_w, *_ = ctx.needs_input_grad
        if weight is None:  # its columns are what dx multiplies
            weight = fp8_quantize_dual(w, block=(128, 128), **options) if need_x else (fp8_quantize(w, block=(128, 128), **options), (None, None))
        (qw, sw), columns = weight
        keep_fp8 = wgrad == "fp8" and need_w
        rows, kept = fp8_quantize_dual(x, **options) if keep_fp8 else (fp8_quantize(x, **options), (x if need_w else None, None))
        ctx.save_for_backward(offsets, *columns, *kept)
        ctx.options, ctx.backend, ctx.dtype, ctx.keep_fp8, ctx.experts = options, backend, x.dtype, keep_fp8, qw.shape[0]
        return fp8_grouped_matmul(rows, Quantized(qw, sw), offsets, out_dtype=x.dtype, backend=backend)

    @staticmethod
    def backward(ctx, dy):
        offsets, qw, sw, x, sx = ctx.saved_tensors
        E, (need_x, need_w, *_), rows, dx, dw = ctx.experts, ctx.needs_input_grad, None, None, None
        if ctx.keep_fp8:
            rows, columns = fp8_quantize_dual(dy, **ctx.options)
            dw = fp8_grouped_wgrad(columns, Quantized(x, sx), offsets, E, out_dtype=ctx.dtype, backend=ctx.backend)
        elif need_w:
            dw = grouped_wgrad(dy, x, offsets, E, backend=ctx.options["backend"])
        if need_x:
            rows = rows or fp8_quantize(dy, **ctx.options)
            dx = fp8_grouped_matmul(rows, Quantized(qw.mT, sw.mT), offsets, out_dtype=ctx.dtype, backend=ctx.backend)
        return dx, dw, None, None, None, None, None


def fp8_grouped_matmul(x: Quantized, w: Quantized, offsets: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
                       backend: str | None = None) -> Tensor:  # fmt: skip
    """The product of quantised operands alone.

    x: q (T, K), scales (T, K / 128), as `fp8_quantize` by (1, 128) makes them.  w: q (E, N, K), scales (E, N / 128, K / 128), by (128, 128); the rows
    of both contiguous.  offsets: as in `grouped_gemm`.  out: (T, N), rows contiguous, whose rows of no expert are not touched; otherwise they are 0.
    Returns (T, N) in out_dtype.  Not differentiable.  Raises ValueError on a mismatch.
    """
    (q, s), (qw, sw) = x, w
    check_groups("fp8_grouped_matmul", q, qw, offsets)
    (T, K), N = q.shape, qw.shape[1]
    blocks = -(-K // 128)
    check(q.dtype == qw.dtype == torch.float8_e4m3fn, lambda: f"fp8_grouped_matmul: x is {q.dtype}, w is {qw.dtype}; wanted float8_e4m3fn")
    check(s.shape == (T, blocks) and sw.shape == (qw.shape[0], -(-N // 128), blocks) and s.dtype == sw.dtype == torch.float32,
          lambda: f"fp8_grouped_matmul: scales are {tuple(s.shape)} {s.dtype} and {tuple(sw.shape)} {sw.dtype}; wanted {(T, blocks)} and "
                  f"{(qw.shape[0], -(-N // 128), blocks)} fp32")  # fmt: skip
    check(out is None or (out.shape == (T, N) and (N <= 1 or out.stride(1) == 1)),
          lambda: f"fp8_grouped_matmul: out is {tuple(out.shape)} with strides {out.stride()}; wanted {(T, N)}, rows contiguous")  # fmt: skip
    out_dtype = out_dtype if out is None else out.dtype
    check(out_dtype in OUT_DTYPES, lambda: f"fp8_grouped_matmul: out_dtype is {out_dtype}; wanted one of {OUT_DTYPES}")
    return op(backend, x=q, x_scales=s, w=qw, w_scales=sw, offsets=offsets, out=out, out_dtype=out_dtype)


def fp8_grouped_wgrad(dy: Quantized, x: Quantized, offsets: Tensor, experts: int, *, out_dtype: torch.dtype = torch.bfloat16,
                      backend: str | None = None) -> Tensor:  # fmt: skip
    """Gradient of each expert's weight from operands quantised along tokens.

    dy: q (T, N), scales (T / 128, N).  x: q (T, K), scales (T / 128, K).  Both as `fp8_quantize` by (128, 1) makes them, columns contiguous.
    offsets: as in `grouped_gemm`, all multiples of 128 (not checked: they are on the device).  Returns (E, N, K) in out_dtype, 0 for an expert
    without tokens.  Not differentiable.  Raises ValueError on a mismatch.
    """
    (q, s), (qx, sx) = dy, x
    T = q.shape[0]
    check(q.ndim == qx.ndim == 2 and qx.shape[0] == T and q.dtype == qx.dtype == torch.float8_e4m3fn,
          lambda: f"fp8_grouped_wgrad: dy is {tuple(q.shape)} {q.dtype}, x is {tuple(qx.shape)} {qx.dtype}; wanted (T, N) and (T, K) float8_e4m3fn")
    wanted = [(-(-T // 128), t.shape[1]) for t in (q, qx)]
    check([tuple(s.shape), tuple(sx.shape)] == wanted and s.dtype == sx.dtype == torch.float32,
          lambda: f"fp8_grouped_wgrad: scales are {tuple(s.shape)} {s.dtype} and {tuple(sx.shape)} {sx.dtype}; wanted {wanted} fp32")  # fmt: skip
    check(out_dtype in OUT_DTYPES, lambda: f"fp8_grouped_wgrad: out_dtype is {out_dtype}; wanted one of {OUT_DTYPES}")
    check_offsets("fp8_grouped_wgrad", offsets, experts, q.device)
    return wgrad_op(backend, dy=q, dy_scales=s, x=qx, x_scales=sx, offsets=offsets, experts=experts, out_dtype=out_dtype)


def fp8_grouped_matmul_reference(x, x_scales, w, w_scales, offsets, out, out_dtype) -> Tensor:
    """Dequantise, then multiply, in fp32 or, for fp64 results, in fp64."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    groups = groups_of(offsets, w.shape[0])
    first, last = groups[0][0], groups[-1][1]
    x, w = (dequantize(Quantized(*part), block, wide) for part, block in (((x, x_scales), (1, 128)), ((w, w_scales), (128, 128))))
    y = grouped_gemm_reference(x, w, offsets).to(out_dtype)
    if out is None:
        return y
    out[first:last] = y[first:last]
    return out


def fp8_grouped_wgrad_reference(dy, dy_scales, x, x_scales, offsets, experts, out_dtype) -> Tensor:
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    dy, x = (dequantize(Quantized(*part), (128, 1), wide) for part in ((dy, dy_scales), (x, x_scales)))
    return torch.stack([(dy[a:b].T @ x[a:b]).to(out_dtype) for a, b in groups_of(offsets, experts)])


def why_not_portable(call: dict) -> str | None:
    if call["out_dtype"] == torch.float64:
        return "the kernels sum in fp32; fp64 is the reference's"
    x = call["x"]
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "the card has no FP8 products (they begin with compute capability 8.9)"
    w = call.get("w")
    if w is not None and (w.numel() == 0 or w.stride(2) != 1):
        return f"w is {tuple(w.shape)} with strides {w.stride()}; wanted rows contiguous"
    if w is None and any(t.numel() and (t.stride(0) != 1 or t.stride(1) % 16 or t.data_ptr() % 16) for t in (x, call["dy"])):
        return "the columns of dy and x are to be contiguous, at multiples of 16 bytes"
    if w is None and x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "the card has no tensor descriptors (they begin with compute capability 9.0)"
    return why_not_triton({name: value for name, value in call.items() if name != "out"})


def why_no_hopper(x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"tensors are on {x.device}"
    return None if torch.cuda.get_device_capability(x.device)[0] == 9 else "the card is no Hopper (compute capability 9.0)"


def why_not_hopper(call: dict) -> str | None:
    x, w, xs = call["x"], call["w"], call["x_scales"]
    if reason := why_no_hopper(x):
        return reason
    if not all(t.stride(-1) == 1 and t.stride(-2) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, w)):
        return f"the rows of x and w are to be contiguous, at multiples of 16 bytes (strides {x.stride()} and {w.stride()})"
    if w.stride(0) != w.shape[1] * w.stride(1) or xs.stride(0) != 1:
        return f"w's experts are to follow each other and x's scales to be stored by columns (strides {w.stride()} and {xs.stride()})"
    return why_not_portable(call)


def why_not_hopper_wgrad(call: dict) -> str | None:
    if reason := why_no_hopper(call["x"]):
        return reason
    scales = call["x_scales"]
    if scales.stride(1) != 1 or scales.stride(0) % 4 or scales.data_ptr() % 16:
        return f"x's scales are to be stored by rows, at multiples of 16 bytes (strides {scales.stride()})"
    return why_not_portable(call)


op = register("fp8_grouped_gemm", cuda=Backend(late("fp8_grouped_gemm_hopper_triton.fp8_grouped_matmul_hopper"), why_not_hopper),
              triton=Backend(late("fp8_grouped_gemm_triton.fp8_grouped_matmul_triton"), why_not_portable),
              reference=Backend(fp8_grouped_matmul_reference))  # fmt: skip
wgrad_op = register("fp8_grouped_wgrad", cuda=Backend(late("fp8_grouped_wgrad_hopper_triton.fp8_grouped_wgrad_hopper"), why_not_hopper_wgrad),
                    triton=Backend(late("fp8_grouped_gemm_triton.fp8_grouped_wgrad_triton"), why_not_portable),
                    reference=Backend(fp8_grouped_wgrad_reference))  # fmt: skip
