"""Mixtures of experts and latent attention split over tensor parallel ranks against one process."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import tensor_worker  # noqa: E402
from sparse_models import FAMILIES, packed, random_decoder, sequences  # noqa: E402
from test_sharding import run_recipe  # noqa: E402
from test_tensor_parallel import compare_states, distance, on_ranks  # noqa: E402

from athanor.model.moe import Routes, mixtures, use_fp8_  # noqa: E402
from athanor.tensor_parallel import split_, splits  # noqa: E402

pytestmark = pytest.mark.usefixtures("threads")


class OneOfTwo:
    world, group = 2, None

    def __init__(self, rank: int):
        self.rank = rank


@pytest.fixture
def no_sums(monkeypatch):
    """Sums over ranks that leave each its own addend."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: None)


@pytest.mark.parametrize("name, mode", [("deepseek_v3", "off"), ("qwen3_moe", "off"), ("deepseek_v3", "dgrad"), ("qwen3_moe", "wgrad")])
def test_the_experts_of_two_ranks_add_up_to_the_layer(name, mode, no_sums):
    """Outputs and gradients of both parts, in FP8 too, where a part has the whole's blocks: all but the sum over ranks has its bits."""
    model = use_fp8_(random_decoder(FAMILIES[name].model_copy(update={"num_key_value_heads": 4} if name == "qwen3_moe" else {})), mode)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(48, 48, generator=generator) for _ in range(2))

    def run(moe):
        own = x.clone().requires_grad_()
        routes = Routes()
        y = moe(own, routes)
        y.backward(dy)
        return {"y": y.detach(), "dx": own.grad, "ids": routes.ids[0], "router": moe.router.weight.grad, "down": moe.down_proj.grad,
                "gate_up": moe.gate_up_proj.grad}  # fmt: skip

    layer = mixtures(model)[0]
    whole, parts = run(copy.deepcopy(layer)), [run(mixtures(split_(copy.deepcopy(model), OneOfTwo(rank)))[0]) for rank in (0, 1)]
    for key in ("down", "gate_up"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert all(torch.equal(part["ids"], whole["ids"]) for part in parts)
    for key in ("y", "dx", "router"):
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(parts[0]["y"], whole["y"], atol=0.01)


class InThreads:
    """Two ranks as threads of one process: a sum over them waits for both."""

    world = 2

    def __init__(self, rank: int, barrier: threading.Barrier, addends: list):
        self.rank, self.barrier, self.addends, self.group = rank, barrier, addends, self

    def sum_(self, tensor: torch.Tensor) -> None:
        self.addends[self.rank] = tensor.detach().clone()
        self.barrier.wait(30)
        tensor.copy_(self.addends[0] + self.addends[1])
        self.barrier.wait(30)


@pytest.mark.parametrize("name", ["deepseek_v3, mtp", "deepseek_v3, plain queries", "qwen3_moe, four keys"])
def test_every_gradient_of_two_parts_is_that_of_the_whole(name, monkeypatch):
    """fp64, with the balance loss, on threads: what a rank has of a matrix, and all of what every rank has, which is there once and not twice."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: group.sum_(tensor))
    model = random_decoder(tensor_worker.sharding_worker.MODELS[name]).double()
    ids, positions, attend = packed([x[:40] for x in sequences()])  # 1, 7 and 40 tokens
    upstream = torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(decoder, found: dict) -> None:
        routes = Routes(cu_seqlens=attend.cu_seqlens)
        hidden = decoder(ids, positions, attend, routes)
        if decoder.mtp is not None:
            hidden = hidden + decoder.look_ahead(hidden, ids.roll(-1), positions, attend, routes)
        loss = (hidden * upstream).sum() + torch.stack(routes.balance).sum()
        loss.backward()
        found |= {"loss": loss.detach(), **{n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}}

    barrier, addends, wanted, found = threading.Barrier(2), [None, None], {}, [{}, {}]
    parts = [split_(copy.deepcopy(model), InThreads(rank, barrier, addends)) for rank in (0, 1)]
    run(model, wanted)
    threads = [threading.Thread(target=run, args=pair) for pair in zip(parts, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, part in enumerate(parts):
        assert found[rank].keys() == wanted.keys()
        of = splits(part)
        for key, whole in wanted.items():
            expected = of[key].part(whole, rank) if key in of else whole
            assert (found[rank][key] - expected).norm() <= 1e-12 * whole.norm(), (rank, key)


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return tensor_worker.main(Path(), "sparse")


def compare(folder: Path, world: int, alone: dict) -> None:
    layouts = tensor_worker.sparse_cases(world)
    case = list(layouts.values())[-1][0]
    found = on_ranks(folder, world, "sparse", case)
    for name in layouts:
        wanted = alone[name.split(", ")[0]]
        muon = name.startswith("muon")  # in fp32, and in bf16 where gradients of few tokens have not full rank (test_sharding)
        assert distance(found[name]["gradients"], wanted["gradients"]) < (2e-6 if muon else 1e-12), name
        assert distance(found[name]["weights"], wanted["weights"]) < (5e-2 if muon else 1e-12), name
        for step, one in zip(found[name]["figures"], wanted["figures"], strict=True):  # losses, that of multi-token prediction with them, and norm
            assert step == pytest.approx(one, rel=1e-3 if muon else 1e-12), name
    with pytest.raises(AssertionError):  # the comparison can fail
        assert distance(found["deepseek"]["weights"], {n: x + 1e-9 for n, x in alone["deepseek"]["weights"].items()}) < 1e-12
    for name, one in alone["samples"].items():
        for (tokens, logps, finish, routes), (one_tokens, one_logps, one_finish, one_routes) in zip(found["samples"][name], one, strict=True):
            assert (tokens, finish, routes) == (one_tokens, one_finish, one_routes) and logps == pytest.approx(one_logps, abs=1e-5)
    compare_states(folder, found, case, 1e-7)  # the balance loss has fp32 weights here


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_what_one_does(tmp_path, alone, world):
    compare(tmp_path, world, alone)


SPARSE = [word for name, value in dict(
    architecture="deepseek_v3", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1, kv_lora_rank=8, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, initializer_range=0.2,
).items() for word in (f"--models.main.{name}", value)]  # fmt: skip
EVERYTHING = ("--parallel.tensor", "2", "--parallel.context", "2", "--parallel.expert", "2", "--parallel.shard", "0", "--parallel.rollout", "split",
              "--stages.zero.micro_batch_tokens", "64")  # fmt: skip


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_run_of_a_mixture_that_is_split_in_every_way_draws_the_samples_of_one_process(tmp_path):
    """Base model, RL with a KL term on the sampler's routes, rejection, SFT and a reward model."""
    options = (*SPARSE, "--stages.zero.routing_replay", "rollout")
    (alone, _), (split, _) = run_recipe(tmp_path / "one", 1, *options), run_recipe(tmp_path / "split", 4, *options, *EVERYTHING)
    assert [(row["stage"], row["step"]) for row in alone] == [(row["stage"], row["step"]) for row in split]
    for one, other in zip(alone, split, strict=True):
        for name in ("reward", "mean_tokens", "truncated_rate", "accuracy", "format", "zero_advantage_rate", "pair_accuracy", "tokens"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-12)), (name, one, other)
        for name in ("loss", "entropy", "grad_norm", "kl_ref", "router_imbalance", "route_disagreement"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-3, abs=1e-7)), (name, one, other)
        assert other.get("logp_gap_max", 0) < 1e-5 and not other.get("rollout_route_disagreement", 0)
