"""sample in Triton: exact filters without a sort, one read of the logits and then only the tiles that matter; the rules are those of sample.py.

`sample_tiles_kernel` reads the logits once and writes for every tile of 128 tokens m = its largest logit, S = sum exp((x - m) / temperature) and
U = sum (x - m) exp((x - m) / temperature).  `sample_draw_kernel`, one program per row, merges the tiles into the row's statistics and draws:

- No filter: one uniform number picks a tile by the integer masses of the tiles, what is left of it a token in that tile, in vocabulary order.
- Filters: first a lower bound of the threshold from the tiles alone.  Everything below t is certainly dropped if k tiles have a maximum of t or
  more; or if sum over tiles of min(mass, 128 exp((t - m) / temperature)) <= (1 - top_p) of the row's mass; or if exp((t - m) / temperature) < min_p.
  Only tiles with a maximum above the bound are read again.  Among their logits the threshold is found exactly by a search over keys, int32 in the
  order of the floats: PIVOTS equidistant keys per pass, the interval then shrinks to the keys that occur in it.  At most 11 passes of 3 bits.

Masses are integers, floor(2^40 exp((x - max) / temperature)): sums do not depend on their order.  Every structure depends on V alone, so a row has
the same bits in any batch, at any place.  Nothing is compiled anew for other parameters or batches.  Equal logits are kept by lowest index.

Predicted for an H200, not measured: 128 rows of V = 151936 in fp32 are 78 MB, one read at 4.3 TB/s is 18 us; 12 B per tile written and read add
2.5 %.  Without filters the second launch adds 4-5 us: 23 us.  With filters that leave 8 tiles or fewer about 33 us, with 64 tiles about 50 us; the
goal is 30 us.  A nearly flat row, whose nucleus is spread over all tiles, is read once per pass from L2: several hundred us, still exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .logprob_triton import LOG2E, LOWEST, exponentials, rescaled

TILE = tl.constexpr(128)
# Not measured on a GPU yet
TILES_PER_PROGRAM, TILE_WARPS = 32, 4  # 32 logits per thread in flight
CHUNK, PIVOTS, DRAW_WARPS = 1024, 8, 8
UNIT = tl.constexpr(float(2**40))  # mass of the most likely token; V <= 2^22 keeps the sum within int64
BOUND_STEPS = tl.constexpr(16)  # halvings for the lower bound, which need not be tight
FAR = tl.constexpr(1 << 40)  # beyond every key and index


def sample_triton(logits: Tensor, temperature, top_k, top_p, min_p, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    B, V = logits.shape
    device = logits.device
    tokens, last_kept = (torch.empty(B, dtype=torch.int64, device=device) for _ in range(2))
    logps, full_logps, entropy, thresholds = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(4))
    if B:
        tiles = triton.cdiv(V, TILE.value)
        partials = torch.empty(3, B, tiles, dtype=torch.float32, device=device)
        candidates = torch.empty(B, tiles, dtype=torch.int32, device=device)
        t_ptr, t, t_row = per_row(temperature, seeds, torch.float32)
        k_ptr, k, k_row = per_row(top_k, seeds, torch.int64)
        p_ptr, p, p_row = per_row(top_p, seeds, torch.float32)
        q_ptr, q, q_row = per_row(min_p, seeds, torch.float32)
        with on_device_of(logits):
            sample_tiles_kernel[(B * triton.cdiv(tiles, TILES_PER_PROGRAM),)](
                logits, t_ptr, partials, B, V, tiles, logits.stride(0), float(t), T_ROW=t_row, TILES=TILES_PER_PROGRAM,
                num_warps=TILE_WARPS)  # fmt: skip
            sample_draw_kernel[(B,)](
                logits, partials, candidates, seeds.contiguous(), positions.contiguous(), t_ptr, k_ptr, p_ptr, q_ptr, tokens, logps, full_logps,
                entropy, thresholds, last_kept, B, V, tiles, logits.stride(0), float(t), min(int(k), V), float(p), float(q),
                T_ROW=t_row, K_ROW=k_row, P_ROW=p_row, Q_ROW=q_row, BLOCK=triton.next_power_of_2(tiles), CHUNK=CHUNK, PIVOTS=PIVOTS,
                num_warps=DRAW_WARPS)  # fmt: skip
    return tokens, logps, full_logps, entropy, thresholds, last_kept


def per_row(value, seeds: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, bool]:
    """Pointer, number, and which of the two counts: a number is an argument of the launch, not a tensor that another launch would have to fill."""
    if isinstance(value, Tensor):
        return value.to(dtype).contiguous(), 0, True
    return seeds, value, False


SMALL = ["seeds_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "tokens_ptr", "logps_ptr", "full_logps_ptr",
         "entropy_ptr", "thresholds_ptr", "last_kept_ptr"]  # fmt: skip


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["temperature_ptr"])
def sample_tiles_kernel(logits_ptr, temperature_ptr, partials_ptr, B, V, tiles, stride, temperature, T_ROW: tl.constexpr, TILES: tl.constexpr):
    programs = tl.cdiv(tiles, TILES)
    row = (tl.program_id(0) // programs).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    tile = tl.program_id(0) % programs * TILES + tl.arange(0, TILES)
    v = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(logits_ptr + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    m = tl.maximum(tl.max(x, 1), LOWEST)
    e, de = exponentials(x, m[:, None], inv_temperature)
    at = partials_ptr + row * tiles + tile
    plane = tiles.to(tl.int64) * B
    tl.store(at, m, mask=tile < tiles)
    tl.store(at + plane, tl.sum(e, 1), mask=tile < tiles)
    tl.store(at + 2 * plane, tl.sum(de, 1), mask=tile < tiles)


@triton.jit(do_not_specialize=["B", "top_k"], do_not_specialize_on_alignment=SMALL)
def sample_draw_kernel(
    logits_ptr, partials_ptr, candidates_ptr, seeds_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    tokens_ptr, logps_ptr, full_logps_ptr, entropy_ptr, thresholds_ptr, last_kept_ptr, B, V, tiles, stride, temperature, top_k, top_p, min_p,
    T_ROW: tl.constexpr, K_ROW: tl.constexpr, P_ROW: tl.constexpr, Q_ROW: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    k = top_k.to(tl.int64)
    if K_ROW:
        k = tl.load(top_k_ptr + row)
    if P_ROW:
        top_p = tl.load(top_p_ptr + row)
    if Q_ROW:
        min_p = tl.load(min_p_ptr + row)
    greedy = temperature == 0
    inv_temperature = 1.0 / tl.where(greedy, 1.0, temperature)
    x_ptr = logits_ptr + row * stride
    tile = tl.arange(0, BLOCK)
    at = partials_ptr + row * tiles + tile
    ms, Ss, Us = load_tiles(at, tiles.to(tl.int64) * B, tile < tiles)
    m, S, U = merged(ms, Ss, Us, inv_temperature)
    bad = (S != S) | (S == 0)
    masses = tile_masses(ms, Ss, m, inv_temperature)
    u = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, 0)

    token, threshold, last_kept = V - 1, float("-inf"), (V - 1).to(tl.int64)
    log_kept = tl.log(tl.where(bad, 1.0, S))
    truncated = ((k > 0) & (k < V)) | (top_p < 1) | (min_p > 0)
    if bad:
        threshold = float("nan")
    elif greedy:
        j = tl.min(tl.where((ms == m) & (tile < tiles), tile, BLOCK - 1), 0)
        _, x = tile_logits(x_ptr, j, V)
        token = j * TILE + tl.min(tl.where(x == m, tl.arange(0, TILE), TILE - 1), 0)
        threshold, last_kept = m, token.to(tl.int64)
    elif not truncated:
        j, rest = pick(masses, tile, u)
        v, x = tile_logits(x_ptr, j, V)
        largest = tl.max(x, 0)
        token = j * TILE + pick(mass_of(x, largest, inv_temperature), tl.arange(0, TILE), rest)[0]
    else:
        list_ptr = candidates_ptr + row * tiles
        lo = bound(ms, Ss, m, S, inv_temperature, k, top_p, min_p, V)
        near = (key_of(ms) >= lo) & (Ss > 0)
        tl.store(list_ptr + tl.cumsum(near.to(tl.int32), 0) - 1, tile, mask=near)
        chunks = tl.cdiv(tl.sum(near.to(tl.int32), 0), CHUNK // TILE)
        count = tl.sum(near.to(tl.int32), 0)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        t, room, kept = filtered(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, lo, k, top_p, min_p, tl.sum(masses, 0), CHUNK, PIVOTS)
        threshold = float_of(t)
        last_kept = last_tied(x_ptr, list_ptr, count, chunks, V, t, room, CHUNK)
        token = pick_kept(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, last_kept, target_of(u, kept), CHUNK).to(tl.int32)
        log_kept = tl.log(kept.to(tl.float32) / UNIT)
    z = (tl.load(x_ptr + token).to(tl.float32) - m) * inv_temperature
    nan = tl.where(bad, float("nan"), 0.0)
    full = z - tl.log(S) + nan
    logp = tl.where(truncated, tl.minimum(z - log_kept, 0.0) + nan, full)
    one = tl.arange(0, 1)
    tl.store(tokens_ptr + row + one, token.to(tl.int64))
    tl.store(logps_ptr + row + one, tl.where(greedy, 0.0 + nan, logp))
    tl.store(full_logps_ptr + row + one, full)
    tl.store(entropy_ptr + row + one, tl.log(S) - U / S * inv_temperature + nan)
    tl.store(thresholds_ptr + row + one, threshold)
    tl.store(last_kept_ptr + row + one, last_kept)


# Tiles, shared with linear_sample_triton.py
@triton.jit
def load_tiles(at, plane, mask):
    m = tl.load(at, mask=mask, other=LOWEST)
    return m, tl.load(at + plane, mask=mask, other=0.0), tl.load(at + 2 * plane, mask=mask, other=0.0)


@triton.jit
def merged(ms, Ss, Us, inv_temperature):
    """m, S, U of the row."""
    m = tl.max(ms, 0)
    Ss, Us = rescaled(Ss, Us, ms, m, inv_temperature)
    return m, tl.sum(Ss, 0), tl.sum(Us, 0)


@triton.jit
def tile_masses(ms, Ss, m, inv_temperature):
    e = Ss * tl.exp2(tl.maximum(ms - m, -1e38) * (inv_temperature * LOG2E))
    return (tl.where(e == e, e, 0.0) * UNIT).to(tl.int64)  # a NaN row is handled by its statistics


@triton.jit
def uniform(seed, position, tile, stream):
    """53 random bits as a number in [0, 1), the same as philox_uniform's."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, low, high, low * 0 + tile, low * 0 + stream)
    bits = (a >> 5).to(tl.int64) * 67108864 + (b >> 6).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def target_of(u, total):
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def pick(masses, index, u):
    """First index whose running mass exceeds u of the total; and the part of its own mass that u reaches into, in [0, 1)."""
    running = tl.cumsum(masses, 0)
    target = target_of(u, tl.sum(masses, 0))
    before = running <= target
    i = tl.sum(before.to(tl.int32), 0)
    inside = target - tl.max(tl.where(before, running, 0), 0)
    own = tl.sum(tl.where(index == i, masses, 0), 0)
    return i, inside.to(tl.float64) / tl.maximum(own, 1).to(tl.float64)


