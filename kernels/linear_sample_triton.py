"""linear_sample in Triton: a token from hidden states and the lm_head without logits in memory; the two-step draw is that of linear_sample.py.

`linear_sample_tiles_kernel`: a program owns BM rows and one tile of 128 tokens of the vocabulary.  Its logits are one matrix product in registers;
from them come m, S, U, the tile's candidate and the candidate's logit, 20 bytes per row and tile.  The candidate is an inverse CDF over integer
masses, floor(2^23 exp((x - m) / temperature)), whose running sum is exact in int32: a token of less than 1e-7 of the tile's best has mass 0.
`linear_sample_draw_kernel`, one program per row, merges the tiles, picks one with the second uniform number and writes the outputs.

BM and the tiles depend on the dtype and the GPU, never on B, and a row of a matrix product does not depend on the other rows of its tile: so neither
do the results, bit for bit.  Rows beyond B in the last tile are products with 0.

On an H200 316-321 us at B = 64: at B <= 64 every weight is read once, V = 151936 by D = 4096 in bf16 are 1.24 GB, 290 us at 4.3 TB/s; two
programs per SM let the epilogue of one run under the loads of the other.  The 20 bytes are 1.5 MB at B = 64, and the second launch is 5 us.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, entry_for, on_device_of
from .linear_logprob_triton import Tiles, _logits, operands
from .linear_sample import TILE
from .logprob_triton import LOWEST, exponentials
from .sample_tiles_triton import merged, part_masses, pick, uniform
from .sample_triton import per_row

# BN is the tile of the draw.  On sm_90 no other of six was faster by more than 2 %; two programs of 4 x (64 + 128) x 64 x 2 = 96 KiB fit on an SM of
# sm_90.
TILES = {80: Tiles(64, TILE, 32, 4, 4, TILE), 90: Tiles(64, TILE, 64, 4, 4, TILE), 100: Tiles(64, TILE, 64, 8, 4, TILE)}
TILES_FP32 = Tiles(32, TILE, 16, 8, 3, TILE)  # exact fp32 products, no tensor cores
TILES_INTERPRETER = Tiles(16, TILE, 16, 4, 1, TILE)
UNIT = tl.constexpr(float(2**23))
SMALL = ["temperature_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr", "logps_ptr", "full_logps_ptr", "entropy_ptr", "thresholds_ptr",
         "last_kept_ptr"]  # fmt: skip


def tiles_of(hidden: Tensor) -> Tiles:
    if not hidden.is_cuda:
        return TILES_INTERPRETER
    if hidden.dtype == torch.float32:
        return TILES_FP32
    return entry_for(TILES, hidden.device)


def linear_sample_triton(hidden: Tensor, weight: Tensor, temperature, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    (B, _), V, device = hidden.shape, weight.shape[0], hidden.device
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    seeds, positions = seeds.contiguous(), positions.contiguous()
    tokens, last_kept = (torch.empty(B, dtype=torch.int64, device=device) for _ in range(2))
    logps, full_logps, entropy, thresholds = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(4))
    if B:
        count = triton.cdiv(V, TILE)
        partials = torch.empty(4, B, count, dtype=torch.float32, device=device)
        candidates = torch.empty(B, count, dtype=torch.int32, device=device)
        t_ptr, t, t_row = per_row(temperature, seeds, torch.float32)
        tiles = tiles_of(hidden)
        call = operands(hidden, weight, tiles)
        call.pop("GROUP")
        with on_device_of(hidden):
            linear_sample_tiles_kernel[(triton.cdiv(B, tiles.BM) * count,)](
                partials_ptr=partials, candidates_ptr=candidates, seeds_ptr=seeds, positions_ptr=positions, temperature_ptr=t_ptr, B=B, V=V,
                temperature=float(t), T_ROW=t_row, **call)  # fmt: skip
            linear_sample_draw_kernel[(B,)](
                partials, candidates, seeds, positions, t_ptr, tokens, logps, full_logps, entropy, thresholds, last_kept, B, V, float(t),
                T_ROW=t_row, TILE=TILE, BLOCK=triton.next_power_of_2(count), num_warps=8)  # fmt: skip
    return tokens, logps, full_logps, entropy, thresholds, last_kept


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=SMALL)
def linear_sample_tiles_kernel(
    hidden, weight, partials_ptr, candidates_ptr, seeds_ptr, positions_ptr, temperature_ptr, B, V, D, hidden_stride, weight_stride, temperature,
    T_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    # programs that share a tile of the weights are neighbours
    blocks = tl.cdiv(B, BM)
    row0, tile = tl.program_id(0) % blocks * BM, tl.program_id(0) // blocks
    rows, cols = row0 + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    x = _logits(hidden, weight, rows, cols, row0, tile * BN, B, V, D, hidden_stride, weight_stride, BM, BN, BK, DESCRIPTORS)
    x = tl.where((cols < V)[None, :], x, float("-inf"))
    inside = rows < B
    if T_ROW:
        t = tl.load(temperature_ptr + rows, mask=inside, other=1.0)
    else:
        t = tl.zeros([BM], tl.float32) + temperature
    greedy = t == 0
    inv_temperature = 1.0 / tl.where(greedy, 1.0, t)
    m = tl.maximum(tl.max(x, 1), LOWEST)
    e, de = exponentials(x, m[:, None], inv_temperature[:, None])
    S, U = tl.sum(e, 1), tl.sum(de, 1)
    mass = (tl.where(e == e, e, 0.0) * UNIT).to(tl.int32)
    position = tl.load(positions_ptr + rows, mask=inside, other=0)
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seeds_ptr + rows, mask=inside, other=0), low, high, low * 0 + tile, low * 0 + 1)
    target = tl.umulhi(word, tl.sum(mass, 1).to(tl.uint32)).to(tl.int32)  # floor of u times the mass
    drawn = tl.sum((tl.cumsum(mass, 1) <= target[:, None]).to(tl.int32), 1)
    lanes = tl.arange(0, BN)
    largest = tl.min(tl.where(x == m[:, None], lanes[None, :], BN - 1), 1)
    drawn = tl.minimum(tl.where(greedy, largest, drawn), BN - 1)
    x_drawn = tl.sum(tl.where(lanes[None, :] == drawn[:, None], x, 0.0), 1)
    count = tl.cdiv(V, BN)
    at = rows.to(tl.int64) * count + tile
    plane = B.to(tl.int64) * count
    tl.store(partials_ptr + at, m, mask=inside)
    tl.store(partials_ptr + plane + at, S, mask=inside)
    tl.store(partials_ptr + 2 * plane + at, U, mask=inside)
    tl.store(partials_ptr + 3 * plane + at, x_drawn, mask=inside)
    tl.store(candidates_ptr + at, tile * BN + drawn, mask=inside)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=SMALL)
def linear_sample_draw_kernel(
    partials_ptr, candidates_ptr, seeds_ptr, positions_ptr, temperature_ptr, tokens_ptr, logps_ptr, full_logps_ptr, entropy_ptr, thresholds_ptr,
    last_kept_ptr, B, V, temperature, T_ROW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if T_ROW:
        temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    inv_temperature = 1.0 / tl.where(greedy, 1.0, temperature)
    count = tl.cdiv(V, TILE)
    plane = B.to(tl.int64) * count
    tile = tl.arange(0, BLOCK)
    at = partials_ptr + row * count
    there = tile < count
    ms, Ss = tl.load(at + tile, mask=there, other=LOWEST), tl.load(at + plane + tile, mask=there, other=0.0)
    Us = tl.load(at + 2 * plane + tile, mask=there, other=0.0)
    m, S, U = merged(ms, Ss, Us, inv_temperature)
    bad = (S != S) | (S == 0)
    u = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, 2)
    picked, _ = pick(part_masses(ms, Ss, m, inv_temperature), tile, u)
    largest = tl.min(tl.where((ms == m) & (tile < count), tile, count - 1), 0)
    j = tl.minimum(tl.where(greedy, largest, picked), count - 1)
    x = tl.load(at + 3 * plane + j)
    token = tl.minimum(tl.load(candidates_ptr + row * count + j), V - 1).to(tl.int64)
    nan = tl.where(bad, float("nan"), 0.0)
    full = (x - m) * inv_temperature - tl.log(S) + nan
    one = tl.arange(0, 1)
    tl.store(tokens_ptr + row + one, token)
    tl.store(logps_ptr + row + one, tl.where(greedy, nan, full))
    tl.store(full_logps_ptr + row + one, full)
    tl.store(entropy_ptr + row + one, tl.log(S) - U / S * inv_temperature + nan)
    tl.store(thresholds_ptr + row + one, tl.where(greedy, x, float("-inf")) + nan)
    tl.store(last_kept_ptr + row + one, tl.where(greedy & (bad == 0), token, V - 1))


def ahead_of_time() -> list[AheadOfTime]:
    cases = []

    def add(name, tiles, capabilities, dtype, descriptors, rows=False, ones=()):
        kinds = [f"tensordesc<{dtype}[{block}, {tiles.BK}]>" if descriptors else f"*{dtype}:16" for block in (tiles.BM, tiles.BN)]
        signature = dict(zip(("hidden", "weight"), kinds, strict=True)) | {
            "partials_ptr": "*fp32:16", "candidates_ptr": "*i32:16", "seeds_ptr": "*i64", "positions_ptr": "*i64",
            "temperature_ptr": "*fp32" if rows else "*i64", "B": "i32", "V": "i32:16", "D": "i32:16", "hidden_stride": "i32:16",
            "weight_stride": "i32:16", "temperature": "fp32"}  # fmt: skip
        signature = {name: kind for name, kind in signature.items() if name not in ones}
        constants = dict(T_ROW=rows, BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, DESCRIPTORS=descriptors) | dict.fromkeys(ones, 1)
        cases.append(AheadOfTime(f"linear_sample_tiles {name}", linear_sample_tiles_kernel, signature, constants, tiles.num_warps, tiles.num_stages,
                                 registers=255, matrix=dtype != "fp32", capabilities=capabilities))  # fmt: skip

    for capability, tiles in TILES.items():
        add(f"sm_{capability} bf16 pointers", tiles, (capability,), "bf16", False)
        if capability >= 90:
            add(f"sm_{capability} bf16 descriptors", tiles, (capability,), "bf16", True)
            add(f"sm_{capability} fp16 descriptors, temperature per row", tiles, (capability,), "fp16", True, rows=True)
    add("fp32", TILES_FP32, (80, 90, 100), "fp32", False)
    add("fp32 V=1", TILES_FP32, (80, 90, 100), "fp32", False, ones=("V",))  # a launch compiles in an integer of 1: a vocabulary of one token
    draw = {"partials_ptr": "*fp32:16", "candidates_ptr": "*i32:16", "temperature_ptr": "*fp32", "B": "i32", "V": "i32:16", "temperature": "fp32"}
    draw |= dict.fromkeys(("seeds_ptr", "positions_ptr", "tokens_ptr", "last_kept_ptr"), "*i64")
    draw |= dict.fromkeys(("logps_ptr", "full_logps_ptr", "entropy_ptr", "thresholds_ptr"), "*fp32")
    for name, signature, constants in (("", draw, dict(BLOCK=2048)), (" V=1", {k: v for k, v in draw.items() if k != "V"}, dict(BLOCK=1, V=1))):
        constants |= dict(T_ROW=True, TILE=TILE)
        cases.append(AheadOfTime("linear_sample_draw" + name, linear_sample_draw_kernel, signature, constants, 8, registers=128))
    return cases
