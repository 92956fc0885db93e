"""Predicted bytes against what PyTorch's CPU allocator counted in real training steps and real generation.

The profiler (`profile_memory`) reports every allocation and release of tensor memory; added up in their order they give what is alive at each moment.
Compared are, within 10 %: what building the model leaves alive (parameters); what the first optimizer step leaves alive (gradients and optimizer
state); how far the second step rises above what was alive before it, the old gradients, which it frees first, taken off (activations and workspace:
there are two micro-batches, so the gradients of the first are there when the second is at its highest); the sum of all; and what a generation leaves
alive (KV pages).  Not compared: what the process needs besides tensors.
"""

import gc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from athanor import Generator, Request, SamplingConfig
from athanor.batch import pack
from athanor.config import ModelConfig, OptimizerConfig, ParallelConfig
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.planner import memory
from athanor.planner.memory import Layout
from athanor.planner.search import make_plan
from athanor.planner.settings import PlanConfig
from athanor.sharding import parallelize_
from athanor.stages.training import completion_logprobs, optimizer_step

PROMPT, COMPLETION, SEQUENCES = 17, 240, 4  # of a micro-batch: 4 x 256 rows, whole row steps
MOE = dict(num_experts=8, num_experts_per_tok=2)
LATENT = dict(architecture="deepseek_v3", n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1, norm_topk_prob=True)
SMALL = {
    "qwen3": ModelConfig(vocab_size=3001, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, intermediate_size=384),
    "llama_untied": ModelConfig(architecture="llama", vocab_size=3001, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
                                num_key_value_heads=4, intermediate_size=352, tie_word_embeddings=False),
    "qwen3_moe": ModelConfig(architecture="qwen3_moe", vocab_size=3001, hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
                             num_key_value_heads=4, moe_intermediate_size=96, **MOE),
    "deepseek_v3": ModelConfig(**LATENT, vocab_size=3001, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=320,
                               moe_intermediate_size=96, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
                               **MOE),
}  # fmt: skip
LARGE = {  # 85 to 126 MB of parameters
    "qwen3": ModelConfig(vocab_size=16000, hidden_size=512, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
                         intermediate_size=1536),
    "qwen2": ModelConfig(architecture="qwen2", vocab_size=16000, hidden_size=448, num_hidden_layers=6, num_attention_heads=7, num_key_value_heads=1,
                         intermediate_size=1792, tie_word_embeddings=False),
    "deepseek_v3": ModelConfig(**LATENT, vocab_size=16000, hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1024,
                               moe_intermediate_size=384, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
                               **MOE),
}  # fmt: skip


class Measured:
    net = peak = 0  # bytes, over what was alive before


@contextmanager
def allocations():
    """Bytes of tensors that a block left alive, and the most that were alive in it at once."""
    gc.collect()
    result = Measured()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield result
        gc.collect()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        result.net += event.nbytes()
        result.peak = max(result.peak, result.net)


def measure(config: ModelConfig, again: bool, optimizer: str = "adamw", gradient_parts: int = 1) -> dict[str, int]:
    """Two optimizer steps of two micro-batches, in each part."""
    rng = np.random.default_rng(0)
    draw = lambda n: [rng.integers(config.vocab_size, size=n) for _ in range(2 * SEQUENCES)]  # noqa: E731
    batches = pack(draw(PROMPT), draw(COMPLETION), SEQUENCES * (PROMPT + COMPLETION - 1))
    assert [len(batch.input_ids) for batch in batches] == [SEQUENCES * (PROMPT + COMPLETION - 1)] * 2
    with allocations() as built:
        model = Decoder(config)
    model.initialize_(0)
    ranks = Ranks(device="cpu", threads=1, gradient_parts=gradient_parts)
    parallelize_(model, ParallelConfig(activation_checkpointing=again), ranks)
    with allocations() as state:
        steps = Optimizer(model, OptimizerConfig(name=optimizer), ranks)

    def loss_of(batch):
        return -completion_logprobs(model, batch).logps.mean(), None

    parts = ranks.parts(batches * gradient_parts)
    with allocations() as first:
        optimizer_step(steps, parts, loss_of, 1e-4)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    with allocations() as second:
        optimizer_step(steps, parts, loss_of, 1e-4)
    kept = state.net + first.net
    return {"parameters": built.net, "gradients and optimizer": kept, "activations": second.peak, "peak": built.net + kept + second.peak,
            "gradients": gradients}  # fmt: skip


def predict(config: ModelConfig, again: bool, optimizer: str = "adamw", gradient_parts: int = 1) -> dict[str, float]:
    # as many prompts as make two micro-batches
    workload = dict(prompts_per_step=2, group_size=SEQUENCES, prompt_tokens=PROMPT, max_tokens=COMPLETION, mean_tokens=COMPLETION, reference=False,
                    scoring_passes=0, micro_batch_tokens=SEQUENCES * (PROMPT + COMPLETION - 1), precision="float32", optimizer=optimizer,
                    gradient_parts=gradient_parts)  # fmt: skip
    plan = make_plan(config, PlanConfig(workload=workload, layout=dict(activation_checkpointing=again)))
    m = plan.training.memory
    assert plan.cluster.world == 1 and not m["gathered"] and not m["reference"]
    return {"parameters": m["parameters"], "gradients": m["gradients"], "gradients and optimizer": m["gradients"] + m["optimizer"],
            "activations": m["activations"] + m["workspace"], "peak": sum(m.values())}  # fmt: skip


