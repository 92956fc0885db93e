"""fp8_quantize_many: the FP8 copies of a mixture's experts after an optimizer step, beside one launch per stack.  Bits are compared.

Sizes of Qwen3-30B-A3B: 128 experts, D = 2048, F = 768.  Its 48 layers and their copies are 116 GB, so it is 4 of them here, 2.4e9 numbers, a twelfth.
The goal, 8 ms for 8e9 numbers and 30 ms for 30e9, is 1 ms for 1e9, so 2.4 ms; by bytes on an H200 at 4.25 TB/s 2.3 ms.  Not measured.
"""

import torch
from case import Case

from athanor import kernels as K
from athanor.kernels import Quantized
from athanor.kernels.fp8_quantize import fp8_quantize_reference
from athanor.kernels.fp8_quantize_many import LAYOUTS, empty_copy

from .grouped_gemm import rn

E4M3 = torch.float8_e4m3fn
# layers, E, D, F: multiples of 16, so that a clone of a copy has its memory layout
SIZES = {"cuda": (4, 128, 2048, 768), "cpu": (3, 2, 272, 144)}
PARTS = ("q", "scales", "q_columns", "scales_columns")


def copies_of(inputs: dict) -> list[tuple[Quantized, Quantized]]:
    stacks = [name for name in inputs if name.startswith("w")]
    found = [[inputs[f"{part} {name}"] for part in PARTS] for name in stacks]
    return [(Quantized(q.view(E4M3), scales), Quantized(columns.view(E4M3), more)) for q, scales, columns, more in found]


def flat(copies) -> tuple:
    return tuple(part for copy in copies for q, scales in copy for part in (q.view(torch.uint8), scales))


def cases(device: str) -> list[Case]:
    layers, E, D, F = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = {f"w{i}": shape for i, shape in enumerate([(E, 2 * F, D), (E, D, F)] * layers)}
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())

    def make(g) -> dict:
        weights, copies = {name: rn(g, *shape) for name, shape in shapes.items()}, {}
        for name, shape in shapes.items():
            for (q, scales), parts in zip(empty_copy(shape, g.device), (PARTS[:2], PARTS[2:]), strict=True):
                copies |= {f"{parts[0]} {name}": q.view(torch.uint8).fill_(0x55), f"{parts[1]} {name}": scales.fill_(torch.nan)}  # unwritten shows
        return weights | copies

    def weights_of(inputs: dict) -> list:
        return [inputs[name] for name in shapes]

    def run(backend, **inputs):
        copies = copies_of(inputs)
        K.fp8_quantize_many(weights_of(inputs), copies, backend=backend)
        return flat(copies)

    def eager(**inputs):
        return flat([fp8_quantize_reference(w.float(), LAYOUTS, True) for w in weights_of(inputs)])

    def single(**inputs):
        """One launch per stack into new memory, and two copies of that into the old."""
        copies = copies_of(inputs)
        for weight, copy in zip(weights_of(inputs), copies, strict=True):
            for old, new in zip(copy, K.fp8_quantize_dual(weight, block=(128, 128)), strict=True):
                old.q.copy_(new.q)
                old.scales.copy_(new.scales)
        return flat(copies)

    def launches(**inputs):
        return flat([K.fp8_quantize_dual(weight, block=(128, 128)) for weight in weights_of(inputs)])

    scales = tuple(f"{part} {name}" for name in shapes for part in PARTS[1::2])
    return [Case("fp8_quantize_many", {"layers": layers, "E": E, "D": D, "F": F}, dtype, make, run, eager,
                 "reads every stack, writes a byte per number in two layouts, and the scales twice",
                 bytes=numbers * (dtype.itemsize + 2 + 8 / 128**2),
                 rivals={"one by one, in place": single, "one by one": launches}, fp32=scales)]  # fmt: skip
