"""What every rank of the tests of dispatch over gloo runs: rollouts that rank 0 is slow at, so that the others take from it what they can."""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from test_dispatch import ALWAYS, SAMPLING, TASK, TOKENIZER, facts, small_model

from athanor import dispatch
from athanor.config import ParallelConfig
from athanor.parallel import Ranks
from athanor.rollout import rollout_generator, sample_groups
from athanor.sample_store import resumable_groups
from athanor.samples import Sample
from athanor.sharding import for_sampling
from athanor.stream import Stream

PROBLEMS = [TASK.problem("train", i) for i in range(9)]
SPARSE = dict(architecture="qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
CASES = {  # [parallel] dispatch, model, sampling, ranks of a model
    "group": ("group", {}, "plain", 1),
    "sample, truncated": ("sample", {}, "truncated", 1),
    "static": ("static", {}, "stop", 1),
    "routes": ("group", SPARSE, "plain", 1),
    "parts": ("group", {"num_attention_heads": 4, "num_key_value_heads": 2}, "plain", 2),
    "parts, static": ("static", {"num_attention_heads": 4, "num_key_value_heads": 2}, "plain", 2),
}


def drawn(ranks: Ranks, name: str, folder: Path) -> dict:
    """This rank's groups of two rollouts in a row, the groups of an evaluation, and what the dispatcher says."""
    mode, shape, sampling, tensor = CASES[name]
    model = small_model(**shape).requires_grad_(False)
    if tensor > 1 and ranks.world > 1:
        model = for_sampling(model, ParallelConfig(tensor=tensor, rollout="split"), ranks)
    generator = rollout_generator(model, TOKENIZER, 8, 4, record_routes=name == "routes")
    seen: list[Sample] = []
    rollouts = []
    for step in range(2):
        rollouts.append(sample_groups(generator, TOKENIZER, PROBLEMS, 4, SAMPLING[sampling], ranks, 0, "zero", step, on_sample=seen.append))
    assert sorted(map(id, seen)) == sorted(id(sample) for groups in rollouts for group in groups for sample in group)
    stored = resumable_groups(generator, TOKENIZER, PROBLEMS, 4, SAMPLING[sampling], ranks, 0, "zero", 0, folder=folder / name)
    ranks.barrier()
    return {
        "rollouts": [[facts(group) for group in groups] for groups in rollouts],
        "stored": [[s.token_ids.tolist() for s in group] for group in stored],
        "file": (folder / name / "samples.jsonl").read_text(), "handed_over": generator.dispatched["handed_over"],
    }  # fmt: skip


def main(folder: Path, kind: str) -> dict:
    for name, value in ALWAYS.items():
        setattr(dispatch, name, value)
    sizes = (1, 2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else (1,)
    ranks = {tensor: Ranks("cpu", threads=1, tensor=tensor, timeout_s=4 if kind == "dead" else 300) for tensor in sizes}
    step, rank = Stream.step, ranks[1].rank

    def stepped(stream):
        if kind == "dead" and rank == 1:
            os._exit(7)
        time.sleep(0.02 * (rank == 0))
        return step(stream)

    if ranks[1].world > 1:
        Stream.step = stepped
    if kind == "dead":
        return drawn(ranks[1], "group", folder)
    found = {}
    for name in CASES:
        of = ranks[min(CASES[name][3], max(sizes))]
        of.dispatch = CASES[name][0]
        found[name] = drawn(of, name, folder)
        left = [key for key in dist.distributed_c10d._get_default_store().list_keys() if "board" in key] if ranks[1].world > 1 else []
        of.barrier()
        found[name]["left"] = left
    return found


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = main(folder, kind)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
