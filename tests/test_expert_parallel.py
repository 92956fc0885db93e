"""Experts on 1, 2 and 4 gloo ranks against one process that has them all: bits of forward and gradients, a rank without tokens, what is refused.
Training, states and runs with shared experts: test_sharding, test_sharded_checkpoint, test_tiny_moe."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from athanor.config import ModelConfig, ParallelConfig, RecipeConfig
from athanor.errors import UserError
from athanor.expert_parallel import shard_experts_
from athanor.kernels import fp8_quantize_dual
from athanor.model.moe import mixtures, use_fp8_
from athanor.parallel import Ranks
from athanor.sharding import will_split

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, our_logits, random_decoder  # noqa: E402

WORLDS = (1, 2, 4)
# Tokens of 4 parts that the ranks take, one or more in a row: whole row steps, as the engine's forwards have them, and none.
PARTS = (48, 64, 0, 16)
pytestmark = pytest.mark.usefixtures("threads")


def ranks_of(world: int, run, *arguments) -> list:
    """What run(rank, world, *arguments) returns on each of `world` processes."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    folder, arguments = arguments[0], arguments[1:]
    store = f"{folder}/store-{run.__name__}-{world}"
    processes = [context.Process(target=_rank, args=(rank, world, store, queue, run, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    failed = [text for text in results.values() if isinstance(text, str)]
    assert not failed, failed[0]
    return [torch.load(f"{folder}/{run.__name__}-{world}-{r}.pt") for r in range(world)]


def _rank(rank, world, store, queue, run, arguments):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        # tensors go by file: through a queue they would need the process to live on
        torch.save(run(rank, world, *arguments), f"{Path(store).parent}/{run.__name__}-{world}-{rank}.pt")
        dist.destroy_process_group()
        queue.put((rank, None))
    except Exception as error:
        queue.put((rank, repr(error)))


def a_layer(name: str, mode: str = "off"):
    return use_fp8_(copy.deepcopy(mixtures(random_decoder(FAMILIES[name]))[0]), mode)


def layer_inputs():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(n, 48, generator=generator) for _ in range(2)) for n in PARTS]


CASES = [("qwen3_moe", "off"), ("deepseek_v3", "off"), ("deepseek_v3", "dgrad"), ("qwen3_moe", "wgrad")]


def layers(rank: int, world: int) -> list[dict]:
    """Forward and backward of one layer of each case over this rank's parts, end to end; world 0: without sharding."""
    parts, found = layer_inputs(), []
    mine = parts[rank * len(parts) // max(world, 1) : (rank + 1) * len(parts) // max(world, 1)]
    mesh = init_device_mesh("cpu", (world,)) if world else None
    for name, mode in CASES:
        moe = a_layer(name, mode)
        if world:
            shard_experts_(moe, mesh)
            assert moe.down_proj.shape[0] == moe.num_experts == world * len(moe.down_proj.to_local())
        x, dy = (torch.cat(tensors) for tensors in zip(*mine, strict=True))
        x.requires_grad_()
        y = moe(x)
        y.backward(dy)
        stacks = [grad.to_local() if world else grad for grad in (moe.gate_up_proj.grad, moe.down_proj.grad)]
        found.append({"y": y.detach(), "dx": x.grad, "gate_up": stacks[0], "down": stacks[1], "router": moe.router.weight.grad})
        if world:
            dist.all_reduce(found[-1]["router"])
    return found


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_layer_has_the_bits_of_one_process(tmp_path):
    whole = layers(0, 0)
    for world in WORLDS:
        ranks = ranks_of(world, layers, tmp_path)
        for i, want in enumerate(whole):
            for key in ("y", "dx", "gate_up", "down"):
                assert torch.equal(torch.cat([found[i][key] for found in ranks]), want[key]), (world, CASES[i], key)
            for found in ranks:  # summed over ranks in another order
                torch.testing.assert_close(found[i]["router"], want["router"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_one_rank_is_the_layer_as_it_was(one_rank):
    """The fast part: everything but a second process."""
    for found, want in zip(layers(0, 1), layers(0, 0), strict=True):
        assert all(torch.equal(found[key], want[key]) for key in want)
    model, ids = random_decoder(FAMILIES["qwen3_moe"]), [torch.arange(16)]
    with torch.no_grad():
        want = our_logits(model, ids)
        sharded = shard_experts_(copy.deepcopy(model), one_rank)
        assert torch.equal(our_logits(sharded, ids), want) and torch.equal(our_logits(copy.deepcopy(sharded), ids), want)
    with pytest.raises(ValueError, match="shared already"):
        shard_experts_(sharded, one_rank)


def test_fp8_copies_of_shared_experts_follow_the_parameter(one_rank):
    """A step past the version counters of what a rank holds, as fused AdamW's, and a write into what it holds, as a state's that is read."""
    moe = shard_experts_(a_layer("qwen3_moe", "dgrad"), one_rank)
    x, copies = torch.randn(16, 48, generator=torch.Generator().manual_seed(0)), moe.fp8.weights["down_proj"]
    with torch.no_grad():
        before = moe(x)
        assert torch.equal(moe(x), before) and copies.num_made == 1
        torch.autograd.graph.increment_version([moe.down_proj])
        moe(x)
        moe.down_proj.to_local().mul_(2)
        assert not torch.equal(moe(x), before) and copies.num_made == 3
        moe.down_proj.mul_(0.5)
        assert torch.equal(moe(x), before) and copies.num_made == 4


def test_fp8_copies_of_wider_masters_are_made_of_what_the_products_would_read(one_rank):
    """fp32 parts of a model that computes in bf16: rounded first, as the weight that the sampler has is."""
    moe = shard_experts_(a_layer("qwen3_moe", "dgrad").bfloat16(), one_rank, torch.float32)
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for factor in (1.001, 1.003):
            for name in moe.fp8.weights:
                getattr(moe, name).to_local().mul_(factor)
            moe(x)
        for name, copies in moe.fp8.weights.items():
            want = fp8_quantize_dual(getattr(moe, name).to_local().bfloat16(), block=(128, 128))
            for got, wanted in zip(copies.copy, want, strict=True):
                assert torch.equal(got.q.view(torch.uint8), wanted.q.view(torch.uint8)) and torch.equal(got.scales, wanted.scales)
            assert copies.num_made == 2


class FourRanks(Ranks):
    def __init__(self):
        super().__init__("cpu", threads=1)
        self.world = self.copies.world = 4


def test_ranks_and_models_that_experts_cannot_be_divided_by_are_refused(monkeypatch, one_rank):
    assert will_split(ParallelConfig(expert=2), FourRanks()) and not will_split(ParallelConfig(), FourRanks())
    with pytest.raises(UserError, match="parallel.expert is 3, wanted a divisor of the 4 ranks"):
        will_split(ParallelConfig(expert=3), FourRanks())
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(UserError, match="parallel.expert is 2, wanted a divisor of the 5 experts of the model"):
        shard_experts_(random_decoder(FAMILIES["qwen3_moe_unnormalised_some_dense_untied"]), one_rank)
    with pytest.raises(ValueError, match="offload is true and expert is 2; shared experts stay on their device"):
        ParallelConfig(offload=True, shard=0, expert=2)
    dense, sparse = ModelConfig().model_dump(), FAMILIES["qwen3_moe"].model_dump()
    with pytest.raises(ValueError, match="parallel.expert is 2, wanted 1: no model of the run has experts"):
        RecipeConfig(parallel={"expert": 2}, models={"main": dense})
    assert RecipeConfig(parallel={"expert": 2}, models={"main": sparse, "student": dense}).parallel.expert == 2
