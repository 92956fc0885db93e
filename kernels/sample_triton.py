"""sample in Triton: one read of the logits, and with filters a second one of the tiles that matter; the rules are those of sample.py.

Without filters two launches: `sample_tiles_kernel` (sample_tiles_triton.py) and `sample_draw_kernel`, one warp per row.  With filters three more
kernels find what is kept, without a sort (sample_filter_triton.py).  Every structure depends on V alone, so a row has the same bits in any batch, at
any place.  Nothing is compiled anew for other parameters or batches.  Equal logits are kept by lowest index.

On an H200 22 + 4 us.  128 rows of V = 151936 in fp32 are 78 MB, one read at 4.3 TB/s is 18 us; the draw is three loads that wait for
each other, one warp's sums in between and ten rounds of Philox, 5 us, and the second launch 2 us: 26 us.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sample_filter_triton as filters
from . import sample_tiles_triton as parts
from ._triton import AheadOfTime, on_device_of
from .sample_bracket_triton import SMALL, variants
from .sample_tiles_triton import TILE, draw_unfiltered, merged, row_segments, sample_tiles_kernel, uniform

DRAW_WARPS = 1


def sample_triton(logits: Tensor, temperature, top_k, top_p, min_p, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    B, V = logits.shape
    device = logits.device
    tokens, last_kept = (torch.empty(B, dtype=torch.int64, device=device) for _ in range(2))
    logps, full_logps, entropy, thresholds = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(4))
    outputs = tokens, logps, full_logps, entropy, thresholds, last_kept
    if not B:
        return outputs
    segments = triton.cdiv(V, parts.TILES * TILE.value)
    tiles = torch.empty(B, 2, triton.cdiv(V, TILE.value), dtype=torch.float32, device=device)
    statistics = torch.empty(B, 3, segments, dtype=torch.float32, device=device)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    t_ptr, t, t_row = per_row(temperature, seeds, torch.float32)
    sizes = dict(TILES=parts.TILES, SEGMENTS=triton.next_power_of_2(segments))
    with on_device_of(logits):
        sample_tiles_kernel[(B * segments,)](logits, t_ptr, tiles, statistics, V, logits.stride(0), float(t), T_ROW=t_row, TILES=parts.TILES,
                                             num_warps=parts.TILE_WARPS)  # fmt: skip
        if filters.any_filter(temperature, top_k, top_p, min_p, V):
            filters.filtered_draw(logits, tiles, statistics, seeds, positions, outputs, (t_ptr, t, t_row), per_row(top_k, seeds, torch.int64),
                                  per_row(top_p, seeds, torch.float32), per_row(min_p, seeds, torch.float32), **sizes)  # fmt: skip
        else:
            sample_draw_kernel[(B,)](logits, tiles, statistics, seeds, positions, *outputs, t_ptr, V, logits.stride(0), float(t), T_ROW=t_row,
                                     **sizes, num_warps=DRAW_WARPS)  # fmt: skip
    return outputs


def per_row(value, seeds: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, bool]:
    """Pointer, number, and which of the two counts: a number is an argument of the launch, not a tensor that another launch would have to fill."""
    if isinstance(value, Tensor):
        return value.to(dtype).contiguous(), 0, True
    return seeds, value, False


@triton.jit(do_not_specialize_on_alignment=SMALL)
def sample_draw_kernel(
    logits_ptr, tiles_ptr, segments_ptr, seeds_ptr, positions_ptr, tokens_ptr, logps_ptr, full_logps_ptr, entropy_ptr, thresholds_ptr,
    last_kept_ptr, temperature_ptr, V, stride, temperature, T_ROW: tl.constexpr, TILES: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    inv_temperature = 1.0 / tl.where(greedy, 1.0, temperature)
    x_ptr = logits_ptr + row * stride
    u = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, 0)
    ms, Ss, Us = row_segments(segments_ptr, row, V, TILES, SEGMENTS)
    m, S, U = merged(ms, Ss, Us, inv_temperature)
    bad = (S != S) | (S == 0)
    token = tl.full([], V - 1, tl.int32)
    if not bad:
        token = draw_unfiltered(x_ptr, tiles_ptr, row, ms, Ss, m, inv_temperature, u, greedy, V, TILES, SEGMENTS)
    nan = tl.where(bad, float("nan"), 0.0)
    full = (tl.load(x_ptr + token).to(tl.float32) - m) * inv_temperature - tl.log(S) + nan
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logps_ptr + row, tl.where(greedy, nan, full))
    tl.store(full_logps_ptr + row, full)
    tl.store(entropy_ptr + row, tl.log(S) - U / S * inv_temperature + nan)
    tl.store(thresholds_ptr + row, tl.where(greedy, m, float("-inf")) + nan)
    tl.store(last_kept_ptr + row, tl.where(greedy | bad, token.to(tl.int64), V - 1))


def ahead_of_time() -> list[AheadOfTime]:
    return variants("sample_draw", sample_draw_kernel, {}, DRAW_WARPS, 128)
