"""group_advantage, policy_loss, grpo_loss: from log-probs and rewards to loss and coefficients."""

import torch
from case import Case, differentiated

from athanor import kernels as K

VARIANT = K.LossVariant(clip_low=0.2, clip_high=0.28, kl="k3", beta=0.001)


def cases(device: str) -> list[Case]:
    S, length, G = (1024, 2048, 16) if device == "cuda" else (256, 40, 16)
    N = S * length

    def make(g):
        logps = -torch.rand(N, generator=g, dtype=torch.float64)
        old, ref = (logps + 0.2 * torch.randn(N, generator=g, dtype=torch.float64) for _ in range(2))
        return {"logps": logps, "old": old, "ref": ref, "rewards": torch.randint(0, 5, (S,), generator=g).double() / 4,
                "ids": torch.arange(S) // G, "cu": torch.arange(0, N + 1, length, dtype=torch.int32)}  # fmt: skip

    def eager_advantage(rewards):
        r = rewards.view(-1, G)
        return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)).flatten()

    def eager_loss(logps, old, ref, A):
        A = A.repeat_interleave(length)
        r, e = (logps - old).exp(), ref - logps
        kl = e.exp() - e - 1
        with torch.no_grad():  # what trainers log beside the loss; ours returns more
            _ = r.mean(), r.max(), ((r < 0.8) & (A < 0)).float().mean(), ((r > 1.28) & (A > 0)).float().mean(), kl.mean()
        return (-torch.minimum(r * A, r.clamp(0.8, 1.28) * A) + 0.001 * kl).mean()

    def grpo(logps, old, ref, rewards, ids, cu, backend):
        return differentiated(lambda x: K.grpo_loss(x, old, rewards, ids, cu, ref_logps=ref, variant=VARIANT, backend=backend)[0], logps)

    def policy(logps, old, ref, rewards, ids, cu, backend):
        return differentiated(lambda x: K.policy_loss(x, old, rewards - 0.5, cu, ref_logps=ref, variant=VARIANT, backend=backend)[0], logps)

    work = "reads three log-probs, writes one coefficient; backward reads and writes it"
    sizes = {"N": N, "S": S, "G": G}
    return [
        Case("grpo_loss", sizes, torch.float32, make, grpo,
             lambda logps, old, ref, rewards, ids, cu: differentiated(lambda x: eager_loss(x, old, ref, eager_advantage(rewards)), logps),
             work, bytes=6 * N * 4, slack=8),
        Case("policy_loss", sizes, torch.float32, make, policy,
             lambda logps, old, ref, rewards, ids, cu: differentiated(lambda x: eager_loss(x, old, ref, rewards - 0.5), logps),
             work, bytes=6 * N * 4, slack=8),
        Case("group_advantage", {"S": S, "G": G}, torch.float32, lambda g: {k: v for k, v in make(g).items() if k in ("rewards", "ids")},
             lambda rewards, ids, backend: (K.group_advantage(rewards, ids, backend=backend),), lambda rewards, ids: (eager_advantage(rewards),),
             "reads rewards and ids, writes advantages", bytes=16 * S, slack=4),
    ]  # fmt: skip
