"""Top-k, top-p and min-p for sample_triton.py: the exact threshold, by a second read that proves a bracket of it and lists the logits inside.

1. `sample_bracket_kernel` (sample_bracket_triton.py), one program per row: keys lo <= hi between which the threshold should lie.
2. `sample_collect_kernel`, one program per row and segment, reads the tiles with a logit of lo or more: number and mass of what is above the bracket
   and in it, the least key that min-p keeps, and a list of the logits in the bracket.
3. `sample_resolve_kernel`, one program per row.  Is the threshold in the bracket?  If not (rare, and it costs time but not exactness) the bracket is
   moved to all that remains on that side and collected again, by this program alone.  Then the threshold is searched for in the list over keys,
   int32 in the order of the floats: PIVOTS equidistant keys per pass, the interval then shrinks to the keys that occur in it.  The mass kept in each
   segment follows, and the token is found as without filters: segment, tile, token, in vocabulary order.

Masses are integers, so sums agree whichever kernel adds them.  The list has room for every logit, and is written in the bracket only.

Predicted for an H200 (of a first version collect took 70 and resolve 34 us at 3 x randn, T = 0.6, top-p 0.95), 128 rows of V = 151936 in fp32, with
the 20 us of the tiles: bracket 10 us; collect 4 us where few tiles matter, 25-35 us where all do; resolve 8 us for a list of some hundred, 12 us for
the 6,000 of a flat row, 25 us with heavy ties; three launches more 5 us. Peaked 45 us, flat 75-85 us, ties 90 us.  A row whose bracket fails takes
1-2 ms, read by a single program.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sample_bracket_triton as bracket
from ._triton import AheadOfTime
from .logprob_triton import LOG2E
from .sample_bracket_triton import FAR, SMALL, filters_of, float_of, key_of, sample_bracket_kernel, variants
from .sample_tiles_triton import TILE, UNIT, draw_unfiltered, mass_of, merged, part_masses, reached, row_segments, segment_logits, target_of, uniform

# Not measured on a GPU yet
FORBIDDEN = tl.constexpr(-2139095041)  # key of -inf
COLLECT_WARPS = 4
CHUNK, PIVOTS, RESOLVE_WARPS = 2048, 8, 16


def any_filter(temperature, top_k, top_p, min_p, V: int) -> bool:
    """Whether a filter may be on: of tensors the host knows nothing."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        return False
    filters = (top_k, lambda k: 0 < k < V), (top_p, lambda p: p < 1), (min_p, lambda p: p > 0)
    return any(isinstance(value, Tensor) or on(value) for value, on in filters)


