"""Packed causal attention for CPU tensors: csrc/cpu/attention.inl.

A token's output has the bits that `paged_attention` gives it in its cpu backend, from the same keys and values, whatever the batch, its packing and
the number of threads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._cpu import dense, native, run

EVERYTHING = 1 << 40  # tokens: a window beyond all sequences


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, window: int | None = None) -> Tensor:
    return run(AttentionCpuFunction, q, k, v, *(cu.to(torch.int32).contiguous() for cu in (cu_seqlens, cu_seqlens_k)), scale, window or EVERYTHING)


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, window: int):
    return native().PackedAttention(q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(), k.stride(), v.stride(), cu_seqlens.data_ptr(),
                                    cu_seqlens_k.data_ptr(), cu_seqlens.numel() - 1, q.shape[1], k.shape, scale, window,
                                    torch.get_num_threads())  # fmt: skip


class AttentionCpuFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, cu_seqlens_k, scale, window):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out, stats = torch.empty(q.shape), torch.empty(*q.shape[:2], 2)
        native().attention_fwd(_packed(q, k, v, cu_seqlens, cu_seqlens_k, scale, window), out.data_ptr(), stats.data_ptr())
        ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k, out, stats)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, cu_seqlens, cu_seqlens_k, out, stats = ctx.saved_tensors
        dout, dq, dk, dv = dense(dout), torch.empty(q.shape), *(torch.zeros(x.shape) for x in (k, v))  # no query: no gradient
        call = _packed(q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.window)
        native().attention_bwd(call, *(x.data_ptr() for x in (out, stats, dout, dq, dk, dv)))
        return dq, dk, dv, None, None, None, None
