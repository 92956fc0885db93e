"""Block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2):  q = e4m3(x / s),  s = amax(|x| over a block) / 448,  x ~ s q.

Blocks of 1 x 128 (a row's activations along the sum of a product), 128 x 128 (weights: their transpose has the same numbers) and 128 x 1 (the sum of
a weight gradient runs over tokens).  Scales are fp32 numbers: amax / 448 itself, or the next power of two, by which a number scales exactly.

A number is rounded once, to the nearest, ties to even: x (448 / amax), or x / s for powers of two; what a rounding of 448 / amax lifts above 448
saturates.  amax below 448 x 2^-126 counts as that, so that s and 1/s are normal numbers; a block of zeros has q = 0.  NaN or infinity anywhere in a
block make its scale and all its numbers NaN: a maximum that drops NaN would hide it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import Backend, check, late, register
from ._triton import why_not_triton

BLOCKS = ((1, 128), (128, 128), (128, 1))
LARGEST = 448.0  # of e4m3
LEAST_AMAX = LARGEST * 2.0**-126


class Quantized(NamedTuple):
    """x ~ scales q, each scale for one block of q."""

    q: Tensor  # e4m3, the shape of x
    scales: Tensor  # fp32, (..., rows / block rows, columns / block columns), rounded up


def fp8_quantize(x: Tensor, *, block: tuple[int, int] = (1, 128), power_of_two: bool = True, backend: str | None = None) -> Quantized:
    """Quantise x in blocks of block[0] rows x block[1] columns; the last block of a row or a column may be smaller.

    x: (R, C), or (E, R, C) with blocks of 128 x 128; bf16, fp16 or fp32.  Returns q in x's shape and the scales.  Memory: q is contiguous, but with
    blocks of 128 x 1 its columns are (q.T is contiguous, each column padded to a multiple of 16 bytes); the scales of 1 x 128 are stored by column,
    too, padded to 16 bytes: what a product along that axis reads is then adjacent.  Not differentiable.  Raises ValueError on another block or shape.
    """
    _check_input(x, block, "fp8_quantize")
    check(tuple(block) in BLOCKS, lambda: f"fp8_quantize: block is {tuple(block)}; wanted one of {BLOCKS}")
    return op(backend, x=x.detach(), layouts=(tuple(block),), power_of_two=power_of_two)[0]


def fp8_quantize_dual(x: Tensor, *, block: tuple[int, int] = (1, 128), power_of_two: bool = True,
                      backend: str | None = None) -> tuple[Quantized, Quantized]:  # fmt: skip
    """Quantise x along its rows and along its columns in one read: the two operands that a matrix needs in a layer's products.

    block (1, 128): returns what `fp8_quantize` gives with (1, 128) and with (128, 1), bit for bit.  block (128, 128), for weights: the same numbers
    and scales twice, second with columns contiguous (q.mT is contiguous, rows of 16 bytes).  x as for `fp8_quantize`.  Raises ValueError likewise.
    """
    _check_input(x, block, "fp8_quantize_dual")
    check(tuple(block) in BLOCKS[:2], lambda: f"fp8_quantize_dual: block is {tuple(block)}; wanted (1, 128) or (128, 128)")
    return op(backend, x=x.detach(), layouts=(tuple(block), "columns" if tuple(block) == (128, 128) else (128, 1)), power_of_two=power_of_two)


def dequantize(quantized: Quantized, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """s q in `dtype`, exact in fp64 and with power-of-two scales within fp32's range."""
    q, scales = quantized
    for axis, size in zip((-2, -1), block, strict=True):
        scales = scales.repeat_interleave(size, axis).narrow(axis, 0, q.shape[axis]) if size > 1 else scales
    return q.to(dtype) * scales.to(dtype)


def _check_input(x: Tensor, block: tuple[int, int], where: str) -> None:
    check(x.ndim == 2 or (x.ndim == 3 and tuple(block) == (128, 128)), lambda: f"{where}: x is {tuple(x.shape)}; wanted (R, C), or (E, R, C) with "
          f"blocks of 128 x 128")  # fmt: skip
    check(x.dtype in (torch.float32, torch.bfloat16, torch.float16), lambda: f"{where}: x is {x.dtype}; wanted bf16, fp16 or fp32")


def empty_layout(shape: tuple[int, ...], layout, device: torch.device) -> Quantized:
    """Memory for one layout, as `fp8_quantize` describes it."""
    *outer, R, C = shape
    br, bc = (128, 128) if layout == "columns" else layout
    row_blocks, column_blocks = -(-R // br), -(-C // bc)
    if layout in ("columns", (128, 1)):
        q = torch.empty(*outer, C, -(-R // 16) * 16, dtype=torch.float8_e4m3fn, device=device)[..., :R].mT
    else:
        q = torch.empty(*outer, R, C, dtype=torch.float8_e4m3fn, device=device)
    if layout == (1, 128):
        scales = torch.empty(column_blocks, -(-R // 4) * 4, dtype=torch.float32, device=device)[:, :R].T
    else:
        scales = torch.empty(*outer, row_blocks, column_blocks, dtype=torch.float32, device=device)
    return Quantized(q, scales)


def scales_of(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Scale and the factor that a number is multiplied by, from the largest magnitudes of the blocks."""
    amax = torch.where(amax.isfinite(), amax.clamp_min(LEAST_AMAX), torch.nan)
    largest = torch.full_like(amax, LARGEST)  # PyTorch turns a division by or of a number into a product with a reciprocal
    scale = amax / largest
    if not power_of_two:
        return scale, largest / amax
    exponent = (scale.view(torch.int32) + 0x7FFFFF) >> 23  # rounded up
    poison = scale * 0
    return (exponent << 23).view(torch.float32) + poison, (254 - exponent << 23).view(torch.float32) + poison


def fp8_quantize_reference(x: Tensor, layouts: tuple, power_of_two: bool) -> tuple[Quantized, ...]:
    R, C = x.shape[-2:]
    results = []
    for layout in layouts:
        br, bc = (128, 128) if layout == "columns" else layout
        wide = F.pad(x.float(), (0, -C % bc, 0, -R % br))
        blocks = wide.unflatten(-1, (-1, bc)).unflatten(-3, (-1, br))  # (..., row blocks, br, column blocks, bc)
        scale, factor = scales_of(blocks.abs().amax((-3, -1)) if x.numel() else blocks.new_zeros(*blocks.shape[:-3], blocks.shape[-2]), power_of_two)
        y = (blocks * factor[..., :, None, :, None]).clamp(-LARGEST, LARGEST).flatten(-4, -3).flatten(-2, -1)[..., :R, :C]
        result = empty_layout(x.shape, layout, x.device)
        result.q.copy_(y.to(torch.float8_e4m3fn))
        result.scales.copy_(scale)
        results.append(result)
    return tuple(results)


op = register("fp8_quantize", triton=Backend(late("fp8_quantize_triton.fp8_quantize_triton"), why_not_triton),
              reference=Backend(fp8_quantize_reference))  # fmt: skip