def filtered_draw(logits: Tensor, tiles: Tensor, segments: Tensor, seeds: Tensor, positions: Tensor, outputs: tuple, temperature, top_k, top_p, min_p,
                  **sizes: int) -> None:  # fmt: skip
    """Fill outputs.  temperature and the filters: what `per_row` returned of each."""
    (B, V), spans = logits.shape, segments.shape[2]
    brackets, counts = (torch.empty(B, n, dtype=torch.int64, device=logits.device) for n in (4, 4 * spans))
    lists = logits.new_empty(B, spans * sizes["TILES"] * TILE.value)
    pointers, (t, k, p, q), (t_row, k_row, p_row, q_row) = zip(temperature, top_k, top_p, min_p, strict=True)
    values = (*pointers, V, logits.stride(0), float(t), min(int(k), V), float(p), float(q))
    flags = sizes | dict(T_ROW=t_row, K_ROW=k_row, P_ROW=p_row, Q_ROW=q_row)
    block = triton.next_power_of_2(tiles.shape[2])
    sample_bracket_kernel[(B,)](
        logits, tiles, segments, brackets, *values, **flags, BLOCK=block, SAMPLED=max(1, min(bracket.SAMPLED, bracket.REGISTERS // block)),
        STEPS=bracket.STEPS, SIGMAS=bracket.SIGMAS, UNSEEN=bracket.UNSEEN, num_warps=bracket.WARPS)  # fmt: skip
    sample_collect_kernel[(B * spans,)](
        logits, tiles, brackets, counts, lists, temperature[0], min_p[0], V, logits.stride(0), float(t), float(q), T_ROW=t_row, Q_ROW=q_row,
        TILES=sizes["TILES"], num_warps=COLLECT_WARPS)  # fmt: skip
    sample_resolve_kernel[(B,)](
        logits, tiles, segments, brackets, counts, lists, seeds, positions, *outputs, *values, **flags, CHUNK=max(CHUNK, sizes["SEGMENTS"]),
        PIVOTS=PIVOTS, num_warps=RESOLVE_WARPS)  # fmt: skip


# What is in the bracket
@triton.jit(do_not_specialize_on_alignment=SMALL)
def sample_collect_kernel(logits_ptr, tiles_ptr, brackets_ptr, counts_ptr, lists_ptr, temperature_ptr, min_p_ptr, V, stride, temperature, min_p,
                          T_ROW: tl.constexpr, Q_ROW: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    segments = tl.cdiv(V, TILES * TILE)
    row, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    at = brackets_ptr + row * 4
    lo, hi, top = tl.load(at), tl.load(at + 1), tl.load(at + 3)
    if lo <= hi:
        if T_ROW:
            temperature = tl.load(temperature_ptr + row)
        if Q_ROW:
            min_p = tl.load(min_p_ptr + row)
        collect(logits_ptr + row * stride, tiles_ptr, counts_ptr, lists_ptr, row, segment, lo, hi, float_of(top), 1.0 / temperature, min_p, V, TILES)


@triton.jit
def collect(x_ptr, tiles_ptr, counts_ptr, lists_ptr, row, segment, lo, hi, m, inv_temperature, min_p, V, TILES: tl.constexpr):
    """Of a segment: number above the bracket and in it, mass above, least key that min-p keeps; and the logits in the bracket, in no order."""
    tiles, segments = tl.cdiv(V, TILE), tl.cdiv(V, TILES * TILE)
    tile = segment * TILES + tl.arange(0, TILES)
    largest = tl.load(tiles_ptr + row * 2 * tiles + tile, mask=tile < tiles, other=float("-inf"))
    # floats are in the order of their keys, and take fewer instructions
    low, high = float_of(lo), float_of(hi)
    near = largest >= low
    above_and_inside, mass, least = (lo * 0).to(tl.int32), lo * 0, low * 0 + float("inf")
    if tl.max(near.to(tl.int32), 0) > 0:
        x = segment_logits(x_ptr, segment, near[:, None], V, TILES)
        e = tl.exp2((x - m) * (inv_temperature * LOG2E))
        inside = (x >= low) & (x <= high)
        mass = tl.sum((tl.where(x > high, e, 0.0) * UNIT).to(tl.int64))
        above_and_inside = tl.sum(tl.where(x > high, 65536, inside.to(tl.int32)))
        least = tl.min(tl.where((x >= low) & (e >= min_p), x, float("inf")))
        if ((above_and_inside & 0xFFFF) > 0) & (lo < hi):
            rank = tl.cumsum(inside.to(tl.int32), 1)
            in_tile = tl.sum(inside.to(tl.int32), 1)
            rank += (tl.cumsum(in_tile, 0) - in_tile)[:, None] - 1
            tl.store(lists_ptr + (row * segments + segment) * (TILES * TILE) + rank, x.to(lists_ptr.dtype.element_ty), mask=inside)
    at = counts_ptr + row * 4 * segments + segment
    tl.store(at, (above_and_inside >> 16).to(tl.int64))
    tl.store(at + segments, (above_and_inside & 0xFFFF).to(tl.int64))
    tl.store(at + 2 * segments, mass)
    tl.store(at + 3 * segments, key_of(least).to(tl.int64))


# The threshold and the token
@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=SMALL)
def sample_resolve_kernel(
    logits_ptr, tiles_ptr, segments_ptr, brackets_ptr, counts_ptr, lists_ptr, seeds_ptr, positions_ptr, tokens_ptr, logps_ptr, full_logps_ptr,
    entropy_ptr, thresholds_ptr, last_kept_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V, stride, temperature, top_k, top_p, min_p,
    T_ROW: tl.constexpr, K_ROW: tl.constexpr, P_ROW: tl.constexpr, Q_ROW: tl.constexpr, TILES: tl.constexpr, SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    k, top_p, min_p, truncated = filters_of(row, top_k_ptr, top_p_ptr, min_p_ptr, top_k, top_p, min_p, V, K_ROW, P_ROW, Q_ROW)
    greedy = temperature == 0
    inv_temperature = 1.0 / tl.where(greedy, 1.0, temperature)
    x_ptr = logits_ptr + row * stride
    u = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, 0)
    ms, Ss, Us = row_segments(segments_ptr, row, V, TILES, SEGMENTS)
    m, S, U = merged(ms, Ss, Us, inv_temperature)
    bad = (S != S) | (S == 0)
    token, last_kept = tl.full([], V - 1, tl.int32), tl.full([], V - 1, tl.int64)
    threshold, log_kept = tl.where(bad, float("nan"), float("-inf")), tl.log(S)
    if (bad == 0) & (greedy | (truncated == 0)):
        token = draw_unfiltered(x_ptr, tiles_ptr, row, ms, Ss, m, inv_temperature, u, greedy, V, TILES, SEGMENTS)
        if greedy:
            threshold, last_kept = m, token.to(tl.int64)
    elif bad == 0:
        segments = tl.cdiv(V, TILES * TILE)
        row_mass = tl.sum(part_masses(ms, Ss, m, inv_temperature), 0)
        counts_ptr += row * 4 * segments
        at = brackets_ptr + row * 4
        lo, hi, proven = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        list_ptr, left, longest, mass_inside = runs(counts_ptr, lists_ptr, row, lo, hi, m, inv_temperature, segments, TILES, SEGMENTS, CHUNK)
        below, beyond = missed(counts_ptr, mass_inside, lo, proven, row_mass, k, top_p, segments, SEGMENTS)
        if below | beyond:
            lo, hi = tl.where(beyond, hi + 1, proven), tl.where(beyond, key_of(m).to(tl.int64), hi)
            for s in range(0, segments):
                collect(x_ptr, tiles_ptr, counts_ptr - row * 4 * segments, lists_ptr, row, s, lo, hi, m, inv_temperature, min_p, V, TILES)
            tl.debug_barrier()  # counts and list are read by other threads than wrote them
            list_ptr, left, longest, mass_inside = runs(counts_ptr, lists_ptr, row, lo, hi, m, inv_temperature, segments, TILES, SEGMENTS, CHUNK)
        t, room, ties, masses = filtered(counts_ptr, list_ptr, left, longest, mass_inside, lo, hi, m, inv_temperature, row_mass, k, top_p, segments,
                                         SEGMENTS, CHUNK, PIVOTS)  # fmt: skip
        threshold = float_of(t)
        segment = tl.arange(0, SEGMENTS)
        if room < tl.sum(ties, 0):
            i, rest, _ = reached(ties, segment, room - 1)
            last_kept = located(x_ptr, i, rest, t, V - 1, m, inv_temperature, V, True, TILES).to(tl.int64)
        kept_ties = tl.minimum(tl.maximum(room - (tl.cumsum(ties, 0) - ties), 0), ties)
        masses += kept_ties * mass_of(threshold, m, inv_temperature)
        kept = tl.sum(masses, 0)
        i, rest, _ = reached(masses, segment, target_of(u, kept))
        token = located(x_ptr, i, rest, t, last_kept, m, inv_temperature, V, False, TILES)
        log_kept = tl.log(kept.to(tl.float32) / UNIT)
    nan = tl.where(bad, float("nan"), 0.0)
    z = (tl.load(x_ptr + token).to(tl.float32) - m) * inv_temperature
    full = z - tl.log(S) + nan
    logp = tl.where(truncated, tl.minimum(z - log_kept, 0.0) + nan, full)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logps_ptr + row, tl.where(greedy, nan, logp))
    tl.store(full_logps_ptr + row, full)
    tl.store(entropy_ptr + row, tl.log(S) - U / S * inv_temperature + nan)
    tl.store(thresholds_ptr + row, threshold)
    tl.store(last_kept_ptr + row, last_kept)


@triton.jit
def count_plane(counts_ptr, plane, segments, SEGMENTS: tl.constexpr):
    segment = tl.arange(0, SEGMENTS)
    return tl.load(counts_ptr + plane * segments + segment, mask=segment < segments, other=0)


@triton.jit
def wanted_mass(limit, top_p):
    """ceil(limit top_p)"""
    exact = limit.to(tl.float64) * top_p
    wanted = exact.to(tl.int64)
    return wanted + (wanted.to(tl.float64) < exact).to(tl.int64)


@triton.jit
def runs(counts_ptr, lists_ptr, row, lo, hi, m, inv_temperature, segments, TILES: tl.constexpr, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr):
    """How CHUNK lanes walk the lists of SEGMENTS segments: pointers, what is left to each lane and the longest list; and the mass of all of it."""
    lane = tl.arange(0, CHUNK)
    segment, column = lane // (CHUNK // SEGMENTS), lane % (CHUNK // SEGMENTS)
    length = tl.load(counts_ptr + segments + segment, mask=(segment < segments) & (lo < hi), other=0).to(tl.int32)
    list_ptr, left, longest = lists_ptr + (row * segments + segment) * (TILES * TILE) + column, length - column, tl.max(length, 0)
    inside = count_plane(counts_ptr, 1, segments, SEGMENTS)
    # all that is listed is larger than -inf; the key below 0 is that of -0, which is not smaller than 0
    _, _, mass = tally(list_ptr, left, longest, m, inv_temperature, lo * 0 + FORBIDDEN, lo, hi, inside, SEGMENTS, CHUNK)
    return list_ptr, left, longest, tl.sum(mass, 0)


@triton.jit
def missed(counts_ptr, mass_inside, lo, proven, row_mass, k, top_p, segments, SEGMENTS: tl.constexpr):
    """Whether the threshold of top-k or top-p is below the bracket, and whether it is beyond."""
    above, wanted = tl.sum(count_plane(counts_ptr, 2, segments, SEGMENTS), 0), wanted_mass(row_mass, top_p)
    inside = mass_inside
    if k > 0:
        above, wanted = tl.sum(count_plane(counts_ptr, 0, segments, SEGMENTS), 0), k
        inside = tl.sum(count_plane(counts_ptr, 1, segments, SEGMENTS), 0)
    on = (k > 0) | (top_p < 1)
    return on & (above + inside < wanted) & (lo > proven), on & (above >= wanted)


@triton.jit
def filtered(counts_ptr, list_ptr, left, longest, mass_inside, lo, hi, m, inv_temperature, row_mass, k, top_p, segments, SEGMENTS: tl.constexpr,
             CHUNK: tl.constexpr, PIVOTS: tl.constexpr):  # fmt: skip
    """Key of the smallest kept logit, how many equal to it are kept (FAR: all), and of each segment the number of equal ones and the mass above."""
    above = tl.sum(count_plane(counts_ptr, 0, segments, SEGMENTS), 0)
    inside, mass_above = count_plane(counts_ptr, 1, segments, SEGMENTS), count_plane(counts_ptr, 2, segments, SEGMENTS)
    raised = tl.min(tl.where(tl.arange(0, SEGMENTS) < segments, count_plane(counts_ptr, 3, segments, SEGMENTS), FAR), 0)
    m_above = tl.sum(mass_above, 0)
    t, room, limit = lo, tl.full([], FAR, tl.int64), row_mass
    if k > 0:
        wanted = tl.minimum(k, above + tl.sum(inside, 0)) - above
        limit = m_above
        if wanted > 0:
            t = search(list_ptr, left, longest, m, inv_temperature, t, hi, wanted, False, CHUNK // SEGMENTS, CHUNK, PIVOTS)
            ties, n, mass = tally(list_ptr, left, longest, m, inv_temperature, t, lo, hi, inside, SEGMENTS, CHUNK)
            room = wanted - tl.sum(n, 0)
            limit += tl.sum(mass, 0) + room * mass_of(float_of(t), m, inv_temperature)
    if top_p < 1:
        available = tl.where(k > 0, limit, m_above + mass_inside)
        wanted = tl.minimum(wanted_mass(limit, top_p), available) - m_above
        if wanted > 0:  # else min-p decides
            before = t
            t = search(list_ptr, left, longest, m, inv_temperature, t, hi, wanted, True, CHUNK // SEGMENTS, CHUNK, PIVOTS)
            ties, n, mass = tally(list_ptr, left, longest, m, inv_temperature, t, lo, hi, inside, SEGMENTS, CHUNK)
            own = tl.maximum(mass_of(float_of(t), m, inv_temperature), 1)
            most = tl.where(t == before, tl.minimum(room, tl.sum(ties, 0)), tl.sum(ties, 0))
            room = tl.minimum(tl.maximum((wanted - tl.sum(mass, 0) + own - 1) // own, 1), most)
    room = tl.where(raised > t, FAR, room)
    t = tl.maximum(t, raised)
    ties, n, mass = tally(list_ptr, left, longest, m, inv_temperature, t, lo, hi, inside, SEGMENTS, CHUNK)
    return t, room, ties, mass_above + mass


@triton.jit
def listed(list_ptr, left, offset):
    """The next logits of the list; -inf where there is none."""
    return tl.load(list_ptr + offset, mask=offset < left, other=float("-inf")).to(tl.float32)


@triton.jit
def search(list_ptr, left, longest, m, inv_temperature, lo, hi, target, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
           PIVOTS: tl.constexpr):  # fmt: skip
    """The largest key t in [lo, hi] such that the listed logits of key >= t have mass (or number) `target` or more; that holds for lo."""
    j = tl.arange(0, PIVOTS) + 1
    while lo < hi:
        step = (hi - lo + PIVOTS - 1) // PIVOTS
        pivots = float_of(tl.minimum(lo + j * step, hi))
        sums = tl.zeros([PIVOTS, CHUNK], tl.int64)
        for offset in range(0, longest, WIDTH):
            x = listed(list_ptr, left, offset)
            if WEIGHTED:
                weight = mass_of(x, m, inv_temperature)
            else:
                weight = tl.full([CHUNK], 1, tl.int64)
            sums += tl.where(x[None, :] >= pivots[:, None], weight[None, :], 0)
        n = tl.sum((tl.sum(sums, 1) >= target).to(tl.int64), 0)
        low = float_of(tl.minimum(lo + n * step, hi))
        high = float_of(tl.where(n == PIVOTS, hi, tl.minimum(lo + (n + 1) * step, hi) - 1))
        # on to the keys that occur
        first, last = tl.full([CHUNK], float("inf"), tl.float32), tl.full([CHUNK], float("-inf"), tl.float32)
        for offset in range(0, longest, WIDTH):
            x = listed(list_ptr, left, offset)
            first = tl.minimum(first, tl.where(x >= low, x, float("inf")))
            last = tl.maximum(last, tl.where(x <= high, x, float("-inf")))
        lo, hi = key_of(tl.min(first, 0)).to(tl.int64), key_of(tl.max(last, 0)).to(tl.int64)
    return lo


@triton.jit
def tally(list_ptr, left, longest, m, inv_temperature, t, lo, hi, inside, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr):
    """Of each segment: the number in the bracket of key t, and number and mass of those of a larger key."""
    if lo == hi:
        ties, n = tl.where(t == lo, inside, 0), tl.where(t < lo, inside, 0)
        mass = n * mass_of(float_of(lo), m, inv_temperature)
    else:
        ties, n, mass = tl.zeros([CHUNK], tl.int64), tl.zeros([CHUNK], tl.int64), tl.zeros([CHUNK], tl.int64)
        threshold = float_of(t)
        for offset in range(0, longest, CHUNK // SEGMENTS):
            x = listed(list_ptr, left, offset)
            ties += (x == threshold).to(tl.int64)
            n += (x > threshold).to(tl.int64)
            mass += tl.where(x > threshold, mass_of(x, m, inv_temperature), 0)
        ties, n, mass = by_segment(ties, SEGMENTS), by_segment(n, SEGMENTS), by_segment(mass, SEGMENTS)
    return ties, n, mass


@triton.jit
def by_segment(x, SEGMENTS: tl.constexpr):
    return tl.sum(tl.reshape(x, [SEGMENTS, x.shape[0] // SEGMENTS]), 1)


@triton.jit
def located(x_ptr, segment, target, t, last_kept, m, inv_temperature, V, TIES: tl.constexpr, TILES: tl.constexpr):
    """First index of a segment at which the running mass of what is kept, or with TIES the running number of those of key t, exceeds target."""
    lane, tile = tl.arange(0, TILE), segment * TILES + tl.arange(0, TILES)
    x = segment_logits(x_ptr, segment, True, V, TILES)
    weights = kept_weights(x, tile[:, None] * TILE + lane[None, :], t, last_kept, m, inv_temperature, TIES)
    j, rest, _ = reached(tl.sum(weights, 1), tl.arange(0, TILES), target)
    v = (segment * TILES + j) * TILE + lane
    x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    n, _, _ = reached(kept_weights(x, v, t, last_kept, m, inv_temperature, TIES), lane, rest)
    return tl.minimum((segment * TILES + j) * TILE + n, V - 1)


@triton.jit
def kept_weights(x, v, t, last_kept, m, inv_temperature, TIES: tl.constexpr):
    key = key_of(x)
    if TIES:
        weights = (key == t).to(tl.int64)
    else:
        weights = tl.where((key > t) | ((key == t) & (v <= last_kept)), mass_of(x, m, inv_temperature), 0)
    return weights


def ahead_of_time() -> list[AheadOfTime]:
    more = {"counts_ptr": "*i64:16", "lists_ptr": "*fp32:16"}
    resolve = variants("sample_resolve", sample_resolve_kernel, dict(CHUNK=CHUNK, PIVOTS=PIVOTS), RESOLVE_WARPS, 128, more)
    resolve = [replace(case, stack=32) for case in resolve]  # 24 bytes on sm_100 under triton 3.9
    return variants("sample_collect", sample_collect_kernel, {}, COLLECT_WARPS, 255, more) + resolve
