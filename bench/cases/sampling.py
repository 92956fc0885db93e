"""sample and linear_sample: one decode step over a batch.  The rivals are what generate loops write: softmax, filter by sort, torch.multinomial.

Goals on an H200: sample B=128 V=151936 in 30 us; linear_sample B=64 D=4096 V=151936 in 1.06 x the bare product of matrices ("matmul alone").

Two right samplers may draw different tokens: the generators differ, and a uniform number may lie at the border of two tokens of a flat row.  So the
gate compares the normaliser, as the log-prob of the drawn token less its logit, and the entropy.  tests/kernels/test_sample.py holds the draws
themselves against brute force.
"""

import torch
from case import Case

from athanor import kernels as K


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    B, V = (128, 151936) if gpu else (512, 100)

    def build(sizes, spread=3, temperature=1.0, top_k=0, top_p=1.0):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

        def make(g):
            return {"logits": spread * torch.randn(B, V, generator=g, dtype=torch.float64), "seeds": torch.arange(B), "positions": torch.arange(B)}

        def run(logits, seeds, positions, backend):
            out = K.sample(logits, **options, seeds=seeds, positions=positions, backend=backend)
            return out.tokens, out.full_logps, out.entropy

        def eager(logits, seeds, positions):
            tokens = K.sample(logits.float(), **options, seeds=seeds, positions=positions, backend="reference").tokens
            log_p = (logits / temperature).log_softmax(-1)
            return tokens, log_p.gather(1, tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

        def multinomial(logits, seeds, positions):
            log_p = (logits / temperature).log_softmax(-1)
            p = log_p.exp()
            if top_k:
                largest, index = p.topk(top_k, -1)
                p = torch.zeros_like(p).scatter(1, index, largest)
            if top_p < 1:
                falling, index = p.sort(-1, descending=True)
                p = p.scatter(1, index, torch.where(falling.cumsum(-1) - falling < top_p, falling, 0.0))
            tokens = torch.multinomial(p, 1)
            return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1), -(log_p.exp() * log_p).sum(-1)

        def compared(outputs, logits, seeds, positions):
            tokens, logps, entropy = outputs
            return logps - logits.gather(1, tokens[:, None]).squeeze(1) / temperature, entropy

        return Case("sample", {"B": B, "V": V} | sizes, torch.float32, make, run, eager, "reads the logits once",
                    bytes=4 * B * V, rivals={"sort + multinomial": multinomial}, compared=compared, slack=8)  # fmt: skip

    # a flat row keeps two thirds of its tokens, a peaked one a few
    return [build({"top_p_percent": 100}), build({"top_p_percent": 95}, temperature=0.6, top_p=0.95),
            build({"top_p_percent": 95, "spread": 1}, spread=1, top_p=0.95), build({"top_p_percent": 95, "spread": 8}, spread=8, top_p=0.95),
            build({"top_k": 50}, top_k=50), linear_case(gpu)]  # fmt: skip


def linear_case(gpu: bool) -> Case:
    dtype, b = (torch.bfloat16, 2) if gpu else (torch.float32, 4)
    B, D, V = (64, 4096, 151936) if gpu else (64, 96, 1000)

    def make(g):
        return {"hidden": torch.randn(B, D, generator=g, dtype=torch.float64), "weight": torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5,
                "seeds": torch.arange(B), "positions": torch.arange(B)}  # fmt: skip

    def run(hidden, weight, seeds, positions, backend):
        out = K.linear_sample(hidden, weight, seeds=seeds, positions=positions, backend=backend)
        return out.tokens, out.full_logps, out.entropy

    def eager(hidden, weight, seeds, positions):
        tokens = K.linear_sample(hidden, weight, seeds=seeds, positions=positions, backend="reference").tokens
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_p = (hidden.to(wide) @ weight.to(wide).T).log_softmax(-1)
        return tokens, log_p.gather(1, tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def multinomial(hidden, weight, seeds, positions):
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        tokens = torch.multinomial(log_p.exp(), 1)
        return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def compared(outputs, hidden, weight, seeds, positions):
        tokens, logps, entropy = outputs
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return logps - (hidden.to(wide) * weight[tokens].to(wide)).sum(-1), entropy

    return Case("linear_sample", {"B": B, "D": D, "V": V}, dtype, make, run, eager, "reads the weights and the hidden states once",
                bytes=b * (V * D + B * D), flops=2 * B * V * D, rivals={"logits + multinomial": multinomial}, compared=compared,
                floors={"matmul alone": lambda hidden, weight, seeds, positions: hidden @ weight.T}, slack=8)  # fmt: skip
