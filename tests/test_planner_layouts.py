"""Layouts that the planner proposes, made of DeviceMesh and FSDP2 on a fake process group with meta tensors: each rank owns what the plan says."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from athanor.config import ModelConfig, ParallelConfig
from athanor.model.transformer import Decoder, PackedAttention
from athanor.parallel import Ranks
from athanor.planner import memory
from athanor.planner.command import SHAPES_DIR, shape_at
from athanor.planner.memory import Layout
from athanor.planner.search import make_plan
from athanor.planner.settings import PlanConfig
from athanor.sharding import parallelize_
from athanor.tensor_parallel import split_

LAYERS = 5  # of which the last two of DeepSeek-V3's are sparse


@pytest.fixture
def ranks():
    """Start a fake process group of any size as any of its ranks."""

    def start(rank: int, world: int):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def meshes(layout: Layout):
    """(replicate, shard, tensor) and, over the same ranks, (replicate, expert_shard, expert)."""
    dense = init_device_mesh("cpu", (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    shape = (layout.replicate, layout.expert_shard, layout.expert * layout.tensor)
    return dense, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "expert_shard", "expert"))


def sharded(config, layout: Layout) -> nn.Module:
    """The decoder on meta with PyTorch's own tensor parallelism and FSDP2; experts cut by hand, as expert parallelism does."""
    dense, sparse = meshes(layout)
    with torch.device("meta"):
        model = Decoder(config)
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if layout.tensor > 1 and isinstance(module, nn.Linear | nn.Embedding) and last in memory.TENSOR_AXIS:
            rows = memory.TENSOR_AXIS[last] == 0
            embedding = isinstance(module, nn.Embedding)  # ColwiseParallel would cut its columns
            parallelize_module(module, dense["tensor"], RowwiseParallel() if embedding or not rows else ColwiseParallel())
    hybrid = layout.replicate > 1
    dense = dense["replicate", "shard"] if hybrid else dense["shard"]
    sparse = sparse["replicate", "expert_shard"] if hybrid else sparse["expert_shard"]
    for layer in model.layers:
        if layer.moe is not None:
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(layer.moe, name)
                own = torch.empty(stack.shape[0] // (layout.expert * layout.tensor), *stack.shape[1:], device="meta")
                setattr(layer.moe, name, nn.Parameter(own))
            few = layer.moe.gate_up_proj.shape[0] < layout.expert_shard
            for part in (layer.moe.router, layer.moe.shared):
                if part is not None:
                    fully_shard(part, mesh=dense)
            fully_shard(layer.moe, mesh=sparse, shard_placement_fn=(lambda p: Shard(1)) if few else None)
        fully_shard(layer, mesh=dense)
    fully_shard(model, mesh=dense)
    return model


def local_numel(parameter) -> int:
    return parameter.to_local().numel()


def proposal(name: str, **cluster) -> tuple:
    config = shape_at(SHAPES_DIR / f"{name}.json")
    workload = dict(prompts_per_step=512, updates_per_rollout=16, max_tokens=32768, mean_tokens=7300) if name == "deepseek-v3" else {}
    plan = make_plan(config, PlanConfig(cluster=cluster, workload=workload))
    assert plan.fits
    return config.model_copy(update={"num_hidden_layers": min(config.num_hidden_layers, LAYERS)}), plan.training.layout


def check_every_rank(config, layout: Layout, world: int, ranks, chosen=None) -> None:
    assert layout.replicate * layout.shard * layout.tensor == world
    for rank in chosen or (0, world // 2 + 1, world - 1):
        ranks(rank, world)
        model = sharded(config, layout)
        names = {name: parameter for name, parameter in model.named_parameters()}
        dense, sparse = rank // layout.tensor % layout.shard, rank // (layout.expert * layout.tensor) % layout.expert_shard
        for weight in memory.weights_of(config):
            planned = weight.local(layout, sparse if weight.expert else dense)
            assert local_numel(names[weight.name]) == planned, f"rank {rank}: {weight.name} {weight.shape}"
        if rank == 0:
            assert sum(map(local_numel, names.values())) == memory.local_parameters(config, layout)


@pytest.mark.parametrize("nodes", [64, 256])  # 512 and 2,048 ranks
def test_a_proposed_layout_of_r1_owns_on_each_rank_what_the_plan_says(nodes, ranks):
    config, layout = proposal("deepseek-v3", gpu="h800", gpus_per_node=8, nodes=nodes)
    assert layout.expert > 1
    check_every_rank(config, layout, nodes * 8, ranks)


def test_a_proposed_layout_of_a_dense_model_owns_on_each_rank_what_the_plan_says(ranks):
    config, layout = proposal("qwen2.5-7b", gpu="h100", gpus_per_node=8, nodes=64)
    check_every_rank(config, layout, 512, ranks)


@pytest.mark.parametrize("name, layout, world", [
    ("qwen2.5-7b", Layout(shard=64, replicate=4, tensor=2), 512),  # HSDP and tensor parallel together, 3584 % 64 = 0
    ("llama-3-8b", Layout(shard=24, replicate=3, tensor=1), 72),  # no size divides 24 without a rest
    ("qwen3-30b-a3b", Layout(shard=256, replicate=2, tensor=4, expert=32), 2048),  # one expert per rank, cut in eight along its rows
    ("qwen3-30b-a3b", Layout(shard=16, expert=1), 16),
])  # fmt: skip
def test_other_layouts_do_too(name, layout, world, ranks):
    config = shape_at(SHAPES_DIR / f"{name}.json").model_copy(update={"num_hidden_layers": 2})
    check_every_rank(config, layout, world, ranks)


SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_experts=16, num_experts_per_tok=2,
             moe_intermediate_size=16)  # fmt: skip
MIXTURES = {
    "deepseek_v3": ModelConfig(architecture="deepseek_v3", n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=8,
                               qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, tie_word_embeddings=False, **SMALL),
    "qwen3_moe": ModelConfig(architecture="qwen3_moe", num_key_value_heads=4, **SMALL),
}  # fmt: skip


@pytest.mark.parametrize("name, layout", [
    ("deepseek_v3", Layout(replicate=2, tensor=4)),
    ("deepseek_v3", Layout(shard=4, tensor=2, context=2)),
    ("qwen3_moe", Layout(shard=2, replicate=2, tensor=2)),  # FSDP of two over the experts of each tensor parallel rank, twice
    ("qwen3_moe", Layout(shard=4, tensor=2, expert=4, context=2)),
])  # fmt: skip
def test_parts_that_the_engine_makes_are_those_of_the_plan(name, layout, ranks, monkeypatch):
    """`parallelize_` itself, on a fake process group: what each rank keeps of a mixture, with latent attention or without."""
    config, world = MIXTURES[name], 8
    assert layout.is_built(config) and layout.replicate * layout.shard * layout.tensor == world
    for rank in (0, 5, 7):
        ranks(rank, world)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        recipe = ParallelConfig(shard=layout.shard, tensor=layout.tensor, expert=layout.expert, context=layout.context)
        model = parallelize_(Decoder(config), recipe, Ranks("cpu", threads=1, tensor=layout.tensor, context=layout.context))
        kept = {n: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for n, p in model.named_parameters()}
        dense, sparse = rank // layout.tensor % layout.shard, rank // (layout.expert * layout.tensor) % layout.expert_shard
        for weight in memory.weights_of(config):
            if not weight.name.endswith("router.bias"):  # which FSDP leaves alone
                assert kept[weight.name] == weight.local(layout, sparse if weight.expert else dense), (rank, weight.name)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_part_of_a_mixture_keeps_for_its_backward(name, monkeypatch):
    """One of two tensor parallel ranks alone, sums over ranks left out: within a tenth of the plan, which has the choices even."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: None)
    config = MIXTURES[name].model_copy(update={"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 320, "head_dim": 0})
    kept = []
    for rank in (0, 1):
        part = split_(Decoder(config).initialize_(0), SimpleNamespace(rank=rank, world=2, group=None))
        weights, found, tokens = {p.untyped_storage().data_ptr() for p in part.parameters()}, {}, 1024

        def note(x, weights=weights, found=found):
            if x.untyped_storage().data_ptr() not in weights:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        ids = torch.arange(tokens)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = part(ids % 96, ids, PackedAttention(torch.tensor([0, tokens], dtype=torch.int32)))
        kept.append(sum(storage.nbytes() for storage in found.values()))
        del hidden
    predicted = memory.activations(config, tokens, Layout(tensor=2), 4, on_cpu=True)
    assert sum(kept) / 2 == pytest.approx(predicted.layers + predicted.top, rel=0.1)
    whole = memory.activations(config, tokens, Layout(), 4, on_cpu=True)
    assert whole.layers > 1.3 * predicted.layers


def test_the_shards_of_all_ranks_are_the_model():
    config = shape_at(SHAPES_DIR / "qwen3-30b-a3b.json").model_copy(update={"num_hidden_layers": 2})
    layout = Layout(shard=48, expert=16)  # three ranks per expert's rows
    total = sum(weight.local(layout, rank if not weight.expert else rank // layout.expert) for weight in memory.weights_of(config)
                for rank in range(48))  # fmt: skip
    assert total == memory.num_parameters(config)
