"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): the ranks of a group compute one forward of a model together.

Of each layer a rank has some query heads with their key and value heads, and some of SwiGLU's columns: qkv_proj and gate_up_proj keep rows (of q, k
and v, or gate and up, each by itself), o_proj and down_proj the columns that meet them.  What these give is summed over the group: two sums per
layer in the forward, two in the backward.  Embedding and head keep rows of the vocabulary; the head's log-probs exchange 12 bytes per token
(`linear_logprob_parallel`), 16 with the entropy.  Norms are the same on every rank, and so is everything between the layers, gradients included: all
ranks of a group take the same samples.

Latent attention: q_b_proj and kv_b_proj keep the rows of a rank's heads, o_proj the columns.  The latents of queries, keys and values, their norms
and the one rotated key are the same on every rank, and so is the cache, which holds nothing else.

A mixture of experts: each rank has E / N whole experts, and the shared ones by SwiGLU's columns.  Every rank has all tokens, so the routers choose
the same everywhere, each rank computes the choices that are its own, and the one sum that joins the shared experts' columns joins these, too: nothing
travels.  Cutting each expert's columns instead would even out the ranks, but make every product N times narrower, keep N times the rows of its
inputs, and cut through the blocks of 128 that FP8 weights have a scale for.

It is applied to a model from outside, by other classes for its modules.  Parameters are plain tensors, as the kernels want them, and not DTensors: a
rank's rows of a fused matrix are no range of its rows.  `Split` says which they are; checkpoints, copies of the whole model and the gradient's norm
go by it.  FSDP may split the parts further (sharding.py), as it would split whole parameters.
Left out: more ranks than key and value heads, splitting the latents' projections, and splitting what lies between the layers along the tokens
(sequence parallelism, arXiv 2205.05198).
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.kernels import LogProbs, linear_logprob_parallel
from athanor.model.layers import Linear
from athanor.model.mla import Latent, LatentAttention
from athanor.model.moe import MixtureOfExperts, Routes
from athanor.model.transformer import Attend, Decoder, DecoderLayer
from athanor.parallel import Ranks, all_gather


