"""sample for CPU tensors: csrc/cpu/sample.inl, a row at a time; the rules are those of sample.py.

Without a filter a row is read twice, for its maximum and for its exponentials.  With one, the tokens that a bound does not rule out are selected in
part, never sorted as a whole, and the exponentials of what is kept are summed again by the very function that `logprob` uses on this backend: the
log-prob of a draw has the bits that logprob(logits, tokens, temperature, support) gives.
"""

import torch
from torch import Tensor

from ._cpu import address, dense, dense_rows, native


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """The bits of `philox_uniform(seeds, positions)`, (B,) each."""
    seeds, positions, out = dense(seeds), dense(positions), torch.empty(seeds.shape, dtype=torch.float64)
    native().philox_uniform(seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), out.numel())
    return out


def sample_cpu(logits: Tensor, temperature, top_k, top_p, min_p, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    logits, u = dense_rows(logits), uniforms(seeds, positions)
    B, V = logits.shape
    parameters = [per_row(temperature, torch.float32), per_row(top_k, torch.int64), per_row(top_p, torch.float64), per_row(min_p, torch.float64)]
    tokens, last_kept = seeds.new_empty(B), seeds.new_empty(B)
    logps, full_logps, entropy, thresholds = (logits.new_empty(B) for _ in range(4))
    native().sample(logits.data_ptr(), logits.stride(0), B, V, *(x for number, rows in parameters for x in (number, address(rows))), u.data_ptr(),
                    *map(address, (tokens, last_kept, logps, full_logps, entropy, thresholds)), torch.get_num_threads())  # fmt: skip
    return tokens, logps, full_logps, entropy, thresholds, last_kept


def per_row(value: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """A number, and the tensor that counts instead of it or None."""
    return (0, dense(value.to(dtype))) if isinstance(value, Tensor) else (value, None)
