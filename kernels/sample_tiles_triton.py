"""What sampling knows of a row without its logits: statistics of tiles and segments, and the draw that needs no more than them.

`sample_tiles_kernel` reads the logits once.  A program owns a segment, TILES tiles of 128 tokens, and writes
    segment:  m = its largest logit,  S = sum exp((x - m) / temperature),  U = sum (x - m) exp((x - m) / temperature)
    tile:     its largest logit (-inf = nothing allowed) and its own part of S
The segments merge into the row's m, S, U, and log S - U / (S temperature) is its entropy.  A draw without filters is an inverse CDF in three steps:
one uniform number picks a segment, what is left of it a tile, what is left of that a token.  Each step looks at 128 numbers or fewer, one warp's.

Masses are integers, floor(2^40 exp((x - max) / temperature)): their sums do not depend on an order.
"""

import triton
import triton.language as tl

from ._triton import AheadOfTime
from .logprob_triton import LOG2E, LOWEST, exponentials, rescaled

TILE = tl.constexpr(128)
TILES, TILE_WARPS = 16, 4  # tiles of a segment; 16 logits per thread in flight.  H200: 8, 16 and 32 tiles take equal time
UNIT = tl.constexpr(float(2**40))  # mass of the most likely token; V <= 2^22 keeps the sum within int64


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr"])
def sample_tiles_kernel(logits_ptr, temperature_ptr, tiles_ptr, segments_ptr, V, stride, temperature, T_ROW: tl.constexpr, TILES: tl.constexpr):
    tiles, segments = tl.cdiv(V, TILE), tl.cdiv(V, TILES * TILE)
    row, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    x = segment_logits(logits_ptr + row * stride, segment, True, V, TILES)
    largest = tl.max(x, 1)
    m = tl.maximum(tl.max(largest, 0), LOWEST)
    e, de = exponentials(x, m, inv_temperature)
    S = tl.sum(e, 1)
    tile = segment * TILES + tl.arange(0, TILES)
    at = tiles_ptr + row * 2 * tiles + tile
    tl.store(at, largest, mask=tile < tiles)
    tl.store(at + tiles, S, mask=tile < tiles)
    at = segments_ptr + row * 3 * segments + segment
    tl.store(at, m)
    tl.store(at + segments, tl.sum(S, 0))
    tl.store(at + 2 * segments, tl.sum(de))


@triton.jit
def segment_logits(x_ptr, segment, wanted, V, TILES: tl.constexpr):
    """Logits of a segment, (TILES, TILE); -inf beyond the vocabulary and in tiles that are not wanted."""
    v = (segment * TILES + tl.arange(0, TILES))[:, None] * TILE + tl.arange(0, TILE)[None, :]
    return tl.load(x_ptr + v, mask=wanted & (v < V), other=float("-inf")).to(tl.float32)


@triton.jit
def row_segments(segments_ptr, row, V, TILES: tl.constexpr, SEGMENTS: tl.constexpr):
    """m, S, U of every segment of a row."""
    segments = tl.cdiv(V, TILES * TILE)
    segment = tl.arange(0, SEGMENTS)
    at = segments_ptr + row * 3 * segments + segment
    there = segment < segments
    m = tl.load(at, mask=there, other=LOWEST)
    return m, tl.load(at + segments, mask=there, other=0.0), tl.load(at + 2 * segments, mask=there, other=0.0)


@triton.jit
def merged(ms, Ss, Us, inv_temperature):
    """m, S, U of the row."""
    m = tl.max(ms, 0)
    Ss, Us = rescaled(Ss, Us, ms, m, inv_temperature)
    return m, tl.sum(Ss, 0), tl.sum(Us, 0)


@triton.jit
def part_masses(ms, Ss, m, inv_temperature):
    """Integer masses of tiles or segments."""
    e = Ss * tl.exp2(tl.maximum(ms - m, -1e38) * (inv_temperature * LOG2E))
    return (tl.where(e == e, e, 0.0) * UNIT).to(tl.int64)  # a NaN row is handled by its statistics


@triton.jit
def mass_of(x, m, inv_temperature):
    return (tl.exp2((x - m) * (inv_temperature * LOG2E)) * UNIT).to(tl.int64)


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
def reached(weights, index, target):
    """First index whose running sum of int64 weights exceeds target, the part of target that it reaches into, and its own weight."""
    running = tl.cumsum(weights, 0)
    before = running <= target
    i = tl.sum(before.to(tl.int32), 0)
    return i, target - tl.max(tl.where(before, running, 0), 0), tl.sum(tl.where(index == i, weights, 0), 0)


@triton.jit
def pick(masses, index, u):
    """First index whose running mass exceeds u of the total; and the part of its own mass that u reaches into, in [0, 1)."""
    i, inside, own = reached(masses, index, target_of(u, tl.sum(masses, 0)))
    return i, inside.to(tl.float64) / tl.maximum(own, 1).to(tl.float64)


@triton.jit
def draw_unfiltered(x_ptr, tiles_ptr, row, ms, Ss, m, inv_temperature, u, greedy, V, TILES: tl.constexpr, SEGMENTS: tl.constexpr):
    """The token of u in vocabulary order, or of the largest logit, lowest index first."""
    segment, lane = tl.arange(0, SEGMENTS), tl.arange(0, TILES)
    i, rest = pick(part_masses(ms, Ss, m, inv_temperature), segment, u)
    i = tl.where(greedy, tl.min(tl.where((ms == m) & (Ss > 0), segment, SEGMENTS - 1), 0), i)
    tiles = tl.cdiv(V, TILE)
    at = tiles_ptr + row * 2 * tiles + i * TILES + lane
    there = i * TILES + lane < tiles
    largest, S = tl.load(at, mask=there, other=float("-inf")), tl.load(at + tiles, mask=there, other=0.0)
    j, rest = pick((S * UNIT).to(tl.int64), lane, rest)
    j = i * TILES + tl.where(greedy, tl.min(tl.where(largest == m, lane, TILES - 1), 0), j)
    v = j * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    n, _ = pick(mass_of(x, tl.max(x, 0), inv_temperature), tl.arange(0, TILE), rest)
    n = tl.where(greedy, tl.min(tl.where(x == m, tl.arange(0, TILE), TILE - 1), 0), n)
    return tl.minimum(j * TILE + n, V - 1)


def ahead_of_time() -> list[AheadOfTime]:
    cases = []
    for dtype, rows in (("fp32", False), ("bf16", True)):
        call = {"logits_ptr": f"*{dtype}:16", "temperature_ptr": "*fp32" if rows else "*i64", "tiles_ptr": "*fp32:16", "segments_ptr": "*fp32:16",
                "V": "i32:16", "stride": "i32:16", "temperature": "fp32"}  # fmt: skip
        flags = dict(T_ROW=rows, TILES=TILES)
        cases.append(AheadOfTime(f"sample_tiles {dtype}", sample_tiles_kernel, call, flags, TILE_WARPS))
    # a launch compiles in an integer of 1: a vocabulary of one token
    call = {name: kind for name, kind in call.items() if name not in ("V", "stride")}
    return [*cases, AheadOfTime("sample_tiles V=1", sample_tiles_kernel, call, flags | dict(V=1, stride=1), TILE_WARPS)]
