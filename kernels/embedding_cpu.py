"""Rows of a table for CPU tensors: csrc/cpu/decode_rows.cpp.  Without a gradient; a decode step's embedding is captured as this one call."""

from torch import Tensor

from ._cpu import native


def embedding_cpu(table: Tensor, indices: Tensor) -> Tensor:
    """(n, D) rows of table (V, D) fp32 at indices (n,) int64.  Raises IndexError where there is none."""
    table, indices = table.detach().contiguous(), indices.contiguous()
    out = table.new_empty(len(indices), table.shape[1])
    if not native().take_rows(table.data_ptr(), *table.shape, indices.data_ptr(), len(indices), out.data_ptr()):
        raise IndexError(f"embedding_cpu: indices are {int(indices.min())} to {int(indices.max())}, wanted 0 to {len(table) - 1}")
    return out
