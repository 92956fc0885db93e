"""Grouped product of a mixture of experts:  y_t = W_e x_t  for the tokens t of expert e, which lie side by side.

dx_t = W_e^T dy_t,  dW_e = sum over the tokens of e of dy_t x_t^T (0 where e has none).  How many tokens an expert has is known on the device alone:
the kernels read the offsets there, and nothing waits for the host.  Rows that belong to no expert are 0 in y and in dx and give nothing to dW,
whatever they hold.  Left out: a bias, and gathering the rows of x by index, which the permutation before it does.
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply each group of rows of x by the transposed weight of its expert.

    x: (T, K).  w: (E, N, K).  offsets: (E + 1,) or (E,), int32 or int64, on x's device, ascending: the rows of expert e are offsets[e] up to
    offsets[e + 1]; without the leading 0, offsets[e - 1] up to offsets[e].  Any size from 0 to T.  Returns (T, N) in x's dtype, accumulated in fp32
    in a fixed order, differentiable in x and w.  Raises ValueError on a mismatch of shapes or dtypes; the values of offsets are not checked.
    """
    check_groups("grouped_gemm", x, w, offsets)
    check(x.dtype == w.dtype and x.is_floating_point(), lambda: f"grouped_gemm: w is {w.dtype}, x is {x.dtype}; wanted one floating-point dtype")
    return op(backend, x=x, w=w, offsets=offsets)


def grouped_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, experts: int, *, backend: str | None = None) -> Tensor:
    """Sum dy_t x_t^T over the tokens of each expert: what `grouped_gemm` gives as the gradient of w, alone.

    dy: (T, N).  x: (T, K), alike in dtype.  offsets: as in `grouped_gemm`, of that many experts.  Returns (E, N, K) in x's dtype, 0 for an expert
    without tokens.  Not differentiable.  Raises ValueError on a mismatch.
    """
    check(dy.ndim == x.ndim == 2 and dy.shape[0] == x.shape[0] and dy.dtype == x.dtype,
          lambda: f"grouped_wgrad: x is {tuple(x.shape)} {x.dtype}, dy is {tuple(dy.shape)} {dy.dtype}; wanted (T, K) and (T, N) alike")  # fmt: skip
    check_offsets("grouped_wgrad", offsets, experts, x.device)
    return wgrad_op(backend, dy=dy.detach(), x=x.detach(), offsets=offsets, experts=experts)


def check_groups(where: str, x: Tensor, w: Tensor, offsets: Tensor) -> None:
    check(x.ndim == 2 and w.ndim == 3 and w.shape[2] == x.shape[1],
          lambda: f"{where}: w is {tuple(w.shape)}, x is {tuple(x.shape)}; wanted (E, N, K) and (T, K)")  # fmt: skip
    check_offsets(where, offsets, w.shape[0], x.device)


def check_offsets(where: str, offsets: Tensor, E: int, device: torch.device) -> None:
    check(offsets.ndim == 1 and E > 0 and offsets.shape[0] in (E, E + 1) and offsets.dtype in (torch.int32, torch.int64) and offsets.device == device
          and offsets.is_contiguous(),
          lambda: f"{where}: offsets is {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}; wanted ({E},) or ({E + 1},) int32 or int64, "
                  f"contiguous, on {device}")  # fmt: skip


def groups_of(offsets: Tensor, E: int) -> list[tuple[int, int]]:
    """First row and row behind the last of each expert, on the host."""
    ends = offsets.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True)) if len(ends) == E + 1 else list(zip([0, *ends], ends, strict=False))


def grouped_gemm_reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    groups = groups_of(offsets, w.shape[0])
    parts = [x[a:b] @ weight.T for (a, b), weight in zip(groups, w, strict=True)]
    outside = [x.new_zeros(n, w.shape[1]) for n in (groups[0][0], x.shape[0] - groups[-1][1])]
    return torch.cat([outside[0], *parts, outside[1]])


def grouped_wgrad_reference(dy: Tensor, x: Tensor, offsets: Tensor, experts: int) -> Tensor:
    return torch.stack([dy[a:b].T @ x[a:b] for a, b in groups_of(offsets, experts)])


def why_not_grouped(call: dict) -> str | None:
    x, w = call["x"], call.get("w", call["x"])
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes fp32, fp16 or bf16"
    if "w" in call and not w.is_contiguous():
        return f"w is not contiguous (strides {w.stride()})"
    if "w" in call and w.numel() == 0:
        return f"w is {tuple(w.shape)}, which leaves nothing to multiply"
    return why_not_triton(call)


op = register("grouped_gemm", triton=Backend(late("grouped_gemm_triton.grouped_gemm_triton"), why_not_grouped),
              cpu=Backend(late("grouped_gemm_cpu.grouped_gemm_cpu"), why_not_cpu), reference=Backend(grouped_gemm_reference))  # fmt: skip
wgrad_op = register("grouped_wgrad", triton=Backend(late("grouped_gemm_triton.grouped_wgrad_triton"), why_not_grouped),
                    cpu=Backend(late("grouped_gemm_cpu.grouped_wgrad_cpu"), why_not_cpu), reference=Backend(grouped_wgrad_reference))  # fmt: skip
