"""rollout: sampling, its last samples, one whole GRPO step, and the prefill and the update of a group, as whole workloads beside their peers.

Goals: group_prefill, G = 16 on a prompt of 1,000 tokens, 8 x one request per sample; group_update, the same with completions of 250 tokens, 3 x
sequences by themselves (a quarter of their tokens is left).  On a GPU, decoding near `bound_tokens_per_s`: rows x bandwidth
/ (matrices + rows x context x keys and values), each read once per step.  The sizes for CUDA have never run.

All contenders of a workload get the same random weights, the same prompts and an end token that cannot occur, so every sample has its full length.
"""

import functools

import torch
from workloads import Contender, Workload

# HuggingFace's shapes.  0.8M is what two cores sample in a second or two; it is in fp32, the others are in bf16.
MODELS = {
    "0.8M": dict(architecture="qwen2", vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=344, initializer_range=0.1),
    "Qwen3-0.6B": dict(architecture="qwen3", vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, intermediate_size=3072, rope_theta=1e6, max_position_embeddings=40960),
    "Qwen2.5-0.5B": dict(architecture="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, intermediate_size=4864, rope_theta=1e6, max_position_embeddings=32768),
    "Qwen2.5-7B": dict(architecture="qwen2", vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, intermediate_size=18944, rope_theta=1e6, max_position_embeddings=32768, tie_word_embeddings=False),
}  # fmt: skip
SMALL = {"model": "0.8M", "prompts": 8, "G": 8, "prompt": 32, "new": 128}
PREFILL = {"model": "0.8M", "prompts": 1, "G": 16, "prompt": 1000, "new": 1}
UPDATE = PREFILL | {"new": 250}
STRAGGLERS = {"model": "0.8M", "prompts": 2, "G": 1, "prompt": 32, "new": 256}
LARGE = [{"model": name, "prompts": prompts, "G": 8, "prompt": 1024, "new": 128} for name, prompts in (("Qwen3-0.6B", 8), ("Qwen2.5-7B", 32))]
HUGGINGFACE = {"transformers": "transformers"}
TRL = HUGGINGFACE | {"trl": "trl==1.16.0", "datasets": "datasets", "accelerate": "accelerate"}


def workloads(device: str) -> list[Workload]:
    if device == "cpu":
        groups = [group_prefill(device, PREFILL), group_update(device, UPDATE)]
        return [generate(device, SMALL), stragglers(device, STRAGGLERS), grpo_step(device, SMALL), *groups]
    large = {"model": "Qwen3-0.6B"}
    groups = [group_prefill(device, PREFILL | large), group_update(device, UPDATE | large)]
    return [*(generate(device, sizes) for sizes in LARGE), grpo_step(device, SMALL), *groups]


def dtype_of(sizes: dict) -> torch.dtype:
    return torch.float32 if sizes["model"] == "0.8M" else torch.bfloat16


def gate_sizes(sizes: dict) -> dict:
    """Where the gate runs: at this size in fp32, elsewhere as on a CPU, because bf16 rounds by more than it allows."""
    return sizes if dtype_of(sizes) == torch.float32 else sizes | {"model": "0.8M", "prompt": min(sizes["prompt"], 32), "new": min(sizes["new"], 32)}


def scope(sizes: dict, what: str) -> str:
    small = gate_sizes(sizes)
    return what + ("" if small == sizes else f" in fp32 at {' '.join(f'{k}={v}' for k, v in small.items())}; here finite")


@functools.lru_cache(maxsize=1)  # the contenders of a workload share a model, which makes room for the next workload's
def model_and_prompts(device: str, name: str, prompts: int, length: int, dtype: torch.dtype) -> tuple:
    from rollout_engine import random_model, random_prompts

    model = random_model(MODELS[name], device, dtype)
    return model, random_prompts(model, prompts, length)


def arguments(device: str, sizes: dict) -> dict:
    model, prompts = model_and_prompts(device, sizes["model"], sizes["prompts"], sizes["prompt"], dtype_of(sizes))
    return {"model": model, "prompts": prompts, "group_size": sizes["G"], "new_tokens": sizes["new"]}


def gated_arguments(device: str, sizes: dict) -> dict:
    small = arguments(device, gate_sizes(sizes))
    return arguments(device, sizes) | {"gated": small}


def reward(ids) -> float:
    """The mean id: every group of random tokens has contrast, and next to no sample has its group's mean, which would drop it from the update."""
    return sum(map(int, ids)) / len(ids)


def step_arguments(device: str, sizes: dict) -> dict:
    from athanor.config import OptimizerConfig

    return arguments(device, sizes) | {"reward": reward, "optimizer": OptimizerConfig(lr=1e-6, warmup_steps=0, betas=(0.9, 0.999), grad_clip=1.0)}


def matrix_elements(config: dict) -> int:
    """Of all matrices that a token meets, the lm_head among them."""
    D, H, K, F = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    return config["num_hidden_layers"] * ((2 * H + 2 * K) * head_dim(config) * D + 3 * D * F) + config["vocab_size"] * D


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def step_elements(config: dict, rows: int, context: float) -> float:
    """Read by one decode step of `rows` rows: the matrices, and each row's keys and values."""
    return matrix_elements(config) + rows * context * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim(config)


def forward_flops(config: dict, tokens: int, context: float) -> float:
    """2 per matrix element and token, and the two products of attention at a mean context."""
    return tokens * (2 * matrix_elements(config) + 4 * config["num_hidden_layers"] * config["num_attention_heads"] * head_dim(config) * context)


def sampling_cost(sizes: dict) -> dict:
    config, rows, new = MODELS[sizes["model"]], sizes["prompts"] * sizes["G"], sizes["new"]
    context = sizes["prompt"] + (new - 1) / 2
    step = dtype_of(sizes).itemsize * step_elements(config, rows, context)
    flops = forward_flops(config, rows * new, context) + forward_flops(config, sizes["prompts"] * sizes["prompt"], sizes["prompt"] / 2)
    return {"bytes": new * step, "flops": flops, "tokens": rows * new, "bound_bytes": step, "rows": rows}


def generate(device: str, sizes: dict) -> Workload:
    """Groups of samples that start and end together."""
    return Workload(
        "rollout", "generate", device, sizes, dtype_of(sizes),
        {"athanor": Contender("rollout_engine:EngineGenerate", lambda: gated_arguments(device, sizes), ours=True),
         "eager": Contender("rollout_peers:EagerGenerate", lambda: arguments(device, sizes)),
         "transformers": Contender("rollout_peers:TransformersGenerate", lambda: arguments(device, sizes), needs=HUGGINGFACE)},
        rival="eager", gate=scope(sizes, "log-probs = training forward, greedy = eager loop, shared prompt = single requests"),
        work="reads matrices and each row's keys and values once per step, a shared prompt's for each row; computes each prompt once",
        **sampling_cost(sizes),
    )  # fmt: skip


def stragglers(device: str, sizes: dict) -> Workload:
    """A few rows, greedy: random weights soon go round in circles, which is the best that drafts can meet."""
    return Workload(
        "rollout", "stragglers", device, sizes, dtype_of(sizes),
        {"athanor": Contender("rollout_engine:EngineStragglers", lambda: arguments(device, sizes) | {"drafts": 5}, ours=True),
         "without drafts": Contender("rollout_engine:EngineStragglers", lambda: arguments(device, sizes) | {"drafts": 0})},
        rival="without drafts", gate="samples = those without drafts, to the bit", work="as generate, in as many steps as there are tokens",
        **{name: value for name, value in sampling_cost(sizes).items() if name != "bound_bytes"},
    )  # fmt: skip


def grpo_step(device: str, sizes: dict) -> Workload:
    """Groups, rewards, advantages, and one AdamW step of the clipped loss without KL on all tokens of the rollout."""
    config, cost = MODELS[sizes["model"]], sampling_cost(sizes)
    length = sizes["prompt"] + sizes["new"]
    cost["flops"] += 3 * forward_flops(config, cost["rows"] * length, length / 2)
    del cost["bound_bytes"]  # it bounds tokens per second of decoding, not of a step
    return Workload(
        "rollout", "grpo_step", device, sizes, dtype_of(sizes),
        {"athanor": Contender("rollout_engine:EngineStep", lambda: step_arguments(device, sizes), ours=True),
         "trl": Contender("rollout_peers:TRLStep", lambda: step_arguments(device, sizes), needs=TRL),
         "trl on athanor": Contender("rollout_peers:TRLStepOnAthanor", lambda: step_arguments(device, sizes), needs=TRL)},
        rival="trl", gate="sampled log-probs = training forward in the step, all tokens trained",
        work="as generate, then forward and backward on prompts and samples; bytes are the sampling's", **cost,
    )  # fmt: skip


def group_prefill(device: str, sizes: dict) -> Workload:
    """One token of each sample of one long prompt."""
    config, L = MODELS[sizes["model"]], sizes["prompt"]
    return Workload(
        "rollout", "group_prefill", device, sizes, dtype_of(sizes),
        {"athanor": Contender("rollout_engine:EnginePrefill", lambda: gated_arguments(device, sizes) | {"shared": True}, ours=True),
         "a request per sample": Contender("rollout_engine:EnginePrefill", lambda: gated_arguments(device, sizes) | {"shared": False})},
        rival="a request per sample", goal=8, gate=scope(sizes, "first tokens and log-probs of shared prompt = single requests"),
        work="computes the prompt once, the lm_head for its last token", bytes=dtype_of(sizes).itemsize * step_elements(config, 1, L),
        flops=forward_flops(config, L, L / 2) - 2 * (L - 1) * config["vocab_size"] * config["hidden_size"],
    )  # fmt: skip


def group_update(device: str, sizes: dict) -> Workload:
    """Forward and backward of one group with a long prompt."""
    config, L, new, G = MODELS[sizes["model"]], sizes["prompt"], sizes["new"], sizes["G"]
    flops = forward_flops(config, L, L / 2) + forward_flops(config, G * new, L + new / 2)
    return Workload(
        "rollout", "group_update", device, sizes, dtype_of(sizes),
        {"athanor": Contender("rollout_engine:EngineUpdate", lambda: gated_arguments(device, sizes) | {"shared": True}, ours=True),
         "each by itself": Contender("rollout_engine:EngineUpdate", lambda: gated_arguments(device, sizes) | {"shared": False})},
        rival="each by itself", goal=3, gate=scope(sizes, "gradient with shared prompt = each sequence by itself"),
        work="forward and backward of the prompt once and of all completions", bytes=3 * dtype_of(sizes).itemsize * matrix_elements(config),
        flops=3 * (flops - 2 * (L - 1) * config["vocab_size"] * config["hidden_size"]),
    )  # fmt: skip
