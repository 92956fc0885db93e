"""Top-k, top-p and min-p for sample_triton.py, first half: keys lo <= hi of a row between which the threshold should lie.

`sample_bracket_kernel`, one program per row, looks at SAMPLED of every 128 tokens and at the largest logit of every tile.  Where n tokens were seen,
one in E, there are E (n +- (4 sqrt(n) + 12)) but for one row in some 100,000; likewise the mass below t is E (sum e +- (4 sqrt(sum e^2) + 12 e_t)).
- top-p: the mass below t against (1 - p) of the row's, which is known.
- top-k: the number at or above t; and k tiles whose largest logit is t or more prove it.
- min-p: the keys next to max + temperature log(min_p).
Both ends are found by halving.  sample_filter_triton.py finds out whether the threshold lies in between.

Predicted for an H200 (a first version took 23 us): 128 rows of V = 151936, 16 loads per thread and 24 sums that wait for each other: 8-10 us.
"""

import triton
import triton.language as tl

from ._triton import AheadOfTime
from .logprob_triton import LOG2E, LOWEST
from .sample_tiles_triton import TILE, TILES, merged, row_segments

# Not measured on a GPU yet
SAMPLED, STEPS, WARPS = 8, 9, 16  # of a tile's 128 tokens, one sector of fp32; halvings
REGISTERS = 16384  # logits that a program holds: fewer of a tile where V is more than 262144
SIGMAS, UNSEEN = 4.0, 12.0  # the margins above: of what was not seen at all there are 12 E tokens with a probability of e^-12
FAR = tl.constexpr(1 << 40)  # beyond every key and index
SMALL = ["seeds_ptr", "positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "tokens_ptr", "logps_ptr", "full_logps_ptr",
         "entropy_ptr", "thresholds_ptr", "last_kept_ptr"]  # fmt: skip


