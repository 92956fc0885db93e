"""Causal self-attention over packed sequences with grouped queries (Ainslie et al., arXiv 2305.13245):  softmax(q k^T scale + causal) v.

A dispatcher: flash-attn if installed, then torch.nn.attention.varlen, then the Triton kernel (attention_triton.py), then the reference.  In strict
mode the Triton kernel alone serves on CUDA: a token gets the bits that paged_attention gives it in a decode step.  (Repeating the keys for a
varlen_attn without grouped queries took 1.7 ms on an H200 where Triton took 1.0: T = 8192, 32 and 8 heads, forward and backward.)
fp32 on a CPU has a C++ kernel (attention_cpu.py), whose rows have the bits that paged_attention gives them there.

The reference sorts the sequences into a few buckets of similar length and pads on the right inside a bucket only: causality already hides
the padding from every real token, so no mask is needed, and padded rows are dropped on the way back.  A token appears exactly once among the
padded rows, so packing and unpacking are each other's gradient and both are plain row gathers.
"""

import importlib.util
import inspect
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cpu import why_not_cpu
from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, cu_seqlens_k: Tensor | None = None, scale: float | None = None,
              max_seqlen: int | None = None, window: int | None = None, backend: str | None = None) -> Tensor:  # fmt: skip
    """Attend causally within each sequence of a packed batch.

    q: (T, H, d).  k, v: (U, Hkv, d), query head h reads head h // (H / Hkv).  cu_seqlens: (S+1,) int32, from 0 to T, zero-length allowed.
    cu_seqlens_k: (S+1,) int32, from 0 to U, where sequences have more keys than queries, which are then those of their last keys; without it U = T.
    scale: default 1/sqrt(d).  max_seqlen: at least the most keys of a sequence, which flash attention must know; without it each call waits for the
    device.  window: a token sees itself and the window - 1 tokens before it (sliding window, arXiv 2310.06825, section 2); None = all before it.
    Returns (T, H, d) in q's dtype, differentiable in q, k, v.  Raises ValueError on a shape mismatch and, where the reference or the cpu
    backend serves, on cu_seqlens that break these rules.
    """
    T, H, d = q.shape
    check(k.shape == v.shape and k.ndim == 3 and (k.shape[0] == T or cu_seqlens_k is not None) and k.shape[2] == d,
          lambda: f"attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted k and v (T, Hkv, d)")  # fmt: skip
    check(k.shape[1] > 0 and H % k.shape[1] == 0, lambda: f"attention: {H} query heads are not a multiple of {k.shape[1]} key heads")
    check(cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1, lambda: f"attention: cu_seqlens is {tuple(cu_seqlens.shape)}; wanted (S+1,)")
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    check(cu_seqlens_k.shape == cu_seqlens.shape,
          lambda: f"attention: cu_seqlens_k is {tuple(cu_seqlens_k.shape)}; wanted that of cu_seqlens, {tuple(cu_seqlens.shape)}")  # fmt: skip
    check(window is None or window >= 1, lambda: f"attention: window is {window}; wanted at least 1 token, or None")
    return op(backend, q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=d**-0.5 if scale is None else float(scale),
              max_seqlen=max_seqlen, window=window)  # fmt: skip


def longest_of(cu_seqlens: Tensor) -> int:
    """Tokens of the longest sequence; waits for the device."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


# Padded lengths are whole vectors of 16 floats: then a row's sums do not depend on its neighbours, nor on how far it is padded.
LENGTH_STEP = 16
BUCKET_COST = 512  # padded tokens that cost as much as one more bucket, measured on a 2-core CPU (see tests/kernels/test_attention.py)


@lru_cache(maxsize=256)
def bucket_plan(offsets: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
    """Rows to gather, where each token then lies, and (sequences, padded length) per bucket, for one tuple of cu_seqlens.

    The buckets minimise padded rows + BUCKET_COST per bucket exactly, by dynamic programming over the distinct lengths.
    """
    cu = torch.tensor(offsets)
    starts, lengths = cu[:-1], cu[1:] - cu[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    buckets = _split([-(-n // LENGTH_STEP) * LENGTH_STEP for n in lengths[order].tolist()])
    gather, inverse, base, first = [], torch.empty(offsets[-1], dtype=torch.int64), 0, 0
    for count, length in buckets:
        rows = order[first : first + count]
        step = torch.arange(length)
        index = starts[rows, None] + step
        real = step < lengths[rows, None]
        gather.append(torch.where(real, index, starts[rows, None]).flatten())
        inverse[index[real]] = torch.arange(base, base + count * length).view(count, length)[real]
        base, first = base + count * length, first + count
    return (torch.cat(gather) if gather else torch.empty(0, dtype=torch.int64)), inverse, tuple(buckets)


def _split(lengths: list[int]) -> list[tuple[int, int]]:
    """(count, padded length) per bucket for lengths in descending order."""
    ends = [i for i in range(1, len(lengths) + 1) if i == len(lengths) or lengths[i] != lengths[i - 1]]  # a bucket ends where the length changes
    best = {0: (0, 0)}  # end -> (cost, start of its last bucket)
    for end in ends:
        best[end] = min((best[start][0] + (end - start) * lengths[start] + BUCKET_COST, start) for start in best)
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return [(end - start, lengths[start]) for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]


class GatherRows(torch.autograd.Function):
    """x[index], whose gradient is grad[inverse]: right because every row that inverse leaves out has gradient zero."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[1]), None, None


