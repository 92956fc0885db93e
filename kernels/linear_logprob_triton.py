"""Log-probs straight from hidden states and the lm_head in Triton: no logits in memory; the equations are those of logprob_triton.py.

Forward, two launches.  `linear_logprob_fwd_kernel`: a program owns BM tokens and one vocabulary slice; it computes the slice's logits tile by tile
in registers, keeps the running (m, S, U), the target's logit and, if asked, the first index of the maximum, and writes them: 16 to 20 bytes per token
and slice.  `linear_logprob_merge_kernel` joins the slices in index order.  Slices start at multiples of SLICE whatever the number of tokens, and a
row of a matrix product does not depend on the other rows of its tile: so neither do the results, bit for bit (batch-invariant), and repeats give
equal bits.

With a support, a token that was not kept counts as -inf.  The argmax is of all tokens, so it then has a maximum of its own: 4 bytes more.

Programs are numbered so that those which run together share operands in L2: a band of GROUP token tiles meets one slice after the other.

Backward, for each slice of SLICE_BWD tokens of the vocabulary: `linear_logprob_bwd_kernel` recomputes its logits and writes dz = c (onehot - p) for
up to ROWS_BWD tokens into one buffer of the input's dtype; two library GEMMs then add dz W to d_hidden and dz^T hidden to d_weight, both in fp32 and
in fixed order.  c is the upstream gradient over the temperature, divided by the power of two above the largest one, which is multiplied back at the
end: exact, and fp16 does not lose a gradient of 1e-9.  A token tile without gradient skips its logits.
Extra memory: that buffer, one slice of d_weight and d_hidden in fp32, each once more for a product before it is added, and d_weight itself.  fp32
library GEMMs obey PyTorch's TF32 switch.

Tensor descriptors (TMA) carry the operands on sm_90 and newer where addresses and strides are multiples of 16 bytes, masked pointers elsewhere.  The
descriptors are made on the host: made in the kernel, they would need triton.set_allocator, a ContextVar that autograd's backward thread does not see.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._triton import AheadOfTime, entry_for, on_device_of
from .logprob_triton import LOG2E, LOWEST, exponentials, finished, kept_logits, rescaled


class Tiles(NamedTuple):
    BM: int  # tokens
    BN: int  # vocabulary
    BK: int  # hidden
    num_warps: int
    num_stages: int
    SLICE: int  # vocabulary per program of the forward: a multiple of BN
    GROUP: int = 16  # token tiles per band: 16 x 128 x 4096 bf16 = 16 MiB of hidden states in L2


# That of sm_90 is the fastest of ten on an H200 (forward, T = 8192, V = 151936: 14.7 ms).  Chosen so that each compiles without spilling under triton
# 3.6 to 3.9 (a fourth stage on sm_90 spilled 24 bytes under 3.9) and fits in shared memory: stages x (BM + BN) x BK x bytes.
TILES = {80: Tiles(128, 128, 32, 8, 4, 1024), 90: Tiles(128, 256, 64, 8, 3, 1024), 100: Tiles(128, 128, 64, 8, 4, 1024)}
TILES_FP32 = Tiles(64, 64, 16, 8, 3, 1024)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, 16, 16, 4, 1, 48, 2)
SLICE_BWD, ROWS_BWD = 16384, 8192  # 256 MiB of dz in bf16
MERGE_SLICES, MERGE_TOKENS = 16, 32


def linear_logprob_triton(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_argmax: bool,
                          support: tuple[Tensor, Tensor] | None = None) -> tuple:  # fmt: skip
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    if support is not None:
        # int32: in int64 the comparisons would take registers that the tile needs
        support = support[0].detach().float().contiguous(), support[1].clamp(-1, weight.shape[0]).int().contiguous()
    return LinearLogprobFunction.apply(hidden, weight, targets.contiguous(), temperature, return_argmax, support)


def tiles_of(hidden: Tensor) -> Tiles:
    if not hidden.is_cuda:
        return TILES_INTERPRETER
    if hidden.dtype == torch.float32:
        return TILES_FP32
    return entry_for(TILES, hidden.device)


def tiles_with(tiles: Tiles, argmax: bool, support: bool) -> Tiles:
    """Argmax and support need registers of their own: for one of them half of a wide tile or one stage less, for both a narrow tile.

    With these no supported Triton spills.  BK stays: it alone orders the sum of a logit, and the backward must find the kept tokens of the forward.
    """
    if argmax and support:
        return tiles._replace(BN=min(tiles.BN, 64))
    if not (argmax or support):
        return tiles
    return tiles._replace(BN=tiles.BN // 2) if tiles.BN > 128 else tiles._replace(num_stages=max(1, tiles.num_stages - 1))


def operands(hidden: Tensor, weight: Tensor, tiles: Tiles) -> dict:
    """The kernels' first arguments: descriptors where the hardware has them and allows them, else pointers."""
    capable = hidden.is_cuda and hidden.dtype != torch.float32 and torch.cuda.get_device_capability(hidden.device) >= (9, 0)
    allowed = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1] for x in (hidden, weight))
    call = dict(hidden=hidden, weight=weight, D=hidden.shape[1], hidden_stride=hidden.stride(0), weight_stride=weight.stride(0),
                BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, GROUP=tiles.GROUP, DESCRIPTORS=allowed and (capable or not hidden.is_cuda),
                num_warps=tiles.num_warps, num_stages=tiles.num_stages)  # fmt: skip
    if call["DESCRIPTORS"]:
        call["hidden"] = TensorDescriptor.from_tensor(hidden, [tiles.BM, tiles.BK])
        call["weight"] = TensorDescriptor.from_tensor(weight, [tiles.BN, tiles.BK])
    return call


class LinearLogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, return_argmax, support):
        T, V, device = hidden.shape[0], weight.shape[0], hidden.device
        tiles = tiles_of(hidden)
        slices = triton.cdiv(V, tiles.SLICE)
        logps, entropy, m, S = (torch.empty(T, dtype=torch.float32, device=device) for _ in range(4))
        argmax = torch.empty(T, dtype=torch.int64, device=device) if return_argmax else None
        if T:
            partials = torch.empty(5 if return_argmax and support else 4, slices, T, dtype=torch.float32, device=device)
            # without argmax, pointers that are never used, always to an aligned address: another one would compile anew
            index = torch.empty(slices, T, dtype=torch.int32, device=device) if return_argmax else partials
            thresholds, last_kept = support or (partials, targets)
            call = operands(hidden, weight, tiles_with(tiles, return_argmax, support is not None))
            with on_device_of(hidden):
                linear_logprob_fwd_kernel[(triton.cdiv(T, tiles.BM) * slices,)](
                    targets_ptr=targets, thresholds_ptr=thresholds, last_kept_ptr=last_kept, partials_ptr=partials, index_ptr=index, T=T, V=V,
                    inv_temperature=1 / temperature, SLICE=tiles.SLICE, ARGMAX=return_argmax, SUPPORT=support is not None, **call)  # fmt: skip
                linear_logprob_merge_kernel[(triton.cdiv(T, MERGE_TOKENS),)](
                    partials, index, targets, logps, entropy, m, S, argmax if return_argmax else m, T, V, slices, 1 / temperature,
                    ARGMAX=return_argmax, SUPPORT=support is not None, SLICES=MERGE_SLICES, TOKENS=MERGE_TOKENS, num_warps=4)  # fmt: skip
        ctx.save_for_backward(hidden, weight, targets, m, S, *(support or ()))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy, *([argmax] if return_argmax else []))
        return logps, entropy, argmax

    @staticmethod
    def backward(ctx, dlogps, _entropy, _argmax):
        hidden, weight, targets, m, S, *support = ctx.saved_tensors
        thresholds, last_kept = support or (m, targets)
        (T, D), V = hidden.shape, weight.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        coef = torch.where((targets >= 0) & (targets < V) & (m != -torch.inf), dlogps, 0.0) / ctx.temperature
        largest = torch.where(coef.isfinite(), coef.abs(), 0.0).amax() if T else coef.sum()
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
        coef = coef / unit
        tiles = tiles_with(tiles_of(hidden), False, bool(support))
        dhidden = [None] * triton.cdiv(T, ROWS_BWD)
        dweight = torch.zeros(V, D, dtype=weight.dtype, device=weight.device) if need_weight else None
        # rows start at multiples of 16 elements, for the stores and for the library
        buffer = torch.empty(min(T, ROWS_BWD), triton.cdiv(min(V, SLICE_BWD), 16) * 16, dtype=hidden.dtype, device=hidden.device)
        for first in range(0, V, SLICE_BWD) if T else ():
            w, dw = weight[first : first + SLICE_BWD], None
            for i, rows in enumerate(slice(start, start + ROWS_BWD) for start in range(0, T, ROWS_BWD)):
                x = hidden[rows]
                dz = buffer[: len(x), : len(w)]
                grid = triton.cdiv(len(x), tiles.BM) * triton.cdiv(len(w), tiles.BN)
                with on_device_of(hidden):
                    linear_logprob_bwd_kernel[(grid,)](
                        targets_ptr=targets[rows], thresholds_ptr=thresholds[rows], last_kept_ptr=last_kept[rows], coef_ptr=coef[rows], m_ptr=m[rows],
                        S_ptr=S[rows], dz_ptr=dz, T=len(x), V=len(w), first=first, dz_stride=dz.stride(0), inv_temperature=1 / ctx.temperature,
                        SUPPORT=bool(support), **operands(x, w, tiles))  # fmt: skip
                if need_hidden:
                    dhidden[i] = add_product(dhidden[i], dz, w)
                if need_weight:
                    dw = add_product(dw, dz.T, x)
            if need_weight:
                torch.mul(dw, unit, out=dweight[first : first + SLICE_BWD])
        if need_hidden:
            dhidden = torch.cat([(x * unit).to(hidden.dtype) for x in dhidden]) if T else torch.zeros_like(hidden)
        return dhidden if need_hidden else None, dweight, None, None, None, None


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32, in place; None counts as 0."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    # out_dtype: a bf16 result would be rounded at each slice, and cuBLAS may then add its own partial sums in bf16.  CPUs do not have it
    product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    return product if total is None else total.add_(product)


