"""Keys and values in blocks that rows share, and the three attentions that fill and read them.

The host (`athanor._host.Scheduler`) decides which blocks a row has; the bytes live here.  R rows, n of them decoding, H query heads, K key/value
heads, d head width, T packed tokens.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from athanor.config import ModelConfig
from athanor.kernels import attention, kv_append, mla_decode, paged_attention, qkv_append
from athanor.kernels.paged_attention import CHUNK, empty_kv_cache
from athanor.model.mla import Latent
from athanor.model.transformer import Rotation, packed_latent

SLAB_BYTES = 1 << 28  # of partial results of the paged attention over the rows of a prefill


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device.  The host does not wait: it is read from pinned memory, which PyTorch keeps until then.  On a CPU, a view."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class PagedKVCache:
    """One pool of blocks per layer, allocated once: its addresses never change, so captured graphs stay valid.

    Of a latent, keys and values are the same numbers: on a CPU in two layouts, else in the same memory.
    """

    def __init__(self, config: ModelConfig, num_layers: int, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        """num_layers: those of the config, and one more where the layer for multi-token prediction drafts."""
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        layers = [
            empty_kv_cache(num_blocks, config.cache_heads, block_size, config.cache_width, dtype=dtype, device=device)
            for _ in range(num_layers)
        ]
        self.keys, self.values = [k for k, _ in layers], [v for _, v in layers]
        if config.latent and device.type != "cpu":
            self.values = self.keys

    @staticmethod
    def bytes_per_token(config: ModelConfig, num_layers: int, dtype: torch.dtype, device: torch.device) -> int:
        copies = 1 if config.latent and device.type != "cpu" else 2
        return copies * num_layers * config.cache_heads * config.cache_width * dtype.itemsize

    def copy_(self, copies: np.ndarray) -> None:
        """Copy the first `tokens` slots of block `source` to block `target`, for rows (source, target, tokens) of copies (c, 3)."""
        if not len(copies):
            return
        slots = to_device(np.concatenate([np.arange(n) for n in copies[:, 2]]), self.device)
        source, target = (to_device(copies[:, i].astype(np.int64).repeat(copies[:, 2]), self.device) for i in (0, 1))
        for cache in (*self.keys, *self.values):
            cache[target, :, slots] = cache[source, :, slots]


class PrefillAttention:
    """Packed causal attention that also writes keys and values of the packed tokens to their slots."""

    def __init__(self, cache: PagedKVCache, cu_seqlens: Tensor, max_seqlen: int, blocks: Tensor, slots: Tensor):
        """blocks (T, 1), slots (T,) int32: where each token's key and value go; slot -1 = nowhere.  max_seqlen: the longest sequence."""
        self.cache, self.cu_seqlens, self.max_seqlen, self.blocks, self.slots = cache, cu_seqlens, max_seqlen, blocks, slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        q, k = rotation(q, k)
        kv_append(k, v, self.cache.keys[layer], self.cache.values[layer], self.blocks, self.slots)
        return attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen, window=window)

    def latent(self, layer: int, x: Latent) -> Tensor:
        append_latent(self.cache, layer, x, self.blocks, self.slots)
        return packed_latent(x, partial(attention, cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen))


def append_latent(cache: PagedKVCache, layer: int, x: Latent, block_table: Tensor, positions: Tensor) -> None:
    keys = x.keys()
    kv_append(keys, keys, cache.keys[layer], cache.values[layer], block_table, positions)


