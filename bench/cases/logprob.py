"""linear_logprob and logprob: forward alone (scoring) and with the backward (training).

Peers read logits in bf16; the eager chain here computes them in fp32, as the kernels do, so that the gate compares like with like.  The rival
"half logits" is what trainers usually run: fast, and off by up to 0.06 in a log-prob.
"""

import torch
from case import Case, differentiated
from torch.nn import functional as F

from athanor import kernels as K

# T, D, V: the goals' sizes on a GPU; on a CPU the default recipe's, and one with more logits than the reference hands to autograd
FORWARD = {"cuda": [(8192, 4096, 151936)], "cpu": [(1024, 128, 8192)]}
BOTH = {"cuda": [(4096, 4096, 128256)], "cpu": [(2048, 96, 100), (1024, 128, 8192)]}
LOGITS = {"cuda": [(8192, 151936)], "cpu": [(2048, 100), (512, 8192)]}


def eager_logps(z, targets):
    log_p = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1).detach()


def eager_linear(x, w, targets):
    wide = torch.promote_types(x.dtype, torch.float32)
    return eager_logps(x.to(wide) @ w.to(wide).T, targets)


def half_logits(x, w, targets):
    return -F.cross_entropy((x @ w.T).float(), targets, reduction="none")


def ours(x, w, targets, backend):
    return tuple(K.linear_logprob(x, w, targets, backend=backend)[:2])


def linear_case(T: int, D: int, V: int, backward: bool, dtype: torch.dtype) -> Case:
    def make(g):
        return {"x": torch.randn(T, D, generator=g, dtype=torch.float64), "w": torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5,
                "targets": torch.randint(0, V, (T,), generator=g)}  # fmt: skip

    def run(x, w, targets, backend):
        if backward:
            return differentiated(lambda x, w: ours(x, w, targets, backend), x, w)
        with torch.no_grad():
            return ours(x, w, targets, backend)

    def eager(x, w, targets):
        if backward:
            return differentiated(lambda x, w: eager_linear(x, w, targets), x, w)
        with torch.no_grad():
            return eager_linear(x, w, targets)

    def rival(x, w, targets):
        if backward:
            logps, *grads = differentiated(lambda x, w: half_logits(x, w, targets), x, w)
            return logps, None, *grads
        with torch.no_grad():
            return half_logits(x, w, targets), None

    work = "3 products of 2 T D V (the kernels compute the logits twice: 4)" if backward else "1 product of 2 T D V"
    # the small one has tails in every direction: of the token tiles, of the vocabulary slices and of the hidden dimension
    gate = linear_case(300, 520, 5003, backward, dtype) if T * V > 1 << 28 else None
    return Case("linear_logprob", {"T": T, "D": D, "V": V, "backward": int(backward)}, dtype, make, run, eager, work,
                flops=(6 if backward else 2) * T * D * V, bytes=(3 if backward else 1) * (T + V) * D * dtype.itemsize,
                rivals={"half logits": rival} if dtype != torch.float32 else {}, slack=8, gate=gate,
                rows=() if backward else ("x", "targets"))  # fmt: skip


def logits_case(T: int, V: int, dtype: torch.dtype) -> Case:
    return Case("logprob", {"T": T, "V": V}, dtype,
                lambda g: {"z": 3 * torch.randn(T, V, generator=g, dtype=torch.float64), "targets": torch.randint(0, V, (T,), generator=g)},
                lambda z, targets, backend: differentiated(lambda z: tuple(K.logprob(z, targets, backend=backend)), z),
                lambda z, targets: differentiated(lambda z: eager_logps(z, targets), z),
                "forward reads the logits, backward reads and writes them", bytes=3 * T * V * dtype.itemsize, slack=4,
                gate=logits_case(300, 5003, dtype) if T * V > 1 << 28 else None, rows=("z", "targets"))  # fmt: skip


def cases(device: str) -> list[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [*(linear_case(*size, True, dtype) for size in BOTH[device]), *(linear_case(*size, False, dtype) for size in FORWARD[device]),
            *(logits_case(*size, dtype) for size in LOGITS[device])]  # fmt: skip
