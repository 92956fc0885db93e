"""Keys and values of the rows that are being decoded, and the two attentions that fill and read them.

A row is one running sample.  Groups are explicit: `prefill` runs a prompt once and writes its keys and values to all members' rows.

R rows, n active rows (always the first n), H query heads, K key/value heads, d head width, L tokens per row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.config import ModelConfig
from athanor.kernels import attention

# BLAS takes other paths for products of one to three rows (seen on AMD Zen 5; on an Intel Xeon they gave the same bits): padding queries to
# this many keeps a decoded token's sums in the order of the training attention.
MIN_QUERIES = 8


class KVCache:
    """Dense rows (R, K, L, d) per layer, allocated once and written in place."""

    def __init__(self, config: ModelConfig, num_rows: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (num_rows, config.num_key_value_heads, max_length, config.width_per_head)
        # Zeros, not empty: a masked slot has weight 0, and 0 x NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.row_index = torch.arange(num_rows, device=device)
        self.slots = torch.arange(max_length, device=device)

    def move_(self, source: Tensor, target: Tensor, span: int) -> None:
        """Copy rows `source` (m,) over rows `target` (m,), first `span` tokens."""
        for cache in (*self.keys, *self.values):
            cache[target, :, :span] = cache[source, :, :span]


class PrefillAttention:
    """Packed causal attention over prompts that also writes each prompt's keys and values to its members' rows."""

    def __init__(self, cache: KVCache, cu_seqlens: Tensor, rows: list[Tensor]):
        self.cache, self.cu_seqlens, self.rows = cache, cu_seqlens, rows
        self.bounds = cu_seqlens.tolist()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for i, rows in enumerate(self.rows):
            start, end = self.bounds[i], self.bounds[i + 1]
            self.cache.keys[layer][rows, :, : end - start] = k[start:end].transpose(0, 1)
            self.cache.values[layer][rows, :, : end - start] = v[start:end].transpose(0, 1)
        return attention(q, k, v, self.cu_seqlens)


class DecodeAttention:
    """One token per active row: append its key and value at `positions` (n,), attend to slots 0..position."""

    def __init__(self, cache: KVCache, positions: Tensor, span: int):
        self.cache, self.positions, self.span = cache, positions, span
        n = len(positions)
        self.rows = cache.row_index[:n]
        self.mask = (cache.slots[:span] <= positions[:, None])[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, H, d = q.shape
        K = k.shape[1]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        # The H/K query heads that share a key head are queries of one attention: no copy of keys per query head.
        queries, shared = q.view(n, K, H // K, d), H // K
        if q.device.type == "cpu" and shared < MIN_QUERIES:
            queries = F.pad(queries, (0, 0, 0, MIN_QUERIES - shared))
        out = F.scaled_dot_product_attention(queries, keys[:n, :, : self.span], values[:n, :, : self.span], attn_mask=self.mask)
        return out[:, :, :shared].reshape(n, H, d)
