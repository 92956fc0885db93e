"""trl: one step of TRL's GRPOTrainer with our sampling, log-probs, loss and kernels in it, beside the same step of TRL alone.

    pip install -c constraints.txt -e '.[trl]' && python bench/run.py --op trl      # a GPU: Qwen2.5-0.5B's shape, bf16; a CPU: 0.8M parameters, fp32

A row has the new tokens per second of the whole step, its two parts, and peak memory.  No reference model, no gradient checkpointing, one update on
all of the rollout's tokens.  The size for CUDA has never run.
"""

from cases.rollout import MODELS, SMALL, TRL, dtype_of, forward_flops, sampling_cost, step_arguments
from workloads import Contender, Workload

LARGE = {"model": "Qwen2.5-0.5B", "prompts": 8, "G": 8, "prompt": 256, "new": 256}


def workloads(device: str) -> list[Workload]:
    return [trl_step(device, SMALL if device == "cpu" else LARGE)]


def trl_step(device: str, sizes: dict) -> Workload:
    cost, length = sampling_cost(sizes), sizes["prompt"] + sizes["new"]
    cost["flops"] += 3 * forward_flops(MODELS[sizes["model"]], cost["rows"] * length, length / 2)
    del cost["bound_bytes"]  # of decoding alone
    return Workload(
        "trl", "trl_step", device, sizes, dtype_of(sizes),
        {"trl on athanor": Contender("rollout_peers:TRLStepOnAthanor", lambda: step_arguments(device, sizes), ours=True, needs=TRL),
         "trl": Contender("rollout_peers:TRLStep", lambda: step_arguments(device, sizes), needs=TRL)},
        rival="trl", gate="log-probs of the samples = plain transformers', all samples whole, weights moved",
        work="sampling, then forward and backward on prompts and samples; bytes are the sampling's", **cost,
    )  # fmt: skip
