"""The planner's arithmetic against published counts, hand-computed volumes, drawn samples and a rollout simulated step by step."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.planner import memory
from athanor.planner.cluster import ClusterConfig, resolve_cluster
from athanor.planner.command import SHAPES_DIR, command, shape_at
from athanor.planner.memory import Layout
from athanor.planner.phases import Lengths, Machine, describe
from athanor.planner.search import _Planner, make_plan
from athanor.planner.settings import Assumptions, PlanConfig

R1 = dict(prompts_per_step=512, updates_per_rollout=16, num_steps=650, max_tokens=32768, mean_tokens=7300)
IDEAL = dict(matmul_efficiency=1, expert_efficiency=1, attention_efficiency=1, bandwidth_efficiency=1, network_efficiency=1, expert_imbalance=1,
             layer_latency_us=0, collective_latency_us=0)  # fmt: skip


def shape(name: str) -> ModelConfig:
    return shape_at(SHAPES_DIR / f"{name}.json")


def cluster(**settings):
    return resolve_cluster(ClusterConfig(**settings), 2)


def machine(assume=IDEAL, **settings) -> Machine:
    return Machine(cluster(**settings), Assumptions(**assume), 2)


# ---- what a model weighs


@pytest.mark.parametrize("name, total, active", [
    ("qwen2.5-7b", 7.61e9, 7.61e9), ("llama-3-8b", 8.03e9, 8.03e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9), ("deepseek-v3", 671e9, 37e9),
])  # fmt: skip
def test_parameters_are_the_published_ones(name, total, active):
    config = shape(name)
    assert memory.num_parameters(config) == pytest.approx(total, rel=0.002)
    assert memory.num_active(config) == pytest.approx(active, rel=0.03)  # published to two digits, with or without the embedding


def test_parameters_of_an_expert_model_by_the_formula_of_its_paper():
    D, L, H, r, q_rank, n, R, v, V = 7168, 61, 128, 512, 1536, 128, 64, 128, 129280
    attention = D * q_rank + q_rank * H * (n + R) + D * (r + R) + r * H * (n + v) + H * v * D + q_rank + r
    sparse = 256 * 3 * D * 2048 + 3 * D * 2048 + 256 * D + 256  # routed, shared, router and its bias
    expected = L * (attention + 2 * D) + 3 * 3 * D * 18432 + (L - 3) * sparse + 2 * V * D + D
    assert memory.num_parameters(shape("deepseek-v3")) == expected
    qwen = 48 * (2048 * (32 + 8) * 128 + 32 * 128 * 2048 + 2 * 128 + 2 * 2048 + 128 * 2048 + 128 * 3 * 2048 * 768) + 2 * 151936 * 2048 + 2048
    assert memory.num_parameters(shape("qwen3-30b-a3b")) == qwen


def test_kv_of_a_token():
    assert memory.kv_bytes_per_token(shape("deepseek-v3"), 2, 1, False) == 70272  # the V3 report's figure
    assert memory.kv_bytes_per_token(shape("deepseek-v3"), 2, 8, False) == 70272  # every tensor parallel rank has the latent
    assert memory.kv_bytes_per_token(shape("qwen2.5-7b"), 2, 1, False) == 2 * 28 * 4 * 128 * 2
    assert memory.kv_bytes_per_token(shape("qwen2.5-7b"), 2, 2, False) == 28 * 4 * 128 * 2


def test_mixed_precision_adamw_is_sixteen_bytes_a_parameter_over_all_ranks():
    config = shape("llama-3-8b")
    plan = make_plan(config, PlanConfig(cluster=dict(gpu="h100", gpus_per_node=8, nodes=2), workload=dict(max_tokens=4096)))
    m = plan.training.memory
    assert (m["parameters"] + m["gradients"] + m["optimizer"]) * 16 / plan.training.layout.replicate == pytest.approx(
        16 * memory.num_parameters(config), rel=1e-3
    )


def test_operations_of_a_forward_are_two_per_parameter_and_the_score_matrices():
    model = describe(shape("llama-3-8b"))
    assert 2 * (model.dense + model.head) == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert model.attention == 4 * 32 * 4096  # q k and p v of each layer: 2 D operations per pair each
    moe = describe(shape("deepseek-v3"))
    assert moe.dense + moe.active_experts + moe.head == pytest.approx(36.6e9, rel=1e-2)
    assert moe.decode_attention == 2 * 61 * 128 * (576 + 512) and moe.num_sparse == 58


# ---- links


def test_a_gather_inside_a_node_and_across():
    c = cluster(gpu="h100", gpus_per_node=8, nodes=4)
    assert c.gather_s(8e9, 8) == pytest.approx(8e9 * 7 / 8 / 450e9)
    # 32 ranks: each node's eight adapters of 50 GB/s bring the other nodes' 24 parts in once, NVLink passes them on: 400 GB/s
    assert c.gather_s(8e9, 32) == pytest.approx(8e9 * 31 / 32 / 400e9)
    assert c.gather_s(8e9, 4, stride=8) == pytest.approx(8e9 * 3 / 4 / 50e9)  # one member per node
    assert c.gather_s(8e9, 1) == 0


def test_all_to_all_by_counting_every_message():
    c = cluster(gpu="h800", gpus_per_node=8, nodes=4)
    size, sent = 32, 1e9
    for rank in (0, 13):
        inside = sum(sent / size for other in range(size) if other != rank and other // 8 == rank // 8)
        outside = sum(sent / size for other in range(size) if other // 8 != rank // 8)
        assert c.all_to_all_s(sent, size) == pytest.approx(max(inside / 160e9, outside / 50e9))


def test_what_tensor_parallel_ranks_of_a_mixture_compute_and_send():
    """Two sums of each layer and no exchange of tokens; with expert parallel ranks besides, each sends its part of the choices."""
    config, m, tokens = shape("qwen3-30b-a3b"), machine(gpu="h100", gpus_per_node=16), 4096
    model, layout, apart = describe(config), Layout(shard=4, tensor=4), Layout(shard=4, tensor=4, expert=4)
    assert m.forward_s(model, tokens, 0, 0, layout) * 4 == pytest.approx(m.forward_s(model, tokens, 0, 0, Layout(shard=16)))
    sums = 48 * 2 * 2 * tokens * 2048 * 2 * 3 / 4 / 450e9
    assert m.exchange_s(model, tokens, layout) == pytest.approx(sums)
    assert m.exchange_s(model, tokens, apart) == pytest.approx(sums + 2 * 48 * (tokens / 4 * 8 * 2048 * 2) * 3 / 4 / 450e9)
    both = m.exchange_s(model, tokens, Layout(shard=4, tensor=2, context=2))  # 16 query heads and 2 key heads of each tensor parallel rank
    traded = 48 * tokens / 2 * (2 * 16 + 2 * 2) * 128 * 2 / 2 / 450e9
    assert both == pytest.approx(traded + 48 * 4 * tokens / 2 * 2048 * 2 / 2 / 450e9)
    met = m.decode_step_s(model, 1, 0, 0, Layout(tensor=4)) - 48 * 2 * 2 * 2048 * 2 * 3 / 4 / 450e9
    assert met == pytest.approx((model.dense + model.head + model.experts / 16) / 4 * 2 / 3350e9, rel=1e-3)  # 8 of 128 experts, a quarter on each


@pytest.mark.parametrize("context, keys", [(2, 8), (8, 8), (16, 16)])  # the last has more ranks than key heads, which are then copied
def test_context_ranks_divide_a_forward_and_trade_its_heads(context, keys):
    m, model, tokens = machine(gpu="h100", gpus_per_node=16), describe(shape("llama-3-8b")), 4096
    layout, whole = Layout(shard=16, context=context), Layout(shard=16)
    work = tokens, tokens**2 / 2, tokens
    assert m.forward_s(model, *work, layout) * context == pytest.approx(m.forward_s(model, *work, whole))
    sent = tokens / context * (32 + 2 * keys + 32) * 128 * 2  # queries, keys, values and results of its tokens, in bf16
    assert m.exchange_s(model, tokens, layout) == pytest.approx(32 * sent * (context - 1) / context / 450e9)
    assert m.exchange_s(model, tokens, whole) == 0


def test_figures_can_be_overridden_and_unknown_gpus_are_named():
    c = cluster(gpu="h100", gpus_per_node=4, nodes=2, memory_gb=40, tflops=100, memory_gbs=1000, intra_gbs=10, inter_gbs=5)
    assert (c.world, c.memory, c.flops, c.memory_bandwidth, c.intra, c.inter) == (8, 40e9, 1e14, 1e12, 1e10, 5e9)
    with pytest.raises(UserError, match="plan.cluster.gpu is 'h1000'; did you mean h100"):
        cluster(gpu="h1000")


# ---- rollouts


@pytest.mark.parametrize("mean, longest", [(7300, 32768), (64, 128), (90, 128), (1000, 1000)])
def test_lengths_against_drawn_samples(mean, longest):
    lengths, rng = Lengths(mean, longest), np.random.default_rng(0)
    scale = 1e12 if math.isinf(lengths.tau) else lengths.tau
    drawn = np.minimum(rng.exponential(scale, 400_000), longest)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert (drawn**2).mean() == pytest.approx(lengths.second_moment, rel=0.01)
    assert (drawn > longest / 2).mean() == pytest.approx(lengths.alive(longest / 2), abs=0.005)
    assert lengths.expected_longest(16) == pytest.approx(drawn.reshape(-1, 16).max(1).mean(), rel=0.01)


@pytest.mark.parametrize("samples, rows", [(64, 64), (512, 64)])
def test_decoding_takes_as_long_as_a_simulated_rollout(samples, rows):
    config, prompt, lengths = shape("qwen2.5-7b"), 100.0, Lengths(300, 1500)
    m, model, sampler = machine(gpu="h100", gpus_per_node=1), describe(config), Layout()
    token_bytes = memory.kv_bytes_per_token(config, 2, 1, False)
    seconds = []
    for seed in range(8):
        drawn = np.minimum(np.random.default_rng(seed).exponential(lengths.tau, samples), lengths.longest).astype(int) + 1
        waiting, left, ages, total = list(drawn[rows:]), drawn[:rows].copy(), np.zeros(rows), 0.0
        while len(left):
            total += m.decode_step_s(model, len(left), prompt + ages.mean(), token_bytes, sampler)
            left, ages = left - 1, ages + 1
            for i in np.flatnonzero(left == 0):
                if waiting:
                    left[i], ages[i] = waiting.pop(), 0
            left, ages = left[left > 0], ages[left > 0]
        seconds.append(total)
    predicted, _ = m.decode_s(model, lengths, prompt, samples, rows, samples, token_bytes, sampler)
    assert predicted == pytest.approx(np.mean(seconds), rel=0.1)


def test_a_decode_step_reads_the_weights_that_its_tokens_meet():
    m = machine(gpu="h100", gpus_per_node=8)
    dense = shape("llama-3-8b")
    weights = (8.03e9 - 128256 * 4096) * 2
    assert m.decode_step_s(describe(dense), 1, 0, 0, Layout()) == pytest.approx(weights / 3350e9, rel=2e-3)
    assert m.decode_step_s(describe(dense), 4, 1000, 131072, Layout()) == pytest.approx((weights + 4000 * 131072) / 3350e9, rel=2e-3)
    sparse = describe(shape("qwen3-30b-a3b"))
    one = m.decode_step_s(sparse, 1, 0, 0, Layout())  # one token meets 8 of 128 experts
    assert one == pytest.approx((sparse.dense + sparse.head + sparse.experts / 16) * 2 / 3350e9, rel=1e-3)
    many = m.decode_step_s(sparse, 256, 0, 0, Layout())
    assert many == pytest.approx((sparse.dense + sparse.head + sparse.experts) * 2 / 3350e9, rel=1e-3)


def test_an_update_is_compute_and_what_the_collectives_add():
    config, given = shape("llama-3-8b"), dict(shard=16, replicate=1, tensor=1, activation_checkpointing=True)
    workload = dict(prompts_per_step=64, group_size=16, prompt_tokens=100, max_tokens=4096, mean_tokens=4096, micro_batch_tokens=8400,
                    scoring_passes=0, reference=False)  # fmt: skip
    settings = PlanConfig(cluster=dict(gpu="h100", gpus_per_node=8, nodes=2, memory_gbs=1e9), workload=workload, layout=given,
                          assume={**IDEAL, "overlap": 0.0, "packing": 1.0})  # fmt: skip
    phases = make_plan(config, settings).training.phases
    tokens, params = 64 * 4196, 8.03e9 - 128256 * 4096  # of one rank: 64 of the 1,024 sequences
    flops = 4 * (2 * params * tokens + 4 * 32 * 4096 * 64 * 4196**2 / 2)  # forward, forward again, and twice that backward
    assert phases["update"] == pytest.approx(flops / 989.4e12, rel=2e-3)
    one = 8.03e9 * 15 / 16 / 400e9  # seconds to bring one byte of each parameter
    assert phases["update_collectives"] == pytest.approx(32 * one * (2 + 2 + 4), rel=2e-3)  # two gathers in bf16, one reduction in fp32
    hidden = settings.model_copy(update={"assume": Assumptions(**{**IDEAL, "overlap": 1.0, "packing": 1.0})})
    assert make_plan(config, hidden).training.phases["update_collectives"] == pytest.approx(max(0, 32 * one * 8 - flops / 989.4e12), abs=0.05)


# ---- the choice


def test_no_other_layout_that_fits_is_faster():
    config = shape("llama-3-8b")
    settings = PlanConfig(cluster=dict(gpu="a100", gpus_per_node=4, nodes=1), workload=dict(max_tokens=2048))
    plan = make_plan(config, settings)
    settings = settings.model_copy(update={"workload": settings.workload.over({})})
    planner = _Planner(config, settings, plan.cluster)
    every = [planner.plan(training, planner.sampling(training, in_place=False, built=True)) for training in planner.trainings()]
    assert plan.fits and len(every) > 10 and any(not other.fits for other in every)
    assert plan.step_s == pytest.approx(min(other.step_s for other in every if other.fits))


def test_a_fixed_part_of_the_layout_is_kept_and_one_that_cannot_be_is_refused():
    config, where = shape("llama-3-8b"), dict(gpu="h100", gpus_per_node=8, nodes=2)
    layout = dict(replicate=2, tensor=2, activation_checkpointing=True)
    chosen = make_plan(config, PlanConfig(cluster=where, layout=layout, workload=dict(max_tokens=4096))).training.layout
    assert chosen == Layout(shard=4, replicate=2, tensor=2, activation_checkpointing=True)
    chosen = make_plan(config, PlanConfig(cluster=where, layout=dict(context=4), workload=dict(max_tokens=4096))).training.layout
    assert chosen.context == 4 and chosen.tensor * chosen.shard * chosen.replicate == 16
    with pytest.raises(UserError, match="plan.layout: .*tensor=3.* cannot be made of 16 ranks"):
        make_plan(config, PlanConfig(cluster=where, layout=dict(tensor=3), workload=dict(max_tokens=4096)))
    with pytest.raises(UserError, match="more than the model's max_position_embeddings = 8192"):
        make_plan(config, PlanConfig(cluster=where, workload=dict(max_tokens=8192)))


def test_what_the_engine_runs_comes_first_and_the_rest_where_that_does_not_fit():
    """A mixture on two nodes is sampled by tensor parallel ranks with their parts; of R1 no node holds the whole."""
    where, work = dict(gpu="h100", gpus_per_node=8, nodes=2), dict(max_tokens=4096)
    plan = make_plan(shape("qwen3-30b-a3b"), PlanConfig(cluster=where, workload=work))
    assert plan.fits and plan.is_built and plan.sampling.layout.tensor == plan.training.layout.tensor > 1 == plan.sampling.layout.expert
    every = make_plan(shape("qwen3-30b-a3b"), PlanConfig(cluster=where, workload=work, layout=dict(built=False)))
    assert every.fits and every.step_s <= plan.step_s
    large = PlanConfig(cluster=dict(gpu="h800", gpus_per_node=8, nodes=64), workload=R1, layout=dict(activation_checkpointing=True))
    found = make_plan(shape("deepseek-v3"), large)
    assert found.fits and not found.is_built
    only = make_plan(shape("deepseek-v3"), large.model_copy(update={"layout": large.layout.model_copy(update={"built": True})}))
    assert only.is_built and not only.fits


def test_a_model_that_does_not_fit_is_said_not_to():
    plan = make_plan(shape("qwen2.5-7b"), PlanConfig(cluster=dict(gpu="rtx4090", gpus_per_node=1, nodes=1), workload=dict(max_tokens=2048)))
    assert not plan.fits and plan.peak_bytes > 16 * 7.6e9


def test_r1_zero_on_512_h800_is_within_a_factor_of_two_of_what_was_published():
    plan = make_plan(shape("deepseek-v3"), PlanConfig(cluster=dict(gpu="h800", gpus_per_node=8, nodes=64), workload=R1))
    assert plan.fits
    assert 198 / 2 < plan.step_s * 650 / 3600 < 198 * 2  # 650 rollouts of 8,192 samples, 16 updates each: 10,400 steps


# ---- the command


def test_the_default_recipe_is_planned_from_its_own_stage():
    script = Path(__file__).parents[1] / "engine" / "train.py"
    argv = [sys.executable, str(script), "--plan", "--stages.zero.group_size", "8", "--plan.workload.mean_tokens", "40"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    data = json.loads(ran.stdout.splitlines()[-1])
    w = data["workload"]
    assert data["fits"] and data["num_parameters"] == 255120 and 5 < w["prompt_tokens"] < 20
    assert (w["prompts_per_step"], w["group_size"], w["updates_per_rollout"], w["num_steps"], w["max_tokens"]) == (32, 8, 2, 12, 128)
    assert (w["mean_tokens"], w["precision"], w["reference"], w["scoring_passes"], w["optimizer"]) == (40, "float32", False, 0, "adamw")
    assert all(f"{name} " in ran.stdout for name in (*Assumptions.model_fields, "kv pages", "decode"))


def test_another_stage_and_a_supervised_one():
    data = command(["--plan", "--plan.stage", "student_base", "--plan.workload.max_tokens", "64"])
    assert data["workload"]["optimizer"] == "muon" and "rollout_bytes" not in data and data["num_parameters"] < 255120
    with pytest.raises(UserError, match="plan.stage is 'cold_start_data'; did you mean cold_start"):
        command(["--plan", "--plan.stage", "cold_start_data"])


def test_a_model_folder_and_wrong_names(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text((SHAPES_DIR / "llama-3-8b.json").read_text())
    given = ["--plan", "--plan.cluster.gpu=h100", "--plan.workload.max_tokens=1024"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # as torchrun sets them
    monkeypatch.setenv("WORLD_SIZE", "16")
    data = command([str(tmp_path), *given])
    keys = {"shard", "replicate", "context", "tensor", "expert", "rollout", "activation_checkpointing"}
    assert data["ranks"] == 16 and data["parallel"].keys() == keys
    assert capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert command([str(tmp_path), *given]) == {} and not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    for name, message in (("qwen2.5-8b", "did you mean qwen2.5-7b"), ("nothing", "is no recipe")):
        with pytest.raises(UserError, match=message):
            command([name, "--plan"])
