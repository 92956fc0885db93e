"""Decode attention over a paged KV cache: one query token per row against the keys and values that its block table names.

    o_h = softmax(scale q_h K_g^T) V_g,   g = h // (H / Hkv)          (Vaswani et al., arXiv 1706.03762, eq. 1; grouped queries: arXiv 2305.13245)

in the split form of Flash-Decoding.  The key axis is cut into chunks of CHUNK tokens counted from token 0.  Chunk c gives, in fp32,
    m_c = max_j s_j,   l_c = sum_j exp(s_j - m_c),   o_c = sum_j exp(s_j - m_c) v_j,
and the chunks are merged in ascending order:  M = max_c m_c,  L = sum_c exp(m_c - M) l_c,  o = sum_c exp(m_c - M) o_c / L,  lse = M + log L.
CHUNK depends on nothing: not on the number of rows, on other rows' lengths, on the group or on the device.  So a row's bits are its own.

Shared prefix.  Rows of a group (samples of one prompt) name the same blocks for the prompt's full blocks.  Chunks that lie wholly in the prefix are
computed for the group at once: the queries of several rows are the rows of one product, and the chunk is read once for all of them.  What is left of
the prefix, less than CHUNK tokens, is read by each row (its last block is the row's own copy anyway).  The partials of a row are then merged as
always, and a row of a matrix product does not depend on the other rows: the result has the same bits with sharing and without.

That is the contract of the Triton kernel and of the reference.  The cpu backend (fp32) makes one pass over all keys of a row.  Its bits are its own:
those that the cpu backend of `attention` gives the same token, so a decoded token equals the trained one for any batch, blocks, group and threads.

Layout.  Caches are (num_blocks, Hkv, block_size, d): what a program reads, one head of one block, is one contiguous piece (64 x 128 bf16 = 16 KiB),
and the heads of a block are neighbours.  Keys and values may be views of one allocation; only d must be contiguous.  The cpu backend reads sixteen
keys at a time and wants the tokens of a block to be neighbours instead: `empty_kv_cache` allocates what the device reads fastest.

Traffic.  Keys and values are read once: 2 b d Hkv tokens bytes (b bytes per element, tokens = sum of seq_lens less (G - 1) x the shared chunks of
each group); the partials are written and read once: 2 x 4 (d + 2) H bytes per row and chunk, 3 % of the keys and values at H / Hkv = 4 in bf16. By
these formulas an H200 (4.25 TB/s) needs for 256 rows x 4096 tokens, 32/8 heads of 128, bf16: 4.29 GB + 0.14 GB = 1.04 ms; it takes 1.06 (goal 1.10).
16 groups of 16, prefix 2048 + 2048 own: 2.15 + 0.13 + 0.14 GB = 0.57 ms; it takes 0.64 (goal 0.60).
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._triton import why_not_triton
from .paged_attention_cpu import paged_attention_cpu

CHUNK = 256  # tokens.  Longer: fewer partials, but less of a prefix is shared and small batches fill fewer processors.  Not measured on a GPU yet


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, scale: float | None = None,
    group_offsets: Tensor | None = None, prefix_lens: Tensor | None = None, max_seq_len: int | None = None, window: int | None = None,
    return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from one token per row to the first seq_lens[row] tokens of its blocks; forward only.

    q: (R, H, d).  key_cache, value_cache: (num_blocks, Hkv, block_size, d) in q's dtype, block_size a divisor of CHUNK, as `empty_kv_cache` allocates
    them: the keys may also be a view in which the tokens of a block are neighbours in memory.  block_table: (R, max_blocks)
    int32: token t of row r lies in block block_table[r, t // block_size] at t % block_size; entries behind the row's length are not read, nor is any
    slot there.  seq_lens: (R,) int32, the new token included; 0 = an empty row, whose output is 0 and lse -inf.  scale: default 1/sqrt(d).
    group_offsets: (P+1,) int32, rows group_offsets[p] to group_offsets[p+1] are group p; rows outside of all groups share nothing.  prefix_lens: (P,)
    int32: the group's rows have the same blocks for the whole blocks of their first prefix_lens[p] tokens, and seq_lens of 0 or >= prefix_lens[p].
    window: a row sees the last so many of its tokens, as in `attention`; None = all.
    max_seq_len: no row is longer; default what the table can hold.  It sizes the launch and the partials, R H (d + 2) max_seq_len / CHUNK floats.

    Returns (R, H, d) in q's dtype, or with return_lse also (R, H) fp32 (fp64 for fp64): log sum exp of the scaled scores.  Raises ValueError on a
    mismatch of shapes or dtypes and, on CPU, on lengths or prefixes that break these rules; on a GPU no call waits for the device, and a row longer
    than max_seq_len is cut.
    """
    check_cache("paged_attention", key_cache, value_cache, block_table, q.shape[0] if q.ndim else 0)
    R, (_, Hkv, block_size, d) = q.shape[0], key_cache.shape
    # Messages are put together where they are raised: this runs for every token of every layer.
    if not (q.ndim == 3 and q.shape[2] == d and q.dtype == key_cache.dtype):
        raise ValueError(f"paged_attention: q is {tuple(q.shape)} {q.dtype}, key_cache {tuple(key_cache.shape)} {key_cache.dtype}; "
                         f"wanted (R, H, {d}) in its dtype")  # fmt: skip
    if q.shape[1] % Hkv:
        raise ValueError(f"paged_attention: {q.shape[1]} query heads are not a multiple of {Hkv} key heads")
    if not (seq_lens.shape == (R,) and seq_lens.dtype == torch.int32):
        raise ValueError(f"paged_attention: seq_lens is {tuple(seq_lens.shape)} {seq_lens.dtype}; wanted ({R},) int32")
    check_prefixes("paged_attention", group_offsets, prefix_lens)
    check(window is None or window >= 1, lambda: f"paged_attention: window is {window}; wanted at least 1 token, or None")
    limit = block_table.shape[1] * block_size
    if max_seq_len is not None:
        check(max_seq_len >= 0, lambda: f"paged_attention: max_seq_len is {max_seq_len}; wanted >= 0")
        limit = min(int(max_seq_len), limit)
    call = {"q": q.detach(), "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table, "seq_lens": seq_lens,
            "scale": d**-0.5 if scale is None else float(scale), "group_offsets": group_offsets, "prefix_lens": prefix_lens,
            "limit": limit, "window": window}  # fmt: skip
    name, run = op.resolve(call, backend)
    if name != "cpu" and q.device.type == "cpu":  # the cpu backend looks for itself, in its one call
        check_lengths(block_table, seq_lens, group_offsets, prefix_lens, limit, block_size)
    out, lse = run(**call)
    return (out, lse) if return_lse else out