def assert_close(predicted: dict, measured: dict, within: float = 0.1) -> None:
    figures = {name: (round(predicted[name] / 1e6, 2), round(measured[name] / 1e6, 2)) for name in measured}
    for name, value in measured.items():
        assert abs(predicted[name] / value - 1) <= within, f"{name}; predicted and measured in MB: {figures}"


pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("name, again", [
    ("qwen3", False), ("qwen3", True), ("deepseek_v3", False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("deepseek_v3", True), ("llama_untied", False), ("qwen3_moe", False)]),
])  # fmt: skip
def test_a_training_step_takes_what_was_predicted(name, again):
    assert_close(predict(SMALL[name], again), measure(SMALL[name], again))


def test_sums_of_gradients_wait_for_those_of_later_parts():
    one, two, eight = (predict(SMALL["qwen3"], False, gradient_parts=n) for n in (1, 2, 8))
    assert (two["gradients"], eight["gradients"]) == (2 * one["gradients"], 4 * one["gradients"])


@pytest.mark.slow
def test_a_sum_of_gradients_takes_what_was_predicted():
    config = SMALL["qwen3"]
    one, two = (predict(config, False, gradient_parts=n) for n in (1, 2))
    measured = [measure(config, False, gradient_parts=n)["peak"] for n in (1, 2)]
    assert_close({"more": two["peak"] - one["peak"]}, {"more": measured[1] - measured[0]}, within=0.01)


@pytest.mark.slow
def test_muon_has_one_moment_per_matrix():
    assert_close(predict(SMALL["qwen3"], False, "muon"), {
        name: value for name, value in measure(SMALL["qwen3"], False, "muon").items() if name in ("parameters", "gradients and optimizer")
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_a_training_step_of_a_larger_model_takes_what_was_predicted(name, again):
    assert_close(predict(LARGE[name], again), measure(LARGE[name], again))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_generation_takes_the_pages_that_were_predicted(name):
    config, prompts, group, max_tokens = SMALL[name], 3, 8, 1000
    model = Decoder(config).initialize_(0)
    generator = Generator(model, set(range(0, config.vocab_size, 60)), max_rows=16)  # a sample ends after 60 tokens on average
    requests = [Request(np.arange(PROMPT), seeds=np.arange(group) + 10 * i) for i in range(prompts)]
    finished = 0
    with allocations() as measured, generator.stream(requests, SamplingConfig(max_tokens=max_tokens)) as stream:
        for _ in stream:
            finished += 1
            if finished == 2:
                stream.abort()
    assert finished == prompts * group
    workload = dict(prompts_per_step=prompts, group_size=group, prompt_tokens=PROMPT, max_tokens=max_tokens, max_rows=16, precision="float32")
    plan = make_plan(config, PlanConfig(workload=workload)).sampling
    pool = sum(cache.untyped_storage().nbytes() for cache in (*generator.cache.keys, *generator.cache.values))
    assert plan.rows == 16
    # The generator counts the shared blocks of all three prompts, the plan those of the two groups in flight; its rows have some columns besides.
    assert abs(plan.memory["kv pages"] / pool - 1) <= 0.02
    assert abs(plan.memory["kv pages"] / measured.net - 1) <= 0.1


def test_workspace_of_the_head_is_what_linear_logprob_allocates():
    from athanor.kernels import linear_logprob

    T, D, V = 2048, 64, 20011
    hidden, weight = (torch.randn(n, D, requires_grad=True) for n in (T, V))
    targets = torch.randint(V, (T,))
    with allocations() as forward:
        loss = linear_logprob(hidden, weight, targets).logps.sum()
    with allocations() as backward:
        loss.backward()
    held, call = memory.linear_logprob_bytes(T, V, D, 4, on_cpu=True)
    assert abs(held / forward.net - 1) <= 0.1
    assert abs((held + call) / (forward.net + backward.peak - weight.grad.nbytes) - 1) <= 0.1


def test_tensor_parallelism_and_checkpoints_divide_what_is_kept():
    config = SMALL["qwen3"]
    whole, halves = (memory.activations(config, 4096, Layout(tensor=t), 2) for t in (1, 2))
    inputs = memory.activations(config, 4096, Layout(activation_checkpointing=True), 2)
    assert 0.5 < halves.layers / whole.layers < 0.65  # all but the normed inputs is halved
    assert inputs.layers == config.num_hidden_layers * 4096 * 2 * config.hidden_size * 2  # the stream and what is added to it, in bf16
    assert inputs.working > whole.layers / config.num_hidden_layers  # a layer at a time in full
