"""From tokens to experts and back: rows of one expert side by side, in the order of the tokens, and the weighted sum of a token's k results.

permute:    y[inverse[t, j]] = x[t],    out_t = sum over j of w[t, j] y[inverse[t, j]]    :unpermute

The places come from a stable counting sort by (expert, token, j).  An expert's rows start at offsets[e]; with align > 1 its size is rounded up to a
multiple of it, by rows of zeros that no token reads.  Both sums over j run in ascending order in fp32, forward and backward: no atomics, and the bits
of a token do not depend on the others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton


class Places(NamedTuple):
    offsets: Tensor  # (E+1,) int32: the rows of expert e are offsets[e] up to offsets[e+1]
    source: Tensor  # (P,) int32: row p holds token source[p] // k for its choice source[p] % k; -1 = a row of zeros
    inverse: Tensor  # (T, k) int32: the row of each choice; -1 = it goes to no expert


def moe_places(ids: Tensor, num_experts: int, *, align: int = 1, backend: str | None = None) -> Places:
    """Sort the choices of all tokens by expert.

    ids: (T, k) int32 from [-1, E), -1 = nowhere (not checked: they are on the device).  P is T k, or with align the most that padding can make of
    it.
    Raises ValueError on a mismatch.
    """
    check(ids.ndim == 2 and ids.dtype == torch.int32 and num_experts > 0 and align > 0,
          lambda: f"moe_places: ids is {tuple(ids.shape)} {ids.dtype}, num_experts {num_experts}, align {align}; wanted (T, k) int32, both "
                  f"positive")  # fmt: skip
    return Places(*places_op(backend, ids=ids, num_experts=num_experts, align=align))


def num_rows(slots: int, num_experts: int, align: int) -> int:
    """The most rows that `slots` choices can take: an expert that has any is padded by align - 1 at most."""
    return (slots + min(num_experts, slots) * (align - 1)) // align * align


def moe_permute(
    x: Tensor, ids: Tensor, num_experts: int, *, align: int = 1, places: Places | None = None, backend: str | None = None
) -> tuple[Tensor, Places]:
    """Copy each token's row to its k experts.

    x: (T, D).  ids, num_experts, align: as in `moe_places`.  places: what that made of them, where it was called before; `source` may be cut to as
    many rows as are wanted, offsets[E] at least.  Returns (P, D) in x's dtype, differentiable in x, and the places.
    Raises ValueError on a mismatch.
    """
    check(x.ndim == 2 and ids.ndim == 2 and x.shape[0] == ids.shape[0] and x.is_floating_point(),
          lambda: f"moe_permute: x is {tuple(x.shape)} {x.dtype}, ids is {tuple(ids.shape)}; wanted (T, D) and (T, k)")  # fmt: skip
    places = moe_places(ids, num_experts, align=align, backend=backend) if places is None else places
    return permute_op(backend, x=x, source=places.source, inverse=places.inverse), places


def moe_unpermute(y: Tensor, weights: Tensor, places: Places, *, backend: str | None = None) -> Tensor:
    """Sum each token's k rows of y by its weights.

    y: (P, D); it may have fewer rows than places.source where the rows behind offsets[E] are cut off.  weights: (T, k).  Returns (T, D) in y's dtype,
    accumulated in fp32, differentiable in y and weights.  A choice that goes nowhere adds its weight times 0, which is NaN where the weight is.
    Raises ValueError on a mismatch.
    """
    check(y.ndim == 2 and y.is_floating_point() and weights.shape == places.inverse.shape and y.shape[0] <= places.source.shape[0],
          lambda: f"moe_unpermute: y is {tuple(y.shape)} {y.dtype}, weights is {tuple(weights.shape)}; wanted at most {places.source.shape[0]} rows "
                  f"and {tuple(places.inverse.shape)}")  # fmt: skip
    return unpermute_op(backend, y=y, weights=weights, source=places.source[: y.shape[0]], inverse=places.inverse)


def moe_dots(y: Tensor, dout: Tensor, places: Places, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """Gradient of `moe_unpermute`'s weights alone, (T, k) in `dtype`: the product of each choice's row of y and its token's row of dout.

    y: (P, D), cut as there.  dout: (T, D) alike in dtype.  Not differentiable.  Raises ValueError on a mismatch.
    """
    check(y.ndim == 2 and dout.shape == (places.inverse.shape[0], y.shape[1]) and y.dtype == dout.dtype,
          lambda: f"moe_dots: y is {tuple(y.shape)} {y.dtype}, dout is {tuple(dout.shape)} {dout.dtype}; wanted (P, D) and "
                  f"({places.inverse.shape[0]}, D) alike")  # fmt: skip
    return dots_op(backend, y=y.detach(), dout=dout.detach(), inverse=places.inverse, dtype=dtype)


def moe_places_reference(ids: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    T, k = ids.shape
    flat = torch.where(ids < 0, num_experts, ids).flatten().long()
    order = flat.sort(stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).index_add_(0, flat, torch.ones_like(flat))
    zero = counts.new_zeros(1)
    starts = torch.cat((zero, counts.cumsum(0)))[:-1]
    offsets = torch.cat((zero, (-(-counts[:-1] // align) * align).cumsum(0)))
    expert = flat[order]
    place = offsets[expert] + torch.arange(T * k, device=ids.device) - starts[expert]
    place = torch.where(expert < num_experts, place, -1).to(torch.int32)
    inverse = torch.empty_like(place).scatter_(0, order, place).view(T, k)
    P = num_rows(T * k, num_experts, align)
    source = torch.full((P + 1,), -1, dtype=torch.int32, device=ids.device)  # what goes nowhere is written to the last
    source.scatter_(0, torch.where(place < 0, P, place).long(), order.to(torch.int32))
    return offsets.to(torch.int32), source[:P], inverse


class GatherRows(torch.autograd.Function):
    """Row index[i] of x, or zeros for -1; the gradient sums rows back[t, j] of dy in the order of j."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(index, back)
        return rows_or_zeros(x, index)

    @staticmethod
    def backward(ctx, dy):
        index, back = ctx.saved_tensors
        return ascending_sum(dy, back, None), None, None