def empty_kv_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, dtype: torch.dtype,
                   device: torch.device | str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate the keys and the values of a paged cache, all zeros, as the kernels for that device read them fastest.

    Returns key_cache and value_cache, both (num_blocks, num_kv_heads, block_size, head_dim).  What the C++ kernels serve (CPU, fp32, block_size a
    multiple of 16) gets keys whose tokens are neighbours in memory: a view with stride(2) == 1.  All else is contiguous.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    values = torch.zeros(shape, dtype=dtype, device=device)
    if values.device.type == "cpu" and dtype == torch.float32 and block_size % KEYS_AT_ONCE == 0:
        return torch.zeros(num_blocks, num_kv_heads, head_dim, block_size).transpose(2, 3), values
    return torch.zeros_like(values), values


def check_cache(where: str, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, rows: int) -> None:
    if not (key_cache.ndim == 4 and key_cache.shape == value_cache.shape and key_cache.dtype == value_cache.dtype and key_cache.shape[1] > 0):
        raise ValueError(f"{where}: key_cache is {tuple(key_cache.shape)} {key_cache.dtype}, value_cache {tuple(value_cache.shape)} "
                         f"{value_cache.dtype}; wanted both (num_blocks, Hkv, block_size, d)")  # fmt: skip
    _, _, block_size, d = key_cache.shape
    if block_size <= 0 or CHUNK % block_size:
        raise ValueError(f"{where}: block_size is {block_size}; wanted a divisor of {CHUNK}")
    if d > 1 and (value_cache.stride(3) != 1 or 1 not in key_cache.stride()[2:]):
        raise ValueError(f"{where}: the elements of a head are not neighbours in memory, nor are the keys of a block "
                         f"(strides {key_cache.stride()}, {value_cache.stride()})")  # fmt: skip
    if not (block_table.ndim == 2 and block_table.shape[0] == rows and block_table.dtype == torch.int32):
        raise ValueError(f"{where}: block_table is {tuple(block_table.shape)} {block_table.dtype}; wanted ({rows}, max_blocks) int32")


