"""Context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): N ranks train on the same packed micro-batches, each on a part of their tokens.

A batch is filled up to whole row steps for each of the N ranks, and rank r has the r-th N-th of its rows.  What works token by token (embedding,
norms, projections, SwiGLU, routers, experts, head) is as it was, on fewer rows.  Around attention the ranks trade: queries, keys and values of some
tokens and all H heads for those of all tokens and H/N heads, and the results back.  So every product and what a layer keeps falls N-fold, whatever
the lengths of the packed sequences, but for attention's results, which are kept before and after they travel.  What is computed for a token has the
bits of one process where no row depends on its neighbours, as on a CPU in fp32.

Key heads that N ranks cannot divide evenly are copied as often as needed (with one key head, every rank has all keys); the one latent of multi-head
latent attention is such a head.  That part of the memory falls less than N-fold.

Log-probs and entropies, two numbers per token, are put together again on all N ranks, which compute the same loss of the whole batch; each goes
back from its own rows.  The gradients of all ranks are summed anyway, and give that of one process.  Likewise the balance loss of a mixture of
experts: loads and scores of a sequence are summed over the ranks first.

With tensor parallelism a rank trades those heads that it has a part of the model for; the ranks with the same part share a batch so.

Applied from outside (`sharding.parallelize_`): the model is told its ranks, and who runs it over packed batches asks `part_of` which rows to take.
Sampling does not ask.  Left out: more ranks than query heads (ring attention), hiding the exchange behind arithmetic.
"""

from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor, nn

from athanor.errors import UserError
from athanor.model.layers import ROW_STEP
from athanor.model.mla import Latent
from athanor.model.transformer import Attend, Decoder, Rotation
from athanor.parallel import Ranks


def context_parallel_(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Split what a model is trained on over `ranks.context`, and return the model.  UserError for heads that these, and tensor parallel ranks, do not
    divide."""
    name, size = ("context x parallel.tensor" if ranks.tensor.world > 1 else "context"), ranks.context.world * ranks.tensor.world
    for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
        if (heads := decoder.config.num_attention_heads) % size:
            raise UserError(f"parallel.{name} is {size}, wanted a divisor of the model's {heads} query heads")
        decoder.context = ranks.context
    return model


class Swap(torch.autograd.Function):
    """x (N, ...): x[r] to rank r, and what rank r sent here in its place.  The gradient goes the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return swapped(x, ranks)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return swapped(dy, ctx.ranks), None


def swapped(x: Tensor, ranks: Ranks) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=ranks.group)
    return out


class Sum(torch.autograd.Function):
    """The sum over ranks, from which all of them compute the same loss: each hands back the gradient of its own summand."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, None


class SplitAttention:
    """`attend` over a rank's rows by way of another one over all rows and a rank's heads."""

    def __init__(self, attend: Attend, ranks: Ranks):
        self.attend, self.ranks = attend, ranks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, window: int | None = None) -> Tensor:
        q, k = rotation(q, k)  # by the positions of these rows
        shares = [self._shares(x) for x in (q, k, v)]
        q, k, v = self._to_heads(torch.cat(shares, 2)).split([x.shape[2] for x in shares], 1)
        return self._to_rows(self.attend(layer, q, k, v, _rotated, window))

    def latent(self, layer: int, x: Latent) -> Tensor:
        H, n, r = x.q_nope.shape[1], x.q_nope.shape[2], x.rank
        q = self._to_heads(self._shares(torch.cat((x.q_nope, x.q_rope), -1)))
        keys = self._to_heads(self._shares(x.keys()))[:, 0]
        mine = H // self.ranks.world
        kv_b = x.kv_b[self.ranks.rank * mine : (self.ranks.rank + 1) * mine]
        return self._to_rows(self.attend.latent(layer, Latent(q[..., :n], q[..., n:], keys[:, :r], keys[:, r:], kv_b, x.scale)))

    def _shares(self, x: Tensor) -> Tensor:
        """(t, N, heads, d): each rank's heads of x (t, heads, d), copied where they do not go round."""
        copies = self.ranks.world // gcd(x.shape[1], self.ranks.world)
        return (x.repeat_interleave(copies, 1) if copies > 1 else x).unflatten(1, (self.ranks.world, -1))

    def _to_heads(self, x: Tensor) -> Tensor:
        """(N t, heads, d) of all rows, from (t, N, heads, d)."""
        return Swap.apply(x.transpose(0, 1), self.ranks).flatten(0, 1)

    def _to_rows(self, x: Tensor) -> Tensor:
        """(t, H, d) of all heads, from (N t, H / N, d)."""
        return Swap.apply(x.unflatten(0, (self.ranks.world, -1)), self.ranks).transpose(0, 1).flatten(1, 2)


def _rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


class Part:
    """The rows of one packed batch that this rank computes; all of them where the model has no ranks to share with."""

    def __init__(self, num_tokens: int, ranks: Ranks | None):
        self.ranks, world, rank = ranks, ranks.world if ranks else 1, ranks.rank if ranks else 0
        self.step = ROW_STEP * world  # what the batch's rows are filled up to a multiple of
        share = max(1, -(-num_tokens // self.step)) * ROW_STEP
        self.begin, self.end = rank * share, (rank + 1) * share
        self.num_tokens = max(0, min(num_tokens - self.begin, share))  # without filler

    def rows(self, x: Tensor) -> Tensor:
        """This rank's of x (T, ...), filled up."""
        return x[self.begin : self.end]

    def attend(self, attend: Attend) -> Attend:
        """For this rank's rows, from the one of the batch."""
        return attend if self.ranks is None else SplitAttention(attend, self.ranks)

    def own(self, rows: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of `rows` (n,) int64 of the batch are this rank's, and which of its rows these are."""
        if self.ranks is None:
            return slice(None), rows
        mine = ((rows >= self.begin) & (rows < self.end)).nonzero()[:, 0]
        return mine, rows[mine] - self.begin

    def joined(self, values: Tensor, own: Tensor | slice, n: int) -> Tensor:
        """(n,) values of all ranks, from those of this one at its places `own`."""
        return values if self.ranks is None else Sum.apply(values.new_zeros(n).index_copy(0, own, values), self.ranks)

    def sum(self, x: Tensor) -> Tensor:
        return Sum.apply(x, self.ranks)


def part_of(model: nn.Module, num_tokens: int) -> Part:
    """This rank's of a packed batch of so many tokens."""
    return Part(num_tokens, getattr(model, "context", None))
