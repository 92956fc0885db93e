"""The producers of FP8 operands, and the layer of experts that they make: sizes of Qwen3-30B-A3B, T = 16384 tokens of 8 experts each.

What is compared is s q against the operation in fp64; eager in the case's dtype rounds, quantises and multiplies back, so its error is that of the
format.  The rival makes the numbers first and quantises them then.
"""

import torch
from case import Case, differentiated

from athanor import kernels as K
from athanor.kernels.fp8_producers import Produced, quantised
from athanor.kernels.fp8_quantize import Quantized, dequantize
from athanor.kernels.moe_permute import Places, gather_scaled

from .grouped_gemm import rn

# T, E, k, D, F; layouts as in training with FP8 weight gradients ("dual") and in sampling ("rows").  By bytes on an H200: see fp8_producers.py
SIZES = {"cuda": (16384, 128, 8, 2048, 768), "cpu": (256, 8, 2, 160, 96)}
E4M3 = torch.float8_e4m3fn


def flat(produced: Produced) -> tuple:
    """Bits, which no case converts to its dtype, and scales."""
    return tuple(part for result in produced[:2] if result is not None for part in (result.q.view(torch.uint8), result.scales))


def numbers(outputs: tuple, **inputs) -> tuple:
    """s q of each layout; what is exact already stays."""
    if outputs[0].dtype != torch.uint8:
        return outputs
    pairs = zip(outputs[::2], outputs[1::2], ((1, 128), (128, 1)), strict=False)
    return tuple(dequantize(Quantized(q.view(E4M3), scales), block) for q, scales, block in pairs)


def producer(op: str, sizes: dict, dual: bool, dtype, make, call, exact, work: str, bytes: float, fp32=(), rival=None) -> Case:
    """call: (**inputs, columns, backend) -> Produced.  exact: (**inputs) -> the numbers."""

    def eager(**inputs):
        y = exact(**inputs)
        return (y,) * (1 + dual) if y.dtype == torch.float64 else flat(quantised(y, dual, False, True))

    def separate(**inputs):
        y = (rival or exact)(**inputs)
        return flat(Produced(*(K.fp8_quantize_dual(y) if dual else (K.fp8_quantize(y), None)), None))

    return Case(op, sizes | {"layouts": 1 + dual}, dtype, make, lambda backend, **inputs: flat(call(**inputs, columns=dual, backend=backend)), eager,
                work, bytes=bytes, compared=numbers, fp32=fp32, rivals={"separate": separate}, slack=4)  # fmt: skip


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype, (T, E, k, D, F) = (torch.bfloat16 if gpu else torch.float32), SIZES[device]
    P, b, sizes = T * k, dtype.itemsize, {"T": T, "E": E, "k": k, "D": D}
    found = []

    def routed(g):
        ids = torch.rand(T, E, generator=g).topk(k, dim=1).indices.to(torch.int32)
        return K.moe_places(ids, E, align=128, backend="reference")._asdict()

    padded = P + E * 64  # rows, about
    for dual in (False, True):
        out = 1 + 4 / 128  # bytes of a number in one layout
        layouts = out * (1 + dual)
        found += [
            producer("fp8_permute", sizes, dual, dtype, lambda g: {"x": rn(g, T, D)} | routed(g),
                     lambda x, offsets, source, inverse, **asked: K.fp8_permute(x, Places(offsets, source, inverse), **asked),
                     lambda x, offsets, source, inverse: gather_scaled(x, source, None, k),
                     "reads T rows, writes one byte per number, row and layout, and the scales", T * D * b + padded * D * layouts),
            producer("fp8_swiglu", {"T": P, "F": F}, dual, dtype, lambda g: {"gate_up": rn(g, P, 2 * F)},
                     lambda gate_up, **asked: K.fp8_swiglu(gate_up, **asked),
                     lambda gate_up: torch.nn.functional.silu(gate_up[:, :F].double()).mul(gate_up[:, F:]).to(gate_up.dtype),
                     "reads 2F, writes F in one byte per layout", P * F * (2 * b + layouts), rival=lambda gate_up: K.swiglu(gate_up)),
            producer("fp8_swiglu_backward", {"T": P, "F": F}, dual, dtype, lambda g: {"gate_up": rn(g, P, 2 * F), "dy": rn(g, P, F)},
                     lambda gate_up, dy, **asked: K.fp8_swiglu_backward(gate_up, dy, **asked), gradient_of_swiglu,
                     "reads 3F, writes 2F in one byte per layout", P * F * (3 * b + 2 * layouts), rival=fast_gradient),
        ]  # fmt: skip
    found.append(producer("fp8_rmsnorm", {"T": T, "D": D}, False, dtype, lambda g: {"x": rn(g, T, D), "weight": rn(g, D)},
                          lambda x, weight, columns, backend: K.fp8_rmsnorm(x, weight, backend=backend), norm,
                          "reads x, writes one byte per number and the scales", T * D * (b + 1 + 4 / 128),
                          rival=lambda x, weight: K.rmsnorm(x, weight)))  # fmt: skip
    return [*found, dots_case(T, E, k, D, dtype), layer_case(T, E, k, D, F, dtype)]


