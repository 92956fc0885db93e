"""FP8 products of the routed experts (DeepSeek-V3, arXiv 2412.19437, section 3.3) with weights that are quantised once per change.

The master weights stay as they are, in the model's type, and are all that an optimizer or a checkpoint sees.  Sampler and trainer are the same
module, so they multiply by the same bytes.  Router, shared experts, attention, norms, embedding and head know nothing of it.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from athanor.kernels import Places, fp8_grouped_gemm, fp8_mixture
from athanor.kernels.fp8_quantize import Quantized, fp8_quantize_dual

WGRAD_ROWS = 128  # tokens that share a scale of an FP8 weight gradient: every expert's rows are a multiple of it


class Fp8Weight:
    """The FP8 copy of one stack of matrices, in blocks of 128 x 128 with scales that are powers of two.

    Its memory (2 bytes per number: rows and columns) stays where it is, so that captured steps read the new numbers: `of` writes them over the old
    ones when the stack has been written to since.  What a forward before that saved for its backward is then refused by PyTorch.
    """

    def __init__(self):
        self.copy: tuple[Quantized, Quantized] | None = None
        self.num_made = 0  # how often the stack was quantised
        self._seen: tuple = ()

    def of(self, weight: Tensor, owner: Tensor | None = None) -> tuple[Quantized, Quantized]:
        """`fp8_quantize_dual` of the stack (E, N, K) as it is now.

        owner: the parameter, where the stack is a view or a cast of this rank's part of a DTensor.
        """
        owner = weight if owner is None else owner
        kept = owner._local_tensor if isinstance(owner, DTensor) else owner
        # In-place writes are counted: an optimizer's by the parameter, those of a state that is read by the part.
        seen = owner, owner._version, kept.data_ptr(), kept._version, weight.dtype, weight.device
        if len(self._seen) == len(seen) and seen[0] is self._seen[0] and seen[1:] == self._seen[1:]:
            return self.copy
        with torch.inference_mode(False), torch.no_grad():  # the sampler's inference tensors could not be saved for a backward
            made = fp8_quantize_dual(weight.detach(), block=(128, 128))
            if self.copy is None or self.copy[0].q.shape != weight.shape or self.copy[0].q.device != weight.device:
                self.copy = made
            else:
                for old, new in zip(self.copy, made, strict=True):
                    old.q.copy_(new.q)
                    old.scales.copy_(new.scales)
        self._seen, self.num_made = seen, self.num_made + 1
        return self.copy


class Fp8Products:
    """What takes the place of `grouped_gemm` in one layer: forward and input gradient in FP8, with `wgrad` the weight gradient too.

    `routed` makes each operand of a product where the numbers come from; calling it takes one product at a time, with the same bits.
    """

    def __init__(self, wgrad: bool):
        self.wgrad = wgrad
        self.weights: dict[str, Fp8Weight] = {"gate_up_proj": Fp8Weight(), "down_proj": Fp8Weight()}

    def align(self, training: bool) -> int:
        """What the number of every expert's rows is a multiple of."""
        return WGRAD_ROWS if self.wgrad and training else 1

    def routed(self, x: Tensor, weights: Tensor, places: Places, gate_up: Tensor, down: Tensor, *, gathered: bool = False) -> Tensor:
        """x (T, D) through the experts and back, (T, D).  gathered: the stacks do not tell when they change, and are quantised in every call."""
        copies = (None, None) if gathered else (self.weights["gate_up_proj"].of(gate_up), self.weights["down_proj"].of(down))
        return fp8_mixture(x, weights, places, gate_up, down, copies=copies, wgrad="fp8" if self.wgrad and torch.is_grad_enabled() else "bf16")

    def __call__(self, name: str, x: Tensor, weight: Tensor, offsets: Tensor, owner: Tensor) -> Tensor:
        """One product.  owner: the parameter whose numbers the weight has, which tells when they change."""
        wgrad = "fp8" if self.wgrad and torch.is_grad_enabled() else "bf16"
        return fp8_grouped_gemm(x, weight, offsets, weight=self.weights[name].of(weight, owner), wgrad=wgrad)
