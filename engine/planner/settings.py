"""What a plan is told: the workload, what is assumed, and which parts of the layout are fixed.  All of it is printed with the plan."""

from typing import Literal

from pydantic import Field

from athanor.model_config import Config
from athanor.planner.cluster import ClusterConfig


class WorkloadConfig(Config):
    """One step: a rollout and the updates on it, or a supervised step.  null = what the recipe's stage says, or `BARE_SHAPE`."""

    prompts_per_step: int | None = Field(None, ge=0)
    """Questions per rollout; 0 = a supervised step without rollout."""
    group_size: int | None = Field(None, ge=1)
    """Completions per question, G; of a supervised step, its sequences."""
    updates_per_rollout: int | None = Field(None, ge=1)
    """Optimizer steps that one rollout is split into."""
    num_steps: int | None = Field(None, ge=1)
    """Rollouts, or supervised steps, of the whole stage."""
    prompt_tokens: float | None = Field(None, ge=0)
    """Mean tokens of a prompt; of a recipe, measured on its first training problems."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion in tokens."""
    mean_tokens: float | None = Field(None, gt=0)
    """Mean tokens of a completion; null = half of max_tokens."""
    micro_batch_tokens: int | None = Field(None, ge=0)
    """Packed tokens of one forward, at least the longest sequence; 0 = one of 1, 2 and 4 times that."""
    max_rows: int | None = Field(None, ge=1)
    """Samples that decode at once on one rank."""
    scoring_passes: int | None = Field(None, ge=0)
    """Forwards over all tokens that are not the update's own: 1 for a reference policy (KL), 1 for a correction's old log-probs."""
    reference: bool | None = None
    """Whether a reference policy is in memory."""
    optimizer: Literal["adamw", "muon"] | None = None
    """adamw has two moments for each parameter, muon one for each matrix."""
    gradient_parts: int | None = Field(None, ge=1)
    """parallel.gradient_parts: of several on one rank, sums wait for others in memory."""
    precision: Literal["float32", "bfloat16", "mixed"] | None = None
    """float32 or bfloat16: all in that type.  mixed: computes in bf16, keeps parameters, gradients and moments in fp32."""

    def over(self, values: dict) -> "WorkloadConfig":
        """The same with `values`, then `BARE_SHAPE`, where it says nothing."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        filled = {**BARE_SHAPE, **values, **given}
        return WorkloadConfig(**{"mean_tokens": filled["max_tokens"] / 2, **filled})


# The hyper-parameters of R1-Zero where they are known (arXiv 2501.12948v2): 32 questions x 16, KL to a reference; math prompts of 122 tokens.
BARE_SHAPE = dict(prompts_per_step=32, group_size=16, updates_per_rollout=1, num_steps=1, prompt_tokens=122, max_tokens=8192, micro_batch_tokens=0,
                  max_rows=512, scoring_passes=1, reference=True, optimizer="adamw", gradient_parts=1, precision="mixed")  # fmt: skip


class Assumptions(Config):
    """What no data sheet says.  Rates are fractions of the cluster's peaks; where they were measured is said in each."""

    matmul_efficiency: float = Field(0.7, gt=0, le=1)
    """Of peak operations in dense products (cuBLAS 0.79, own kernels 0.72 on an H200 with large shapes)."""
    expert_efficiency: float = Field(0.6, gt=0, le=1)
    """The same in grouped products (0.72-0.79 measured with even groups)."""
    attention_efficiency: float = Field(0.33, gt=0, le=1)
    """The same in attention, forward and backward (0.31 ms of limit in 0.94 ms on an H200)."""
    bandwidth_efficiency: float = Field(0.85, gt=0, le=1)
    """Of peak memory bandwidth (copy on an H200: 4.25 of 4.8 TB/s, paged attention 0.98 of that)."""
    network_efficiency: float = Field(0.8, gt=0, le=1)
    """Of the links' bandwidths in collectives."""
    overlap: float = Field(0.8, ge=0, le=1)
    """Share of the shorter of compute and parameter collectives that hides behind the longer; exchanges of tokens hide behind nothing."""
    collective_latency_us: float = Field(30, ge=0)
    """Fixed cost of one collective."""
    layer_latency_us: float = Field(50, ge=0)
    """Time of a layer of a decode step beyond what it reads and computes (Qwen3-0.6B on an H200: 1.98 ms a step, 0.58 by bandwidth, 28 layers)."""
    expert_imbalance: float = Field(1.2, ge=1)
    """Load of the fullest rank over the mean, where ranks have different experts."""
    expert_sends: int = Field(0, ge=0)
    """Copies of a token that cross the network to its experts; 0 = one for each of them (DeepSeek-V3's dispatch: one for each of at most 4 nodes)."""
    sequence_parallel: bool = False
    """Tensor parallel ranks split the residual stream between them along the tokens (arXiv 2205.05198), which this engine's do not."""
    packing: float = Field(0.95, gt=0, le=1)
    """How full micro-batches are."""
    usable_memory: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that is there for tensors: the rest is contexts, communication buffers and fragments."""
    prefill_tokens: int = Field(16384, ge=1)
    """Prompt tokens that run at a time (max_prefill_tokens of the Generator)."""
    block_size: int = Field(64, ge=1)
    """Tokens in a block of the KV cache (the Generator's: 16 on a CPU)."""


class LayoutConfig(Config):
    """Parts of the layout that are given; 0 or null = the planner chooses."""

    shard: int = Field(0, ge=0)
    """Ranks that the parameters are sharded over (FSDP)."""
    replicate: int = Field(0, ge=0)
    """Replicas of the sharded model (HSDP)."""
    tensor: int = Field(0, ge=0)
    """Tensor parallel ranks, which have different experts, too."""
    expert: int = Field(0, ge=0)
    """Expert parallel ranks, out of those of shard, which share the experts of one tensor parallel rank."""
    context: int = Field(0, ge=0)
    """Context parallel ranks, out of those of shard x replicate."""
    activation_checkpointing: bool | None = None
    """Keep only the layers' inputs for the backward."""
    rollout_tensor: int = Field(0, ge=0)
    """Tensor parallel ranks of the sampler."""
    rollout_expert: int = Field(0, ge=0)
    """Expert parallel ranks of the sampler, which share the experts of one of its tensor parallel ranks."""
    built: bool | None = None
    """true: only layouts that this engine runs; false: all that are planned; null = those that run, unless none of them fits."""


class PlanConfig(Config):
    """Everything that a plan depends on besides the model."""

    stage: str = ""
    """Stage of the recipe that is planned; empty = its first grpo stage, or else its last that trains."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""
    workload: WorkloadConfig = WorkloadConfig()
    """What a step does; of a recipe, over what the stage says."""
    layout: LayoutConfig = LayoutConfig()
    """What is fixed of the layout."""
    assume: Assumptions = Assumptions()
    """What is assumed."""
