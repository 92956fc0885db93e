"""The layout that fits a cluster and has the least predicted time of a step.

Every division of the ranks is looked at: replicas x shards x tensor parallel ranks, context parallel ranks among replicas x shards, experts over a
part of these, activation checkpointing, length of a micro-batch; and for the sampler, which holds whole weights in the compute type, all tensor
parallel ranks or none.  A phase's memory is given to the next one: gradients, optimizer state and shards stay, activations and the sampler's weights
and KV do not meet.

Where nothing fits that the engine runs, layouts are looked at that it does not: a sampler with expert or tensor parallel ranks of its own, and
experts that travel and are sharded besides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import ceil, gcd, inf

from athanor.errors import UserError
from athanor.model_config import ModelConfig
from athanor.planner import memory
from athanor.planner.cluster import Cluster, resolve_cluster
from athanor.planner.memory import Layout
from athanor.planner.phases import Lengths, Machine, Model, describe
from athanor.planner.settings import Assumptions, PlanConfig, WorkloadConfig

# bytes of parameters, compute, gradients, moments
PRECISIONS = {"float32": (4, 4, 4, 4), "bfloat16": (2, 2, 2, 2), "mixed": (4, 2, 4, 4)}
FORWARD_MOVES, BACKWARD_MOVES = 2, 4  # times that what a forward keeps is read or written in it, and in the backward


@dataclass(frozen=True)
class Training:
    """One layout of the update."""

    layout: Layout
    micro_batch_tokens: int
    micro_batches: int  # per rank and optimizer step
    memory: dict[str, float]  # bytes
    phases: dict[str, float]  # seconds per rollout


@dataclass(frozen=True)
class Sampling:
    """One layout of the sampler."""

    layout: Layout  # tensor and expert alone mean something
    rows: int  # samples that decode at once in a tensor parallel group
    kv_tokens: int  # that one rank has pages for
    memory: dict[str, float]
    phases: dict[str, float]
    drain_s: float

    def is_built(self, training: Training) -> bool:
        """Whether the engine samples so from what it trains so."""
        return self.layout.expert == 1 and self.layout.tensor in (1, training.layout.tensor)


@dataclass(frozen=True)
class Plan:
    config: ModelConfig
    cluster: Cluster
    workload: WorkloadConfig
    assume: Assumptions
    training: Training
    sampling: Sampling | None
    model_flops: float  # of one rollout step as papers count them: 2 per active parameter and token, attention, three forwards for an update

    @property
    def phases(self) -> dict[str, float]:
        return {**(self.sampling.phases if self.sampling else {}), **self.training.phases}

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())

    @property
    def peak_bytes(self) -> float:
        return max(sum(part.memory.values()) for part in (self.training, self.sampling) if part)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.cluster.memory * self.assume.usable_memory

    @property
    def is_built(self) -> bool:
        """Whether the engine runs so."""
        return self.training.layout.is_built(self.config) and (self.sampling is None or self.sampling.is_built(self.training))


def make_plan(config: ModelConfig, settings: PlanConfig) -> Plan:
    """The fastest layout that fits; where none does, the one that lacks least (`fits` is False).  UserError where the ranks cannot be divided so."""
    settings = settings.model_copy(update={"workload": settings.workload.over({})})
    param_bytes, compute_bytes, *_ = PRECISIONS[settings.workload.precision]
    planner = _Planner(config, settings, resolve_cluster(settings.cluster, compute_bytes))
    given = settings.layout.built
    for built in (True, False) if given is None else (given,):
        best = planner.best(built, in_place=param_bytes == compute_bytes)
        if best is not None and best.fits:
            return best
    if best is None:
        raise UserError(f"plan.layout: {planner.fixed} cannot be made of {planner.cluster.world} ranks, {planner.cluster.gpus_per_node} per node")
    return best


class _Planner:
    def __init__(self, config: ModelConfig, settings: PlanConfig, cluster: Cluster):
        w = settings.workload
        if w.prompt_tokens + w.max_tokens > config.max_position_embeddings and w.prompts_per_step:
            lengths = f"plan.workload: prompt_tokens {w.prompt_tokens:g} and max_tokens {w.max_tokens}"
            raise UserError(f"{lengths} are more than the model's max_position_embeddings = {config.max_position_embeddings}")
        self.config, self.cluster, self.assume, self.workload, self.fixed = config, cluster, settings.assume, w, settings.layout
        self.param_bytes, self.compute_bytes, self.grad_bytes, self.moment_bytes = PRECISIONS[w.precision]
        self.model: Model = describe(config)
        self.machine = Machine(cluster, settings.assume, self.compute_bytes)
        self.lengths = Lengths(w.mean_tokens, w.max_tokens)
        self.samples = w.group_size * (w.prompts_per_step or 1)
        self.on_cpu = cluster.gpu == "cpu"
        self.budget = cluster.memory * settings.assume.usable_memory
        self.longest = ceil(w.prompt_tokens) + w.max_tokens - 1
        self.owned, self.decode = cache(self._owned), cache(self._decode)  # of few values each, in thousands of layouts
        self.longest_drawn = self.lengths.expected_longest(self.samples / w.updates_per_rollout)  # of one update
        # tokens, and pairs of token and context, of one sequence
        self.tokens = w.prompt_tokens + self.lengths.mean
        self.pairs = (w.prompt_tokens**2 + 2 * w.prompt_tokens * self.lengths.mean + self.lengths.second_moment) / 2

    def best(self, built: bool, in_place: bool) -> Plan | None:
        """The fastest plan that fits, or the one that lacks least; None where there is none.

        built: only of layouts that the engine runs.  in_place: the sampler can read the trained weights where they are not split.
        """
        best, best_key, samplers = None, (inf, inf), {}
        for training in self.trainings():
            layout = training.layout
            if built and not layout.is_built(self.config):
                continue
            resident = tuple(training.memory[name] for name in ("parameters", "gradients", "optimizer", "reference"))
            key = (resident, layout.shard, layout.tensor, layout.expert)
            if key not in samplers:
                samplers[key] = self.sampling(training, in_place and layout.shard == layout.expert_shard == 1, built)
            if samplers[key] is None and self.workload.prompts_per_step:
                continue
            plan = self.plan(training, samplers[key])
            lacking = max(0.0, plan.peak_bytes - self.budget)
            if (lacking, plan.step_s) < best_key:
                best, best_key = plan, (lacking, plan.step_s)
        return best

    def trainings(self) -> Iterator[Training]:
        """Every layout of the update that the ranks and the model allow."""
        config, fixed, world = self.config, self.fixed, self.cluster.world
        sizes = [self.workload.micro_batch_tokens] if self.workload.micro_batch_tokens else [self.longest, 2 * self.longest, 4 * self.longest]
        for tensor in _tensor_sizes(config, self.cluster):
            for replicate in _divisors(world // tensor):
                shard = world // tensor // replicate
                experts = _divisors(gcd(config.num_experts // tensor, shard)) if config.num_experts else [1]
                for expert, context in product(experts, _context_sizes(config, self.cluster, tensor)):
                    wanted = (fixed.shard, fixed.replicate, fixed.tensor, fixed.expert, fixed.context)
                    if any(given not in (0, have) for given, have in zip(wanted, (shard, replicate, tensor, expert, context), strict=True)):
                        continue
                    for again in (False, True) if fixed.activation_checkpointing is None else (fixed.activation_checkpointing,):
                        layout = Layout(shard, replicate, tensor, expert, again, context)
                        for size in dict.fromkeys(max(n, self.longest) for n in sizes):
                            yield self.training(layout, size)

    def _owned(self, layout: Layout) -> tuple[int, int, float]:
        """Parameters and optimizer state of a rank in numbers, bytes of what is gathered."""
        w, whole = self.workload, layout.shard == layout.expert_shard == 1 and self.param_bytes == self.compute_bytes
        gathered = 0 if whole else memory.gathered(self.config, layout, self.compute_bytes, self.grad_bytes)
        return memory.local_parameters(self.config, layout), memory.moments(self.config, layout, w.optimizer), gathered

    def training(self, layout: Layout, micro_batch_tokens: int) -> Training:
        w, a = self.workload, self.assume
        groups = layout.shard * layout.replicate // layout.context
        mean = self.samples / w.updates_per_rollout / groups  # sequences of a group and update
        longest = self.longest_drawn
        count = ceil(max(mean * self.tokens, w.prompt_tokens + longest) / (micro_batch_tokens * a.packing) - 1e-9)
        tokens_at_once = ceil(min(micro_batch_tokens, max(mean * self.tokens, w.prompt_tokens + longest)))
        return Training(layout, micro_batch_tokens, count, self._training_memory(layout, tokens_at_once),
                        self._training_phases(layout, count, mean, longest))  # fmt: skip

    def _training_memory(self, layout: Layout, tokens: int) -> dict[str, float]:
        local, moments, gathered = self.owned(replace(layout, activation_checkpointing=False, context=1))
        a, size = self.assume, self.compute_bytes
        kept = memory.activations(self.config, tokens, layout, size, sequence_parallel=a.sequence_parallel, imbalance=a.expert_imbalance,
                                  on_cpu=self.on_cpu)  # fmt: skip
        rows = tokens if self.workload.prompts_per_step == 0 else ceil(tokens * self.lengths.mean / self.tokens)
        rows = ceil(rows / layout.context)
        vocab = ceil(self.config.vocab_size / layout.tensor)
        held, call = memory.linear_logprob_bytes(rows, vocab, self.config.hidden_size, size, on_cpu=self.on_cpu)
        # The gradient of the head: in a buffer of its own while it is made, until that of the embedding is there too where they are one.
        head = 0 if gathered else self.config.vocab_size * self.config.hidden_size * self.grad_bytes
        tied = head if self.config.tie_word_embeddings else 0
        return {
            "parameters": local * self.param_bytes,
            "gradients": local * self.grad_bytes * self._gradient_sums(layout),
            "optimizer": moments * self.moment_bytes,
            "reference": local * self.param_bytes if self.workload.reference else 0,
            "gathered": gathered,
            "activations": kept.layers + kept.top,
            "workspace": held + max(kept.head + call + head, kept.working + tied),  # the head's backward comes before that of the layers
        }

    def _gradient_sums(self, layout: Layout) -> int:
        """Gradients at once on a rank: of P parts log2 P sums and the one that is computed (`pairwise`), where the engine takes parts."""
        whole = layout.shard == layout.tensor == layout.expert == layout.context == 1
        return max(self.workload.gradient_parts // layout.replicate, 1).bit_length() if whole else 1

    def _training_phases(self, layout: Layout, count: int, mean: float, longest: float) -> dict[str, float]:
        m, w, model, size = self.machine, self.workload, self.model, self.compute_bytes
        plain = replace(layout, activation_checkpointing=False)
        local, *_ = self.owned(replace(plain, context=1))
        per_token = memory.activations(self.config, 1024, plain, size, sequence_parallel=self.assume.sequence_parallel).layers / 1024
        # A step is over when the rank with the most is: the mean, or the one that has the longest sequence.
        n = w.prompt_tokens + longest
        loads = [(mean * self.tokens, mean * self.pairs), (n, n * n / 2)]
        tokens, pairs = max(loads, key=lambda load: m.forward_s(model, *load, load[0], layout))
        moved = tokens * per_token
        forward = m.forward_s(model, tokens, pairs, tokens, layout)
        exchange = m.exchange_s(model, tokens, layout)
        gather, reduce = m.parameters_s(model, layout, size), m.parameters_s(model, layout, self.grad_bytes)
        again = int(layout.activation_checkpointing)
        updates, hidden = w.updates_per_rollout, self.assume.overlap
        once = forward + FORWARD_MOVES * moved / m.bandwidth
        scoring = w.scoring_passes * (_overlapped(once, count * gather, hidden) + exchange)
        compute = (3 + again) * forward + (FORWARD_MOVES * (1 + again) + BACKWARD_MOVES) * moved / m.bandwidth
        exposed = _overlapped(compute, count * (2 * gather + reduce), hidden) - compute
        state = local * (2 * self.param_bytes + self.grad_bytes + 4 * self.moment_bytes)
        return {
            "scoring": updates * scoring,
            "update": updates * compute,
            "update_collectives": updates * (exposed + (2 + again) * exchange + m.replicas_s(model, layout, local, self.grad_bytes)),
            "optimizer": updates * state / m.bandwidth,
        }

    def sampling(self, training: Training, in_place: bool, built: bool = False) -> Sampling | None:
        """The best sampler beside what the training keeps; None for a supervised step, and where the engine runs none of those that are wanted."""
        if not self.workload.prompts_per_step:
            return None
        options = []
        for tensor in sorted({1, training.layout.tensor}) if built else _tensor_sizes(self.config, self.cluster):
            mine = gcd(self.config.num_experts // tensor, self.cluster.world // tensor)
            for expert in [1] if built or not self.config.num_experts else _divisors(mine):
                given = (self.fixed.rollout_tensor, self.fixed.rollout_expert)
                if given[0] in (0, tensor) and given[1] in (0, expert):
                    options.append(self._sampling(training, Layout(tensor=tensor, expert=expert), in_place))
        if not options and built:
            return None
        if not options:
            raise UserError(f"plan.layout: rollout_tensor {self.fixed.rollout_tensor} and rollout_expert {self.fixed.rollout_expert} do not divide "
                            f"the model over {self.cluster.world} ranks")  # fmt: skip
        return min(options, key=lambda s: (max(0.0, sum(s.memory.values()) - self.budget), sum(s.phases.values())))

    def _sampling(self, training: Training, layout: Layout, in_place: bool) -> Sampling:
        w, a, m, config, size = self.workload, self.assume, self.machine, self.config, self.compute_bytes
        groups = self.cluster.world // layout.tensor
        resident = {name: training.memory[name] for name in ("parameters", "gradients", "optimizer", "reference")}
        same = in_place and (layout.tensor, layout.expert) == (training.layout.tensor, training.layout.expert)
        weights = 0 if same else memory.unsharded_parameters(config, layout) * size
        prefill = min(a.prefill_tokens, ceil(w.prompts_per_step * w.prompt_tokens / groups))
        index = max(range(config.num_hidden_layers), key=config.is_sparse)
        working = memory.layer_bytes(config, index, prefill, layout, size, 1, a.expert_imbalance, self.on_cpu)
        samples = self.samples / groups
        block = 16 if self.on_cpu and a.block_size == 64 else a.block_size
        token_bytes = memory.kv_bytes_per_token(config, size, layout.tensor, self.on_cpu)

        def pages(rows: int) -> int:
            return memory.kv_blocks(w.prompt_tokens, w.prompt_tokens + w.max_tokens, rows, w.group_size, block) * block

        logits = config.vocab_size / layout.tensor * (size + 4)
        room = self.budget - sum(resident.values()) - weights - working
        wanted = max(1, min(w.max_rows, ceil(samples)))
        rows = max(1, min(wanted, int(room / (pages(wanted) / wanted * token_bytes + logits)))) if room > 0 else 1
        decode, drain = self.decode(layout, min(rows, samples))
        tokens = w.prompts_per_step * w.prompt_tokens / groups
        prefill_s = m.forward_s(self.model, tokens, tokens * w.prompt_tokens / 2, 0, layout) + m.exchange_s(self.model, tokens, layout)
        used = {**resident, "sampler weights": weights, "kv pages": pages(rows) * token_bytes, "workspace": working + rows * logits}
        times = {"weights to the sampler": m.refresh_s(self.model, training.layout, layout), "prefill": prefill_s, "decode": decode}
        return Sampling(layout, rows, pages(rows), used, times, drain)

    def _decode(self, layout: Layout, rows: float) -> tuple[float, float]:
        w, samples = self.workload, self.samples * layout.tensor / self.cluster.world
        token_bytes = memory.kv_bytes_per_token(self.config, self.compute_bytes, layout.tensor, self.on_cpu)
        return self.machine.decode_s(self.model, self.lengths, w.prompt_tokens, samples, rows, self.samples, token_bytes, layout)

    def plan(self, training: Training, sampling: Sampling | None) -> Plan:
        tokens, pairs = self.samples * self.tokens, self.samples * self.pairs
        active = self.model.dense + self.model.active_experts + self.model.head
        forward = 2 * active * tokens + self.model.attention * pairs
        return Plan(self.config, self.cluster, self.workload, self.assume, training, sampling,
                    model_flops=forward * (3 + self.workload.scoring_passes + (1 if sampling else 0)))  # fmt: skip


def _overlapped(compute: float, collectives: float, hidden: float) -> float:
    return max(compute, collectives) + (1 - hidden) * min(compute, collectives)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _context_sizes(config: ModelConfig, cluster: Cluster, tensor: int) -> list[int]:
    """Inside a node, of heads that go whole."""
    return _divisors(gcd(config.num_attention_heads // tensor, cluster.gpus_per_node // tensor))


def _tensor_sizes(config: ModelConfig, cluster: Cluster) -> list[int]:
    """Inside a node; heads and experts go whole."""
    heads = config.num_attention_heads if config.latent else config.num_key_value_heads
    return [t for t in _divisors(gcd(heads, cluster.gpus_per_node)) if config.num_experts % t == 0]