def bounds(size: int, parts: int) -> list[int]:
    """Where the parts of a range begin and the last one ends; their sizes differ by one at most."""
    return [size * i // parts for i in range(parts + 1)]


@dataclass(frozen=True)
class Split:
    """How a parameter lies on the ranks of a group: of each of its sections along `dim`, rank r has the r-th part."""

    dim: int
    sections: tuple[int, ...]  # sizes, q, k and v for example
    ranks: Ranks

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """What `rank` has of a whole tensor, as a copy."""
        ends = [bounds(size, self.ranks.world) for size in self.sections]
        pieces = [x.narrow(self.dim, end[rank], end[rank + 1] - end[rank]) for x, end in zip(whole.split(self.sections, self.dim), ends, strict=True)]
        return torch.cat(pieces, self.dim)

    def mine(self, whole: Tensor) -> Tensor:
        return self.part(whole, self.ranks.rank)

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor on every rank, from every rank's part: a collective call."""
        world, rest = self.ranks.world, list(part.shape)
        sizes = [[end[r + 1] - end[r] for end in (bounds(size, world) for size in self.sections)] for r in range(world)]
        rest[self.dim] = max(map(sum, sizes))
        padded = part.new_zeros(rest)
        padded.narrow(self.dim, 0, part.shape[self.dim]).copy_(part)
        gathered = part.new_empty(world, *rest)
        all_gather(gathered.view(-1), padded.view(-1), group=self.ranks.group)
        pieces = [x.narrow(self.dim, 0, sum(own)).split(own, self.dim) for x, own in zip(gathered, sizes, strict=True)]
        return torch.cat([of_rank[i] for i in range(len(self.sections)) for of_rank in pieces], self.dim)


class Shared(torch.autograd.Function):
    """Megatron's f: what every rank has goes into its own part of the work, so its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.ranks.group)
        return dx, None


class Summed(torch.autograd.Function):
    """Megatron's g: the sum of what the ranks have, whose gradient each of them gets."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=ranks.group)
        return x

    @staticmethod
    def backward(ctx, dx: Tensor):
        return dx, None


class RowsOfLinear(Linear):
    """Some of the outputs, from the whole input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Shared.apply(x, self.ranks))


class ColumnsOfLinear(Linear):
    """The whole output, from some of the inputs on each rank."""

    def forward(self, x: Tensor) -> Tensor:
        return Summed.apply(super().forward(x), self.ranks)


class RowsOfEmbedding(nn.Embedding):
    """The embeddings of all tokens, each from the rank that has it."""

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids - self.first
        here = (ids >= 0) & (ids < self.weight.shape[0])
        rows = nn.functional.embedding(ids.clamp(0, self.weight.shape[0] - 1), self.weight)
        return Summed.apply(rows * here.unsqueeze(-1), self.ranks)


class HeadsOfLayer(DecoderLayer):
    """A layer with some of the heads; what norms them has the gradient of all."""

    def norm_of_heads(self) -> dict:
        return {name: Shared.apply(x, self.ranks) if isinstance(x, Tensor) else x for name, x in super().norm_of_heads().items()}


class HeadsOfLatentAttention(LatentAttention):
    """Latent attention with some of the heads."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return super().forward(x, cos, sin, SharedLatents(attend, self.ranks))


class SharedLatents:
    """`attend` for some of the heads: what these read together with the others' has the gradient of all."""

    def __init__(self, attend: Attend, ranks: Ranks):
        self.attend, self.ranks = attend, ranks

    def latent(self, layer: int, x: Latent) -> Tensor:
        if x.latent.requires_grad:
            latent, k_rope = Shared.apply(torch.cat((x.latent, x.k_rope), -1), self.ranks).split((x.rank, x.k_rope.shape[1]), -1)
            x = replace(x, latent=latent, k_rope=k_rope)
        return self.attend.latent(layer, x)


class ExpertsOfMixture(MixtureOfExperts):
    """A mixture with some of the experts, which sees all tokens, and some of the shared experts' columns."""

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        ids, weights = self.router(x, routes)
        x, weights = Shared.apply(x, self.ranks), Shared.apply(weights, self.ranks)
        ids = ids - self.ranks.rank * self.num_experts
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_experts), -1)
        out = self.routed(x, ids, weights) if self.elsewhere is None else self.elsewhere(self, x, ids, weights)
        return Summed.apply(out if self.shared is None else out + self.shared(x), self.ranks)


