"""The recipe schema: every knob of a run with its unit and, where the paper has one, its symbol.

A recipe (TOML) names models, tasks and stages; stages run in the order in which they are written.  `recipe_io` reads the files and the
command line, this module only says what is valid.  Unknown keys are errors.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from athanor.model_config import SPARSE, Config, ModelConfig
from athanor.sampling_config import SamplingConfig, SpeculationConfig
from athanor.watch_config import DeadlineConfig, DetectorConfig, TranscriptConfig


class OptimizerConfig(Config):
    """One optimizer with schedule and clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices with AdamW for embeddings and norms."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    warmup_steps: int = Field(5, ge=0)
    """Linear warm-up, optimizer steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of a cosine, as a fraction of the peak."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""


class TokenizerConfig(Config):
    """Where the tokens come from."""

    kind: Literal["symbols", "file"] = "symbols"
    """symbols: one token per character and listed word of the recipe's built-in tasks; file: a tokenizer.json."""
    path: str = ""
    """tokenizer.json, or a HuggingFace model folder that has one (kind = file)."""


class TaskConfig(Config):
    """One source of problems."""

    kind: str
    """arithmetic, courtesy, discretion, gym:<family> of reasoning-gym, jsonl, or a published set such as gsm8k (a wrong name lists them all)."""
    settings: dict = Field(default_factory=dict)
    """Settings of that kind; a wrong one is an error that lists the right ones."""


class MixEntry(Config):
    """A task and its share."""

    task: str
    """Key in [tasks]."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts, relative to the other entries that are active."""
    start: float = Field(0.0, ge=0, lt=1)
    """Active from this fraction of the stage's steps on."""


class RewardEntry(Config):
    """A reward and where it applies."""

    reward: str
    """accuracy, math, code, choice, format, language, repetition, readability, overlong, length, cosine; preference and safety (the stage's reward
    models); judge and judge_answer (a generative judge: settings url and model of an endpoint, or checkpoint for the engine's own generator)."""
    weight: float = 1.0
    """Factor in the total."""
    domain: Literal["math", "code", "stem", "logic", "reasoning", "general", "safety", "any"] = "any"
    """Which problems it judges; reasoning is math, code, stem and logic too."""
    start: float = Field(0.0, ge=0, lt=1)
    """Active from this fraction of the stage's steps on."""
    end: float = Field(1.0, gt=0, le=1)
    """Active until this fraction of the stage's steps."""
    settings: dict = Field(default_factory=dict)
    """Settings of the reward."""


class ValidationConfig(Config):
    """A look at the validation split while a stage trains, and the best state by it."""

    task: str
    """Task whose validation problems are sampled; they have answers."""
    every: int = Field(10, ge=1)
    """Steps between two looks; the last step has one, too."""
    num_problems: int = Field(64, ge=1)
    """Problems, the same in every look."""
    samples_per_problem: int = Field(4, ge=1)
    """k of pass@1 and cons@k."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    """How they are drawn."""
    best: Literal["", "pass@1", "cons@k", "mean_tokens", "reflection_rate", "format_rate", "language_consistency", "truncated_rate"] = ""
    """Metric by which the best state is kept beside the last ones; its model becomes checkpoints/STAGE.best.  Empty = none."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""


class StageConfig(Config):
    """What all stages share."""

    label: str = ""
    """One line for the report: what this stage is in R1's terms."""


class TrainConfig(StageConfig):
    """What all stages that train a model share."""

    init: str = ""
    """Stage whose checkpoint it starts from, or a HuggingFace model folder; empty = from scratch (pretrain only)."""
    steps: int = Field(100, ge=1)
    """Optimizer steps of supervised stages; rollout steps of grpo."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, schedule and clipping."""
    micro_batch_tokens: int = Field(4096, ge=16)
    """Packed tokens in one forward; changes memory and speed, never the gradient."""
    router_bias_rate: float = Field(0.001, ge=0)
    """Step of a router's selection bias towards balance after each optimizer step, gamma; 0 = leave it (deepseek_v3)."""
    balance_loss: float = Field(0.0001, ge=0)
    """Factor of the sequence balance loss of a mixture of experts, alpha; 0 = none."""
    save_every: int = Field(10, ge=1)
    """Steps between resumable states."""
    keep_states: int = Field(2, ge=1)
    """Resumable states that are kept; when the newest is damaged, the one before takes its place."""
    max_skipped_in_row: int = Field(3, ge=1)
    """Updates in a row with a loss or gradient that is not finite after which the run stops; each is skipped, counted and kept in RUN/skipped."""