@triton.jit
def tile_logits(x_ptr, j, V):
    v = j * TILE + tl.arange(0, TILE)
    return v, tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def mass_of(x, m, inv_temperature):
    return (tl.exp2((x - m) * (inv_temperature * LOG2E)) * UNIT).to(tl.int64)


# The search for the threshold
@triton.jit
def key_of(x):
    """int32 in the order of the floats; -0 and 0 share one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def bound(ms, Ss, m, S, inv_temperature, k, top_p, min_p, V):
    """A key below which certainly nothing is kept, int64."""
    scale = inv_temperature * LOG2E
    tile_mass = Ss * tl.exp2(tl.maximum(ms - m, -1e38) * scale)
    lo, hi = key_of(tl.full([1], LOWEST, tl.float32)).to(tl.int64), key_of(m).to(tl.int64)
    lo = tl.sum(lo, 0)
    # the margin of 2^-10 covers the rounding of the sums
    spare = S * (1 - top_p) * (1 - 0.0009765625)
    for _ in range(BOUND_STEPS):
        middle = lo + (hi - lo + 1) // 2
        t = float_of(middle)
        e = tl.exp2((t - m) * scale)
        enough = tl.sum(((ms >= t) & (Ss > 0)).to(tl.int64), 0)
        below = tl.sum(tl.minimum(tile_mass, 128.0 * e), 0)
        other = (min_p * (1 - 0.0009765625) > e) | ((top_p < 1) & (below <= spare))
        # top-p is of what top-k leaves: all k must be seen then
        dropped = tl.where((k > 0) & (k < V), enough >= k, other)
        lo, hi = tl.where(dropped, middle, lo), tl.where(dropped, hi, tl.maximum(middle - 1, lo))
    return lo


@triton.jit
def chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK: tl.constexpr):
    """Index, logit and key of the next CHUNK tokens of the listed tiles, in vocabulary order; -inf where there is none."""
    lane = chunk * CHUNK + tl.arange(0, CHUNK)
    there = lane // TILE < count
    v = tl.load(list_ptr + lane // TILE, mask=there, other=0) * TILE + lane % TILE
    x = tl.load(x_ptr + v, mask=there & (v < V), other=float("-inf")).to(tl.float32)
    return v, x, key_of(x)


@triton.jit
def search(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, lo, hi, target, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, PIVOTS: tl.constexpr):
    """The largest key t in [lo, hi] such that the tokens of key >= t have mass (or number) `target` or more; that holds for lo."""
    j = tl.arange(0, PIVOTS) + 1
    while lo < hi:
        step = (hi - lo + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(lo + j * step, hi).to(tl.int32)
        sums = tl.zeros([PIVOTS, CHUNK], tl.int64)
        for chunk in range(0, chunks):
            v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
            if WEIGHTED:
                weight = mass_of(x, m, inv_temperature)
            else:
                weight = tl.full([CHUNK], 1, tl.int64)
            sums += tl.where(key[None, :] >= pivots[:, None], weight[None, :], 0)
        n = tl.sum((tl.sum(sums, 1) >= target).to(tl.int64), 0)
        low, high = tl.minimum(lo + n * step, hi), tl.where(n == PIVOTS, hi, tl.minimum(lo + (n + 1) * step, hi) - 1)
        # on to the keys that occur
        first, last = tl.full([CHUNK], FAR, tl.int64), tl.full([CHUNK], -FAR, tl.int64)
        for chunk in range(0, chunks):
            v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
            first = tl.minimum(first, tl.where(key >= low, key.to(tl.int64), FAR))
            last = tl.maximum(last, tl.where(key <= high, key.to(tl.int64), -FAR))
        lo, hi = tl.min(first, 0), tl.max(last, 0)
    return lo


@triton.jit
def tally(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, CHUNK: tl.constexpr):
    """Number and mass of the tokens of key > t, number of those of key t."""
    n, mass, ties = tl.zeros([CHUNK], tl.int64), tl.zeros([CHUNK], tl.int64), tl.zeros([CHUNK], tl.int64)
    for chunk in range(0, chunks):
        v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
        n += (key > t).to(tl.int64)
        mass += tl.where(key > t, mass_of(x, m, inv_temperature), 0)
        ties += (key == t).to(tl.int64)
    return tl.sum(n, 0), tl.sum(mass, 0), tl.sum(ties, 0)


@triton.jit
def filtered(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, lo, k, top_p, min_p, row_mass, CHUNK: tl.constexpr, PIVOTS: tl.constexpr):
    """Key of the smallest kept logit, how many of those equal to it are kept (FAR: all), and the integer mass of all that is kept."""
    hi = key_of(m).to(tl.int64)
    t, room = lo, tl.full([], FAR, tl.int64)
    n, mass, ties = tally(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, lo - 1, CHUNK)
    n, mass = n + ties, mass + ties * mass_of(float_of(lo - 1), m, inv_temperature)
    limit = tl.maximum(row_mass, mass)  # the row's own mass: tiles below the bound count in top-p
    if (k > 0) & (k < V):
        k = tl.minimum(k, n)
        t = search(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, lo, hi, k, False, CHUNK, PIVOTS)
        n, mass, ties = tally(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, CHUNK)
        room = k - n
        limit = mass + room * mass_of(float_of(t), m, inv_temperature)
        mass = limit
    if top_p < 1:
        exact = limit.to(tl.float64) * top_p
        wanted = exact.to(tl.int64)
        wanted = tl.minimum(wanted + (wanted.to(tl.float64) < exact).to(tl.int64), mass)
        before, t = t, search(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, hi, wanted, True, CHUNK, PIVOTS)
        n, mass, ties = tally(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, CHUNK)
        own = tl.maximum(mass_of(float_of(t), m, inv_temperature), 1)
        available = tl.where(t == before, tl.minimum(room, ties), ties)
        room = tl.minimum(tl.maximum((wanted - mass + own - 1) // own, 1), available)
    least = tl.full([CHUNK], FAR, tl.int64)
    for chunk in range(0, chunks):
        v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
        e = tl.exp2((x - m) * (inv_temperature * LOG2E))
        least = tl.minimum(least, tl.where((key >= t) & (e >= min_p), key.to(tl.int64), FAR))
    raised = tl.min(least, 0)
    room = tl.where(raised == t, room, FAR)
    n, mass, ties = tally(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, raised, CHUNK)
    room = tl.where(room >= ties, FAR, room)
    return raised, room, mass + tl.minimum(room, ties) * mass_of(float_of(raised), m, inv_temperature)


@triton.jit
def last_tied(x_ptr, list_ptr, count, chunks, V, t, room, CHUNK: tl.constexpr):
    """Index of the room-th token of key t; V - 1 where all are kept."""
    last = (V - 1).to(tl.int64)
    if room < FAR:
        seen = tl.full([], 0, tl.int64)
        for chunk in range(0, chunks):
            v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
            tied = (key == t).to(tl.int64)
            rank = seen + tl.cumsum(tied, 0)
            last = tl.minimum(last, tl.min(tl.where((tied > 0) & (rank == room), v.to(tl.int64), FAR), 0))
            seen += tl.sum(tied, 0)
    return last


@triton.jit
def pick_kept(x_ptr, list_ptr, count, chunks, V, m, inv_temperature, t, last_kept, target, CHUNK: tl.constexpr):
    """First index, in vocabulary order, at which the running mass of what is kept exceeds the target."""
    token, seen = (V - 1).to(tl.int64), tl.full([], 0, tl.int64)
    for chunk in range(0, chunks):
        v, x, key = chunk_logits(x_ptr, list_ptr, count, chunk, V, CHUNK)
        kept = (key > t) | ((key == t) & (v <= last_kept))
        mass = tl.where(kept, mass_of(x, m, inv_temperature), 0)
        running = seen + tl.cumsum(mass, 0)
        token = tl.minimum(token, tl.min(tl.where((running > target) & (mass > 0), v.to(tl.int64), FAR), 0))
        seen += tl.sum(mass, 0)
    return token


def ahead_of_time() -> list[AheadOfTime]:
    sizes = {"B": "i32", "V": "i32:16", "tiles": "i32", "stride": "i32:16", "temperature": "fp32"}
    cases = []
    for dtype, rows in (("fp32", False), ("bf16", True)):
        logits = {"logits_ptr": f"*{dtype}:16", "partials_ptr": "*fp32:16"}
        t_ptr = {"temperature_ptr": "*fp32" if rows else "*i64"}
        tiles = logits | t_ptr | sizes
        cases.append(AheadOfTime(f"sample_tiles {dtype}", sample_tiles_kernel, tiles, dict(T_ROW=rows, TILES=TILES_PER_PROGRAM), TILE_WARPS))
        small = dict.fromkeys(SMALL[:2], "*i64") | t_ptr
        small |= dict.fromkeys(("logps_ptr", "full_logps_ptr", "entropy_ptr", "thresholds_ptr"), "*fp32")
        filters = {"top_k_ptr": "*i64", "top_p_ptr": "*fp32" if rows else "*i64", "min_p_ptr": "*fp32" if rows else "*i64"}
        draw = logits | sizes | small | filters | {"candidates_ptr": "*i32:16", "tokens_ptr": "*i64", "last_kept_ptr": "*i64"}
        draw |= {"top_k": "i32", "top_p": "fp32", "min_p": "fp32"}
        flags = dict(T_ROW=rows, K_ROW=rows, P_ROW=rows, Q_ROW=rows, BLOCK=2048, CHUNK=CHUNK, PIVOTS=PIVOTS)
        cases.append(AheadOfTime(f"sample_draw {dtype}", sample_draw_kernel, draw, flags, DRAW_WARPS, registers=255))
    return cases