class RowsOfDecoder(Decoder):
    """A decoder whose head has some of the vocabulary.  A `Generator` of it samples on the ranks of the group together, the same on each."""

    @property
    def own_config(self) -> ModelConfig:
        config, size = self.config, self.ranks.world
        heads = {"num_attention_heads": config.num_attention_heads // size}
        if not config.latent:  # of which every rank has the one
            heads |= {"num_key_value_heads": config.num_key_value_heads // size, "head_dim": config.width_per_head}
        return config.model_copy(update=heads)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, support: tuple[Tensor, Tensor] | None = None, entropy: bool = True
    ) -> LogProbs:
        call = dict(first=self.embed.first, vocab_size=self.config.vocab_size, group=self.ranks.group)
        return linear_logprob_parallel(hidden, self.lm_head_weight, targets, temperature=temperature, support=support, entropy=entropy, **call)

    def logits(self, hidden: Tensor) -> Tensor:
        return Split(1, (self.config.vocab_size,), self.ranks).whole(super().logits(hidden))


def check_tensor(config: ModelConfig, ranks: Ranks) -> None:
    """Refuse, with a UserError, a model that does not divide into so many parts."""
    size, at = ranks.world, f"parallel.tensor is {ranks.world}"
    heads, name = (config.num_attention_heads, "attention") if config.latent else (config.num_key_value_heads, "key and value")
    if heads % size:
        raise UserError(f"{at}, wanted a divisor of the {heads} {name} heads (num_{name.replace(' and ', '_')}_heads)")
    if config.num_experts % size:
        raise UserError(f"{at}, wanted a divisor of the {config.num_experts} experts (num_experts), of which each rank has whole ones")
    if config.intermediate_size < size or config.vocab_size < size:
        raise UserError(f"{at}, more than intermediate_size = {config.intermediate_size} or vocab_size = {config.vocab_size}")


@torch.no_grad()
def split_(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Keep this rank's part of a model that every rank has whole, in place, and return it.  Make the optimizer afterwards.

    ranks: the group that shares the model.  Raises UserError for a model that does not divide.
    """
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    for decoder in decoders:
        check_tensor(decoder.config, ranks)
        config = decoder.config
        for layer in (module for module in decoder.modules() if isinstance(module, DecoderLayer)):
            _split_latent(layer.mla, ranks) if config.latent else _split_heads(layer, config, ranks)
            if layer.moe is not None:
                _split_mixture(layer.moe, ranks)
                continue
            _become(layer.gate_up_proj, RowsOfLinear, ranks, 0, (config.intermediate_size,) * 2)
            _become(layer.down_proj, ColumnsOfLinear, ranks, 1, (config.intermediate_size,))
        _become(decoder, RowsOfDecoder, ranks)
        _become(decoder.embed, RowsOfEmbedding, ranks, 0, (config.vocab_size,))
        decoder.embed.first = bounds(config.vocab_size, ranks.world)[ranks.rank]
        if not config.tie_word_embeddings:
            _become(decoder.lm_head, type(decoder.lm_head), ranks, 0, (config.vocab_size,))
    return model


def _split_heads(layer: DecoderLayer, config: ModelConfig, ranks: Ranks) -> None:
    q, kv = config.num_attention_heads * config.width_per_head, config.num_key_value_heads * config.width_per_head
    layer.num_heads, layer.num_kv_heads = layer.num_heads // ranks.world, layer.num_kv_heads // ranks.world
    _become(layer, HeadsOfLayer, ranks)
    _become(layer.qkv_proj, RowsOfLinear, ranks, 0, (q, kv, kv))
    _become(layer.o_proj, ColumnsOfLinear, ranks, 1, (q,))


def _split_latent(mla: LatentAttention, ranks: Ranks) -> None:
    _become(mla, HeadsOfLatentAttention, ranks)
    _become(mla.q_b_proj, RowsOfLinear, ranks, 0, (mla.num_heads * (mla.n + mla.R),))
    _become(mla.kv_b_proj, Linear, ranks, 0, (mla.num_heads * (mla.n + mla.v),))  # whose inputs `SharedLatents` shares
    _become(mla.o_proj, ColumnsOfLinear, ranks, 1, (mla.num_heads * mla.v,))
    mla.num_heads //= ranks.world


def _split_mixture(moe: MixtureOfExperts, ranks: Ranks) -> None:
    _become(moe, ExpertsOfMixture, ranks, 0, (moe.num_experts,))
    moe.num_experts, moe.partial = moe.num_experts // ranks.world, True
    if moe.shared is not None:  # whose inputs and sums are those of the mixture
        width = moe.shared.down_proj.weight.shape[1]
        _become(moe.shared.gate_up_proj, Linear, ranks, 0, (width, width))
        _become(moe.shared.down_proj, Linear, ranks, 1, (width,))


def _become(module: nn.Module, kind: type, ranks: Ranks, dim: int = 0, sections: tuple[int, ...] = ()) -> None:
    """Change the module's class and, where there are sections, its parameters to this rank's part."""
    module.__class__, module.ranks = kind, ranks
    if sections:
        split = module.split = Split(dim, sections, ranks)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(split.mine(parameter), requires_grad=parameter.requires_grad))


def splits(model: nn.Module) -> dict[str, Split]:
    """How each parameter that is split in this way is split; {} for a model that is not."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(split := getattr(module, "split", None), Split):
            found |= {f"{prefix}.{name}" if prefix else name: split for name, _ in module.named_parameters(recurse=False)}
    return found
