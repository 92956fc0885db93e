"""What `fp8_numerics` puts in the place of a mixture's FP8 products: exact ones that keep their operands, and noise of FP8's size.

`Noisy` is the control for FP8 experts: every operand x of a product becomes  x + s (Q(x) - x),  Q as FP8 rounds in the same blocks, each s = +1 or -1
at random.  The errors have FP8's sizes, number by number, but no side: their mean over s is 0, so whatever FP8 does by the side to which it rounds,
and noise of that size does not, is FP8's own bias.  Signs of weights are drawn once, as FP8's error of a weight stays while the weight does; those of
activations and gradients in every call.
"""

import torch
from torch import Tensor

from athanor.kernels import Places, grouped_gemm, moe_unpermute, swiglu
from athanor.kernels.fp8_quantize import dequantize, fp8_quantize
from athanor.kernels.grouped_gemm import grouped_gemm_reference, grouped_wgrad


class Products:
    """The interface of `Fp8Products` on which a layer calls, over `product`."""

    def __init__(self):
        self.weights = {}  # FP8 copies: none

    def align(self, training: bool) -> int:
        return 128

    def routed(self, x: Tensor, weights: Tensor, places: Places, gate_up: Tensor, down: Tensor, *, gathered: bool) -> Tensor:
        rows = x[places.source.clamp_min(0) // weights.shape[1]] * (places.source >= 0)[:, None]
        return moe_unpermute(self.product(swiglu(self.product(rows, gate_up, places.offsets)), down, places.offsets), weights, places)

    def product(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        raise NotImplementedError


class Watched(Products):
    """Exact products, and what goes into them is kept."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {"activations": [], "weights": [], "gradients": []}

    def product(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        y = grouped_gemm(x, weight, offsets)
        self.kept["activations"].append(x.detach())
        self.kept["weights"].append(weight.detach())
        y.register_hook(lambda dy: self.kept["gradients"].append(dy.detach()))
        return y


class Noisy(Products):
    """Products of operands with noise of FP8's size.  seed: of the signs; None = FP8's own errors.  wgrad: noise in weight gradients, too."""

    def __init__(self, *, wgrad: bool, seed: int | None):
        super().__init__()
        self.wgrad, self.generator, self.signs = wgrad, None, {}
        if seed is not None:
            self.generator = torch.Generator().manual_seed(seed)

    def product(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return _NoisyProduct.apply(x, weight, offsets, self)

    def align(self, training: bool) -> int:
        return 128 if self.wgrad else 1

    def drawn(self, x: Tensor) -> Tensor | float:
        return 1.0 if self.generator is None else torch.randint(0, 2, x.shape, dtype=torch.int8, generator=self.generator).mul_(2).sub_(1)

    def noisy(self, x: Tensor, block: tuple[int, int], signs: Tensor | float | None = None) -> Tensor:
        return dequantize(fp8_quantize(x, block=block), block).sub_(x).mul_(self.drawn(x) if signs is None else signs).add_(x)


class _NoisyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, noise):
        stack = weight.data_ptr()  # the optimizer steps in place
        if stack not in noise.signs:
            noise.signs[stack] = noise.drawn(weight)
        w = noise.noisy(weight, (128, 128), noise.signs[stack])
        ctx.save_for_backward(noise.noisy(x, (128, 1)) if noise.wgrad else x, w, offsets)
        ctx.noise = noise
        return grouped_gemm_reference(noise.noisy(x, (1, 128)), w, offsets)

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        dw = grouped_wgrad(ctx.noise.noisy(dy, (128, 1)) if ctx.noise.wgrad else dy, x, offsets, w.shape[0])
        return grouped_gemm_reference(ctx.noise.noisy(dy, (1, 128)), w.mT, offsets), dw, None, None
