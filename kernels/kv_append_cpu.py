"""Append to a paged KV cache on a CPU: csrc/cpu/kv_cache.cpp, for caches of any strides."""

import torch
from torch import Tensor

from ._cpu import dense, dense_rows, native
from .paged_attention_cpu import no_such_block, paged_cache
from .rope_cpu import rotated


def kv_append_cpu(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor, *,
                  where: str = "kv_append") -> None:  # fmt: skip
    k, v, block_table, positions = dense_rows(k), dense_rows(v), dense_rows(block_table), positions.contiguous()
    written = native().kv_append(paged_cache(key_cache, value_cache, block_table), k.data_ptr(), v.data_ptr(), k.stride(), v.stride(),
                                 positions.data_ptr(), torch.get_num_threads())  # fmt: skip
    if not written:
        from .kv_append import check_positions  # which imports this file

        check_positions(where, block_table, positions, key_cache.shape[2])
        raise no_such_block(where, key_cache)


def qkv_append_cpu(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor,
                   positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:  # fmt: skip
    q, k = rotated(q, k, cos, sin, () if q_weight is None else (dense(q_weight), dense(k_weight)), eps, inverse=False)
    kv_append_cpu(k, v, key_cache, value_cache, block_table, positions, where="qkv_append")
    return q
