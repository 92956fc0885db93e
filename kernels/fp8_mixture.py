"""The routed experts of a layer in block-scaled FP8, from tokens to tokens:  out_t = sum over j of w_tj W2_e swiglu(W1_e x_t),  e = ids[t, j].

Bit for bit what `moe_permute`, `fp8_grouped_gemm`, `swiglu`, `fp8_grouped_gemm` and `moe_unpermute` give after each other, values and gradients, but
every operand of a product is quantised by the operation that makes it (fp8_producers.py):

forward   permute -> rows;  W1;  swiglu -> rows;  W2;  unpermute
backward  unpermute's gradient -> dy;  W2^T;  swiglu's gradient -> dh;  W1^T;  sum over j.    dW2 = dy^T a,  dW1 = dh^T x.

With wgrad "fp8" each quantised operand has its columns too, of dy, a, dh and x, and no bf16 copy of them is written or kept.  With "bf16" the
producers write that copy beside the rows; where no gradient of a weight is wanted there are rows alone.
"""

import torch
from torch import Tensor

from ._dispatch import check
from .fp8_grouped_gemm import WGRADS, fp8_grouped_matmul, fp8_grouped_wgrad
from .fp8_producers import DTYPES, Produced, fp8_permute, fp8_swiglu, fp8_swiglu_backward
from .fp8_quantize import Quantized, fp8_quantize_dual
from .grouped_gemm import grouped_wgrad
from .moe_permute import Places, moe_dots, moe_unpermute

Copies = tuple[Quantized, Quantized]  # of a stack: fp8_quantize_dual by (128, 128)


def fp8_mixture(x: Tensor, weights: Tensor, places: Places, gate_up: Tensor, down: Tensor, *, wgrad: str = "bf16", power_of_two: bool = True,
                copies: tuple[Copies | None, Copies | None] = (None, None), backend: str | None = None) -> Tensor:  # fmt: skip
    """Take every token through its experts and sum the results by weight.

    x: (T, D) bf16, fp16 or fp32.  weights: (T, k).  places: of `moe_places`, with align = 128 where wgrad is "fp8".  gate_up: (E, 2F, D), down:
    (E, D, F), in x's dtype.  wgrad: as in `fp8_grouped_gemm`.  copies: `fp8_quantize_dual(.., block=(128, 128))` of both stacks, to quantise them
    once per optimizer step instead of in each call.  Returns (T, D) in x's dtype, differentiable in x, weights and both stacks.  Raises ValueError
    on a mismatch.
    """
    E, F = gate_up.shape[0], down.shape[-1]
    check(x.ndim == 2 and gate_up.ndim == 3 and gate_up.shape == (E, 2 * F, x.shape[1]) and down.shape == (E, x.shape[1], F),
          lambda: f"fp8_mixture: x is {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}; wanted (T, D), (E, 2F, D) and "
                  f"(E, D, F)")  # fmt: skip
    check(x.dtype == gate_up.dtype == down.dtype and x.dtype in DTYPES,
          lambda: f"fp8_mixture: x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}; wanted bf16, fp16 or fp32 alike")  # fmt: skip
    check(wgrad in WGRADS, lambda: f"fp8_mixture: wgrad is {wgrad!r}; wanted one of {WGRADS}")
    check(places.offsets.shape == (E + 1,) and weights.shape == places.inverse.shape == (x.shape[0], places.inverse.shape[1]),
          lambda: f"fp8_mixture: weights is {tuple(weights.shape)}, offsets {tuple(places.offsets.shape)}, inverse {tuple(places.inverse.shape)}; "
                  f"wanted (T, k), ({E + 1},) and (T, k)")  # fmt: skip
    for name, stack, copy in (("gate_up", gate_up, copies[0]), ("down", down, copies[1])):
        check(copy is None or all(q.shape == stack.shape for q, _ in copy),
              lambda name=name, stack=stack, copy=copy: f"fp8_mixture: the copy of {name} is {[tuple(q.shape) for q, _ in copy]}; wanted "
                                                        f"fp8_quantize_dual of it, {tuple(stack.shape)}")  # fmt: skip
    return Fp8MixtureFunction.apply(x, weights, gate_up, down, *places, copies, wgrad, power_of_two, backend, torch.is_grad_enabled())