class GateConfig(Config):
    """A check that a checkpoint must pass before others build on it."""

    task: str
    """Task that offers the check."""
    threshold: float = Field(0.97, ge=0, le=1)
    """Greedy accuracy on validation problems on which the reasoning has begun (`competence` of the task)."""
    num_problems: int = Field(256, ge=1)
    """Validation problems."""
    extra_steps: int = Field(300, ge=1)
    """Steps to train on when the gate fails, with a fresh schedule at half the learning rate."""
    max_rounds: int = Field(3, ge=0)
    """Extra rounds before the run stops with an error."""


class SupervisedConfig(TrainConfig):
    """What all stages that train on given texts share."""

    validation: ValidationConfig | None = None
    """Looks at a validation split in between."""
    mtp_loss: float = Field(0.0, ge=0)
    """Factor of the multi-token prediction loss, lambda (DeepSeek-V3: 0.3, then 0.1), for a model with num_nextn_predict_layers; 0 = that layer
    stays as it is."""


class PretrainConfig(SupervisedConfig):
    """Train a base model on the tasks' corpora."""

    kind: Literal["pretrain"]
    model: str = "main"
    """Key in [models]."""
    corpus: list[MixEntry]
    """Tasks that write the documents."""
    docs_per_step: int = Field(64, ge=1)
    """Documents in one optimizer step."""
    gate: GateConfig | None = None
    """Competence wanted before the stage is done."""


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on prompt/completion files, loss on the completion."""

    kind: Literal["sft"]
    data: list[str]
    """Stages that write data, or JSONL files with prompt and completion."""
    batch_size: int = Field(64, ge=1)
    """Examples in one optimizer step."""


class RejectionConfig(StageConfig):
    """Sample from a checkpoint, keep what is correct and readable, write a JSONL set."""

    kind: Literal["rejection"]
    source: str = ""
    """Stage or folder that is sampled; empty = no samples, only written examples."""
    prompts: list[MixEntry] = []
    """Tasks whose training prompts are sampled."""
    num_prompts: int = Field(256, ge=1)
    """Prompts to sample."""
    samples_per_prompt: int = Field(4, ge=1)
    """Completions per prompt."""
    keep_per_prompt: int = Field(4, ge=1)
    """Most completions kept per prompt."""
    max_kept: int = Field(0, ge=0)
    """Most samples kept in all; 0 = all."""
    sampling: SamplingConfig = SamplingConfig()
    """How they are drawn."""
    verifier: Literal["", "accuracy", "math", "code", "judge_answer"] = ""
    """Reward that says which of them are right; empty = by each problem's domain and the answer that its prompt asks for."""
    verifier_settings: dict = Field(default_factory=dict)
    """Settings of that reward, such as url and model of the endpoint that judge_answer asks."""
    min_language_consistency: float = Field(1.0, ge=0, le=1)
    """Share of words in the target language that a kept sample must reach."""
    max_repetition: float = Field(0.5, ge=0, le=1)
    """Largest share of repeated n-grams in a kept sample."""
    max_paragraph_words: int = Field(400, ge=0)
    """Words in the longest paragraph of a kept chain of thought, between blank lines; 0 = no limit."""
    code_blocks: bool = False
    """Keep chains of thought with fenced code blocks, which R1 drops, for problems that do not ask for code."""
    decontaminate: list[str] = []
    """Evaluation sets, tasks (their test split) or files: what shares an n-gram of words with one of their questions or solutions goes."""
    decontaminate_words: int = Field(10, ge=1)
    """n of these n-grams (R1: 10)."""
    written: list[MixEntry] = []
    """Tasks that add written examples (templated long chains of thought, non-reasoning data)."""
    num_written: int = Field(0, ge=0)
    """Written examples to add."""
    mixed: list[str] = []
    """JSONL files with prompt and completion to mix in (non-reasoning data)."""
    num_mixed: int = Field(0, ge=0)
    """Examples drawn from them without repetition; 0 = all."""


