"""What a decode step does to its rows once their tokens are drawn, in one launch: counters, last token, ring of results, and whether a row goes on.

A row is one running sample.  Of a row that is RUNNING (and, where `drawing` is given, drawing) the token counts:

    length, generated, slot += 1,  last = token
    status = ERROR if the log-prob is NaN, else STOP if the token is one of the row's `eos`, else REPETITION if the row has a streak limit and its
             streak, the tokens in a row whose full-softmax log-prob is above the row's bound, has reached it, else LENGTH if the new length is the
             row's largest, else RUNNING

A row that does not count keeps everything.  Token and log-prob go to slot `slot` of the row's column of the rings, whether or not they count.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton

RUNNING, HELD, LENGTH, STOP, REPETITION, ERROR = range(6)  # HELD: its prompt is not in the cache yet.  From STOP on: by what it drew


class Streaks(NamedTuple):
    """The repetition stop of m rows."""

    counts: Tensor  # (m,) int64, changed in place
    limits: Tensor  # (m,) int64, 0 = the row has none
    bounds: Tensor  # (m,) fp32 log-probs
    full_logps: Tensor  # (m,) fp32 of the tokens, under the full softmax


def advance_rows(
    tokens: Tensor, logps: Tensor, token_ring: Tensor, logp_ring: Tensor, *, status: Tensor, lengths: Tensor, max_lengths: Tensor, generated: Tensor,
    slots: Tensor, last: Tensor, eos: Tensor, drawing: Tensor | None = None, streaks: Streaks | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """Account for one token of each of m rows, in place.

    tokens: (m,) int64, logps: (m,) fp32.  token_ring, logp_ring: (slots, m) in these dtypes, columns neighbours.  status, generated, slots, last:
    (m,) int64.  lengths, max_lengths: (m,) int32.  eos: (m, E) int64, contiguous; entries that are no token id count for nothing.  drawing: (m,)
    bool.  A slot beyond the rings is the caller's mistake and is not looked for.  Raises ValueError on a mismatch of shapes, dtypes or strides.
    """
    counters = {"tokens": tokens, "status": status, "generated": generated, "slots": slots, "last": last}
    narrow, wide = {"lengths": lengths, "max_lengths": max_lengths}, {"logps": logps}
    if streaks is not None:
        counters |= {"streaks.counts": streaks.counts, "streaks.limits": streaks.limits}
        wide |= {"streaks.bounds": streaks.bounds, "streaks.full_logps": streaks.full_logps}
    m = tokens.shape[0] if tokens.ndim == 1 else -1
    for dtype, group in ((torch.int64, counters), (torch.int32, narrow), (torch.float32, wide), (torch.bool, {"drawing": drawing})):
        for name, x in group.items():
            check(x is None or (x.shape == (m,) and x.dtype == dtype and x.is_contiguous()),
                  lambda name=name, x=x, dtype=dtype: f"advance_rows: {name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; wanted "
                                                      f"({m},) {dtype}, contiguous")  # fmt: skip
    for name, x, dtype in (("token_ring", token_ring, torch.int64), ("logp_ring", logp_ring, torch.float32)):
        check(x.ndim == 2 and x.shape[1] == m and x.dtype == dtype and x.stride(1) == 1 and x.stride(0) == token_ring.stride(0),
              lambda name=name, x=x, dtype=dtype: f"advance_rows: {name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; wanted "
                                                  f"(slots, {m}) {dtype}, rows at one stride in both rings")  # fmt: skip
    check(eos.ndim == 2 and eos.shape[0] == m and eos.dtype == torch.int64 and eos.is_contiguous(),
          lambda: f"advance_rows: eos is {tuple(eos.shape)} {eos.dtype}; wanted ({m}, E) int64, contiguous")  # fmt: skip
    op(backend, tokens=tokens, logps=logps, token_ring=token_ring, logp_ring=logp_ring, status=status, lengths=lengths, max_lengths=max_lengths,
       generated=generated, slots=slots, last=last, eos=eos, drawing=drawing, streaks=streaks)  # fmt: skip


def row_positions(status: Tensor, lengths: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(m,) int32 positions that the next step feeds, lengths - 1 of rows that are RUNNING, -1 of the others; and these + 1, the keys that it sees.

    status: (m,) int64.  lengths: (m,) int32.  Raises ValueError on a mismatch.
    """
    check(status.shape == lengths.shape and status.ndim == 1 and status.dtype == torch.int64 and lengths.dtype == torch.int32,
          lambda: f"row_positions: status is {tuple(status.shape)} {status.dtype}, lengths is {tuple(lengths.shape)} {lengths.dtype}; wanted (m,) "
                  f"int64 and int32")  # fmt: skip
    return positions_op(backend, status=status, lengths=lengths)


def advance_rows_reference(tokens, logps, token_ring, logp_ring, status, lengths, max_lengths, generated, slots, last, eos, drawing, streaks) -> None:
    for ring, values in ((token_ring, tokens), (logp_ring, logps)):
        ring.scatter_(0, slots[None], values[None])
    live = status == RUNNING if drawing is None else (status == RUNNING) & drawing
    became = torch.where(lengths + 1 >= max_lengths, LENGTH, RUNNING)
    if streaks is not None:
        counts = torch.where(streaks.full_logps > streaks.bounds, streaks.counts + 1, 0)
        became = torch.where((counts >= streaks.limits) & (streaks.limits > 0), REPETITION, became)
        streaks.counts.copy_(torch.where(live, counts, streaks.counts))
    became = torch.where((tokens[:, None] == eos).any(1), STOP, became)
    became = torch.where(logps.isnan(), ERROR, became)
    for count in (slots, generated, lengths):
        count += live
    last.copy_(torch.where(live, tokens, last))
    status.copy_(torch.where(live, became, status))


def row_positions_reference(status: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.where(status == RUNNING, lengths, 0)
    return ends - 1, ends


op = register("advance_rows", triton=Backend(late("advance_rows_triton.advance_rows_triton"), why_not_triton),
              cpu=Backend(late("advance_rows_cpu.advance_rows_cpu"), why_not_cpu), reference=Backend(advance_rows_reference))  # fmt: skip
positions_op = register("row_positions", triton=Backend(late("advance_rows_triton.row_positions_triton"), why_not_triton),
                        cpu=Backend(late("advance_rows_cpu.row_positions_cpu"), why_not_cpu), reference=Backend(row_positions_reference))  # fmt: skip