class Fp8MixtureFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, gate_up, down, offsets, source, inverse, copies, wgrad, power_of_two, backend, differentiated):
        # of these operations the products alone have a cuda backend
        options, places = dict(power_of_two=power_of_two, backend=None if backend == "cuda" else backend), Places(offsets, source, inverse)
        stacks = [fp8_quantize_dual(stack, block=(128, 128), **options) if copy is None else copy
                  for stack, copy in zip((gate_up, down), copies, strict=True)]  # fmt: skip
        needed = [need and differentiated for need in ctx.needs_input_grad[:4]]
        ctx.options, ctx.backend, ctx.wgrad = options, backend, wgrad
        tokens = fp8_permute(x, places, **layouts_of(ctx, needed[2]))
        h = fp8_grouped_matmul(tokens.rows, stacks[0][0], offsets, out_dtype=x.dtype, backend=backend)
        a = fp8_swiglu(h, **layouts_of(ctx, needed[3]))
        y = fp8_grouped_matmul(a.rows, stacks[1][0], offsets, out_dtype=x.dtype, backend=backend)
        if any(needed):
            ctx.save_for_backward(weights, *places, *stacks[0][1], *stacks[1][1], *kept(tokens), *kept(a), h, y if needed[1] else None)
        return moe_unpermute(y, weights, places, backend=options["backend"])

    @staticmethod
    def backward(ctx, dout):
        weights, offsets, source, inverse, q1, s1, q2, s2, x, xs, a, a_scales, h, y = ctx.saved_tensors
        (need_x, need_weights, need_gate_up, need_down, *_), places = ctx.needs_input_grad, Places(offsets, source, inverse)
        backend, dx, dweights, dgate_up, ddown = ctx.options["backend"], None, None, None, None
        if need_weights:
            dweights = moe_dots(y, dout, places, weights.dtype, backend=backend)
        dy = fp8_permute(dout, places, weights=weights, **layouts_of(ctx, need_down))
        if need_down:
            ddown = weight_gradient(ctx, dy, a, a_scales, offsets, h.dtype)
        if need_x or need_gate_up:
            da = fp8_grouped_matmul(dy.rows, Quantized(q2.mT, s2.mT), offsets, out_dtype=h.dtype, backend=ctx.backend)
            dh = fp8_swiglu_backward(h, da, **layouts_of(ctx, need_gate_up))
            if need_gate_up:
                dgate_up = weight_gradient(ctx, dh, x, xs, offsets, h.dtype)
        if need_x:
            rows = fp8_grouped_matmul(dh.rows, Quantized(q1.mT, s1.mT), offsets, out_dtype=h.dtype, backend=ctx.backend)
            dx = moe_unpermute(rows, torch.ones_like(weights), places, backend=backend)  # a product with 1 changes no bit
        return dx, dweights, dgate_up, ddown, *[None] * 8


def layouts_of(ctx, for_weight_gradient: bool) -> dict:
    """What a producer is asked for beside the rows that the next product reads."""
    return ctx.options | dict(columns=for_weight_gradient and ctx.wgrad == "fp8", wide=for_weight_gradient and ctx.wgrad == "bf16")


def kept(produced: Produced) -> tuple[Tensor | None, Tensor | None]:
    """For a weight gradient: columns and their scales, or the numbers themselves."""
    return (produced.wide, None) if produced.columns is None else produced.columns


def weight_gradient(ctx, dy: Produced, x: Tensor, scales: Tensor | None, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    experts = len(offsets) - 1
    if scales is None:
        return grouped_wgrad(dy.wide, x, offsets, experts, backend=ctx.options["backend"])
    return fp8_grouped_wgrad(dy.columns, Quantized(x, scales), offsets, experts, out_dtype=dtype, backend=ctx.backend)
