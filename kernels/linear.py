"""Linear layer:  y = x weight^T + bias.

On CUDA that usually is the library's product.  cuBLAS, though, picks its kernel, and whether to split the sum over K, by the shape of the call: the
bits of a row depend on how many other rows there are.  In strict mode the Triton kernel serves (linear_triton.py), which gives a row the same bits in
a decode step of one token as in a packed batch of thousands.  Only the forward feeds log-probs: gradients are the library's products either way.

MKL does the same on a CPU, and takes AVX2 on an AMD machine that has AVX-512: there the C++ kernel serves fp32 (linear_cpu.py).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cpu import why_not_cpu
from ._dispatch import Backend, check, is_strict, late, register, requested_backend
from ._triton import why_not_triton


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """Multiply each row of x by weight^T and add the bias.

    x: (T, K).  weight: (N, K).  bias: (N,).  All in one dtype.  Returns (T, N) in that dtype, differentiable in all three; accumulated in fp32 (fp64
    for fp64) and, by the kernel, rounded once.  out_dtype: fp32 hands the sums out as they are, for logits; forward only.
    `strict_mode()` says when the bits of a row depend on that row alone.  Raises ValueError on a mismatch of shapes or dtypes.
    """
    check(x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype,
          lambda: f"linear: weight is {tuple(weight.shape)} {weight.dtype}, x is {tuple(x.shape)} {x.dtype}; wanted (N, K) and (T, K) "
                  f"alike")  # fmt: skip
    check(bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype),
          lambda: f"linear: bias is {None if bias is None else (*bias.shape, bias.dtype)}; wanted ({weight.shape[0]},) {x.dtype}")  # fmt: skip
    if out_dtype in (None, x.dtype):
        if not x.is_cpu and not is_strict() and requested_backend(backend, "linear") is None:
            return F.linear(x, weight, bias)  # what auto would take, without asking: a small product costs less than the asking
        return op(backend, x=x, weight=weight, bias=bias, out_dtype=x.dtype)
    check(out_dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16) and bias is None,
          lambda: f"linear: out_dtype is {out_dtype}, x is {x.dtype}, bias is {'not ' * (bias is not None)}None; wanted fp32 from bf16 or fp16, "
                  f"no bias")
    return op(backend, x=x.detach(), weight=weight.detach(), bias=None, out_dtype=out_dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == x.dtype:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.T, out_dtype=out_dtype) if x.is_cuda else x.to(out_dtype) @ weight.to(out_dtype).T


def why_not_linear(call: dict) -> str | None:
    x, weight = call["x"], call["weight"]
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes fp32, fp16 or bf16"
    if weight.shape[1] == 0:
        return f"weight is {tuple(weight.shape)}, which leaves nothing to multiply"
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return f"the numbers of a row of weight are not neighbours in memory (strides {weight.stride()})"
    return why_not_triton(call)


def why_not_linear_cpu(call: dict) -> str | None:
    return "out_dtype is not that of x" if call["out_dtype"] != call["x"].dtype else why_not_cpu(call)


op = register("linear", triton=Backend(late("linear_triton.linear_triton"), why_not_linear, strict=True, usual=False),
              cpu=Backend(late("linear_cpu.linear_cpu"), why_not_linear_cpu), reference=Backend(linear_reference))  # fmt: skip
