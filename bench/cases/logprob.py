"""linear_logprob and logprob, forward and backward."""

import torch
from case import Case, differentiated

from athanor import kernels as K


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    dtype, b = (torch.bfloat16, 2) if gpu else (torch.float32, 4)
    T, D, V = (4096, 4096, 128256) if gpu else (2048, 96, 100)

    def make(g):
        return {"x": torch.randn(T, D, generator=g, dtype=torch.float64), "w": torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5,
                "targets": torch.randint(0, V, (T,), generator=g)}  # fmt: skip

    def eager_logps(z, targets):
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        log_p = wide.log_softmax(-1)
        return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1).detach()

    def eager_linear(x, w, targets):
        wide = torch.promote_types(x.dtype, torch.float32)
        return eager_logps(x.to(wide) @ w.to(wide).T, targets)

    return [
        Case("linear_logprob", {"T": T, "D": D, "V": V}, dtype, make,
             lambda x, w, targets, backend: differentiated(lambda x, w: tuple(K.linear_logprob(x, w, targets, backend=backend)), x, w),
             lambda x, w, targets: differentiated(lambda x, w: eager_linear(x, w, targets), x, w),
             "3 GEMMs of T D V", flops=6 * T * D * V, slack=8),
        Case("logprob", {"T": T, "V": V}, dtype,
             lambda g: {"z": 3 * torch.randn(T, V, generator=g, dtype=torch.float64), "targets": make(g)["targets"]},
             lambda z, targets, backend: differentiated(lambda z: tuple(K.logprob(z, targets, backend=backend)), z),
             lambda z, targets: differentiated(lambda z: eager_logps(z, targets), z),
             "forward reads the logits, backward reads and writes them", bytes=3 * T * V * b, slack=4),
    ]  # fmt: skip
