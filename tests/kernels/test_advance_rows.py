"""The bookkeeping of a decode step against the same rules in plain Python, row by row."""

import math

import pytest
import torch

from athanor.kernels import advance_rows, row_positions
from athanor.kernels.advance_rows import ERROR, HELD, LENGTH, REPETITION, RUNNING, STOP, Streaks

R, SLOTS, E = 300, 5, 3  # more rows than one program of the Triton kernel takes


def make(generator):
    """Rows in every state, that end in every way; what is passed are slices that begin at row 1 of a larger tensor."""

    def integers(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    n = R + 1
    state = {
        "status": torch.tensor([RUNNING, RUNNING, RUNNING, HELD, LENGTH, STOP, REPETITION, ERROR])[integers(0, 8, n)],
        "lengths": integers(1, 20, n, dtype=torch.int32), "max_lengths": integers(10, 24, n, dtype=torch.int32), "generated": integers(0, 9, n),
        "slots": integers(0, SLOTS, n), "last": integers(0, 8, n), "eos": integers(-1, 8, n, E),
    }  # fmt: skip
    tokens, logps = integers(0, 16, n), -torch.rand(n, generator=generator)
    logps[integers(0, 12, n) == 0] = torch.nan
    streaks = Streaks(integers(0, 4, n), integers(0, 5, n), -torch.rand(n, generator=generator), -torch.rand(n, generator=generator))
    drawing = integers(0, 4, n) > 0
    rings = torch.full((SLOTS, n), -7), torch.full((SLOTS, n), -7.0)
    return state, tokens, logps, rings, streaks, drawing


def by_hand(state, tokens, logps, rings, streaks, drawing):
    """The rules of advance_rows.py."""
    seen = set()
    for r in range(1, len(tokens)):
        for ring, values in zip(rings, (tokens, logps), strict=True):
            ring[state["slots"][r], r] = values[r]
        if state["status"][r] != RUNNING or (drawing is not None and not drawing[r]):
            continue
        length, token = int(state["lengths"][r]) + 1, int(tokens[r])
        became = RUNNING
        if length >= state["max_lengths"][r]:
            became = LENGTH
        if streaks is not None:
            streak = int(streaks.counts[r]) + 1 if streaks.full_logps[r] > streaks.bounds[r] else 0
            streaks.counts[r] = streak
            if 0 < streaks.limits[r] <= streak:
                became = REPETITION
        if token in state["eos"][r].tolist():
            became = STOP
        if math.isnan(logps[r]):
            became = ERROR
        for name, value in (("status", became), ("lengths", length), ("last", token)):
            state[name][r] = value
        state["generated"][r] += 1
        state["slots"][r] += 1
        seen.add(became)
    return seen


def advance(backend, state, tokens, logps, rings, streaks, drawing, device="cpu"):
    """The same by a backend, in place."""
    moved = {name: x.to(device) for name, x in state.items()}
    there = [x.to(device) for x in rings]
    repeats = None if streaks is None else Streaks(*(x.to(device) for x in streaks))
    own = None if repeats is None else Streaks(*(x[1:] for x in repeats))
    advance_rows(tokens.to(device)[1:], logps.to(device)[1:], there[0][:, 1:], there[1][:, 1:], **{name: x[1:] for name, x in moved.items()},
                 drawing=None if drawing is None else drawing.to(device)[1:], streaks=own, backend=backend)  # fmt: skip
    for old, new in zip((*state.values(), *rings, *(streaks or ())), (*moved.values(), *there, *(repeats or ())), strict=True):
        old.copy_(new)


def check(backend, device, generator, with_streaks, with_drawing):
    state, tokens, logps, rings, streaks, drawing = make(generator)
    streaks, drawing = streaks if with_streaks else None, drawing if with_drawing else None
    copies = {name: x.clone() for name, x in state.items()}, tokens, logps, [x.clone() for x in rings]
    kept = None if streaks is None else Streaks(*(x.clone() for x in streaks))
    seen = by_hand(*copies, kept, drawing)
    assert seen == {RUNNING, LENGTH, STOP, ERROR} | ({REPETITION} if with_streaks else set())
    status, lengths = (state[name].to(device)[1:] for name in ("status", "lengths"))
    positions, ends = row_positions(status, lengths, backend=backend)
    assert positions.dtype == ends.dtype == torch.int32 and torch.equal(ends, positions + 1)
    assert positions.tolist() == [n - 1 if s == RUNNING else -1 for s, n in zip(status.tolist(), lengths.tolist(), strict=True)]
    advance(backend, state, tokens, logps, rings, streaks, drawing, device)
    for name, x in state.items():
        assert torch.equal(x, copies[0][name]), name
    assert torch.equal(rings[0], copies[3][0]) and torch.equal(rings[1].nan_to_num(5), copies[3][1].nan_to_num(5))
    assert streaks is None or torch.equal(streaks.counts, kept.counts)


@pytest.mark.parametrize("with_drawing", [False, True])
@pytest.mark.parametrize("with_streaks", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_move_by_the_rules(backend, with_streaks, with_drawing, generator):
    check(backend, "cpu", generator, with_streaks, with_drawing)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_rows(backend):
    none, wide = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    state = dict.fromkeys(("status", "generated", "slots", "last"), none) | {"lengths": wide, "max_lengths": wide, "eos": none.view(0, 1)}
    advance_rows(none, torch.empty(0), none.view(3, 0), torch.empty(3, 0), **state, backend=backend)
    assert [x.shape for x in row_positions(none, wide, backend=backend)] == [(0,), (0,)]


@pytest.mark.parametrize("name, value, message", [
    ("status", torch.zeros(4, dtype=torch.int32), r"advance_rows: status is \(4,\) torch.int32 .* wanted \(4,\) torch.int64"),
    ("lengths", torch.zeros(3, dtype=torch.int32), r"lengths is \(3,\) .* wanted \(4,\) torch.int32"),
    ("last", torch.zeros(8, dtype=torch.int64)[::2], r"last is \(4,\) torch.int64 with strides \(2,\); wanted .* contiguous"),
    ("eos", torch.zeros(4, dtype=torch.int64), r"eos is \(4,\) torch.int64; wanted \(4, E\) int64"),
    ("drawing", torch.zeros(4), r"drawing is \(4,\) torch.float32"),
    ("logp_ring", torch.zeros(3, 5), r"logp_ring is \(3, 5\) .* wanted \(slots, 4\) torch.float32"),
    ("logp_ring", torch.zeros(3, 9)[:, :4], r"logp_ring is \(3, 4\) torch.float32 with strides \(9, 1\); .* one stride in both rings"),
])  # fmt: skip
def test_mismatches_are_refused(name, value, message):
    long, narrow = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    call = dict.fromkeys(("status", "generated", "slots", "last", "tokens"), long) | {"lengths": narrow, "max_lengths": narrow}
    call |= {"eos": long[:, None], "logps": torch.zeros(4), "token_ring": torch.zeros(3, 4, dtype=torch.int64), "logp_ring": torch.zeros(3, 4)}
    advance_rows(**call)
    with pytest.raises(ValueError, match=message):
        advance_rows(**call | {name: value})
    streaks = Streaks(long, long, torch.zeros(8)[::2], torch.zeros(4))
    with pytest.raises(ValueError, match=r"streaks.bounds is \(4,\) torch.float32 with strides \(2,\); wanted .* contiguous"):
        advance_rows(**call, streaks=streaks)
    with pytest.raises(ValueError, match=r"row_positions: status is \(4,\) torch.int64, lengths is \(4,\) torch.int64; wanted"):
        row_positions(long, long)