def rows_or_zeros(x: Tensor, index: Tensor) -> Tensor:
    if not len(x):
        return x.new_zeros(len(index), x.shape[1])
    return x.index_select(0, index.clamp_min(0)).masked_fill_((index < 0)[:, None], 0)


def ascending_sum(y: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """(T, D): sum over j of y[inverse[:, j]], times weights[:, j] where there are any.  A product and a sum, never one rounding for both."""
    wide = accumulation_dtype(y.dtype)
    total = torch.zeros(inverse.shape[0], y.shape[1], dtype=wide, device=y.device)
    for j in range(inverse.shape[1]):
        rows = rows_or_zeros(y, inverse[:, j]).to(wide)
        total += rows if weights is None else rows * weights[:, j, None].to(wide)
    return total.to(y.dtype)


class UnpermuteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, source, inverse):
        ctx.save_for_backward(y, weights, source, inverse)
        return ascending_sum(y, inverse, weights)

    @staticmethod
    def backward(ctx, dout):
        y, weights, source, inverse = ctx.saved_tensors
        dy = gather_scaled(dout, source, weights, inverse.shape[1]).to(y.dtype) if ctx.needs_input_grad[0] else None
        dweights = moe_dots_reference(y, dout, inverse, weights.dtype) if ctx.needs_input_grad[1] else None
        return dy, dweights, None, None


def gather_scaled(x: Tensor, source: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """(P, D): row source[p] // k of x, times weights[source[p]] where there are any; zeros for -1."""
    rows = rows_or_zeros(x, torch.where(source < 0, -1, source // k))
    if weights is None:
        return rows
    wide = accumulation_dtype(x.dtype)
    return (rows.to(wide) * rows_or_zeros(weights.to(wide).reshape(-1, 1), source)).to(x.dtype)


def moe_dots_reference(y: Tensor, dout: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    wide = accumulation_dtype(y.dtype)
    dots = [(rows_or_zeros(y, inverse[:, j]).to(wide) * dout.to(wide)).sum(1) for j in range(inverse.shape[1])]
    return torch.stack(dots, 1).to(dtype)


def moe_permute_reference(x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return GatherRows.apply(x, torch.where(source < 0, -1, source // inverse.shape[1]), inverse)


def moe_unpermute_reference(y: Tensor, weights: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    return UnpermuteFunction.apply(y, weights, source, inverse)


places_op = register("moe_places", triton=Backend(late("moe_permute_triton.moe_places_triton"), why_not_triton),
                     reference=Backend(moe_places_reference))  # fmt: skip
permute_op = register("moe_permute", triton=Backend(late("moe_permute_triton.moe_permute_triton"), why_not_triton),
                      reference=Backend(moe_permute_reference))  # fmt: skip
unpermute_op = register("moe_unpermute", triton=Backend(late("moe_permute_triton.moe_unpermute_triton"), why_not_triton),
                        reference=Backend(moe_unpermute_reference))  # fmt: skip
dots_op = register("moe_dots", triton=Backend(late("moe_permute_triton.moe_dots_triton"), why_not_triton),
                   reference=Backend(moe_dots_reference))  # fmt: skip
