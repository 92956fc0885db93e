"""The row kernel of logits_grpo with the gradient, in CUDA C++ (csrc/cuda/logits_grpo.cu): the logits are read once.  The other steps are Triton's.

Where no gradient is written along - no_grad, or a loss whose coefficients need whole sequences first - Triton's row kernel, too, reads them once.
"""

import numpy as np
import torch
from torch import Tensor

from . import _cuda
from ._dispatch import is_strict
from .logits_grpo import Rows, Tokens, logits_loss
from .policy_loss import LossVariant, run_time_numbers

# Threads per block; granules of 16 bytes whose sums a thread rescales together; granules that a thread can hold in registers, 4 of them each
THREADS, GROUP, HELD = 512, 4, {torch.bfloat16: 12, torch.float32: 8}
SURROGATES = {"clip": "clip", "dual_clip": "capped", "two_sided": "capped", "cispo": "cispo", "sapo": "sapo", "reinforce": "reinforce"}
WEIGHTS = {"none": "none", "tis": "truncated", "token_mask": "masked", "sequence_mask": "masked"}


def shifted(logits: Tensor) -> bool:
    """Do rows begin within a granule?"""
    return logits.data_ptr() % 16 > 0 or logits.stride(0) * logits.element_size() % 16 > 0


def granules_per_thread(logits: Tensor, shared: int) -> tuple[int, int]:
    """In shared memory and in registers, to hold a row; more of the latter than HELD means that it does not fit."""
    width = 16 // logits.element_size()
    granules = -(-(logits.shape[1] + (width - 1) * shifted(logits)) // width)
    needed = -(-granules // (GROUP * THREADS)) * GROUP
    slots = min(needed, shared // (16 * THREADS) // GROUP * GROUP)
    return slots, needed - slots


def why_not_on_chip(logits: Tensor) -> str | None:
    if is_strict() and shifted(logits):
        return "strict mode is on, and the order of a row's sums follows its address modulo 16, which is not 0 in every row"
    slots, held = granules_per_thread(logits, _cuda.limits(logits.device)[1])
    most = HELD[logits.dtype]
    if held > most:
        fit = (slots + most) * THREADS * 16 // logits.element_size()
        return f"a row of {logits.shape[1]} {logits.dtype} does not fit on a multiprocessor; {fit} do"
    return None


def constants(dtype: torch.dtype, slots: int, held: int, v: LossVariant, has_old: bool) -> dict:
    return dict(FP32=dtype == torch.float32, THREADS=THREADS, BLOCKS=2 if slots <= 12 else 1, SLOTS=slots, HELD=held,
                SURROGATE=f"surrogate_{SURROGATES[v.surrogate]}", KL=f"kl_{v.kl}", WEIGHT=f"weight_{WEIGHTS[v.correction]}", HAS_OLD=has_old,
                HAS_REF=v.kl != "none", HAS_RHO=v.correction != "none", SEQUENCE_WEIGHT=v.correction == "sequence_mask")  # fmt: skip


def rows_cuda(logits: Tensor, tokens: Tokens, variant: LossVariant | None, temperature: float, dlogits: Tensor | None = None) -> Rows:
    if dlogits is None:
        from .logits_grpo_triton import rows_triton

        return rows_triton(logits, tokens, variant, temperature)
    T, V = logits.shape
    out = Rows(*(torch.empty(T, dtype=torch.float32, device=logits.device) for _ in Rows._fields))
    if T == 0:
        return out
    multiprocessors, shared = _cuda.limits(logits.device)
    slots, held = granules_per_thread(logits, shared)
    fixed = constants(logits.dtype, slots, held, variant, tokens.old is not None)
    kernel = _cuda.load("logits_grpo", "logits_grpo_kernel", _cuda.macros(fixed), slots * THREADS * 16, logits.device.index)
    given = [x.contiguous() for x in (tokens.targets, tokens.scale, *(tokens.scale if x is None else x for x in tokens[2:]))]  # absent: never read
    pointers = [np.uint64(x.data_ptr()) for x in (logits, dlogits, *given, *out)]
    bounds, weight_bounds = run_time_numbers(variant)
    kernel(min(T, multiprocessors * fixed["BLOCKS"]), THREADS,
           (*pointers, np.int32(T), np.int32(V), np.int64(logits.stride(0)), np.int64(dlogits.stride(0)), np.float32(1 / temperature),
            *map(np.float32, (*bounds, *weight_bounds))))  # fmt: skip
    return out


def logits_grpo_cuda(**call) -> tuple[Tensor, dict[str, Tensor]]:
    from .logits_grpo_triton import TRITON

    return logits_loss(TRITON._replace(rows=rows_cuda), **call)


def ahead_of_time() -> list[_cuda.AheadOfTime]:
    cases = []
    for dtype, slots, held, capabilities, variant in (
        (torch.bfloat16, 28, 12, ("90a",), LossVariant(kl="k3", beta=0.1, correction="tis")),
        (torch.bfloat16, 20, 12, ("80",), LossVariant(kl="k3", beta=0.1, correction="tis")),
        (torch.float32, 28, 8, ("90a",), LossVariant(surrogate="sapo", kl="k2", beta=0.1, correction="sequence_mask")),
        (torch.bfloat16, 28, 4, ("90a",), LossVariant(surrogate="dual_clip", kl="k1", beta=0.1, correction="token_mask")),
        (torch.bfloat16, 16, 0, ("80", "90a"), LossVariant(surrogate="cispo")),
        (torch.bfloat16, 12, 0, ("80", "90a"), LossVariant(surrogate="reinforce")),
        (torch.float32, 4, 0, ("80", "90a"), LossVariant(surrogate="two_sided", delta=2.0)),
    ):
        fixed = constants(dtype, slots, held, variant, True)
        name = f"logits_grpo {str(dtype).removeprefix('torch.')} {slots}+{held} {variant.surrogate} {variant.kl} {variant.correction}"
        registers = 65536 // (THREADS * fixed["BLOCKS"])
        cases.append(_cuda.AheadOfTime(name, "logits_grpo", fixed, THREADS // 32, registers, slots * THREADS * 16, capabilities))
    return cases