class ScatterRows(torch.autograd.Function):
    """padded[inverse], whose gradient puts each row back and leaves zeros on the padding."""

    @staticmethod
    def forward(ctx, padded, inverse):
        ctx.save_for_backward(inverse)
        ctx.rows = padded.shape[0]
        return padded.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        out = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        return out.index_copy_(0, inverse, grad), None


def known_offsets(cu_seqlens: Tensor, cu_seqlens_k: Tensor, T: int, U: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where sequences begin and end among the T queries and the U keys.  ValueError where they do not cover them, or keys are missing."""
    queries = _offsets("cu_seqlens", cu_seqlens, "T", T)
    if cu_seqlens_k is cu_seqlens:
        return queries, queries
    keys = _offsets("cu_seqlens_k", cu_seqlens_k, "U", U)
    for s, ((a, b), (c, e)) in enumerate(zip(pairwise(queries), pairwise(keys), strict=True)):
        check(b - a <= e - c, lambda s=s, n=b - a, m=e - c: f"attention: sequence {s} has {n} queries and {m} keys; wanted as many keys or more")
    return queries, keys


def _offsets(name: str, cu_seqlens: Tensor, what: str, end: int) -> tuple[int, ...]:
    offsets = tuple(cu_seqlens.tolist())
    check(offsets[0] == 0 and offsets[-1] == end and all(a <= b for a, b in pairwise(offsets)),
          lambda: f"attention: {name} runs from {offsets[0]} to {offsets[-1]}; wanted non-decreasing from 0 to {what} = {end}")  # fmt: skip
    return offsets


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float,
                        max_seqlen: int | None = None, window: int | None = None) -> Tensor:  # fmt: skip
    queries, offsets = known_offsets(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0])
    if q.shape[0] == 0:
        return q * 1
    if queries != offsets:  # a query for every key, of which the last ones count
        ends = [torch.arange(end - (b - a), end, device=q.device) for (a, b), end in zip(pairwise(queries), offsets[1:], strict=True)]
        rows = torch.cat(ends)
        q = q.new_zeros(k.shape[0], *q.shape[1:]).index_copy(0, rows, q)
        return attention_reference(q, k, v, cu_seqlens_k, cu_seqlens_k, scale, window=window)[rows]
    index, inverse, buckets = bucket_plan(offsets)
    index, inverse = index.to(q.device), inverse.to(q.device)
    q, k, v = (GatherRows.apply(x, index, inverse) for x in (q, k, v))
    rows = [count * length for count, length in buckets]
    outputs = []
    for (count, length), bq, bk, bv in zip(buckets, q.split(rows), k.split(rows), v.split(rows), strict=True):
        bq, bk, bv = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (bq, bk, bv))
        seen = None if window is None or window >= length else torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(bq, bk, bv, seen, is_causal=seen is None, scale=scale, enable_gqa=bq.shape[1] != bk.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return ScatterRows.apply(torch.cat(outputs), inverse)


def _why_not_cuda(call: dict) -> str | None:
    q = call["q"]
    if not q.is_cuda:
        return f"tensors are on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bf16 or fp16, not {q.dtype}"
    if _flash_attn_there():
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "neither flash-attn nor torch.nn.attention.varlen is installed"
    if q.shape[1] != call["k"].shape[1] and not _varlen_takes_groups():
        return "flash-attn is not installed, and varlen_attn of this PyTorch takes no grouped queries (2.12 does)"
    return None


@lru_cache(maxsize=1)
def _flash_attn_there() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def attention_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float,
                   max_seqlen: int | None = None, window: int | None = None) -> Tensor:  # fmt: skip
    longest = longest_of(cu_seqlens_k) if max_seqlen is None else max_seqlen
    if longest == 0 or q.shape[0] == 0:
        return q * 1
    # Both libraries let the last query see the last key.
    cu_seqlens, cu_seqlens_k = cu_seqlens.to(torch.int32), cu_seqlens_k.to(torch.int32)
    seen = (-1 if window is None else window - 1, 0)  # tokens before and behind the query's own
    if _flash_attn_there():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest, softmax_scale=scale, causal=True,
                                      window_size=seen)  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    groups = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest, scale=scale, window_size=seen, **groups)


@lru_cache(maxsize=1)
def _varlen_takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def why_not_attention(call: dict) -> str | None:
    q, k, v = call["q"], call["k"], call["v"]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; the kernel takes all in fp32, fp16 or bf16"
    if q.shape[2] > 128:
        return f"heads are of {q.shape[2]}; the kernel keeps two sums of at most 128 per query in registers"
    return why_not_triton(call)


def _cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int | None = None,
         window: int | None = None) -> Tensor:  # fmt: skip
    from .attention_cpu import attention_cpu

    known_offsets(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0])
    return attention_cpu(q, k, v, cu_seqlens, cu_seqlens_k, scale, window)


op = register("attention", cuda=Backend(attention_cuda, _why_not_cuda),
              triton=Backend(late("attention_triton.attention_triton"), why_not_attention, strict=True),
              cpu=Backend(_cpu, why_not_cpu), reference=Backend(attention_reference))  # fmt: skip