def check_prefixes(where: str, group_offsets: Tensor | None, prefix_lens: Tensor | None) -> None:
    if (group_offsets is None) != (prefix_lens is None):
        raise ValueError(f"{where}: group_offsets and prefix_lens are given together or not at all")
    if group_offsets is None:
        return
    P = prefix_lens.numel()
    if not (prefix_lens.shape == (P,) and group_offsets.shape == (P + 1,) and prefix_lens.dtype == group_offsets.dtype == torch.int32):
        raise ValueError(f"{where}: group_offsets is {tuple(group_offsets.shape)} {group_offsets.dtype}, prefix_lens {tuple(prefix_lens.shape)} "
                         f"{prefix_lens.dtype}; wanted (P+1,) and (P,) int32")  # fmt: skip


def keys_in_rows(call: dict) -> str | None:
    """The reason against a kernel that reads a key as d neighbouring elements."""
    key_cache = call["key_cache"]
    if key_cache.stride(3) != 1 and key_cache.shape[3] > 1:
        return f"the elements of a key are not neighbours in memory (strides {key_cache.stride()}); that layout is the cpu backend's"
    return None


def check_lengths(block_table, seq_lens, group_offsets, prefix_lens, limit: int, block_size: int) -> None:
    R = len(seq_lens)
    if R == 0:
        return
    low, high = (int(x) for x in torch.aminmax(seq_lens))
    check(0 <= low and high <= limit, lambda: f"paged_attention: seq_lens run from {low} to {high}; wanted [0, {limit}]")
    if group_offsets is None or len(prefix_lens) == 0:
        return
    offsets = group_offsets.tolist()
    check(0 <= offsets[0] and offsets[-1] <= R and offsets == sorted(offsets),
          lambda: f"paged_attention: group_offsets runs from {offsets[0]} to {offsets[-1]}; wanted non-decreasing within [0, {R}]")  # fmt: skip
    rows, _, prefix = _groups_of_rows(R, group_offsets, prefix_lens)
    check(bool(((seq_lens == 0) | (seq_lens >= prefix)).all()), "paged_attention: a row is shorter than the prefix of its group")
    live = seq_lens > 0
    leader = _leaders(rows, live, len(prefix_lens))
    columns = torch.arange(block_table.shape[1])
    same = block_table == block_table[leader[rows.clamp(0, len(prefix_lens) - 1)].clamp_max(R - 1)]
    shared = live[:, None] & ((columns[None, :] + 1) * block_size <= prefix[:, None])
    check(not bool((shared & ~same).any()), "paged_attention: the rows of a group have different blocks in their prefix")