class ContinuedAttention:
    """Causal attention of tokens that continue what is in the cache: each token is a row of the paged attention, one slot longer than the last.

    A token gets the bits of a decode step, which are those of `PrefillAttention` on a CPU in fp32 and in strict mode on CUDA.  Tokens of one chunk of
    a sequence read the chunks before it together.  Rows go in slabs, so that the partial results take SLAB_BYTES and not (tokens x length).
    """

    def __init__(self, cache: PagedKVCache, num_heads: int, tables: np.ndarray, sequences: np.ndarray, positions: np.ndarray):
        """tables (S, columns) int32; sequences (T,), ascending, positions (T,): where each token is; position -1 = a filler, only at the end."""
        self.cache, device = cache, cache.device
        self.block_table = to_device(tables, device)[to_device(sequences, device)]
        self.positions = to_device(positions.astype(np.int32), device)
        num_tokens = int((positions >= 0).sum())
        chunks = positions[:num_tokens] // CHUNK
        starts = np.concatenate(([0], 1 + np.flatnonzero((np.diff(chunks) != 0) | (np.diff(sequences[:num_tokens]) != 0))))
        row_bytes = 4 * num_heads * (cache.keys[0].shape[3] + 2) * (int(chunks.max()) + 1)
        rows = max(1, SLAB_BYTES // row_bytes)
        self.slabs = []  # rows, their lengths, the longest, groups of rows, and what the groups share
        for first in range(0, num_tokens, rows):
            end = min(first + rows, num_tokens)
            begun = np.concatenate(([first], starts[(starts > first) & (starts < end)]))
            groups = to_device(np.append(begun - first, end - first).astype(np.int32), device)
            prefixes = to_device((chunks[begun] * CHUNK).astype(np.int32), device)
            slab = slice(first, end if end < num_tokens else len(positions))
            self.slabs.append((slab, self.positions[slab] + 1, int(positions[slab].max()) + 1, groups, prefixes))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q = qkv_append(q, k, v, rotation.cos, rotation.sin, keys, values, self.block_table, self.positions, **rotation.norm)
        return joined([
            paged_attention(q[rows], keys, values, self.block_table[rows], lengths, max_seq_len=longest, group_offsets=groups, prefix_lens=prefixes,
                            window=window)
            for rows, lengths, longest, groups, prefixes in self.slabs
        ])  # fmt: skip

    def latent(self, layer: int, x: Latent) -> Tensor:
        append_latent(self.cache, layer, x, self.block_table, self.positions)
        q, keys, values = x.queries(), self.cache.keys[layer], self.cache.values[layer]
        return x.output(joined([
            mla_decode(q[rows], keys, values, self.block_table[rows], lengths, rank=x.rank, scale=x.scale, max_seq_len=longest, group_offsets=groups,
                       prefix_lens=prefixes)
            for rows, lengths, longest, groups, prefixes in self.slabs
        ]))  # fmt: skip


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class SharedPrefix:
    """Rows that read a prompt together.  All on the device, of fixed size, so that a captured graph can read them."""

    order: Tensor  # (R,) int64, rows group by group
    inverse: Tensor  # (R,) int64, where each row stands in `order`
    group_offsets: Tensor  # (R+1,) int32 over `order`; groups that do not exist are empty
    prefix_lens: Tensor  # (R,) int32 tokens

    def first(self, n: int) -> "SharedPrefix":
        """Of the first n rows, where no other row decodes."""
        return SharedPrefix(self.order[:n], self.inverse[:n], self.group_offsets[: n + 1], self.prefix_lens[:n])


class DecodeAttention:
    """One token per row: norm, rotate and append its key and value, then attend to the row's first seq_lens slots."""

    def __init__(
        self, cache: PagedKVCache, block_table: Tensor, positions: Tensor, max_seq_len: int | None, shared: SharedPrefix | None,
        seq_lens: Tensor | None = None,
    ):  # fmt: skip
        """block_table (n, columns) int32, positions (n,) int32, -1 = the row does not decode: nothing is written, its output is 0.

        seq_lens: positions + 1, where the caller has it.
        """
        self.cache, self.block_table, self.positions, self.max_seq_len, self.shared = cache, block_table, positions, max_seq_len, shared
        self.seq_lens, self.groups = positions + 1 if seq_lens is None else seq_lens, {}
        if shared is not None:
            self.group_table, self.group_lens = block_table.index_select(0, shared.order), self.seq_lens.index_select(0, shared.order)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q = qkv_append(q, k, v, rotation.cos, rotation.sin, keys, values, self.block_table, self.positions, **rotation.norm)
        return self._attend(paged_attention, q, keys, values, window=window)

    def latent(self, layer: int, x: Latent) -> Tensor:
        append_latent(self.cache, layer, x, self.block_table, self.positions)
        return x.output(self._attend(mla_decode, x.queries(), self.cache.keys[layer], self.cache.values[layer], rank=x.rank, scale=x.scale))

    def _attend(self, attention, q: Tensor, keys: Tensor, values: Tensor, **options) -> Tensor:
        if self.shared is None:
            return attention(q, keys, values, self.block_table, self.seq_lens, max_seq_len=self.max_seq_len, **self.groups, **options)
        s = self.shared
        out = attention(q.index_select(0, s.order), keys, values, self.group_table, self.group_lens, max_seq_len=self.max_seq_len,
                        group_offsets=s.group_offsets, prefix_lens=s.prefix_lens, **options)  # fmt: skip
        return out.index_select(0, s.inverse)


class DraftedAttention(DecodeAttention):
    """Several tokens per row, neighbours in the batch: each is appended before any attends, and they read the chunks before them together."""

    def __init__(self, cache: PagedKVCache, block_table: Tensor, positions: Tensor, max_seq_len: int | None, offsets: Tensor, prefixes: Tensor):
        """block_table and positions of every token; offsets (n+1,) int32, each row's tokens; prefixes (n,) int32, the whole chunks before them."""
        super().__init__(cache, block_table, positions, max_seq_len, None)
        self.groups = {"group_offsets": offsets, "prefix_lens": prefixes}
