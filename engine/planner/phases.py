"""Seconds of each phase of a step, from operations, bytes and the collectives' volumes.

Compute is a roofline: operations at the peak of their kind times an efficiency, plus the bytes of what is not a product.  A rollout is an integral
over the steps of decoding: each reads the weights that its tokens meet and their keys and values, and fewer samples are alive at each.  Lengths are
min(Exp(tau), longest) with the mean that is given, so alive(t) = exp(-t / tau): a tail, as rollouts have one.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from athanor.model_config import ModelConfig
from athanor.planner.cluster import Cluster
from athanor.planner.memory import Layout, traded_width, weights_of
from athanor.planner.settings import Assumptions

POINTS = 64  # of the integral over decode steps


@dataclass(frozen=True)
class Lengths:
    """Completion lengths, in tokens."""

    mean: float
    longest: int

    @cached_property
    def tau(self) -> float:
        """Solve tau (1 - exp(-longest / tau)) = mean; inf where every sample is as long as the longest."""
        if self.mean >= 0.99 * self.longest:
            return math.inf
        low, high = 1e-9, 100.0 * self.longest
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if -middle * math.expm1(-self.longest / middle) < self.mean else (low, middle)
        return high

    def alive(self, t: float) -> float:
        """Share of samples longer than t."""
        return 1.0 if self.tau == math.inf else math.exp(-t / self.tau)

    def going(self, t: float, samples: float) -> float:
        """Probability that any of so many samples is longer than t."""
        return -math.expm1(samples * math.log1p(-self.alive(t))) if self.alive(t) < 1 else 1.0

    def expected_longest(self, samples: float) -> float:
        """Mean of the longest of so many samples: the integral of `going`."""
        width = self.longest / POINTS
        return width * sum(self.going((i + 0.5) * width, samples) for i in range(POINTS))

    @cached_property
    def second_moment(self) -> float:
        """E[L^2] = integral of 2 t alive(t)."""
        if self.tau == math.inf:
            return float(self.longest) ** 2
        x = self.longest / self.tau
        return 2 * self.tau**2 * (1 - (1 + x) * math.exp(-x))


@dataclass(frozen=True)
class Model:
    """Operations and numbers of one forward, by what they are."""

    config: ModelConfig
    dense: float  # parameters of matrices that every token meets, without the tables
    experts: float  # parameters of routed experts, all of them
    head: float  # V D
    attention: float  # operations per token and token of context
    decode_attention: float  # the same in decoding, where a latent is not multiplied out
    num_sparse: int  # layers with experts

    @property
    def active_experts(self) -> float:
        return self.experts * self.config.num_experts_per_tok / self.config.num_experts if self.experts else 0.0


def describe(config: ModelConfig) -> Model:
    weights = weights_of(config)
    heads, values = config.num_hidden_layers * config.num_attention_heads, config.v_head_dim if config.latent else config.width_per_head
    return Model(
        config,
        dense=float(sum(w.numel for w in weights if len(w.shape) == 2 and not w.table)),
        experts=float(sum(w.numel for w in weights if w.expert)),
        head=float(config.vocab_size * config.hidden_size),
        attention=2.0 * heads * (config.width_per_head + values),
        decode_attention=2.0 * heads * (config.cache_width + (config.kv_lora_rank or config.cache_width)),
        num_sparse=sum(config.is_sparse(i) for i in range(config.num_hidden_layers)),
    )


@dataclass(frozen=True)
class Machine:
    """A cluster at the rates that are assumed of it."""

    cluster: Cluster
    assume: Assumptions
    compute_bytes: int

    @property
    def bandwidth(self) -> float:
        return self.cluster.memory_bandwidth * self.assume.bandwidth_efficiency

    @property
    def latency(self) -> float:
        return self.assume.collective_latency_us * 1e-6

    def forward_s(self, model: Model, tokens: float, pairs: float, trained: float, layout: Layout, moved_bytes: float = 0.0) -> float:
        """One forward of `tokens` tokens on the ranks of one tensor parallel or context parallel group.

        pairs: token and token of its context.  trained: tokens that go through the head.  moved_bytes: what is read and written between the products.
        """
        a, peak = self.assume, self.cluster.flops
        full = a.expert_imbalance if layout.expert * layout.tensor > 1 else 1.0
        products = 2 * (model.dense * tokens + model.head * trained) / a.matmul_efficiency
        products += 2 * model.active_experts * tokens * full / a.expert_efficiency
        return (products + model.attention * pairs / a.attention_efficiency) / peak / (layout.tensor * layout.context) + moved_bytes / self.bandwidth

    def exchange_s(self, model: Model, tokens: float, layout: Layout) -> float:
        """What tokens travel in one forward: to the experts and back, and between the ranks of a tensor or context parallel group."""
        c, a, D = self.cluster, self.assume, model.config.hidden_size
        seconds, tokens = 0.0, tokens / layout.context
        if layout.context > 1:  # around attention, there and back
            traded = tokens * traded_width(model.config, layout) * self.compute_bytes
            once = c.all_to_all_s(traded, layout.context, layout.tensor) / a.network_efficiency
            seconds += model.config.num_hidden_layers * (once + 2 * self.latency)
        if layout.tensor > 1:  # a sum, which is a gather and a scatter, behind attention and behind the MLP or mixture
            once = c.gather_s(tokens * D * self.compute_bytes, layout.tensor) / a.network_efficiency + self.latency
            seconds += 4 * model.config.num_hidden_layers * once
        if layout.expert > 1 and model.num_sparse:
            copies = model.config.num_experts_per_tok
            if a.expert_sends and layout.expert > c.members_per_node(layout.expert, layout.tensor):
                copies = min(copies, a.expert_sends)
            sent = tokens / layout.tensor * copies * D * self.compute_bytes * a.expert_imbalance
            seconds += 2 * model.num_sparse * (c.all_to_all_s(sent, layout.expert, layout.tensor) / a.network_efficiency + self.latency)
        return seconds

    def parameters_s(self, model: Model, layout: Layout, size: int) -> float:
        """Gather all parameters, or reduce all gradients, of `size` bytes each, over the ranks that they are sharded over."""
        c = self.cluster
        dense = c.gather_s((model.dense + model.head * self._tables(model)) / layout.tensor * size, layout.shard, layout.tensor)
        apart = layout.expert * layout.tensor
        experts = c.gather_s(model.experts / apart * size, layout.expert_shard, apart)
        calls = model.config.num_hidden_layers * (2 if model.num_sparse else 1) if layout.shard > 1 else 0
        return (dense + experts) / self.assume.network_efficiency + calls * self.latency

    def replicas_s(self, model: Model, layout: Layout, local: float, size: int) -> float:
        """All-reduce of this rank's gradients over the replicas."""
        if layout.replicate == 1:
            return 0.0
        stride = layout.shard * layout.tensor
        return 2 * self.cluster.gather_s(local * size, layout.replicate, stride) / self.assume.network_efficiency + self.latency

    @staticmethod
    def _tables(model: Model) -> int:
        return 1 if model.config.tie_word_embeddings else 2

    def refresh_s(self, model: Model, layout: Layout, sampler: Layout) -> float:
        """Bring the trained weights to where the sampler wants them: each rank receives what it does not own."""
        owned = layout.shard * layout.tensor
        if layout.shard == 1 and layout.tensor == sampler.tensor and layout.expert == sampler.expert:
            return 0.0
        c, size = self.cluster, self.compute_bytes
        dense = c.gather_s((model.dense + model.head * self._tables(model)) / sampler.tensor * size, owned)
        # neighbours in a node want other experts, so each brings its own over the border
        experts = model.experts / (sampler.expert * sampler.tensor) * size / (c.inter if owned > c.members_per_node(owned) else c.intra)
        return (dense + experts) / self.assume.network_efficiency + model.config.num_hidden_layers * self.latency

    def decode_step_s(self, model: Model, rows: float, context: float, kv_token_bytes: float, sampler: Layout) -> float:
        """One token for each of `rows` samples of a tensor parallel group (of every group, where experts are shared)."""
        config, a = model.config, self.assume
        t, size = sampler.tensor, self.compute_bytes
        met = 0.0
        if model.experts:  # experts that at least one of the tokens on the expert group's ranks meets
            tokens = rows * sampler.expert
            met = model.experts / (sampler.expert * t) * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens)
        read = ((model.dense + model.head) / t + met) * size + rows * context * kv_token_bytes
        # pairs at the rate of decoding: forward_s counts operations per pair
        pairs = rows * context * model.decode_attention / model.attention
        computed = self.forward_s(model, rows, pairs, rows, sampler)
        seconds = max(read / self.bandwidth, computed) + config.num_hidden_layers * a.layer_latency_us * 1e-6
        if t > 1:  # two all-reduces per layer
            once = 2 * self.cluster.gather_s(rows * config.hidden_size * size, t) / a.network_efficiency + self.latency
            seconds += 2 * config.num_hidden_layers * once
        if sampler.expert > 1 and model.num_sparse:
            sent = rows / t * config.num_experts_per_tok * config.hidden_size * size * a.expert_imbalance
            seconds += 2 * model.num_sparse * (self.cluster.all_to_all_s(sent, sampler.expert, t) / a.network_efficiency + self.latency)
        return seconds

    def decode_s(self, model: Model, lengths: Lengths, prompt: float, samples: float, rows: float, total: float, kv_token_bytes: float,
                 sampler: Layout) -> tuple[float, float]:  # fmt: skip
        """Seconds of decoding `samples` samples of a group, `rows` at a time, and the part of them in which nothing is left to refill with.

        While there are samples to refill with, all rows are busy at mean age; then they drain until the longest of `total` is done.
        """
        steady = 0.0
        if samples > rows:
            steps = (samples - rows) / rows * lengths.mean
            steady = steps * self.decode_step_s(model, rows, prompt + lengths.second_moment / (2 * lengths.mean), kv_token_bytes, sampler)
        drain, width = 0.0, lengths.longest / POINTS
        for i in range(POINTS):
            t = (i + 0.5) * width
            going = lengths.going(t, total)
            alive = max(rows * lengths.alive(t) / going, min(rows, 1.0)) if going > 1e-9 else 1.0
            drain += width * going * self.decode_step_s(model, alive, prompt + t, kv_token_bytes, sampler)
        return steady + drain, drain
