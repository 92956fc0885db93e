"""Mixture of experts (Qwen3-MoE, DeepSeek-V3): router, experts as grouped products, shared experts.

    out_t = sum over the k experts e of token t of  w_te down_e(silu(gate_e x_t) * up_e x_t)   (+ the shared experts of DeepSeek-V3)

Balance without a loss (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): after a step `rebalance_` moves each expert's
selection bias by the sign of what is missing to the mean load.  The sequence balance loss (eqs. 17-20 there) is `sequence_balance_loss`.

`Routes` goes through a forward where a caller wants to know or to set what the routers choose: recording in rollout, replay in training.
Left out: a capacity with dropped tokens, router noise, the batch-wide auxiliary loss of Qwen3-MoE's pretraining.

T tokens, D hidden, E experts, k of them per token.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from athanor.config import ModelConfig
from athanor.kernels import grouped_gemm, linear, moe_permute, moe_places, moe_route, moe_unpermute, swiglu
from athanor.kernels.moe_route import scores_of
from athanor.model.fp8 import Fp8Products, Fp8Weight, refresh_
from athanor.model.layers import ROW_STEP, Swiglu, rows_of_their_own


class Routes:
    """What the routers of one forward do, one entry per sparse layer in their order.

    No dataclass: FSDP takes those apart and hands copies of them to the layers, in which nobody would read what was written down.
    """

    def __init__(self, replay: Tensor | None = None, num_tokens: int | None = None, cu_seqlens: Tensor | None = None,
                 weights: Tensor | None = None, begin: int = 0, across: Callable[[Tensor], Tensor] | None = None):  # fmt: skip
        self.replay = replay  # (layers, n <= T, k) int32, `recorded` of another forward; rows of -1, and those behind n, are routed as usual
        self.num_tokens = num_tokens  # the first so many count, the rest is filler; None = all
        self.cu_seqlens = cu_seqlens  # (S+1,) of sequences for which `balance` is wanted; they cover the tokens that count
        self.weights = weights  # (S,) of these sequences in `balance`; None = equal ones
        self.begin, self.across = begin, across  # of `sequence_balance_loss`, where the forward is over a part of the sequences' tokens
        self.ids: list[Tensor] = []  # (T, k) int32 each
        self.counts: list[Tensor] = []  # (E,) int32 tokens per expert
        self.changed: list[Tensor] = []  # () int32 replayed choices that the router would not have made
        self.balance: list[Tensor] = []  # () the sequence balance loss, not yet multiplied by alpha; differentiable

    def unwritten(self) -> "Routes":
        """The same question without the answers: for a forward whose record is its own."""
        return Routes(self.replay, self.num_tokens, self.cu_seqlens, self.weights, self.begin, self.across)

    @property
    def recorded(self) -> Tensor:
        """(layers, num_tokens, k) int32: what was chosen, for a later `replay`."""
        return torch.stack(self.ids)[:, : self.num_tokens]

    @property
    def by_token(self) -> Tensor:
        """(num_tokens, layers, k) int16: the same as `recorded` in the order and the width in which a sampler keeps it."""
        return self.recorded.transpose(0, 1).to(torch.int16)

    @property
    def disagreement(self) -> Tensor:
        """() fp32: the share of replayed choices that the routers would not have made; 0 where none was replayed."""
        if self.replay is None:
            return torch.zeros(())
        replayed = (self.replay >= 0).sum()
        return torch.stack(self.changed).sum() / replayed.clamp_min(1)


class Router(nn.Module):
    """Scores and choice.  DeepSeek-V3's scores are fp32 whatever the model's type; its bias is no weight, gets no gradient and stays fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.k, self.options = config.num_experts_per_tok, dict(normalize=config.norm_topk_prob)
        self.bias = None
        if config.latent:
            self.bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
            self.options |= dict(scoring="sigmoid", groups=(config.n_group, config.topk_group), scale=config.routed_scaling_factor)

    def _apply(self, fn, recurse: bool = True) -> "Router":
        before = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if before is not None and self.bias.dtype != torch.float32:  # a step of the bias is below what bf16 holds
            device = self.bias.device
            wide = torch.zeros(before.shape, device=device) if before.is_meta else before.to(device, torch.float32)
            self.bias = nn.Parameter(wide, requires_grad=False)
        return self

    def logits(self, x: Tensor) -> Tensor:
        if self.bias is None or x.dtype == torch.float64:
            return linear(x, self.weight)
        return linear(x.float(), self.weight.float())

    def forward(self, x: Tensor, routes: Routes | None = None) -> tuple[Tensor, Tensor]:
        """ids and weights (T, k) of x (T, D)."""
        logits = self.logits(x)
        replay = None if routes is None or routes.replay is None else routes.replay[len(routes.ids)]
        if replay is not None and len(replay) < len(x):
            replay = F.pad(replay, (0, 0, 0, len(x) - len(replay)), value=-1)
        routing = moe_route(logits, self.k, bias=self.bias, replay=replay, **self.options)
        if routes is not None:
            n = len(x) if routes.num_tokens is None else routes.num_tokens
            routes.ids.append(routing.ids)
            routes.counts.append(routing.counts if n == len(x) else tokens_per_expert(routing.ids[:n], len(self.weight)))
            routes.changed.append(routing.changed)
            if routes.cu_seqlens is not None:
                scores = scores_of(logits[:n], self.options.get("scoring", "softmax"))
                part = dict(begin=routes.begin, across=routes.across)
                routes.balance.append(sequence_balance_loss(scores, routing.ids[:n], routes.cu_seqlens, routes.weights, **part))
        return routing.ids, routing.weights