def norm(x, weight):
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()).to(x.dtype)


def gradient_of_swiglu(gate_up, dy):
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    return torch.autograd.grad(torch.nn.functional.silu(gate) * up, wide, dy.double())[0].to(gate_up.dtype)


def fast_gradient(gate_up, dy):
    leaf = gate_up.detach().requires_grad_()
    return torch.autograd.grad(K.swiglu(leaf), leaf, dy)[0]


def dots_case(T: int, E: int, k: int, D: int, dtype: torch.dtype) -> Case:
    def make(g):
        ids = torch.rand(T, E, generator=g).topk(k, dim=1).indices.to(torch.int32)
        return {"y": rn(g, T * k, D), "dout": rn(g, T, D)} | K.moe_places(ids, E, backend="reference")._asdict()

    return Case("moe_dots", {"T": T, "E": E, "k": k, "D": D}, dtype, make,
                lambda y, dout, offsets, source, inverse, backend: (K.moe_dots(y, dout, Places(offsets, source, inverse), torch.float32,
                                                                               backend=backend),),
                lambda y, dout, offsets, source, inverse: ((y[inverse] * dout[:, None]).to(torch.promote_types(y.dtype, torch.float32)).sum(2),),
                "reads y and the gradient of the layer, writes T k numbers", bytes=T * D * (k + 1) * dtype.itemsize, slack=64)  # fmt: skip


def layer_case(T: int, E: int, k: int, D: int, F: int, dtype: torch.dtype) -> Case:
    """Forward and backward of a layer's routed experts, weights quantised before.  Compared with itself: the error of FP8 is not the kernels'."""
    given = ("x", "weights", "gate_up", "down")

    def make(g):
        ids = torch.rand(T, E, generator=g).topk(k, dim=1).indices.to(torch.int32)
        return {"x": rn(g, T, D), "weights": torch.rand(T, k, generator=g, dtype=torch.float64), "gate_up": rn(g, E, 2 * F, D) / D**0.5,
                "down": rn(g, E, D, F) / F**0.5, "dout": rn(g, T, D), "ids": ids}  # fmt: skip

    def joined(ids, dout, backend=None, wgrad="fp8", **leaves):
        def layer(x, weights, gate_up, down):
            places = K.moe_places(ids, E, align=128, backend=None if backend == "cuda" else backend)  # products alone have that backend
            return K.fp8_mixture(x, weights, places, gate_up, down, wgrad=wgrad, backend=backend)

        return differentiated(layer, *(leaves[name] for name in given), upstream=dout)

    def separate(ids, dout, backend=None, **leaves):
        def layer(x, weights, gate_up, down):
            rows, places = K.moe_permute(x, ids, E, align=128, backend=backend)
            options = dict(wgrad="fp8", backend=backend)
            a = K.swiglu(K.fp8_grouped_gemm(rows, gate_up, places.offsets, **options), backend=backend)
            return K.moe_unpermute(K.fp8_grouped_gemm(a, down, places.offsets, **options), weights, places, backend=backend)

        return differentiated(layer, *(leaves[name] for name in given), upstream=dout)

    def eager(ids, dout, **leaves):
        if dout.dtype != torch.float64:
            return separate(ids, dout, backend="reference", **leaves)

        def layer(x, weights, gate_up, down):
            rows, places = K.moe_permute(x, ids, E, backend="reference")
            gate, up = K.grouped_gemm(rows, gate_up, places.offsets, backend="reference").chunk(2, 1)
            y = K.grouped_gemm(torch.nn.functional.silu(gate) * up, down, places.offsets, backend="reference")
            return K.moe_unpermute(y, weights, places, backend="reference")

        return differentiated(layer, *(leaves[name] for name in given), upstream=dout)

    P = T * k
    return Case("fp8_grouped_gemm", {"T": T, "E": E, "k": k, "D": D, "F": F, "layer": 1}, dtype, make, joined, eager,
                "9 products of 2 P D F (3 forward, 3 dx, 3 dW), permutation, swiglu and casts between", flops=18 * P * D * F, fp32=("weights",),
                rivals={"separate": separate, "bf16 dW": lambda **inputs: joined(**inputs, wgrad="bf16")})  # fmt: skip
