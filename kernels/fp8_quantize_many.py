"""fp8_quantize_dual of many matrices at once, into memory that stays where it is: what an optimizer step does to all FP8 copies of a model.

    q_i = e4m3(x_i / s),  s = amax(|x_i| over a block of 128 x 128) / 448,  for every i       (fp8_quantize.py, bit for bit)

On CUDA it is one launch, whatever the number, the shapes and the types of the matrices: the kernel reads addresses and strides from a table on the
device, which is made anew when one of them has changed.  Captured CUDA graphs read the new numbers, because no output moves.
Left out: other blocks (activations are quantised by what makes them) and one layout alone (training reads both).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton
from .fp8_quantize import Quantized, empty_layout, fp8_quantize_reference

LAYOUTS = ((128, 128), "columns")  # of a copy: rows and columns contiguous
TYPES = (torch.bfloat16, torch.float16, torch.float32)

Copy = tuple[Quantized, Quantized]


def empty_copy(shape: Sequence[int], device: torch.device) -> Copy:
    """Memory for the copy of one matrix (R, C) or stack (E, R, C), as `fp8_quantize_dual(.., block=(128, 128))` lays it out."""
    rows, columns = (empty_layout(tuple(shape), layout, device) for layout in LAYOUTS)
    return rows, columns


def fp8_quantize_many(weights: Sequence[Tensor], copies: Sequence[Copy], *, dtype: torch.dtype | None = None, power_of_two: bool = True,
                      backend: str | None = None) -> None:  # fmt: skip
    """Write `fp8_quantize_dual(weight.to(dtype), block=(128, 128), power_of_two=power_of_two)` of each weight over its copy.

    weights: (R, C) or (E, R, C) each, bf16, fp16 or fp32, columns adjacent, all on one device.  copies: of each, as `empty_copy` lays them out.
    dtype: what the numbers are rounded to first, in which fp32 masters are computed with; None or fp32 = as they are.  Nothing is returned, and
    PyTorch's version counters see the writes.  Not differentiable.  Raises ValueError on a mismatch.
    """
    name = "fp8_quantize_many"
    check(len(weights) == len(copies), lambda: f"{name}: copies has {len(copies)} entries; wanted {len(weights)}, one of each weight")
    check(dtype is None or dtype in TYPES, lambda: f"{name}: dtype is {dtype}; wanted None, bf16, fp16 or fp32")
    for i, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
        check(weight.ndim in (2, 3), lambda i=i, w=weight: f"{name}: weights[{i}] is {tuple(w.shape)}; wanted (R, C) or (E, R, C)")
        check(weight.dtype in TYPES, lambda i=i, w=weight: f"{name}: weights[{i}] is {w.dtype}; wanted bf16, fp16 or fp32")
        check(weight.dtype in (dtype, torch.float32) or dtype in (None, torch.float32),
              lambda i=i, w=weight: f"{name}: weights[{i}] is {w.dtype}; wanted {dtype}, or fp32 to be rounded to it")  # fmt: skip
        check(weight.shape[-1] <= 1 or weight.stride(-1) == 1,
              lambda i=i, w=weight: f"{name}: weights[{i}] has strides {w.stride()}; wanted adjacent columns, 1 at the end")  # fmt: skip
        check(weight.device == weights[0].device,
              lambda i=i, w=weight: f"{name}: weights[{i}] is on {w.device}; wanted {weights[0].device}, as weights[0]")  # fmt: skip
        _check_copy(f"{name}: copies[{i}]", weight, copy)
    if weights:
        weights = [weight.detach() for weight in weights]
        op(backend, first=weights[0], weights=weights, copies=copies, dtype=dtype, power_of_two=power_of_two)


def _check_copy(what: str, weight: Tensor, copy: Copy) -> None:
    check(len(copy) == 2, lambda: f"{what} has {len(copy)} layouts; wanted 2, rows and columns")
    *outer, R, C = weight.shape
    height = -(-R // 16) * 16
    blocks = (*outer, -(-R // 128), -(-C // 128))
    strides = ((R * C, C, 1), (C * height, 1, height))
    for layout, (q, scales), stride in zip(("rows", "columns"), copy, strides, strict=True):
        stride = stride[-weight.ndim :]
        check(q.shape == weight.shape and q.dtype == torch.float8_e4m3fn and (q.stride() == stride or q.numel() <= 1 or 1 in q.shape),
              lambda layout=layout, q=q, stride=stride: f"{what}: q of {layout} is {tuple(q.shape)} {q.dtype} with strides {q.stride()}; wanted "
                                                        f"{tuple(weight.shape)} e4m3 with {stride}")  # fmt: skip
        check(scales.shape == blocks and scales.dtype == torch.float32 and scales.is_contiguous(),
              lambda layout=layout, s=scales: f"{what}: scales of {layout} are {tuple(s.shape)} {s.dtype} with strides {s.stride()}; wanted {blocks} "
                                              f"fp32, contiguous")  # fmt: skip
        check(layout == "rows" or q.data_ptr() % 16 == 0, lambda q=q: f"{what}: q of columns begins at {q.data_ptr()}; wanted a multiple of 16 bytes")
        check(q.device == scales.device == weight.device,
              lambda layout=layout, q=q, s=scales: f"{what}: {layout} is on {q.device} and {s.device}; wanted {weight.device}")  # fmt: skip


def fp8_quantize_many_reference(first: Tensor, weights: Sequence[Tensor], copies: Sequence[Copy], dtype: torch.dtype | None,
                                power_of_two: bool) -> None:  # fmt: skip
    for weight, copy in zip(weights, copies, strict=True):
        for old, new in zip(copy, fp8_quantize_reference(weight.to(dtype or weight.dtype), LAYOUTS, power_of_two), strict=True):
            old.q.copy_(new.q)
            old.scales.copy_(new.scales)


op = register("fp8_quantize_many", triton=Backend(late("fp8_quantize_many_triton.fp8_quantize_many_triton"), why_not_triton),
              reference=Backend(fp8_quantize_many_reference))  # fmt: skip