@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=SMALL)
def sample_bracket_kernel(
    logits_ptr, tiles_ptr, segments_ptr, brackets_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V, stride, temperature, top_k, top_p, min_p,
    T_ROW: tl.constexpr, K_ROW: tl.constexpr, P_ROW: tl.constexpr, Q_ROW: tl.constexpr, TILES: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr, SAMPLED: tl.constexpr, STEPS: tl.constexpr, SIGMAS: tl.constexpr, UNSEEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    k, top_p, min_p, truncated = filters_of(row, top_k_ptr, top_p_ptr, min_p_ptr, top_k, top_p, min_p, V, K_ROW, P_ROW, Q_ROW)
    inv_temperature = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    ms, Ss, Us = row_segments(segments_ptr, row, V, TILES, SEGMENTS)
    m, S, _ = merged(ms, Ss, Us, inv_temperature)
    scale = inv_temperature * LOG2E
    top = key_of(m).to(tl.int64)
    lo, hi, proven = tl.full([], FAR, tl.int64), tl.full([], -FAR, tl.int64), key_of(m * 0 + LOWEST).to(tl.int64)  # lo > hi: nothing to collect
    if truncated & (temperature != 0) & (S > 0):
        lo, hi = proven, top
        if (k > 0) | (top_p < 1):
            tile = tl.arange(0, BLOCK)
            largest = tl.load(tiles_ptr + row * 2 * tl.cdiv(V, TILE) + tile, mask=tile < tl.cdiv(V, TILE), other=float("-inf"))
            v = (tile * TILE + sampled_run(tile, SAMPLED) * SAMPLED)[:, None] + tl.arange(0, SAMPLED)[None, :]
            x = tl.load(logits_ptr + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
            e = tl.exp2((x - m) * scale)
            spare = S * (1.0 - top_p)
            # the threshold is a or more, b may be too high; it is d or less, c may be too low.  Top-p: V tokens of less than a weigh less than spare
            a = tl.where(k > 0, LOWEST, tl.maximum(m + tl.log2(tl.where(k > 0, S, spare) / (S * V)) / scale, LOWEST))
            b, c, d = m, a, m
            first = tl.maximum(tl.min(tl.where(x > float("-inf"), x, m)), a)
            for step in range(0, STEPS + 3):
                # first the ends of what was seen, so that equal logits are done and a narrow row is halved in its width; then 2^-40 of the largest
                probe = tl.where(step == 0, first, tl.where(step == 1, m, tl.maximum(m - 40.0 / scale, first)))
                t = tl.where(step < 3, probe, a + (b - a) * 0.5)
                at_least = surely(True, x, e, largest, t, m, scale, k, spare, TILE // SAMPLED, SIGMAS, UNSEEN)
                a, b = tl.where(at_least, tl.maximum(a, t), a), tl.where(at_least, b, tl.minimum(b, t))
                t = tl.where(step < 3, probe, c + (d - c) * 0.5)
                at_most = surely(False, x, e, largest, t, m, scale, k, spare, TILE // SAMPLED, SIGMAS, UNSEEN)
                c, d = tl.where(at_most, c, tl.maximum(c, t)), tl.where(at_most, tl.minimum(d, t), d)
            lo = tl.minimum(tl.maximum(key_of(a).to(tl.int64), proven), top)
            # of what top-k leaves top-p keeps a part that is not known yet
            hi = tl.where((k > 0) & (top_p < 1), top, tl.maximum(tl.minimum(key_of(d).to(tl.int64), top), lo))
        if min_p > 0:
            # 2^-10 and one key cover the rounding of the logarithm and of exp2
            least = key_of(m + tl.log2(min_p * (1 - 0.0009765625)) / scale).to(tl.int64) - 1
            most = key_of(m + tl.log2(min_p * (1 + 0.0009765625)) / scale).to(tl.int64) + 1
            if (k == 0) & (top_p >= 1):
                hi = lo
            # top-p is of what top-k leaves: all k must be seen then
            proven = tl.where(k > 0, proven, tl.maximum(proven, tl.minimum(least, top)))
            lo = tl.maximum(lo, proven)
            hi = tl.minimum(tl.maximum(tl.maximum(hi, most), lo), top)
    at = brackets_ptr + row * 4
    tl.store(at, lo)
    tl.store(at + 1, hi)
    tl.store(at + 2, proven)
    tl.store(at + 3, top)


# Keys and parameters, shared with sample_filter_triton.py
@triton.jit
def key_of(x):
    """int32 in the order of the floats; -0 and 0 share one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def filters_of(row, top_k_ptr, top_p_ptr, min_p_ptr, top_k, top_p, min_p, V, K_ROW: tl.constexpr, P_ROW: tl.constexpr, Q_ROW: tl.constexpr):
    """k, 0 where it is off, top_p, min_p, and whether any of them is on."""
    k = top_k.to(tl.int64)
    if K_ROW:
        k = tl.load(top_k_ptr + row)
    if P_ROW:
        top_p = tl.load(top_p_ptr + row)
    if Q_ROW:
        min_p = tl.load(min_p_ptr + row)
    k = tl.where(k < V, k, 0)
    return k, top_p, min_p, (k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def sampled_run(tile, SAMPLED: tl.constexpr):
    """Which run of SAMPLED tokens of a tile is looked at: another one in the next tile, so that no order of the vocabulary hides from them."""
    return ((tile * 40503 & 0xFFFF) * (TILE // SAMPLED)) >> 16


@triton.jit
def surely(LEAST: tl.constexpr, x, e, largest, t, m, scale, k, spare, EVERY: tl.constexpr, SIGMAS: tl.constexpr, UNSEEN: tl.constexpr):
    """Whether the threshold is surely t or more (LEAST), or t or less."""
    if k > 0:
        n = tl.sum((x >= t).to(tl.int32)).to(tl.float32)
        margin = SIGMAS * tl.sqrt(n)
        if LEAST:
            sure = (tl.sum((largest >= t).to(tl.int32), 0) >= k) | (EVERY * (n - margin) >= k)
        else:
            sure = EVERY * (n + margin + UNSEEN) < k
    else:
        seen = tl.where(x < t, e, 0.0)
        below, margin = tl.sum(seen), SIGMAS * tl.sqrt(tl.sum(seen * seen))
        if LEAST:
            sure = EVERY * (below + margin + UNSEEN * tl.exp2((t - m) * scale)) <= spare
        else:
            sure = EVERY * (below - margin) >= spare
    return sure


def row_signature(dtype: str, rows: bool) -> dict[str, str]:
    """Types of the arguments of a row, its filters and its outputs."""
    signature = {"logits_ptr": f"*{dtype}:16", "tiles_ptr": "*fp32:16", "segments_ptr": "*fp32:16", "brackets_ptr": "*i64:16", "V": "i32:16",
                 "stride": "i32:16", "temperature": "fp32", "top_k": "i32", "top_p": "fp32", "min_p": "fp32", "top_k_ptr": "*i64"}  # fmt: skip
    signature |= dict.fromkeys(("temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32" if rows else "*i64")
    signature |= dict.fromkeys(("seeds_ptr", "positions_ptr", "tokens_ptr", "last_kept_ptr"), "*i64")
    return signature | dict.fromkeys(("logps_ptr", "full_logps_ptr", "entropy_ptr", "thresholds_ptr"), "*fp32")


# dtype, whether parameters are per row, and the integers that a launch compiles in because they are 1: in a vocabulary of one token
VARIANTS = [("fp32", False, {}), ("bf16", True, {}), ("fp32", True, {"V": 1, "stride": 1})]


def variants(name: str, kernel, constants: dict, warps: int, registers: int, more: dict[str, str] | None = None) -> list[AheadOfTime]:
    """The kernel ahead of time for each of VARIANTS; `constants` holds what differs from kernel to kernel."""
    cases = []
    for dtype, rows, ones in VARIANTS:
        flags = dict(T_ROW=rows, K_ROW=rows, P_ROW=rows, Q_ROW=rows, TILES=TILES, SEGMENTS=1 if ones else 128) | ones | constants
        signature = row_signature(dtype, rows) | (more or {})
        given = {arg: signature[arg] for arg in kernel.arg_names if arg in signature and arg not in ones}
        flags = {arg: flags[arg] for arg in kernel.arg_names if arg not in given}
        cases.append(AheadOfTime(f"{name} {dtype}" + " V=1" * bool(ones), kernel, given, flags, warps, registers=registers))
    return cases


def ahead_of_time() -> list[AheadOfTime]:
    return variants("sample_bracket", sample_bracket_kernel, dict(BLOCK=2048, SAMPLED=SAMPLED, STEPS=STEPS, SIGMAS=SIGMAS, UNSEEN=UNSEEN), WARPS, 128)
