"""The bookkeeping of a decode step in Triton; the rules are those of advance_rows.py.  One thread per row: what it saves is launches."""

import triton
import triton.language as tl
from torch import Tensor

from ._triton import AheadOfTime, on_device_of
from .advance_rows import ERROR, LENGTH, REPETITION, RUNNING, STOP

BLOCK = 128
STATUS = dict(RUNNING=RUNNING, LENGTH=LENGTH, STOP=STOP, REPETITION=REPETITION, ERROR=ERROR)


def advance_rows_triton(tokens, logps, token_ring, logp_ring, status, lengths, max_lengths, generated, slots, last, eos, drawing, streaks) -> None:
    m = len(tokens)
    if m == 0:
        return
    streak = (tokens, tokens, logps, logps) if streaks is None else streaks
    with on_device_of(tokens):
        advance_rows_kernel[(triton.cdiv(m, BLOCK),)](
            tokens, logps, token_ring, logp_ring, token_ring.stride(0), status, lengths, max_lengths, generated, slots, last, eos,
            status if drawing is None else drawing, *streak, m, E=eos.shape[1], DRAWING=drawing is not None, STREAKS=streaks is not None, BLOCK=BLOCK,
            num_warps=4, **STATUS,
        )  # fmt: skip


def row_positions_triton(status: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    positions, ends, m = lengths.new_empty(lengths.shape), lengths.new_empty(lengths.shape), len(lengths)
    if m:
        with on_device_of(status):
            row_positions_kernel[(triton.cdiv(m, BLOCK),)](status.contiguous(), lengths.contiguous(), positions, ends, m, RUNNING=RUNNING,
                                                           BLOCK=BLOCK, num_warps=4)  # fmt: skip
    return positions, ends


POINTERS = {  # slices of larger tensors, of any number of rows: nothing of them is specialised
    "tokens_ptr": "*i64", "logps_ptr": "*fp32", "token_ring_ptr": "*i64", "logp_ring_ptr": "*fp32", "status_ptr": "*i64", "lengths_ptr": "*i32",
    "max_lengths_ptr": "*i32", "generated_ptr": "*i64", "slots_ptr": "*i64", "last_ptr": "*i64", "eos_ptr": "*i64", "drawing_ptr": "*i1",
    "streak_ptr": "*i64", "streak_limit_ptr": "*i64", "streak_bound_ptr": "*fp32", "full_logps_ptr": "*fp32",
}  # fmt: skip


@triton.jit(do_not_specialize=["ring_stride", "m"], do_not_specialize_on_alignment=list(POINTERS))
def advance_rows_kernel(tokens_ptr, logps_ptr, token_ring_ptr, logp_ring_ptr, ring_stride, status_ptr, lengths_ptr, max_lengths_ptr, generated_ptr,
                        slots_ptr, last_ptr, eos_ptr, drawing_ptr, streak_ptr, streak_limit_ptr, streak_bound_ptr, full_logps_ptr, m,
                        E: tl.constexpr, DRAWING: tl.constexpr, STREAKS: tl.constexpr, BLOCK: tl.constexpr, RUNNING: tl.constexpr,
                        LENGTH: tl.constexpr, STOP: tl.constexpr, REPETITION: tl.constexpr, ERROR: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < m
    token, logp = tl.load(tokens_ptr + rows, mask=there, other=0), tl.load(logps_ptr + rows, mask=there, other=0.0)
    slot, status = tl.load(slots_ptr + rows, mask=there, other=0), tl.load(status_ptr + rows, mask=there, other=LENGTH)
    tl.store(token_ring_ptr + slot * ring_stride + rows, token, mask=there)
    tl.store(logp_ring_ptr + slot * ring_stride + rows, logp, mask=there)
    live = there & (status == RUNNING)
    if DRAWING:
        live = live & (tl.load(drawing_ptr + rows, mask=there, other=0) != 0)
    length = tl.load(lengths_ptr + rows, mask=there, other=0) + 1
    became = tl.where(length >= tl.load(max_lengths_ptr + rows, mask=there, other=0), LENGTH, RUNNING)
    if STREAKS:
        above = tl.load(full_logps_ptr + rows, mask=there, other=0.0) > tl.load(streak_bound_ptr + rows, mask=there, other=0.0)
        streak = tl.where(above, tl.load(streak_ptr + rows, mask=there, other=0) + 1, 0)
        limit = tl.load(streak_limit_ptr + rows, mask=there, other=0)
        became = tl.where((streak >= limit) & (limit > 0), REPETITION, became)
        tl.store(streak_ptr + rows, streak, mask=live)
    for e in tl.static_range(E):
        became = tl.where(token == tl.load(eos_ptr + rows.to(tl.int64) * E + e, mask=there, other=-1), STOP, became)
    became = tl.where(logp != logp, ERROR, became)
    tl.store(status_ptr + rows, became.to(tl.int64), mask=live)
    tl.store(last_ptr + rows, token, mask=live)
    tl.store(slots_ptr + rows, slot + 1, mask=live)
    tl.store(generated_ptr + rows, tl.load(generated_ptr + rows, mask=there, other=0) + 1, mask=live)
    tl.store(lengths_ptr + rows, length, mask=live)


@triton.jit(do_not_specialize=["m"], do_not_specialize_on_alignment=["status_ptr", "lengths_ptr", "positions_ptr", "ends_ptr"])
def row_positions_kernel(status_ptr, lengths_ptr, positions_ptr, ends_ptr, m, RUNNING: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < m
    running = tl.load(status_ptr + rows, mask=there, other=0) == RUNNING
    ends = tl.where(running, tl.load(lengths_ptr + rows, mask=there, other=0), 0)
    tl.store(positions_ptr + rows, ends - 1, mask=there)
    tl.store(ends_ptr + rows, ends, mask=there)


def ahead_of_time() -> list[AheadOfTime]:
    numbers = {"ring_stride": "i32", "m": "i32"}
    cases = [
        AheadOfTime(f"advance_rows drawing={drawing} streaks={streaks}", advance_rows_kernel, POINTERS | numbers,
                    STATUS | dict(E=2, DRAWING=drawing, STREAKS=streaks, BLOCK=BLOCK))
        for drawing, streaks in ((False, False), (True, True))
    ]  # fmt: skip
    positions = {"status_ptr": "*i64", "lengths_ptr": "*i32", "positions_ptr": "*i32", "ends_ptr": "*i32", "m": "i32"}
    return [*cases, AheadOfTime("row_positions", row_positions_kernel, positions, dict(RUNNING=RUNNING, BLOCK=BLOCK))]