class GRPOConfig(TrainConfig):
    """Group-relative policy optimization (arXiv 2402.03300, eq. 3) and its relatives."""

    kind: Literal["grpo"]
    loss: str = "grpo"
    """Preset: grpo, r1, dapo, dr_grpo, gspo, cispo, rloo, reinforce_pp."""
    loss_overrides: dict = Field(default_factory=dict)
    """Fields of the preset to change, such as clip_high, beta or correction (tis, token_mask, sequence_mask against the sampler's log-probs)."""
    prompts: list[MixEntry]
    """Tasks whose training prompts are asked."""
    rewards: list[RewardEntry]
    """Rewards that are added up."""
    reward_scaling: Literal["sum", "gdpo"] = "sum"
    """sum: advantages of the weighted sum; gdpo: each reward is normalised in its group first (arXiv 2601.05242)."""
    reward_failures: Literal["zero", "drop_sample", "drop_group"] = "drop_sample"
    """What becomes of a sample on which a reward ends in an error or a timeout; it is counted in any case."""
    reward_workers: int = Field(0, ge=0)
    """Processes of rewards that run in one (math), started when such a reward is used; 0 = half of this rank's cores."""
    prompts_per_step: int = Field(32, ge=1)
    """Questions per rollout."""
    group_size: int = Field(16, ge=2)
    """Completions per question, G."""
    updates_per_rollout: int = Field(2, ge=1)
    """Optimizer steps that one rollout is split into (whole groups)."""
    routing_replay: Literal["off", "trainer", "rollout"] = "off"
    """Mixture of experts: train each token on the experts that it had in the sampler (rollout: R3, arXiv 2510.11370; 2 bytes per token, sparse layer
    and choice), or in the trainer before the first update of its rollout (trainer: GSPO, arXiv 2507.18071, section 5.3; one more forward for all
    updates but the first).  Where sampler and trainer agree to the bit, so do the two."""
    sampling: SamplingConfig = SamplingConfig()
    """How rollouts are drawn."""
    reward_model: str = ""
    """Stage that trained the pairwise model of the preference reward."""
    safety_model: str = ""
    """Stage that trained the pointwise model of the safety reward."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End the stage after the first step whose rollouts reach this mean accuracy reward; null = run all steps."""
    max_refills: int = Field(3, ge=0)
    """Times that a step may draw again when the preset drops groups without contrast (dynamic sampling)."""
    max_logp_gap: float | None = Field(None, gt=0)
    """Stop the run when a sampled log-prob differs from the trainer's by more than this (nats); null = 1e-3 where their bits are meant to be equal
    (on a CPU, and on CUDA in strict mode), where from 1e-5 on there is a warning, and no limit elsewhere."""
    control: Literal["none", "shuffle", "flip"] = "none"
    """Negative control: shuffle the advantages inside the batch, or flip their sign."""
    validation: ValidationConfig | None = None
    """Looks at a validation split in between."""
    detectors: DetectorConfig = DetectorConfig()
    """Warnings."""
    transcripts: TranscriptConfig = TranscriptConfig()
    """Samples to read."""


class RewardModelConfig(TrainConfig):
    """Train a scalar head: on preference pairs (Bradley-Terry) or on responses labelled safe or unsafe (logistic)."""

    kind: Literal["reward_model"]
    objective: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: reads the final reply, for the reward preference; pointwise: reads the whole response, for the reward safety."""
    task: str
    """Task that offers the verdicts: preferences or courtesy (pairwise), labelled or discretion (pointwise)."""
    num_examples: int = Field(512, ge=5)
    """Pairs or labelled responses; a fifth of them is held out."""
    batch_size: int = Field(64, ge=1)
    """Examples in one optimizer step."""
    sampling: SamplingConfig = SamplingConfig()
    """How the policy's replies are drawn, where the task has them judged."""


class DistillConfig(SupervisedConfig):
    """SFT of a student on the samples of a teacher."""

    kind: Literal["distill"]
    data: list[str]
    """Rejection stages that sampled the teacher, or JSONL files with prompt and completion."""
    batch_size: int = Field(64, ge=1)
    """Examples in one optimizer step."""


Stage = Annotated[
    PretrainConfig | SFTConfig | RejectionConfig | GRPOConfig | RewardModelConfig | DistillConfig,
    Field(discriminator="kind"),
]


