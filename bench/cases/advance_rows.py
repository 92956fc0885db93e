"""advance_rows and row_positions: what a decode step does to its rows once their tokens are drawn, and before the next one.

It works in place, so every call gets copies, which the row `copies` times alone.  The rival does it step by step in PyTorch.
"""

import torch
from case import Case

from athanor import kernels as K
from athanor.kernels.advance_rows import LENGTH, RUNNING, STOP

R, SLOTS, STATE = {"cuda": 512, "cpu": 64}, 16, ("status", "lengths", "max_lengths", "generated", "slots", "last", "eos", "token_ring", "logp_ring")


def copies(tokens=None, logps=None, **state):
    return {name: x.clone() for name, x in state.items()}


def outputs(state):
    return tuple(state[name].to(torch.float64) for name in STATE)


def advance(tokens, logps, backend, **state):
    state = copies(**state)
    K.advance_rows(tokens, logps, **state, backend=backend)
    return outputs(state)


def eager(tokens, logps, **state):
    state = copies(**state)
    status, lengths, max_lengths, generated, slots, last, eos, token_ring, logp_ring = (state[name] for name in STATE)
    token_ring.scatter_(0, slots[None], tokens[None])
    logp_ring.scatter_(0, slots[None], logps[None])
    live = status == RUNNING
    became = torch.where((tokens[:, None] == eos).any(1), STOP, torch.where(lengths + 1 >= max_lengths, LENGTH, RUNNING))
    for count in (slots, generated, lengths):
        count += live
    last.copy_(torch.where(live, tokens, last))
    status.copy_(torch.where(live, became, status))
    return outputs(state)


def cases(device: str) -> list[Case]:
    rows = R[device]

    def make(g):
        integers = lambda low, high, dtype=torch.int64: torch.randint(low, high, (rows,), generator=g, dtype=dtype)  # noqa: E731
        lengths = integers(100, 150, torch.int32)
        return {"tokens": integers(0, 20), "logps": torch.randn(rows, generator=g, dtype=torch.float64),
                "status": integers(0, 6) * integers(0, 2), "lengths": lengths, "max_lengths": lengths + integers(1, 9, torch.int32),
                "generated": integers(0, 50), "slots": integers(0, SLOTS), "last": integers(0, 1000), "eos": integers(0, 20)[:, None],
                "token_ring": torch.zeros(SLOTS, rows, dtype=torch.int64),
                "logp_ring": torch.zeros(SLOTS, rows, dtype=torch.float64)}  # fmt: skip

    def make_positions(g):
        state = make(g)
        return {"status": state["status"], "lengths": state["lengths"]}

    return [
        Case("advance_rows", {"R": rows}, torch.float32, make, advance, eager, "reads and writes a few numbers per row", bytes=rows * 100,
             floors={"copies": lambda **inputs: outputs(copies(**inputs))}),
        Case("row_positions", {"R": rows}, torch.float32, make_positions,
             lambda status, lengths, backend: tuple(x.double() for x in K.row_positions(status, lengths, backend=backend)),
             lambda status, lengths: tuple(torch.where(status == RUNNING, lengths - n, -n).double() for n in (1, 0)),
             "reads two numbers per row, writes two", bytes=rows * 20),
    ]  # fmt: skip