def _groups_of_rows(R: int, group_offsets: Tensor, prefix_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: its group (-1 or P outside of all), its place in the group, and the length of its prefix (0 outside)."""
    row = torch.arange(R, device=group_offsets.device)
    group = torch.searchsorted(group_offsets, row.to(torch.int32), right=True) - 1
    inside, known = (group >= 0) & (group < len(prefix_lens)), group.clamp(0, max(0, len(prefix_lens) - 1))
    return group, row - group_offsets[known], torch.where(inside, prefix_lens[known], 0)


def _leaders(group: Tensor, live: Tensor, P: int) -> Tensor:
    """First row of each group that is not empty; the number of rows where there is none."""
    rows, counted = torch.arange(len(group), device=group.device), live & (group >= 0) & (group < P)
    leaders = torch.full((P,), len(group), device=group.device)
    return leaders.scatter_reduce_(0, group[counted], rows[counted], "amin")


# Products here all have this many query rows, filled up with zeros: BLAS takes other paths for few rows and then rounds differently.
QUERY_ROWS = 16
SLAB = 1 << 20  # elements of keys that are gathered at a time
WIDTHS = (32, 64, 128, CHUNK)  # tokens of a row's last chunk that are read.  The row's own length decides, never the batch: it is the length of sums


def paged_attention_reference(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
                              group_offsets: Tensor | None, prefix_lens: Tensor | None, limit: int,
                              window: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    R, H, d = q.shape
    Hkv, block_size, device = key_cache.shape[1], key_cache.shape[2], q.device
    repeat, wide = H // Hkv, accumulation_dtype(q.dtype)
    lens = seq_lens.long().clamp_max(limit)
    unseen = torch.zeros_like(lens) if window is None else (lens - window).clamp_min(0)  # first tokens that a row does not see
    C = -(-int(lens.max()) // CHUNK) if R else 0
    m = torch.full((R, C, H), -torch.inf, dtype=wide, device=device)
    l, o = torch.zeros((R, C, H), dtype=wide, device=device), torch.zeros((R, C, H, d), dtype=wide, device=device)
    heads, chunks = torch.arange(Hkv, device=device), torch.arange(C, device=device)
    M = -(-repeat // QUERY_ROWS) * QUERY_ROWS
    rows_per_tile = M // repeat
    grouped = q.to(wide).view(R, Hkv, repeat, d)

    def gather(cache: Tensor, rows: Tensor, chunk: Tensor, width: int, own: Tensor) -> Tensor:
        """(n, Hkv, width, d): the first `width` tokens of a chunk of each row; what lies from `own` on is anything."""
        width = max(width, block_size)
        column = torch.arange(width // block_size, device=device)
        wanted = column * block_size < own[:, None]
        blocks = block_table[rows[:, None], (chunk[:, None] * (CHUNK // block_size) + column).clamp_max(block_table.shape[1] - 1)]
        blocks = torch.where(wanted, blocks, 0).long()
        if cache.is_contiguous():  # whole pieces at a time
            pieces = (blocks[:, None, :] * Hkv + heads[None, :, None]).flatten()
            return cache.view(-1, block_size * d).index_select(0, pieces).view(len(rows), Hkv, -1, d).to(wide)
        return cache[blocks[:, None, :], heads[None, :, None]].flatten(2, 3).to(wide)

    def store(rows: Tensor, chunk: Tensor, tile: Tensor, keys: Tensor, values: Tensor, own: Tensor) -> None:
        """Partials of a tile (n, k, Hkv, repeat, d): of k rows each (n, k), -1 for none."""
        n, k = rows.shape
        width, used = keys.shape[2], k * repeat
        queries, p = keys.new_zeros(n, Hkv, M, d), keys.new_zeros(n, Hkv, M, width)
        queries[:, :, :used] = tile.transpose(1, 2).flatten(2, 3)
        s = torch.matmul(queries, keys.transpose(-1, -2))[:, :, :used].mul_(scale)
        short = int(own.min())
        if short < width:  # slots behind a row's end may hold NaN, and 0 x NaN is NaN
            behind = (torch.arange(short, width, device=device) >= own[:, None])[:, None]
            s[..., short:].masked_fill_(behind[:, :, None], -torch.inf)
            values[:, :, short:].masked_fill_(behind[..., None], 0)
        if window is not None:
            hidden = torch.arange(width, device=device) + CHUNK * chunk[:, None, None] < unseen[rows.clamp_min(0)][..., None]  # (n, k, width)
            s.unflatten(2, (k, repeat)).masked_fill_(hidden[:, None, :, None], -torch.inf)
        top = s.amax(-1, keepdim=True)
        weights = torch.exp(s.sub_(top.masked_fill(top == -torch.inf, 0)), out=p[:, :, :used])
        there = rows >= 0
        at = rows[there], chunk[:, None].expand(n, k)[there]
        for target, x in ((m, top), (l, weights.sum(-1, keepdim=True)), (o, torch.matmul(p, values)[:, :, :used])):
            x = x.unflatten(2, (k, repeat)).transpose(1, 2)  # (n, k, Hkv, repeat, 1 or d)
            target[at] = x[there].flatten(1, 2).view(-1, *target.shape[2:])

    own_from = torch.zeros_like(lens)  # first chunk that a row reads for itself
    if group_offsets is not None and len(prefix_lens) and C:
        group, place, prefix = _groups_of_rows(R, group_offsets.to(device), prefix_lens.to(device))
        P, own_from = len(prefix_lens), prefix.long() // CHUNK
        leaders = _leaders(group, lens > 0, P)
        sizes = (group_offsets[1:] - group_offsets[:-1]).long()
        p, c = ((chunks[None, :] < (prefix_lens.long() // CHUNK)[:, None]) & (leaders < R)[:, None]).nonzero(as_tuple=True)
        for first in range(0, len(p), _items(Hkv, CHUNK, d)):
            p_slab, c_slab = (x[first : first + _items(Hkv, CHUNK, d)] for x in (p, c))
            full = torch.full_like(c_slab, CHUNK)
            keys, values = (gather(cache, leaders[p_slab], c_slab, CHUNK, full) for cache in (key_cache, value_cache))
            for tile in range(0, int(sizes[p_slab].max()), rows_per_tile):
                more = (sizes[p_slab] > tile).nonzero(as_tuple=True)[0]
                step = torch.arange(tile, tile + rows_per_tile, device=device)
                rows = (group_offsets[p_slab[more]].long()[:, None] + step).clamp_max(R - 1)
                live = (step < sizes[p_slab[more]][:, None]) & (lens[rows] > 0)
                kept = (keys, values) if len(more) == len(p_slab) else (keys[more], values[more])
                store(torch.where(live, rows, -1), c_slab[more], grouped[rows], *kept, full[more])
    rest = lens[:, None] - chunks * CHUNK
    wanted = (chunks >= own_from[:, None]) & ((chunks + 1) * CHUNK > unseen[:, None])
    for low, width in zip((0, *WIDTHS), WIDTHS, strict=False):
        rows, c = ((rest.clamp_max(CHUNK) > low) & (rest.clamp_max(CHUNK) <= width) & wanted).nonzero(as_tuple=True)
        for r_slab, c_slab in zip(rows.split(_items(Hkv, width, d)), c.split(_items(Hkv, width, d)), strict=True):
            if len(r_slab):
                own = rest[r_slab, c_slab].clamp_max(CHUNK)
                keys, values = (gather(cache, r_slab, c_slab, width, own) for cache in (key_cache, value_cache))
                store(r_slab[:, None], c_slab, grouped[r_slab][:, None], keys, values, own)
    return merge(m, l, o, q.dtype)


def _items(Hkv: int, width: int, d: int) -> int:
    return max(1, SLAB // (Hkv * width * d))


def merge(m: Tensor, l: Tensor, o: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and lse from the partials m, l (R, C, H) and o (R, C, H, d), chunk after chunk; a chunk that a row does not have is (-inf, 0, 0)."""
    R, C, H = m.shape
    top = m.amax(1) if C else m.new_full((R, H), -torch.inf)
    weights = torch.exp(m - top.masked_fill(top == -torch.inf, 0)[:, None])
    L, out = m.new_zeros(R, H), o.new_zeros(R, H, o.shape[3])
    for c in range(C):
        L += weights[:, c] * l[:, c]
        out += weights[:, c, :, None] * o[:, c]
    return (out / torch.where(L == 0, 1, L)[..., None]).to(dtype), top + L.log()


KEYS_AT_ONCE = 16  # whatever the machine, see csrc/cpu/simd.inl


def _why_not_cpu(call: dict) -> str | None:
    key_cache = call["key_cache"]
    reason = why_not_cpu(call)
    if reason is None and key_cache.shape[2] % KEYS_AT_ONCE:
        return f"block_size is {key_cache.shape[2]}, no multiple of {KEYS_AT_ONCE}"
    if reason is None and key_cache.stride(2) != 1:
        return f"the keys of a block are not neighbours in memory (strides {key_cache.stride()}); empty_kv_cache allocates them so"
    return reason


def _why_not_triton(call: dict) -> str | None:
    return why_not_triton(call) or keys_in_rows(call)


op = register("paged_attention", triton=Backend(late("paged_attention_triton.paged_attention_triton"), _why_not_triton),
              cpu=Backend(paged_attention_cpu, _why_not_cpu),
              reference=Backend(paged_attention_reference))  # fmt: skip
