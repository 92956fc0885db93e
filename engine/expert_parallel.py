"""Expert parallelism (GShard, arXiv 2006.16668): every rank keeps a part of each layer's experts, and tokens travel to them and back.

`[parallel] expert = N` of a recipe: ranks in groups of N, in which rank r keeps experts r E/N up to (r + 1) E/N of every mixture, and each group has
them all.  The stacks are DTensors over (copies, experts), so that optimizer, checkpoints and the rollout's copy (`sharding`) treat them as they
treat other split parameters.  A rank's backward gives the sum of its group's gradients, which is one addend of that of all copies.  With tensor
parallelism (tensor_parallel.py), N ranks that have the same part of the model share the experts of that part.

A layer's ranks tell each other first how many rows they will send, then send exactly these: there is no capacity, no padding on the way and no token
is dropped.  A rank's expert sees its rows in the order of (rank, token), as one process with all tokens in the order of ranks has them, so on a CPU
in fp32 outputs, gradients of the inputs and gradients of the experts have the bits of one process.  What every rank has (router, attention, ...)
gets the sum of its gradients over ranks, which rounds in another order.

Every rank must run the same forwards and backwards, with or without tokens, or the others wait for it.  Left out: hiding the exchange behind
arithmetic, exchanging FP8 rows, and sampling with experts elsewhere, where ranks would have to decode in lockstep.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from athanor.errors import UserError
from athanor.kernels import moe_permute, moe_unpermute
from athanor.model.moe import MixtureOfExperts, mixtures

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
    """What a sharded mixture does with its tokens in place of its own products."""

    def __init__(self, mesh: DeviceMesh):
        self.copies, self.group = mesh.ndim - 1, mesh.get_group(mesh.ndim - 1)
        self.world = dist.get_world_size(self.group)

    def __deepcopy__(self, memo) -> "ElsewhereExperts":  # a process group cannot be copied, and a copy of a model shares it
        return self

    def part(self, stack: DTensor, dtype: torch.dtype) -> Tensor:
        """This rank's experts (E / N, ...), in the type to compute in; their gradient is to be summed over the copies (`Optimizer` does)."""
        return stack.to_local(grad_placements=[*[Partial()] * self.copies, Shard(0)]).to(dtype)

    def __call__(self, moe: MixtureOfExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (T, D), each token's experts ids (T, k) and their weights, to the weighted sum (T, D)."""
        mine = moe.num_experts // self.world
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


def shard_experts_(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> nn.Module:
    """Keep this rank's experts of every mixture, in place, and return the model.

    mesh: its last axis is the ranks that share the experts, one before that the copies of them.  dtype: of what is kept; None = the model's.  Every
    rank must hold the same model.  Make the optimizer afterwards: the stacks are new parameters.  Raises UserError where the number of experts is no
    multiple of the ranks, ValueError where they are shared already.
    """
    found, elsewhere = mixtures(model), ElsewhereExperts(mesh)
    placements, rank = [*[Replicate()] * elsewhere.copies, Shard(0)], mesh.get_local_rank(mesh.ndim - 1)
    for moe in found:
        if moe.elsewhere is not None:
            raise ValueError("shard_experts_: the model's experts are shared already")
        if moe.num_experts % elsewhere.world:
            whose = "that each tensor parallel rank has" if moe.partial else "of the model"
            raise UserError(f"parallel.expert is {elsewhere.world}, wanted a divisor of the {moe.num_experts} experts {whose}")
    for moe in found:
        mine = moe.num_experts // elsewhere.world
        for name in STACKS:
            stack = getattr(moe, name)
            kept = stack.detach()[rank * mine : (rank + 1) * mine].to(mesh.device_type, dtype or stack.dtype, copy=True)
            split = DTensor.from_local(kept, mesh, placements, run_check=False, shape=stack.shape, stride=stack.stride())
            setattr(moe, name, nn.Parameter(split, requires_grad=stack.requires_grad))
        moe.elsewhere = elsewhere
    return model
