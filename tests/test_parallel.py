"""Two gloo ranks against one process: the same documents, prompts and samples, and so the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from athanor.parallel import Ranks

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).with_name("micro_recipe.toml")


def train(folder, world):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0", "--standalone"]
    launcher = [sys.executable, *(torchrun if world > 1 else [])]
    # AdamW with a large eps: Muon works in bf16 and Adam divides by |g|, both of which blow up the last bits of a sum over ranks.
    changes = ["--until", "zero", "--stages.zero.steps", "2", "--stages.base.steps", "20", "--stages.base.optimizer.name", "adamw",
               "--stages.base.optimizer.eps", "1e-3", "--device", "cpu", "--run_root", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(ROOT / "engine" / "train.py"), str(RECIPE), *changes], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "micro" / "metrics.jsonl").read_text().splitlines()]
    return json.loads(result.stdout.splitlines()[-1]), rows, load_file(folder / "micro" / "checkpoints" / "base" / "model.safetensors")


@pytest.mark.multiproc
def test_two_ranks_train_as_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    summary, alone, weights = train(tmp_path / "one", 1)
    summary2, together, weights2 = train(tmp_path / "two", 2)
    assert [(row["stage"], row["step"]) for row in alone] == [(row["stage"], row["step"]) for row in together]
    for a, b in zip(alone, together, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), (a, b)
        for name in ("loss", "reward", "mean_tokens", "entropy", "zero_advantage_rate"):
            assert a.get(name) == (None if name not in a else pytest.approx(b[name], rel=1e-4)), (name, a, b)
        if a["stage"] == "zero":
            assert "rollout_idle_share" not in a and 0 <= b["rollout_idle_share"] < 1 and b["rollout_idle_s"] >= 0 and b["rollout_handed_over"] >= 0
    for name, tensor in weights.items():
        torch.testing.assert_close(weights2[name], tensor, rtol=1e-3, atol=1e-4)
    assert list(summary["stages"]) == list(summary2["stages"]) == ["base", "zero"]


@pytest.mark.parametrize("context, tensor", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_neighbours_share_a_batch_and_the_nearest_a_forward(monkeypatch, context, tensor):
    """Rank = (data, context, tensor), the last one innermost: each view holds the ranks that differ in its own places alone."""
    world, size = 8, context * tensor
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            ranks = Ranks("cpu", threads=1, context=context, tensor=tensor)
            alike = {
                "tensor": [r for r in range(world) if r // tensor == rank // tensor],
                "context": [r for r in range(world) if r // size == rank // size and r % tensor == rank % tensor],
                "data": [r for r in range(world) if r % size == rank % size],
                "copies": [r for r in range(world) if r % tensor == rank % tensor],
            }
            for name, members in alike.items():
                view = getattr(ranks, name)
                group = dist.get_process_group_ranks(view.group) if view.group is not None or view.world == world else [rank]
                assert (group, view.rank, view.world) == (members, members.index(rank), len(members)), (name, rank)
            assert ranks.copies.data.world == ranks.data.world == world // size and ranks.copies.data.rank == ranks.data.rank
        finally:
            dist.destroy_process_group()
