"""Expert parallelism (GShard, arXiv 2006.16668): every rank keeps a part of each layer's experts, and tokens travel to them and back.

    shard_experts(model, group)        # rank r of n keeps experts r E/n up to (r + 1) E/n of every mixture
    loss.backward()                    # of this rank's own tokens, divided by denominators over all ranks
    norm = reduce_gradients_(model, group)
    unshard_experts(model)             # for a checkpoint

A layer's ranks tell each other first how many rows they will send, then send exactly these: there is no capacity, no padding on the way and no token
is dropped.  A rank's expert sees its rows in the order of (rank, token), as one process with all tokens in the order of ranks has them, so on a CPU
in fp32 outputs, gradients of the inputs and gradients of the experts have the bits of one process.  What every rank has (router, attention, ...)
gets the sum of its gradients over ranks, which rounds in another order.

Every rank must run the same forwards and backwards, with or without tokens, or the others wait for it.  Left out: hiding the exchange behind
arithmetic, exchanging FP8 rows, and sampling with experts elsewhere, where ranks would have to decode in lockstep.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from athanor.errors import UserError
from athanor.kernels import moe_permute, moe_unpermute
from athanor.model.moe import MixtureOfExperts, mixtures
from athanor.sharding import all_gather

STACKS = ("gate_up_proj", "down_proj")


class Exchange(torch.autograd.Function):
    """Rows to ranks: the first `sent[0]` to rank 0, and so on; returns what the others sent here, rank after rank.  The gradient goes back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        sent, received = ctx.counts
        return exchanged(dy, received, sent, ctx.group), None, None, None


def exchanged(rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class ElsewhereExperts:
    """What a sharded mixture does with its tokens in place of its own products.  The group is of all ranks of the process group, in their order."""

    def __init__(self, group):
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo) -> "ElsewhereExperts":  # a process group cannot be copied, and a copy of a model shares it
        return self

    def __call__(self, moe: MixtureOfExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (T, D), each token's experts ids (T, k) and their weights, to the weighted sum (T, D)."""
        mine = moe.gate_up_proj.shape[0]
        rows, places = moe_permute(x, ids, moe.num_experts)  # side by side by expert, and so by rank
        counts = places.offsets.diff().long()
        arriving = torch.empty_like(counts)  # (n, mine): how many rows each rank has for each of this rank's experts
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = torch.stack((counts, arriving)).view(2, self.world, mine).sum(2).tolist()  # the host has to know how much to send
        arrived = Exchange.apply(rows[: sum(sent)], sent, received, self.group)
        expert = torch.arange(mine, dtype=torch.int32, device=x.device).repeat(self.world).repeat_interleave(arriving)
        here, order = moe_permute(arrived, expert[:, None], mine, align=moe.align(x))
        here = here[: int(order.offsets[-1])] if x.is_cpu else here
        y = moe_unpermute(moe.experts(here, order.offsets), weights.new_ones(len(arrived), 1), order)
        return moe_unpermute(Exchange.apply(y, received, sent, self.group), weights, places)


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Keep this rank's experts of every mixture, in place, and return the model.

    group: of the ranks that share them; None = all.  Every rank must hold the same model.  Make the optimizer afterwards: the stacks are new
    parameters.  Raises UserError where there are no experts or their number is no multiple of the ranks, ValueError where they are shared already.
    """
    found, elsewhere = mixtures(model), ElsewhereExperts(group)
    if not found:
        raise UserError("shard_experts: the model has no experts")
    for moe in found:
        if moe.elsewhere is not None:
            raise ValueError("shard_experts: the model's experts are shared already; wanted unshard_experts first")
        if moe.num_experts % elsewhere.world:
            raise UserError(f"shard_experts: {moe.num_experts} experts on {elsewhere.world} ranks; wanted a multiple")
    for moe in found:
        mine = moe.num_experts // elsewhere.world
        for name in STACKS:
            stack = getattr(moe, name)
            kept = stack.detach()[elsewhere.rank * mine : (elsewhere.rank + 1) * mine].clone()
            setattr(moe, name, nn.Parameter(kept, requires_grad=stack.requires_grad))
        moe.elsewhere = elsewhere
    return model


def unshard_experts(model: nn.Module) -> nn.Module:
    """Give every rank all experts again, in place, and return the model: the inverse of `shard_experts`, a collective."""
    for moe in mixtures(model):
        if moe.elsewhere is None:
            raise ValueError("unshard_experts: the model's experts are not shared")
        for name in STACKS:
            stack = getattr(moe, name)
            whole = stack.new_empty(moe.num_experts, *stack.shape[1:], requires_grad=False)
            all_gather(whole, stack.detach().contiguous(), group=moe.elsewhere.group)
            setattr(moe, name, nn.Parameter(whole, requires_grad=stack.requires_grad))
        moe.elsewhere = None
    return model


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that no other rank has."""
    return [getattr(moe, name) for moe in mixtures(model) if moe.elsewhere is not None for name in STACKS]


@torch.no_grad()
def reduce_gradients_(model: nn.Module, group: dist.ProcessGroup | None = None) -> float:
    """Sum the gradients of what every rank has over the ranks, in place; return the norm of all gradients, this rank's experts' and the others'.

    A missing gradient counts as zero.
    """
    own = {id(p) for p in sharded_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    common = [p for p in trained if id(p) not in own]
    flat = torch.cat([p.grad.reshape(-1) for p in common])
    dist.all_reduce(flat, group=group)
    for parameter, grad in zip(common, flat.split([p.numel() for p in common]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
    squares = sum((p.grad.double().square().sum() for p in trained if id(p) in own), flat.new_zeros((), dtype=torch.float64))
    dist.all_reduce(squares, group=group)
    return math.sqrt(float(squares + flat.double().square().sum()))
