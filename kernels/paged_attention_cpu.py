"""Decode attention for CPU tensors: csrc/cpu/paged_attention.inl, which reads the blocks where they lie."""

import torch
from torch import Tensor

from ._cpu import dense_rows, native
from .attention_cpu import EVERYTHING


def paged_attention_cpu(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
                        group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int,
                        window: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, block_table, seq_lens = dense_rows(q), dense_rows(block_table), seq_lens.contiguous()
    R, H, d = q.shape
    out, lse = torch.empty(R, H, d), torch.empty(R, H)
    groups = (0, 0, 0)
    if group_offsets is not None:
        group_offsets, prefix_lens = group_offsets.contiguous(), prefix_lens.contiguous()
        groups = group_offsets.data_ptr(), prefix_lens.data_ptr(), prefix_lens.numel()
    served = native().paged_attention(paged_cache(key_cache, value_cache, block_table), q.data_ptr(), q.stride(), H, seq_lens.data_ptr(), *groups,
                                      limit, scale, window or EVERYTHING, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())  # fmt: skip
    if not served:
        from .paged_attention import check_lengths  # which imports this file

        check_lengths(block_table, seq_lens, group_offsets, prefix_lens, limit, key_cache.shape[2])
        raise no_such_block("paged_attention", key_cache)
    return out, lse


def paged_cache(key_cache: Tensor, value_cache: Tensor, block_table: Tensor):
    """What the compiled module calls a paged cache; it holds addresses, no references."""
    return native().PagedCache(key_cache.data_ptr(), value_cache.data_ptr(), key_cache.shape, key_cache.stride(), value_cache.stride(),
                               block_table.data_ptr(), block_table.shape, block_table.stride(0))  # fmt: skip


def no_such_block(where: str, key_cache: Tensor) -> ValueError:
    return ValueError(f"{where}: block_table names a block outside of the cache; it has {key_cache.shape[0]} blocks")