class EvaluationConfig(Config):
    """The final report's look at the test split."""

    stages: list[str] = []
    """Stages that are evaluated, in the order of the report."""
    task: str = "chain"
    """Reasoning task."""
    general_task: str = ""
    """Open-ended task, scored by the stage named in reward_model; empty = none."""
    reward_model: str = ""
    """Stage that trained the preference model."""
    safety_task: str = ""
    """Task whose responses may be unsafe, by its own rule where it has one and by the stage named in safety_model; empty = none."""
    safety_model: str = ""
    """Stage that trained the safety model."""
    split: Literal["validation", "test"] = "test"
    """test only for the final report; validation for tuning."""
    num_problems: int = Field(128, ge=1)
    """Problems."""
    samples_per_problem: int = Field(16, ge=1)
    """k of pass@1 and cons@k."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    """The report's T = 0.6, top-p 0.95; pass@1_t1 always uses T = 1 without truncation."""


class ParallelConfig(Config):
    """How a training step is spread over ranks and memory.  It changes no result beyond the order of sums."""

    gradient_parts: int = Field(1, ge=1)
    """Parts, a power of two, that the samples of every optimizer step are split into, each with a gradient of its own, which are added in an order of
    their own: then 1, 2, 4 ... ranks, up to as many as parts, train to the same bits.  1 = one part per rank, added in whatever order."""

    shard: int = Field(1, ge=0)
    """Ranks that one copy of parameters, gradients and optimizer state is split over (FSDP); 1 = every rank holds all of it, 0 = all ranks.  With
    fewer than all, the copies are kept equal (HSDP)."""
    expert: int = Field(1, ge=1)
    """Ranks that share the experts of a mixture, each its part of them, to which the tokens of all travel; 1 = every rank has all of them.  A divisor
    of the ranks and of the experts, with tensor of those of a tensor parallel rank; with fewer than all ranks there are copies, kept equal.  With
    shard, the rest of the parameters is split so."""
    context: int = Field(1, ge=1)
    """Ranks that train on the same packed micro-batches, each on a part of their tokens, so that a sequence may be as many times as long; 1 = every
    rank has micro-batches of its own.  It must divide the ranks and every model's query heads; with tensor, the product of both must."""
    reshard_after_forward: bool = True
    """Gather a layer's parameters again for its backward instead of keeping them (ZeRO-3 instead of ZeRO-2)."""
    tensor: int = Field(1, ge=1)
    """Ranks that compute a forward together (tensor parallelism: heads, SwiGLU's columns, experts and the vocabulary are split between them); 1 =
    off.  A divisor of the ranks, of the model's key and value heads (with latent attention, of all heads) and of its experts.  They should be of one
    node, for they wait for each other in every layer."""
    rollout: Literal["whole", "split"] = "whole"
    """Weights that sampling reads: a whole copy on every rank, or the parts of tensor parallelism, whose ranks then sample together: for models that
    do not fit one GPU."""
    dispatch: Literal["group", "sample", "static"] = "group"
    """How ranks share the samples of a rollout.  group, sample: whoever has rows free takes more of what is left, whole groups, which compute their
    prompt once, or single samples, and ranks without work take over samples that run long.  static: each rank has its share and nothing else."""
    activation_checkpointing: bool = False
    """Keep the inputs of the layers alone and compute the rest again in backward."""
    offload: bool = False
    """Keep split parameters, gradients and optimizer state in CPU memory, where the optimizer then runs (on a CPU they are there anyway)."""

    @model_validator(mode="after")
    def _split(self):
        if self.gradient_parts & (self.gradient_parts - 1):
            raise ValueError(f"gradient_parts is {self.gradient_parts}, wanted a power of two")
        for name in ("shard", "expert", "context", "tensor") if self.gradient_parts > 1 else ():
            if (size := getattr(self, name)) != 1:
                raise ValueError(f"gradient_parts is {self.gradient_parts} and {name} is {size}, whose sums go by the ranks; wanted 1 for either")
        if self.offload and self.shard == 1:
            raise ValueError("offload is true, which takes split parameters; wanted shard other than 1")
        if self.offload and self.expert > 1:
            raise ValueError(f"offload is true and expert is {self.expert}; shared experts stay on their device, wanted one of the two")
        if self.rollout == "split" and self.tensor == 1:
            raise ValueError("rollout is split, which takes the parts of tensor parallelism; wanted tensor > 1")
        return self


