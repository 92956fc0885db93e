"""What every rank of the tests of gradient parts runs: steps over the same documents, with the parts of a step on one, two or four ranks."""

import multiprocessing
import os
import socket
import sys

import torch
from sharding_worker import build, sequences

from athanor.config import TrainConfig
from athanor.parallel import Ranks
from athanor.stages.routing import RouterBalance
from athanor.stages.training import cross_entropy_step, packed_batches

CASES = [("qwen3", "adamw"), ("qwen3", "muon"), ("deepseek_v3, fp8, mtp", "muon")]
COUNTS = (9, 3, 8)  # sequences of a step: unequal parts of four, an empty one, equal parts


def result(ranks: Ranks, name: str, optimizer: str) -> dict:
    """Gradients after the first step, weights and optimizer state after all, and metrics."""
    model, optimizer = build(ranks, name, optimizer)
    found = {"metrics": []}
    for step, count in enumerate(COUNTS):
        pairs = ranks.parts(list(zip(*sequences(step, 48), strict=True))[:count])
        parts = [packed_batches(model, ranks, [prompt for prompt, _ in part], [text for _, text in part], 48) for part in pairs]
        num_targets = ranks.sum_int(sum(batch.num_targets for batches in parts for batch in batches))
        balance = RouterBalance(model, TrainConfig(balance_loss=0.01), ranks)
        metrics = cross_entropy_step(model, optimizer, parts, num_targets, 1e-2, balance, 0.3 if model.mtp is not None else 0.0)
        found["metrics"].append(metrics | balance.finish())
        if step == 0:
            found["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found | {"state": {n: value.clone() for n, value in optimizer.state_tensors().items()}}


def results(ranks: Ranks) -> dict[str, dict]:
    return {" ".join(case): result(ranks, *case) for case in CASES}


def one(rank: int, path: str) -> None:
    os.environ["RANK"] = str(rank)
    ranks = Ranks("cpu", threads=1, timeout_s=60, gradient_parts=4)
    pair = ranks._of([[0, 1], [2, 3]])  # two jobs of two ranks, side by side
    pair.num_parts, pair.context, pair.tensor = 2, ranks.context, ranks.tensor
    found = {"four": results(ranks), "two": results(pair)}
    if ranks.is_main:
        torch.save(found, path)
    ranks.close()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "4"}
    # Forked, because the imports are most of the time that four processes of torchrun's take here.
    processes = [multiprocessing.get_context("fork").Process(target=one, args=(rank, sys.argv[1])) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
