"""FP8 products of the routed experts (DeepSeek-V3, arXiv 2412.19437, section 3.3) with weights that are quantised once per change.

The master weights stay as they are, in the model's type, and are all that an optimizer or a checkpoint sees.  Sampler and trainer are the same
module, so they multiply by the same bytes.  Router, shared experts, attention, norms, embedding and head know nothing of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from athanor.kernels import Places, fp8_grouped_gemm, fp8_mixture, fp8_quantize_many
from athanor.kernels.fp8_quantize import Quantized
from athanor.kernels.fp8_quantize_many import empty_copy

WGRAD_ROWS = 128  # tokens that share a scale of an FP8 weight gradient: every expert's rows are a multiple of it


class Fp8Weight:
    """The FP8 copy of one stack of matrices, in blocks of 128 x 128 with scales that are powers of two.

    Its memory (2 bytes per number: rows and columns) stays where it is, so that captured steps read the new numbers: they are written over the old
    ones when the stack has been written to since.  What a forward before that saved for its backward is then refused by PyTorch.

    among: the copies of a model.  After an optimizer step all of them are old, and the first that is asked for has all made anew in one launch; the
    others then find theirs new.
    """

    def __init__(self, among: list["Fp8Weight"] | None = None):
        self.copy: tuple[Quantized, Quantized] | None = None
        self.num_made = 0  # how often the stack was quantised
        self.owner: Tensor | None = None  # the parameter
        self.dtype: torch.dtype | None = None  # to round to first; None = as the numbers are
        self._made_of: tuple = ()
        self._among = [] if among is None else among
        self._among.append(self)

    def of(self, weight: Tensor, owner: Tensor | None = None) -> tuple[Quantized, Quantized]:
        """`fp8_quantize_dual` of the stack (E, N, K) as it is now.

        owner: the parameter, where the stack is a view or a cast of this rank's part of a DTensor.
        """
        self.watch(weight if owner is None else owner, weight.dtype)
        if self.is_old():
            refresh_([copy for copy in self._among if copy.owner is not None and copy.kept.device == self.kept.device])
        return self.copy

    def watch(self, owner: Tensor, dtype: torch.dtype) -> "Fp8Weight":
        """Be the copy of a parameter, or of this rank's part of one, in the type in which it is computed with."""
        self.owner = owner
        self.dtype = None if dtype == self.kept.dtype else dtype
        return self

    @property
    def kept(self) -> Tensor:
        """The numbers that the copy is made of: what this rank has of the parameter."""
        return self.owner._local_tensor if isinstance(self.owner, DTensor) else self.owner

    def is_old(self) -> bool:
        made_of = self._state()
        return len(self._made_of) != len(made_of) or self._made_of[0] is not made_of[0] or self._made_of[1:] != made_of[1:]

    def _state(self) -> tuple:
        # In-place writes are counted: an optimizer's by the parameter, those of a state that is read by the part.
        kept = self.kept
        return self.owner, self.owner._version, kept.data_ptr(), kept._version, kept.dtype, kept.device, self.dtype


def refresh_(copies: Iterable[Fp8Weight]) -> None:
    """Make anew what is older than its stack, in one launch; one for each device and type to round to, where they have several."""
    together: dict[tuple, list[Fp8Weight]] = {}
    for copy in copies:
        if copy.is_old():
            together.setdefault((copy.kept.device, copy.dtype), []).append(copy)
    for (device, dtype), old in together.items():
        with torch.inference_mode(False), torch.no_grad():  # the sampler's inference tensors could not be saved for a backward
            for copy in old:
                if copy.copy is None or copy.copy[0].q.shape != copy.kept.shape or copy.copy[0].q.device != device:
                    copy.copy = empty_copy(copy.kept.shape, device)
            fp8_quantize_many([copy.kept for copy in old], [copy.copy for copy in old], dtype=dtype)
        for copy in old:
            copy._made_of, copy.num_made = copy._state(), copy.num_made + 1


class Fp8Products:
    """What takes the place of `grouped_gemm` in one layer: forward and input gradient in FP8, with `wgrad` the weight gradient too.

    `routed` makes each operand of a product where the numbers come from; calling it takes one product at a time, with the same bits.
    """

    def __init__(self, wgrad: bool, among: list[Fp8Weight] | None = None):
        among = [] if among is None else among  # the copies of all layers, see `Fp8Weight`
        self.wgrad = wgrad
        self.weights: dict[str, Fp8Weight] = {"gate_up_proj": Fp8Weight(among), "down_proj": Fp8Weight(among)}

    def align(self, training: bool) -> int:
        """What the number of every expert's rows is a multiple of."""
        return WGRAD_ROWS if self.wgrad and training else 1

    def routed(self, x: Tensor, weights: Tensor, places: Places, gate_up: Tensor, down: Tensor, *, gathered: bool = False) -> Tensor:
        """x (T, D) through the experts and back, (T, D).

        gathered: the stacks do not tell when they change, and lie elsewhere each time: they are quantised in every call, one by one.
        """
        copies = (None, None) if gathered else (self.weights["gate_up_proj"].of(gate_up), self.weights["down_proj"].of(down))
        return fp8_mixture(x, weights, places, gate_up, down, copies=copies, wgrad="fp8" if self.wgrad and torch.is_grad_enabled() else "bf16")

    def __call__(self, name: str, x: Tensor, weight: Tensor, offsets: Tensor, owner: Tensor) -> Tensor:
        """One product.  owner: the parameter whose numbers the weight has, which tells when they change."""
        wgrad = "fp8" if self.wgrad and torch.is_grad_enabled() else "bf16"
        return fp8_grouped_gemm(x, weight, offsets, weight=self.weights[name].of(weight, owner), wgrad=wgrad)