class RecipeConfig(Config):
    """A whole run."""

    name: str = "run"
    """Run folder under run_root."""
    seed: int = Field(0, ge=0)
    """Key of every random number of the run."""
    run_root: str = "runs"
    """Folder of all runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto = CUDA when there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type."""
    fp8: Literal["off", "dgrad", "wgrad"] = "off"
    """Products of routed experts in block-scaled FP8, in training and sampling alike: dgrad = forward and input gradient, with weight gradients of
    unquantised operands; wgrad = these too.  All else, master weights and reward models included, keeps dtype."""
    threads: int = Field(0, ge=0)
    """CPU threads of one process; 0 = cores divided by the local ranks."""
    max_rows: int = Field(512, ge=1)
    """Sequences that decode at once."""
    speculation: SpeculationConfig = SpeculationConfig()
    """Drafts for the last samples of a rollout, of rejection sampling and of an evaluation."""
    strict: bool = False
    """On CUDA, take kernels whose sums do not depend on the batch: sampled log-probs equal the trainer's bit for bit.  On a CPU they do anyway."""
    loggers: list[Literal["wandb", "trackio"]] = []
    """Services that get the metrics besides metrics.jsonl and TensorBoard; each must be installed, and is set up by its own environment variables."""
    verify_weights: bool = False
    """Hash the weights after every RL step and again before the next rollout; stop when the sampler reads other ones."""
    reuse: str = ""
    """Another run folder: finished stages with the same settings, seed and inputs are copied from it."""
    until: str = ""
    """Last stage to run, and to evaluate; empty = all.  The same run goes on when it is started again without it."""
    parallel: ParallelConfig = ParallelConfig()
    """Sharding over ranks, activation checkpointing."""
    failed_save: Literal["stop", "go_on"] = "stop"
    """When a training state cannot be written (disk full): stop, or warn and go on to the next one.  The last good state stays in any case; a line of
    metrics or a finished model that cannot be written ends the run."""
    background_save: bool = False
    """Write training states while the run goes on, from a copy in CPU memory (one of each rank's share of the state).  The run waits for a state
    before the next one and at the end of a stage; a kill in between costs one more interval."""
    deadlines: DeadlineConfig = DeadlineConfig()
    """When a run counts as hung."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer of all models."""
    models: dict[str, ModelConfig] = {}
    """Model shapes by name; of a checkpoint of the same name, what `--dry-run` takes while its folder is not there."""
    checkpoints: dict[str, str] = {}
    """Model folders by name; tokenizer.path, init and source may say the name."""
    downloads: dict[str, str] = {}
    """Where the files and folders that this recipe names come from, by path: the message when one is missing."""
    tasks: dict[str, TaskConfig] = {}
    """Problem sources by name."""
    stages: dict[str, Stage] = {}
    """Stages by name, in order."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The test at the end."""
    reflection_words: list[str] = []
    """Words that count as reflection; empty = the report's list."""
    report_notes: list[str] = []
    """What the report should say plainly about this run's data."""

    @model_validator(mode="after")
    def _experts(self):
        folders = [stage.init for stage in self.stages.values() if getattr(stage, "init", "") not in ("", *self.stages)]
        if not self.models or folders:
            return self
        sparse = [model for model in self.models.values() if model.architecture in SPARSE]
        if self.fp8 != "off" and not sparse:
            raise ValueError(f"fp8 is {self.fp8}, wanted off: no model of the run has experts")
        if self.parallel.expert > 1 and not sparse:
            raise ValueError(f"parallel.expert is {self.parallel.expert}, wanted 1: no model of the run has experts")
        return self

    @model_validator(mode="after")
    def _drafts(self):
        shapes = [model for name, model in self.models.items() if name not in self.checkpoints]
        if self.speculation.tokens and self.speculation.draft == "mtp" and any(not model.num_nextn_predict_layers for model in shapes):
            raise ValueError("speculation.draft is mtp, wanted ngram: not every model of the run has num_nextn_predict_layers")
        return self

    @model_validator(mode="after")
    def _whole_heads(self):
        context, tensor = self.parallel.context, self.parallel.tensor
        for name, model in self.models.items() if context > 1 else ():
            if model.num_attention_heads % (context * tensor):
                wanted = f"wanted a divisor of models.{name}.num_attention_heads = {model.num_attention_heads}"
                raise ValueError(f"parallel.context{' x parallel.tensor' if tensor > 1 else ''} is {context * tensor}, {wanted}")
        return self

    def folder(self, reference: str) -> str:
        """The folder that a reference to a checkpoint means, where it is no stage."""
        return self.checkpoints.get(reference, reference)
