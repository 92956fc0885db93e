"""What every rank of the test of linear_logprob_parallel runs: its piece of the vocabulary; all ranks' results, as lists, by rank 0.

A case is (hidden, weight, targets, support or None, temperature, dlogps, bounds of the pieces, logits in a chunk).
"""

import sys

import torch
import torch.distributed as dist

from athanor.kernels import linear_logprob_parallel
from athanor.kernels.linear_grpo import CHUNK_LOGITS


def results(case: tuple) -> dict:
    hidden, weight, targets, support, temperature, dlogps, bounds, CHUNK_LOGITS["cpu"] = case
    first, end = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    hidden, mine = hidden.clone().requires_grad_(), weight[first:end].clone().requires_grad_()
    call = dict(first=first, vocab_size=len(weight), temperature=temperature, support=support)
    out = linear_logprob_parallel(hidden, mine, targets, **call)
    out.logps.backward(dlogps)
    lean = linear_logprob_parallel(hidden, mine, targets, entropy=False, **call)
    assert lean.entropy is None and torch.equal(lean.logps.detach().nan_to_num(7.0), out.logps.detach().nan_to_num(7.0))
    return {"logps": out.logps.detach(), "entropy": out.entropy, "dhidden": hidden.grad, "dweight": mine.grad}


if __name__ == "__main__":
    cases, target, store, world, rank = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    found = [results(case) for case in torch.load(cases)]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        torch.save(everyone, target)
    dist.destroy_process_group()
