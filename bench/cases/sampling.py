"""sample: one decode step over a batch.  The rival is what generate loops write: softmax, filter by sort, torch.multinomial.

The draws of two random number generators cannot be compared, so the gate compares the log-prob of the drawn token with the
eager one of the same token, and the entropy.  tests/kernels/test_sample.py holds the draws themselves against brute force.
"""

import torch
from case import Case

from athanor import kernels as K


def cases(device: str) -> list[Case]:
    B, V = (256, 151936) if device == "cuda" else (512, 100)

    def make(g):
        return {"logits": 3 * torch.randn(B, V, generator=g, dtype=torch.float64), "seeds": torch.arange(B), "positions": torch.arange(B)}

    def build(name, temperature, top_p):
        def run(logits, seeds, positions, backend):
            out = K.sample(logits, temperature=temperature, top_p=top_p, seeds=seeds, positions=positions, backend=backend)
            return out.full_logps, out.entropy

        def eager(logits, seeds, positions):
            tokens = K.sample(logits.float(), temperature=temperature, top_p=top_p, seeds=seeds, positions=positions, backend="reference").tokens
            log_p = (logits / temperature).log_softmax(-1)
            return log_p.gather(1, tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

        def multinomial(logits, seeds, positions):
            log_p = (logits / temperature).log_softmax(-1)
            p = log_p.exp()
            if top_p < 1:
                falling, index = p.sort(-1, descending=True)
                p = p.scatter(1, index, torch.where(falling.cumsum(-1) - falling < top_p, falling, 0.0))
            tokens = torch.multinomial(p, 1)
            return log_p.gather(1, tokens).squeeze(1), -(log_p.exp() * log_p).sum(-1)

        return Case("sample", {"B": B, "V": V, "top_p_percent": int(100 * top_p)}, torch.float32, make, run, eager, "reads the logits once",
                    bytes=4 * B * V, rivals={"sort + multinomial": multinomial}, slack=8)  # fmt: skip

    return [build("plain", 1.0, 1.0), build("nucleus", 0.6, 0.95)]
