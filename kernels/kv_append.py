"""Write the new token's key and value into a paged KV cache, alone or with QK norm and rotation in front.

Token at position t of row r goes to block block_table[r, t // block_size], slot t % block_size; the cache's layout is that of paged_attention.py.
`qkv_append` is rope(q, k, cos, sin, q_weight=..., k_weight=...) followed by `kv_append`, in one launch that reads the projections' output and the
cache once: 2 b d (H + Hkv) + 2 b d Hkv bytes per row, b bytes per element.  Its rounding order is that of rope.py: the normed head is rounded to its
dtype, turned in fp32 and rounded again; the Triton kernel calls the very function that `rope` does, the cpu backend calls `rope`.
"""

import torch
from torch import Tensor

from ._cpu import why_not_cpu
from ._dispatch import Backend, Op, check, late, register
from ._triton import why_not_triton
from .kv_append_cpu import kv_append_cpu, qkv_append_cpu
from .paged_attention import check_cache, keys_in_rows
from .rope import rope_reference


def kv_append(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor, *,
              backend: str | None = None) -> None:  # fmt: skip
    """Write one key and value per row into the cache, in place.

    k, v: (R, Hkv, d).  key_cache, value_cache: (num_blocks, Hkv, block_size, d) in their dtype.  block_table: (R, max_blocks) int32.  positions: (R,)
    int32, negative = an empty row, nothing is written.  Two rows must not write to one slot.  Raises ValueError on a mismatch of shapes or dtypes
    and, on CPU, on a position that the table cannot hold; on a GPU such a row writes nothing.
    """
    _check("kv_append", k, v, key_cache, value_cache, block_table, positions)
    _run(op, backend, k=k.detach(), v=v.detach(), key_cache=key_cache, value_cache=value_cache, block_table=block_table, positions=positions)


def qkv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor, *,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Norm (where weights are given) and rotate the new token's query and key, append key and value to the cache in place, return the query.

    q: (R, H, d), k, v: (R, Hkv, d) as the projections gave them; they may be slices of one matrix.  cos, sin: (R, d/2) for each row's position.
    q_weight, k_weight: (d,), both or neither.  The rest as in `kv_append`.  Returns a new (R, H, d); forward only.  Raises ValueError as `kv_append`
    and `rope` do.
    """
    _check("qkv_append", k, v, key_cache, value_cache, block_table, positions)
    R, d = k.shape[0], k.shape[2]
    check(q.ndim == 3 and q.shape[0] == R and q.shape[2] == d and q.dtype == k.dtype and d % 2 == 0,
          lambda: f"qkv_append: q is {tuple(q.shape)} {q.dtype}, k is {tuple(k.shape)} {k.dtype}; wanted (R, H, d) and (R, Hkv, d) with even "
                  f"d")  # fmt: skip
    check(cos.shape == sin.shape == (R, d // 2),
          lambda: f"qkv_append: cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}; wanted {(R, d // 2)} for q {tuple(q.shape)}")  # fmt: skip
    check((q_weight is None) == (k_weight is None), "qkv_append: one of q_weight and k_weight is missing; wanted both or neither")
    if q_weight is not None:
        check(q_weight.shape == k_weight.shape == (d,),
              lambda: f"qkv_append: q_weight is {tuple(q_weight.shape)}, k_weight is {tuple(k_weight.shape)}; wanted {(d,)}")  # fmt: skip
        q_weight, k_weight = q_weight.detach(), k_weight.detach()
    return _run(fused_op, backend, q=q.detach(), k=k.detach(), v=v.detach(), cos=cos, sin=sin, key_cache=key_cache, value_cache=value_cache,
                block_table=block_table, positions=positions, q_weight=q_weight, k_weight=k_weight, eps=eps)  # fmt: skip


def _check(where: str, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor) -> None:
    R = k.shape[0] if k.ndim else 0
    check_cache(where, key_cache, value_cache, block_table, R)
    _, Hkv, _, d = key_cache.shape
    if not (k.shape == v.shape == (R, Hkv, d) and k.dtype == v.dtype == key_cache.dtype):
        raise ValueError(f"{where}: k is {tuple(k.shape)} {k.dtype}, v is {tuple(v.shape)} {v.dtype}; wanted (R, {Hkv}, {d}) {key_cache.dtype}")
    if not (positions.shape == (R,) and positions.dtype == torch.int32):
        raise ValueError(f"{where}: positions is {tuple(positions.shape)} {positions.dtype}; wanted ({R},) int32")


def check_positions(where: str, block_table: Tensor, positions: Tensor, block_size: int) -> None:
    highest, holds = int(positions.max()) if len(positions) else -1, block_table.shape[1] * block_size
    check(highest < holds, lambda: f"{where}: positions go up to {highest}; the table holds {holds} tokens")


def _run(op: Op, backend: str | None, **call) -> Tensor | None:
    name, run = op.resolve(call, backend)
    if name != "cpu" and call["k"].device.type == "cpu":  # the cpu backend looks for itself, in its one call
        check_positions(op.name, call["block_table"], call["positions"], call["key_cache"].shape[2])
    return run(**call)


def kv_append_reference(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, positions: Tensor) -> None:
    block_size = key_cache.shape[2]
    rows = ((positions >= 0) & (positions < block_table.shape[1] * block_size)).nonzero().squeeze(1)
    positions = positions[rows].long()
    blocks, slots = block_table[rows, positions // block_size].long(), positions % block_size
    key_cache[blocks, :, slots] = k[rows]
    value_cache[blocks, :, slots] = v[rows]


def qkv_append_reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor,
                         positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:  # fmt: skip
    q, k = rope_reference(q, k, cos, sin, q_weight, k_weight, eps)
    kv_append_reference(k, v, key_cache, value_cache, block_table, positions)
    return q


def _why_not_triton(call: dict) -> str | None:
    return why_not_triton(call) or keys_in_rows(call)


op = register("kv_append", triton=Backend(late("kv_append_triton.kv_append_triton"), _why_not_triton), cpu=Backend(kv_append_cpu, why_not_cpu),
              reference=Backend(kv_append_reference))  # fmt: skip
fused_op = register("qkv_append", triton=Backend(late("kv_append_triton.qkv_append_triton"), _why_not_triton),
                    cpu=Backend(qkv_append_cpu, why_not_cpu), reference=Backend(qkv_append_reference))  # fmt: skip
