"""FP8 operands straight from the operation before a product: what `fp8_quantize` would read again is not written.

    fp8_permute(x, places)                   = fp8_quantize of moe_permute(x)         rows of tokens to their experts
    fp8_permute(dout, places, weights=w)     = ... of moe_unpermute's dy              the gradient on its way back there
    fp8_swiglu(gate_up)                      = ... of swiglu(gate_up)
    fp8_swiglu_backward(gate_up, dy)         = ... of swiglu's gradient
    fp8_rmsnorm(x, weight)                   = ... of rmsnorm(x, weight)              rows alone: for what multiplies tokens in their own order

bit for bit: a result is rounded to the dtype of the input first, and quantised from there.  `columns` gives the layout along tokens too, which an FP8
weight gradient multiplies, and `wide` the result itself, for a weight gradient in bf16.

Saved per number in bf16: 2 bytes written and 2 read, less 2 where `wide` is asked for.  Predicted for an H200 (4.25 TB/s), 131072 rows (T = 16384,
k = 8), in ms: by bytes / by instructions that have to issue / what bytes the separate kernels move.  None has run on a GPU yet.
    permute to D = 2048: rows 0.08 / 0.12 / 0.33, both layouts 0.15 / 0.31 / 0.40
    swiglu with F = 768: rows 0.12 / 0.10 / 0.21, both layouts 0.14 / 0.16 / 0.24; its gradient: both layouts 0.24 / 0.38 / 0.43
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton
from .fp8_quantize import Quantized, fp8_quantize_reference
from .moe_permute import Places, gather_scaled
from .rmsnorm import rmsnorm_reference
from .swiglu import swiglu_gradient, swiglu_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Produced(NamedTuple):
    rows: Quantized  # blocks of 1 x 128, in the memory layout of fp8_quantize
    columns: Quantized | None  # blocks of 128 x 1
    wide: Tensor | None  # the numbers that were quantised, in the dtype of the input


def fp8_permute(x: Tensor, places: Places, *, weights: Tensor | None = None, columns: bool = False, wide: bool = False, power_of_two: bool = True,
                backend: str | None = None) -> Produced:  # fmt: skip
    """Quantise each token's row in the places of its experts; rows of no token are zeros.

    x: (T, D) bf16, fp16 or fp32.  places: of `moe_places`; source may be cut where its rows behind offsets[E] are not wanted.  weights: (T, k), to
    multiply each row by in fp32 before it is rounded to x's dtype: the gradient of `moe_unpermute`.  Not differentiable.  Raises ValueError on a
    mismatch.
    """
    _check("fp8_permute", x)
    check(places.inverse.shape[0] == x.shape[0] and (weights is None or weights.shape == places.inverse.shape),
          lambda: f"fp8_permute: x is {tuple(x.shape)}, inverse {tuple(places.inverse.shape)}, weights "
                  f"{None if weights is None else tuple(weights.shape)}; wanted (T, D), (T, k) and (T, k)")  # fmt: skip
    return permute_op(backend, x=x.detach(), source=places.source, weights=None if weights is None else weights.detach(),
                      k=places.inverse.shape[1], columns=columns, wide=wide, power_of_two=power_of_two)  # fmt: skip


def fp8_swiglu(gate_up: Tensor, *, columns: bool = False, wide: bool = False, power_of_two: bool = True, backend: str | None = None) -> Produced:
    """Quantise swiglu(gate_up) (T, F) of gate_up (T, 2F), gate first.  Not differentiable.  Raises ValueError on a mismatch."""
    _check("fp8_swiglu", gate_up, halves=True)
    return swiglu_op(backend, gate_up=gate_up.detach(), columns=columns, wide=wide, power_of_two=power_of_two)


def fp8_swiglu_backward(gate_up: Tensor, dy: Tensor, *, columns: bool = False, wide: bool = False, power_of_two: bool = True,
                        backend: str | None = None) -> Produced:  # fmt: skip
    """Quantise the gradient (T, 2F) of swiglu at gate_up (T, 2F) for dy (T, F).  Not differentiable.  Raises ValueError on a mismatch."""
    _check("fp8_swiglu_backward", gate_up, halves=True)
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    check(dy.shape == (T, F) and dy.dtype == gate_up.dtype,
          lambda: f"fp8_swiglu_backward: dy is {tuple(dy.shape)} {dy.dtype}, gate_up {tuple(gate_up.shape)} {gate_up.dtype}; wanted {(T, F)} "
                  f"alike")  # fmt: skip
    return swiglu_backward_op(backend, gate_up=gate_up.detach(), dy=dy.detach(), columns=columns, wide=wide, power_of_two=power_of_two)


def fp8_rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, wide: bool = False, power_of_two: bool = True,
                backend: str | None = None) -> Produced | tuple[Produced, Tensor]:  # fmt: skip
    """Quantise the rows of rmsnorm(x, weight), with a residual those of x + residual, which is returned too.

    x: (T, D).  weight: (D,).  residual: as x.  `columns` of the result is None.  Not differentiable.  Raises ValueError on a mismatch.
    """
    _check("fp8_rmsnorm", x)
    check(weight.shape == x.shape[1:], lambda: f"fp8_rmsnorm: weight is {tuple(weight.shape)}, x is {tuple(x.shape)}; wanted (D,) and (T, D)")
    check(residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
          lambda: f"fp8_rmsnorm: residual is {tuple(residual.shape)} {residual.dtype}; wanted that of x, {tuple(x.shape)} {x.dtype}")  # fmt: skip
    produced, s = rmsnorm_op(backend, x=x.detach(), weight=weight.detach(), eps=eps, residual=None if residual is None else residual.detach(),
                             wide=wide, power_of_two=power_of_two)  # fmt: skip
    return produced if residual is None else (produced, s)


def _check(where: str, x: Tensor, halves: bool = False) -> None:
    check(x.ndim == 2 and x.dtype in DTYPES and not (halves and x.shape[1] % 2),
          lambda: f"{where}: the input is {tuple(x.shape)} {x.dtype}; wanted (T, {'2F' if halves else 'D'}) bf16, fp16 or fp32")  # fmt: skip


def quantised(y: Tensor, columns: bool, wide: bool, power_of_two: bool) -> Produced:
    """The layouts that are asked for, of a result that is there."""
    rows, *more = fp8_quantize_reference(y, ((1, 128), (128, 1))[: 1 + columns], power_of_two)
    return Produced(rows, more[0] if more else None, y if wide else None)


def fp8_permute_reference(x, source, weights, k, columns, wide, power_of_two) -> Produced:
    return quantised(gather_scaled(x, source, weights, k), columns, wide, power_of_two)


def fp8_swiglu_reference(gate_up, columns, wide, power_of_two) -> Produced:
    return quantised(swiglu_reference(gate_up), columns, wide, power_of_two)


def fp8_swiglu_cpu(gate_up, columns, wide, power_of_two) -> Produced:
    from .swiglu_cpu import swiglu_cpu

    return quantised(swiglu_cpu(gate_up), columns, wide, power_of_two)


def fp8_swiglu_backward_reference(gate_up, dy, columns, wide, power_of_two) -> Produced:
    return quantised(swiglu_gradient(gate_up, dy), columns, wide, power_of_two)


def fp8_swiglu_backward_cpu(gate_up, dy, columns, wide, power_of_two) -> Produced:
    from .swiglu_cpu import swiglu_gradient_cpu

    return quantised(swiglu_gradient_cpu(gate_up, dy), columns, wide, power_of_two)


def fp8_rmsnorm_reference(x, weight, eps, residual, wide, power_of_two) -> tuple[Produced, Tensor]:
    y = rmsnorm_reference(x, weight, eps, residual)
    y, s = (y, x) if residual is None else y
    return quantised(y, False, wide, power_of_two), s


def fp8_rmsnorm_cpu(x, weight, eps, residual, wide, power_of_two) -> tuple[Produced, Tensor]:
    from .rmsnorm_cpu import rmsnorm_cpu

    y = rmsnorm_cpu(x, weight, eps, residual)
    y, s = (y, x) if residual is None else y
    return quantised(y, False, wide, power_of_two), s


permute_op = register("fp8_permute", triton=Backend(late("fp8_producers_triton.fp8_permute_triton"), why_not_triton),
                      reference=Backend(fp8_permute_reference))  # fmt: skip
swiglu_op = register("fp8_swiglu", triton=Backend(late("fp8_producers_triton.fp8_swiglu_triton"), why_not_triton),
                     cpu=Backend(fp8_swiglu_cpu, why_not_cpu), reference=Backend(fp8_swiglu_reference))  # fmt: skip
swiglu_backward_op = register("fp8_swiglu_backward", triton=Backend(late("fp8_producers_triton.fp8_swiglu_backward_triton"), why_not_triton),
                              cpu=Backend(fp8_swiglu_backward_cpu, why_not_cpu), reference=Backend(fp8_swiglu_backward_reference))  # fmt: skip
rmsnorm_op = register("fp8_rmsnorm", triton=Backend(late("fp8_producers_triton.fp8_rmsnorm_triton"), why_not_triton),
                      cpu=Backend(fp8_rmsnorm_cpu, why_not_cpu), reference=Backend(fp8_rmsnorm_reference))  # fmt: skip