class Elsewhere(Protocol):
    """What a mixture does whose experts are shared with other ranks."""

    def __call__(self, moe: "MixtureOfExperts", x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Take x (T, D), each token's experts ids (T, k) and their weights; return the weighted sum (T, D)."""

    def part(self, stack: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's experts of a stack, in the type to compute in."""


class MixtureOfExperts(nn.Module):
    """The experts' matrices are stacks (E, N, K); in HuggingFace files each expert has its own (`weights`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.router = Router(config)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        for stack in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(stack, std=config.initializer_range)
        self.shared = Swiglu(D, width * config.n_shared_experts) if config.n_shared_experts else None
        self.fp8: Fp8Products | None = None  # set by `use_fp8_`
        self.elsewhere: Elsewhere | None = None  # set by `expert_parallel`: the stacks are then DTensors, of which this rank has its experts
        self.partial = False  # set by `tensor_parallel`: most of the choices are other ranks'
        self.gathered = False  # set by `sharding`: the stacks are there for a forward or backward alone, and do not tell when they have changed

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """x (T, D), normed, to what the layer adds (T, D)."""
        ids, weights = self.router(x, routes)
        out = self.routed(x, ids, weights) if self.elsewhere is None else self.elsewhere(self, x, ids, weights)
        return out if self.shared is None else out + self.shared(x)

    def routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every token through its experts (T, k), summed by weight: (T, D)."""
        places = moe_places(ids, self.num_experts, align=self.align(x))
        if (self.partial and torch.is_grad_enabled()) or (x.is_cpu and self.align(x) > 1):
            # Fewer rows to compute or to keep.  And reading a number on the host tells a captured step (cpu_graph) that its course depends on the
            # data: products that want aligned rows read the offsets on the host too.
            places = places._replace(source=places.source[: int(places.offsets[-1])])
        if self.fp8 is not None:
            return self.fp8.routed(x, weights, places, self.gate_up_proj, self.down_proj, gathered=self.gathered)
        rows, places = moe_permute(x, ids, self.num_experts, places=places)
        return moe_unpermute(self.experts(rows, places.offsets), weights, places)

    def align(self, x: Tensor) -> int:
        """What the number of every expert's rows is a multiple of.

        On a CPU whole row steps, unless the products see to it themselves: what an expert computes for a token does not depend on how many others it
        got.
        """
        wanted = ROW_STEP if x.is_cpu and not (self.fp8 is None and rows_of_their_own(x)) else 1
        return wanted if self.fp8 is None else max(wanted, self.fp8.align(torch.is_grad_enabled()))

    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """(P, D): rows (P, D) through their expert's SwiGLU; those of expert e are offsets[e] up to offsets[e + 1]."""

        def product(name: str, x: Tensor) -> Tensor:
            stack = getattr(self, name)
            weight = stack if self.elsewhere is None else self.elsewhere.part(stack, x.dtype)
            if self.fp8 is None:
                return grouped_gemm(x, weight, offsets)
            return self.fp8(name, x, weight, offsets, stack)

        return product("down_proj", swiglu(product("gate_up_proj", rows)))


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def use_fp8_(model: nn.Module, mode: str) -> nn.Module:
    """Set the products of all routed experts, and return the model.  mode: `fp8` of a recipe, "off", "dgrad" or "wgrad"."""
    if mode not in ("off", "dgrad", "wgrad"):
        raise ValueError(f"use_fp8_: mode is {mode!r}; wanted off, dgrad or wgrad")
    among: list[Fp8Weight] = []
    for moe in mixtures(model):
        moe.fp8 = None if mode == "off" else Fp8Products(wgrad=mode == "wgrad", among=among)
    return model


def fp8_mode(model: nn.Module) -> str:
    """What `use_fp8_` has set."""
    products = next((moe.fp8 for moe in mixtures(model)), None)
    return "off" if products is None else "wgrad" if products.wgrad else "dgrad"


def refresh_fp8_(model: nn.Module) -> None:
    """Bring the FP8 copies of all experts up to date in one launch, for captured steps, which cannot look themselves."""
    found = [(copy, getattr(moe, name)) for moe in mixtures(model) if moe.fp8 is not None for name, copy in moe.fp8.weights.items()]
    refresh_([copy.watch(stack, stack.dtype) for copy, stack in found])


def tokens_per_expert(ids: Tensor, num_experts: int) -> Tensor:
    """(E,) int32 from ids (T, k), -1 left out."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.index_add_(0, (ids.flatten() + 1).long(), torch.ones_like(ids).flatten())[1:]


def sequence_balance_loss(scores: Tensor, ids: Tensor, cu_seqlens: Tensor, weights: Tensor | None = None, *, begin: int = 0,
                          across: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
    """Mean over sequences of  sum over experts of f_e P_e  (DeepSeek-V3, eqs. 17-20), without the factor alpha; 1 when all are equally loaded.

    weights: (S,) to sum with instead of taking the mean.

    f_e = E / (k T_s) x the tokens of sequence s that go to e;  P_e = mean over its tokens of score_e / sum of scores.
    scores: (T, E), differentiable.  ids: (T, k) int32.  cu_seqlens: (S+1,) from 0 to T; empty sequences count for nothing.
    begin, across: where the T tokens are only those from `begin` on, and others have the rest, `across` adds up (S, 2E) over all of them.
    """
    (T, E), k = scores.shape, ids.shape[1]
    lengths = cu_seqlens.diff().long()
    sequence = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(begin, begin + T, device=scores.device), right=True)
    per_token = lengths.clamp_min(1)[:, None].to(scores.dtype)
    hits = scores.new_zeros(T, E + 1).scatter_(1, (ids + 1).long(), 1.0)[:, 1:]
    load = scores.new_zeros(len(lengths), E).index_add_(0, sequence, hits)
    share = scores.new_zeros(len(lengths), E).index_add(0, sequence, scores / scores.sum(1, keepdim=True))
    if across is not None:
        load, share = across(torch.cat((load, share), 1)).split(E, 1)
    load, share = load * (E / k) / per_token, share / per_token
    if weights is None:
        weights = (lengths > 0) / (lengths > 0).sum().clamp_min(1)
    return (load * share).sum(1) @ weights.to(scores.dtype)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model in the order of its layers, which is that of the lists in `Routes`; of a layer for multi-token prediction while it is
    trained."""
    return [router for name, router in model.named_modules() if isinstance(router, Router) and ("mtp" not in name or router.weight.requires_grad)]


@torch.no_grad()
def rebalance_(model: nn.Module, counts: list[Tensor] | Tensor, rate: float) -> None:
    """Move the selection biases after a step:  bias_e += rate x sign(mean count - count_e), in place.

    counts: one (E,) per sparse layer, added up over the micro-batches of the step and over all ranks.  rate: gamma, 0.001 for most of DeepSeek-V3's
    training.  Raises ValueError where a router has no such bias, or on another number of layers.
    """
    found = routers(model)
    if len(found) != len(counts) or any(router.bias is None for router in found):
        kinds = sum(router.bias is not None for router in found)
        raise ValueError(f"rebalance_: counts of {len(counts)} layers, {len(found)} routers, {kinds} with a bias; wanted as many of each")
    for router, count in zip(found, counts, strict=True):
        count = count.to(router.bias.device, torch.float32)
        router.bias.add_(torch.sign(count.mean() - count), alpha=rate)


def imbalance(counts: list[Tensor]) -> float:
    """The largest over the layers of  max_e count_e / mean count - 1  (MaxVio of arXiv 2408.15664); 0 = all experts are equally loaded."""
    return max(float(c.max() / c.float().mean().clamp_min(1e-9)) - 1 for c in counts)
