"""Absorbed decode of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): one query token per row over a paged latent cache.

    o_h = sum over tokens j of  softmax_j(scale q_h . [c_j; k_j]) c_j

The cache holds one row [c; k] per token: the latent of `rank` numbers, which is the value too, and the rotated key.  All H heads read the same row.
The kernel works in chunks of CHUNK tokens from token 0, merged in ascending order, as `paged_attention` does: a row's bits are its own.  Rows of a
group, whose first blocks are the same, read the chunks that lie wholly in their common prefix together, with the bits that they get alone.

On CPU tensors in fp32 it is the C++ kernel of `paged_attention` with one key head: a token has the bits that `attention` gives it in a packed batch.

Traffic: b (rank + R) bytes per cached token and layer: 1152 in bf16 for DeepSeek-V3's 512 + 64.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton
from .paged_attention import _why_not_cpu, check_cache, check_lengths, check_prefixes, keys_in_rows
from .paged_attention_cpu import paged_attention_cpu

# Tokens, from token 0.  Longer than paged_attention's 256: a partial is rank x H floats, 262 KB at 128 heads, and 256 rows of the cache are 295 KB
CHUNK = 2048


def mla_decode(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, rank: int, scale: float,
               group_offsets: Tensor | None = None, prefix_lens: Tensor | None = None, max_seq_len: int | None = None,
               backend: str | None = None) -> Tensor:  # fmt: skip
    """Attend from one token per row to the first seq_lens[row] tokens of its blocks; forward only.

    q: (R, H, d), d = rank + the width of the rotated key, absorbed: in the space of the latent.  key_cache, value_cache: (num_blocks, 1, block_size,
    d) in q's dtype, block_size a divisor of 256, with the same numbers in both: one tensor, or on a CPU the two layouts of `empty_kv_cache`.
    block_table: (R, max_blocks) int32, seq_lens: (R,) int32, group_offsets, prefix_lens, max_seq_len: as in `paged_attention`.
    Returns (R, H, rank) in q's dtype; 0 for a row without tokens.
    Raises ValueError on a mismatch of shapes or dtypes and, on CPU, on lengths or prefixes that break the rules.
    """
    R = q.shape[0] if q.ndim else 0
    check_cache("mla_decode", key_cache, value_cache, block_table, R)
    _, heads, block_size, d = key_cache.shape
    check(q.ndim == 3 and heads == 1 and q.shape[2] == d and q.dtype == key_cache.dtype and 0 < rank <= d,
          lambda: f"mla_decode: q is {tuple(q.shape)} {q.dtype}, key_cache {tuple(key_cache.shape)} {key_cache.dtype}, rank {rank}; wanted "
                  f"(R, H, d) and (num_blocks, 1, block_size, d) alike, rank in [1, d]")  # fmt: skip
    check(seq_lens.shape == (R,) and seq_lens.dtype == torch.int32,
          lambda: f"mla_decode: seq_lens is {tuple(seq_lens.shape)} {seq_lens.dtype}; wanted ({R},) int32")  # fmt: skip
    check_prefixes("mla_decode", group_offsets, prefix_lens)
    limit = block_table.shape[1] * block_size
    if max_seq_len is not None:
        check(max_seq_len >= 0, lambda: f"mla_decode: max_seq_len is {max_seq_len}; wanted >= 0")
        limit = min(int(max_seq_len), limit)
    call = {"q": q.detach(), "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table, "seq_lens": seq_lens, "rank": rank,
            "scale": float(scale), "group_offsets": group_offsets, "prefix_lens": prefix_lens, "limit": limit}  # fmt: skip
    name, run = op.resolve(call, backend)
    if name != "cpu" and q.is_cpu:
        check_lengths(block_table, seq_lens, group_offsets, prefix_lens, limit, block_size)
    return run(**call)


def mla_decode_reference(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, rank: int, scale: float,
                         group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int) -> Tensor:  # fmt: skip
    """Every row by itself: what groups share changes no number."""
    R, H, d = q.shape
    block_size, wide = key_cache.shape[2], accumulation_dtype(q.dtype)
    lens = seq_lens.long().clamp(0, limit)
    longest = int(lens.max()) if R else 0
    out = q.new_zeros(R, H, rank)
    if not longest:
        return out
    at = torch.arange(longest, device=q.device)
    there = at < lens[:, None]
    blocks = torch.where(there, block_table[:, at // block_size], 0).long()
    rows = key_cache[blocks, 0, (at % block_size).expand(R, -1)].to(wide)
    rows = rows.masked_fill(~there[..., None], 0)  # slots behind a row's end may hold NaN
    scores = torch.einsum("rhd,rjd->rhj", q.to(wide), rows).mul_(scale).masked_fill_(~there[:, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill_((lens == 0)[:, None, None], 0)
    return torch.einsum("rhj,rjd->rhd", weights, rows[..., :rank]).to(q.dtype)


def mla_decode_cpu(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, rank: int, scale: float,
                   group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int) -> Tensor:  # fmt: skip
    return paged_attention_cpu(q, key_cache, value_cache, block_table, seq_lens, scale, group_offsets, prefix_lens, limit)[0][..., :rank]


def _why_not_triton(call: dict) -> str | None:
    if call["key_cache"].data_ptr() != call["value_cache"].data_ptr():
        return "the values lie elsewhere than the keys; the kernel reads them once"
    return why_not_triton(call) or keys_in_rows(call)


op = register("mla_decode", triton=Backend(late("mla_decode_triton.mla_decode_triton"), _why_not_triton), cpu=Backend(mla_decode_cpu, _why_not_cpu),
              reference=Backend(mla_decode_reference))  # fmt: skip
