"""What the layers of every family are made of: the norm, the matrix, SwiGLU, and the number of rows that a CPU computes at a time."""

import torch
from torch import Tensor, nn

from athanor.kernels import linear, rmsnorm, swiglu
from athanor.kernels._cpu import native_there
from athanor.kernels._dispatch import requested_backend
from athanor.kernels.embedding_cpu import embedding_cpu
from athanor.kernels.mlp_cpu import mlp_cpu

# Products of few rows, or of an odd number of rows per CPU thread, take other paths in BLAS and round differently (seen with 5-27 rows on AMD and
# 1-7 on Intel).  Rollout and trainer therefore run the model on multiples of this many rows, the last ones filler that nobody reads.
ROW_STEP = 16


def rows_of_their_own(x: Tensor) -> bool:
    """Whether products of CPU tensors like x give every row bits that do not depend on the number of rows: the C++ kernels' do, BLAS's do not."""
    return x.dtype == torch.float32 and native_there() and requested_backend(None, "products") in (None, "cpu")


def fill_rows(x: Tensor, value: float = 0, step: int = ROW_STEP) -> Tensor:
    """x (n, ...) with rows of `value` behind it, up to the next multiple of `step` and at least `step`."""
    missing = -x.shape[0] % step if x.shape[0] else step
    return torch.cat((x, x.new_full((missing, *x.shape[1:]), value))) if missing else x


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normed x; with a residual (the normed x + residual, x + residual), in one kernel."""
        return rmsnorm(x, self.weight, eps=self.eps, residual=residual)


class Embedding(nn.Embedding):
    """nn.Embedding; a decode step's rows on a CPU by a kernel, which is captured as one."""

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and self.weight.is_cpu and ids.ndim == 1 and rows_of_their_own(self.weight):
            return embedding_cpu(self.weight, ids)
        return super().forward(ids)


class Linear(nn.Linear):
    """nn.Linear by way of the kernel, which has a row-independent version for strict mode."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def mlp(x: Tensor, gate_up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """down(silu(gate x) * up x) (T, D) of x (T, D); of CPU tensors a block of rows at a time, to the same bits."""
    plain = type(gate_up_proj) is Linear and type(down_proj) is Linear and gate_up_proj.bias is None and down_proj.bias is None
    if plain and x.is_cpu and rows_of_their_own(x):
        return mlp_cpu(x, gate_up_proj.weight, down_proj.weight)
    return down_proj(swiglu(gate_up_proj(x)))


class Swiglu(nn.Module):
    """down(silu(gate x) * up x), gate and up as one matrix."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.gate_up_proj, self.down_proj)