@triton.jit
def _logits(hidden, weight, rows, cols, row0, col0, T, V, D, hidden_stride, weight_stride,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """(BM, BN) fp32 tile of hidden weight^T; rows and columns beyond T and V hold products with 0."""
    acc = tl.zeros([BM, BN], tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BK):
            acc = tl.dot(hidden.load([row0, k]), weight.load([col0, k]).T, acc, input_precision="ieee")
    else:
        lanes = tl.arange(0, BK)
        x_ptr = hidden + rows.to(tl.int64)[:, None] * hidden_stride + lanes[None, :]
        w_ptr = weight + cols.to(tl.int64)[None, :] * weight_stride + lanes[:, None]
        for k in range(0, D, BK):
            x = tl.load(x_ptr + k, mask=(rows < T)[:, None] & (k + lanes < D)[None, :], other=0.0)
            w = tl.load(w_ptr + k, mask=(cols < V)[None, :] & (k + lanes < D)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["targets_ptr", "thresholds_ptr", "last_kept_ptr", "partials_ptr", "index_ptr"])
def linear_logprob_fwd_kernel(
    hidden, weight, targets_ptr, thresholds_ptr, last_kept_ptr, partials_ptr, index_ptr, T, V, D, hidden_stride, weight_stride, inv_temperature,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, ARGMAX: tl.constexpr,
    SUPPORT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    slices = tl.cdiv(V, SLICE)
    first = pid // (GROUP * slices) * GROUP
    width = tl.minimum(tl.cdiv(T, BM) - first, GROUP)
    row0 = (first + pid % (GROUP * slices) % width) * BM
    slice = pid % (GROUP * slices) // width
    rows = row0 + tl.arange(0, BM)
    target = tl.load(targets_ptr + rows, mask=rows < T, other=-1)
    m = tl.full([BM], LOWEST, tl.float32)
    S, U, x_target = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    index = tl.zeros([BM], tl.int32)
    if SUPPORT:
        threshold = tl.load(thresholds_ptr + rows, mask=rows < T, other=0.0)[:, None]
        last_kept = tl.load(last_kept_ptr + rows, mask=rows < T, other=0)[:, None]
        top = m  # the largest logit, kept or not
    for col0 in range(slice * SLICE, tl.minimum(slice * SLICE + SLICE, V), BN):
        cols = col0 + tl.arange(0, BN)
        x = _logits(hidden, weight, rows, cols, row0, col0, T, V, D, hidden_stride, weight_stride, BM, BN, BK, DESCRIPTORS)
        x_target += tl.sum(tl.where(cols[None, :] == target[:, None], x, 0.0), 1)
        x = tl.where((cols < V)[None, :], x, float("-inf"))
        largest = tl.max(x, 1)
        if ARGMAX:
            at = tl.min(tl.where(x == largest[:, None], cols[None, :], 2147483647), 1)
            index = tl.where(largest > (top if SUPPORT else m), at, index)
        if SUPPORT:
            top = tl.maximum(top, largest)
            x = kept_logits(x, cols[None, :], target[:, None], threshold, last_kept)
            largest = tl.max(x, 1)
        new = tl.maximum(m, largest)
        S, U = rescaled(S, U, m, new, inv_temperature)
        e, de = exponentials(x, new[:, None], inv_temperature)
        S, U, m = S + tl.sum(e, 1), U + tl.sum(de, 1), new
    # one plane per field, then slice, then token: the merge reads neighbouring tokens
    plane = slices.to(tl.int64) * T
    at = partials_ptr + slice.to(tl.int64) * T + rows
    tl.store(at, m, mask=rows < T)
    tl.store(at + plane, S, mask=rows < T)
    tl.store(at + 2 * plane, U, mask=rows < T)
    tl.store(at + 3 * plane, x_target, mask=rows < T)
    if ARGMAX:
        tl.store(index_ptr + slice.to(tl.int64) * T + rows, index, mask=rows < T)
        if SUPPORT:
            tl.store(at + 4 * plane, top, mask=rows < T)


# their alignment compiles nothing
SMALL = ["targets_ptr", "thresholds_ptr", "last_kept_ptr", "logps_ptr", "entropy_ptr", "coef_ptr", "m_ptr", "S_ptr", "argmax_ptr"]


@triton.jit(do_not_specialize=["T", "slices"], do_not_specialize_on_alignment=SMALL)
def linear_logprob_merge_kernel(partials_ptr, index_ptr, targets_ptr, logps_ptr, entropy_ptr, m_ptr, S_ptr, argmax_ptr, T, V, slices, inv_temperature,
                                ARGMAX: tl.constexpr, SUPPORT: tl.constexpr, SLICES: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    plane = slices.to(tl.int64) * T
    m = tl.full([TOKENS], LOWEST, tl.float32)
    S, U, x_target = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    top, index = m, tl.zeros([TOKENS], tl.int32)
    for i in range(0, slices, SLICES):
        s = i + tl.arange(0, SLICES)
        mask = (s < slices)[:, None] & (t < T)[None, :]
        at = s.to(tl.int64)[:, None] * T + t[None, :]
        ms = tl.load(partials_ptr + at, mask=mask, other=LOWEST)
        Ss, Us = tl.load(partials_ptr + plane + at, mask=mask, other=0.0), tl.load(partials_ptr + 2 * plane + at, mask=mask, other=0.0)
        x_target += tl.sum(tl.load(partials_ptr + 3 * plane + at, mask=mask, other=0.0), 0)
        largest = tl.max(ms, 0)
        if ARGMAX:
            tops = tl.load(partials_ptr + 4 * plane + at, mask=mask, other=LOWEST) if SUPPORT else ms
            highest = tl.max(tops, 0)
            found = tl.load(index_ptr + at, mask=mask, other=2147483647)
            found = tl.min(tl.where(tops == highest[None, :], found, 2147483647), 0)
            index, top = tl.where(highest > top, found, index), tl.maximum(top, highest)
        new = tl.maximum(m, largest)
        S, U = rescaled(S, U, m, new, inv_temperature)
        Ss, Us = rescaled(Ss, Us, ms, new[None, :], inv_temperature)
        S, U, m = S + tl.sum(Ss, 0), U + tl.sum(Us, 0), new
    target = tl.load(targets_ptr + t, mask=t < T, other=-1)
    logp, entropy, m, S = finished(x_target, m, S, U, inv_temperature)
    tl.store(logps_ptr + t, tl.where((target >= 0) & (target < V), logp, 0.0), mask=t < T)
    tl.store(entropy_ptr + t, entropy, mask=t < T)
    tl.store(m_ptr + t, m, mask=t < T)
    tl.store(S_ptr + t, S, mask=t < T)
    if ARGMAX:
        tl.store(argmax_ptr + t, index.to(tl.int64), mask=t < T)


@triton.jit(do_not_specialize=["T", "first"], do_not_specialize_on_alignment=SMALL)
def linear_logprob_bwd_kernel(
    hidden, weight, targets_ptr, thresholds_ptr, last_kept_ptr, coef_ptr, m_ptr, S_ptr, dz_ptr, T, V, D, first, hidden_stride, weight_stride,
    dz_stride, inv_temperature,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, SUPPORT: tl.constexpr,
):  # fmt: skip
    """dz = coef (onehot - p) of a slice of the vocabulary that begins at `first` and has V tokens."""
    pid = tl.program_id(0)
    band = GROUP * tl.cdiv(V, BN)
    width = tl.minimum(tl.cdiv(T, BM) - pid // band * GROUP, GROUP)
    row0 = (pid // band * GROUP + pid % band % width) * BM
    col0 = pid % band // width * BN
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    coef = tl.load(coef_ptr + rows, mask=rows < T, other=0.0)
    steps = tl.where(tl.sum((coef != 0).to(tl.int32), 0) > 0, D, 0)  # a tile without gradient skips its products
    target = tl.load(targets_ptr + rows, mask=rows < T, other=-1) - first
    m, S = tl.load(m_ptr + rows, mask=rows < T, other=0.0), tl.load(S_ptr + rows, mask=rows < T, other=1.0)
    x = _logits(hidden, weight, rows, cols, row0, col0, T, V, steps, hidden_stride, weight_stride, BM, BN, BK, DESCRIPTORS)
    if SUPPORT:
        threshold = tl.load(thresholds_ptr + rows, mask=rows < T, other=0.0)[:, None]
        last_kept = tl.load(last_kept_ptr + rows, mask=rows < T, other=0)[:, None] - first
        x = kept_logits(x, cols[None, :], target[:, None], threshold, last_kept)
    m = tl.where(coef == 0, float("inf"), m)  # p = 0 where nothing flows back: x is 0 in a skipped tile, and m is -inf in a row of forbidden tokens
    dz = tl.exp2((x - m[:, None]) * (inv_temperature * LOG2E)) * (-coef / S)[:, None]
    dz = tl.where(cols[None, :] == target[:, None], dz + coef[:, None], dz)
    at = dz_ptr + rows.to(tl.int64)[:, None] * dz_stride + cols[None, :]
    tl.store(at, dz.to(dz_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < V)[None, :])


def ahead_of_time() -> list[AheadOfTime]:
    sizes = {"T": "i32", "V": "i32:16", "D": "i32:16", "hidden_stride": "i32:16", "weight_stride": "i32:16", "inv_temperature": "fp32"}
    support = {"thresholds_ptr": "*fp32", "last_kept_ptr": "*i32"}
    fwd = {"targets_ptr": "*i64", "partials_ptr": "*fp32", "index_ptr": "*i32"} | support | sizes
    rows = {"targets_ptr": "*i64", "coef_ptr": "*fp32", "m_ptr": "*fp32", "S_ptr": "*fp32"} | support
    cases = []

    def add(name, tiles, capabilities, dtype, descriptors):
        def case(kernel, label, tiles, signature, **constants):
            kinds = [f"tensordesc<{dtype}[{block}, {tiles.BK}]>" if descriptors else f"*{dtype}:16" for block in (tiles.BM, tiles.BN)]
            constants |= dict(BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, GROUP=tiles.GROUP, DESCRIPTORS=descriptors)
            cases.append(AheadOfTime(label, kernel, dict(zip(("hidden", "weight"), kinds, strict=True)) | signature, constants, tiles.num_warps,
                                     tiles.num_stages, registers=255, matrix=dtype != "fp32", capabilities=capabilities))  # fmt: skip

        bwd = rows | sizes | {"dz_ptr": f"*{dtype}:16", "first": "i32", "dz_stride": "i32:16"}
        for truncated in (False, True):
            label = name + " support" * truncated
            for argmax in (False, True):
                case(linear_logprob_fwd_kernel, f"linear_logprob_fwd {label} argmax {argmax}", tiles_with(tiles, argmax, truncated), fwd,
                     SLICE=tiles.SLICE, ARGMAX=argmax, SUPPORT=truncated)  # fmt: skip
            case(linear_logprob_bwd_kernel, f"linear_logprob_bwd {label}", tiles_with(tiles, False, truncated), bwd, SUPPORT=truncated)

    for capability, tiles in TILES.items():
        for descriptors in (False, True) if capability >= 90 else (False,):
            for dtype in ("bf16", "fp16") if descriptors else ("bf16",):
                add(f"sm_{capability} {dtype} {'descriptors' if descriptors else 'pointers'}", tiles, (capability,), dtype, descriptors)
    add("fp32", TILES_FP32, (80, 90, 100), "fp32", False)
    merge = {"partials_ptr": "*fp32:16", "index_ptr": "*i32:16", "targets_ptr": "*i64", "argmax_ptr": "*i64", "T": "i32", "V": "i32:16",
             "slices": "i32", "inv_temperature": "fp32"} | dict.fromkeys(("logps_ptr", "entropy_ptr", "m_ptr", "S_ptr"), "*fp32")  # fmt: skip
    for truncated in (False, True):
        constants = dict(ARGMAX=True, SUPPORT=truncated, SLICES=MERGE_SLICES, TOKENS=MERGE_TOKENS)
        cases.append(AheadOfTime("linear_logprob_merge" + " support" * truncated, linear_logprob_merge_kernel, merge, constants, registers=128))
    return cases
