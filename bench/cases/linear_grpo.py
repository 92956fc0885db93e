"""linear_grpo and logits_grpo, forward and gradients, with every token alive and with 40 % of the tokens in sequences of advantage 0.

The ratios stay away from the clip bounds: a token on a bound would be cut by one rounding and not by another, and the gate could not tell that from
an error.  Peers compute cross entropies, not this loss; the rival "half logits" is the usual chain on bf16 logits.
"""

import torch
from case import Case, differentiated

from athanor import kernels as K

LINEAR = {"cuda": (4096, 4096, 128256), "cpu": (1024, 128, 8192)}  # T, D, V: the goal's size on a GPU
LOGITS = {"cuda": (8192, 151936), "cpu": (512, 8192)}


def tokens(g: torch.Generator, logps: torch.Tensor, dead: int) -> dict:
    """The rest of a batch of S = 20 sequences, `dead` % of which have advantage 0."""
    T, S = len(logps), 20
    A = 0.5 + torch.rand(S, generator=g, dtype=torch.float64)
    A[3::4] *= -1  # few, so that the loss is no difference of nearly equal sums
    A[torch.arange(S) % 5 < dead // 20] = 0
    old = logps + 0.1 * (2 * torch.rand(T, generator=g, dtype=torch.float64) - 1)
    return {"old": old, "A": A, "cu": (torch.arange(S + 1) * T // S).int()}


def picked(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def eager_loss(logps, old, A, cu):
    A, r = A.repeat_interleave(cu.diff().long(), output_size=len(logps)), (logps - old).exp()
    return -torch.minimum(r * A, r.clamp(0.8, 1.2) * A).mean()


def wide_logits(x, w):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ w.to(wide).T


def linear_case(T: int, D: int, V: int, dead: int, dtype: torch.dtype) -> Case:
    def make(g):
        x, w = torch.randn(T, D, generator=g, dtype=torch.float64), torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
        targets = torch.randint(0, V, (T,), generator=g)
        rounded, chunks = (x.to(dtype).float(), w.to(dtype).float().T), range(0, T, 512)  # in fp64 they would not be the log-probs of these inputs
        logps = torch.cat([picked(rounded[0][i : i + 512] @ rounded[1], targets[i : i + 512]) for i in chunks])
        return {"x": x, "w": w, "targets": targets} | tokens(g, logps.double(), dead)

    def run(x, w, targets, old, A, cu, backend):
        return differentiated(lambda x, w: K.linear_grpo(x, w, targets, old, A, cu, backend=backend)[0], x, w)

    def eager(x, w, targets, old, A, cu):
        return differentiated(lambda x, w: eager_loss(picked(wide_logits(x, w), targets), old, A, cu), x, w)

    def half(x, w, targets, old, A, cu):
        return differentiated(lambda x, w: eager_loss(picked(x @ w.T, targets), old, A, cu), x, w)

    live = 1 - dead / 100
    return Case("linear_grpo", {"T": T, "D": D, "V": V, "dead%": dead}, dtype, make, run, eager,
                f"products of 2 T D V: 1 + 2 x {live:.1f}, the share of rows with a gradient", flops=(1 + 2 * live) * 2 * T * D * V,
                bytes=2 * (T + V) * D * dtype.itemsize,
                rivals={"half logits": half} if dtype != torch.float32 else {}, fp32=("old", "A"),
                slack=(8, 8, 8) if dtype == torch.float32 else (64, 8, 8),  # eager multiplies in fp32; tensor cores cut their sums off, all one way
                gate=linear_case(300, 520, 5003, dead, dtype) if T * V > 1 << 28 else None)  # fmt: skip


def logits_case(T: int, V: int, dead: int, dtype: torch.dtype) -> Case:
    def make(g):
        z, targets = 3 * torch.randn(T, V, generator=g, dtype=torch.float64), torch.randint(0, V, (T,), generator=g)
        logps = torch.cat([picked(z[i : i + 512].to(dtype), targets[i : i + 512]) for i in range(0, T, 512)])
        return {"z": z, "targets": targets} | tokens(g, logps.double(), dead)

    def run(z, targets, old, A, cu, backend):
        return differentiated(lambda z: K.logits_grpo(z, targets, old, A, cu, backend=backend)[0], z)

    def eager(z, targets, old, A, cu):
        return differentiated(lambda z: eager_loss(picked(z, targets), old, A, cu), z)

    return Case("logits_grpo", {"T": T, "V": V, "dead%": dead}, dtype, make, run, eager,
                "logits read once, their gradient written once", bytes=2 * T * V * dtype.itemsize, slack=8, fp32=("old", "A"),
                gate=logits_case(300, 5003, dead, dtype) if T * V > 1 << 28 else None)  # fmt: skip


def cases(device: str) -> list[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [case(*size[device], dead, dtype) for case, size in ((linear_case, LINEAR), (logits_case, LOGITS)) for dead in (0, 40)]
