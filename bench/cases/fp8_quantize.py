"""fp8_quantize: activations of an expert layer in one layout and in both, and a layer's weights with their transpose.  Bits are compared."""

import torch
from case import Case

from athanor import kernels as K
from athanor.kernels.fp8_quantize import fp8_quantize_reference

# shape, block, both layouts; predicted on an H200 at 4.3 TB/s: 166, 222 and 109 us
SIZES = {
    "cuda": [((32768, 7168), (1, 128), 0), ((32768, 7168), (1, 128), 1), ((8, 2048, 7168), (128, 128), 1)],
    "cpu": [((1024, 512), (1, 128), 0), ((1024, 512), (1, 128), 1), ((4, 256, 512), (128, 128), 1)],
}


def case(shape: tuple, block: tuple, dual: int, dtype: torch.dtype) -> Case:
    def flat(results) -> tuple:
        return tuple(part for q, scales in results for part in (q.view(torch.uint8), scales))

    def run(x, backend):
        return flat(K.fp8_quantize_dual(x, block=block, backend=backend) if dual else [K.fp8_quantize(x, block=block, backend=backend)])

    def eager(x):
        second = ["columns" if block == (128, 128) else (128, 1)] * dual
        return flat(fp8_quantize_reference(x.float(), (block, *second), True))

    elements = torch.Size(shape).numel()
    rows = {"E": shape[0]} if len(shape) == 3 else {}
    return Case("fp8_quantize", rows | {"R": shape[-2], "C": shape[-1], "block": block[0], "layouts": 1 + dual}, dtype,
                lambda g: {"x": torch.randn(shape, generator=g, dtype=torch.float64)}, run, eager,
                "reads x, writes one byte per number and layout, and the scales",
                bytes=elements * (dtype.itemsize + (1 + dual) * (1 + 4 / (block[0] * block[1]))))  # fmt: skip


def cases(device: str) -> list[Case]:
    return [case(*size, torch.bfloat16 if device == "cuda" else torch.float32) for size in SIZES[device]]
