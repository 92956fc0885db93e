"""Ranks of a torchrun job: one process or many run the same code.

Work is split by index (rank r takes items r, r + world, ...) or by size, gradients are summed, and losses divide by denominators counted over all
ranks, so N ranks give the gradients of one.  To the bit they do with `gradient_parts`: then the samples of an optimizer step are split into so many
parts, of which each rank has neighbours, and the parts' gradients are added in pairs, the sums in pairs, and so on, on ranks and between them.

Where C T neighbouring ranks train on the same micro-batches, C of them on other tokens (`context_parallel`) and T neighbours among these with other
parts of the model (`tensor_parallel`), samples of an update are split over `data`, the world / (C T) ranks that have other ones; sampling is split
over all ranks.
"""

import copy
import datetime
import functools
import heapq
import os
import pickle
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from athanor import watchdog
from athanor.errors import UserError

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12


def collective(method):
    """Names a method of Ranks to the watchdog while it runs: ranks wait for each other in it."""

    @functools.wraps(method)
    def watched(self, *args, **kwargs):
        if self.world == 1:
            return method(self, *args, **kwargs)
        with watchdog.phase("collective", method.__name__):
            return method(self, *args, **kwargs)

    return watched


def spread(work: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Items of each rank, ascending: the largest first, each to the rank that has the least so far (R. L. Graham, 1969: at most 4/3 of the best)."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + work[i], rank))
    return [sorted(share) for share in shares]


def pairwise(addends: Iterable[list[Tensor]]) -> list[Tensor]:
    """Sum a power of two of lists of tensors in a binary tree over their order, in the memory of the first of each pair.

    Each half of them, each half of that and so on is added as `pairwise` adds it alone.  Of what an iterator computes, log2 of their number and one
    are alive at once.
    """
    sums: list[list[Tensor]] = []
    for count, addend in enumerate(addends, 1):
        while count % 2 == 0:
            earlier, count = sums.pop(), count // 2
            torch._foreach_add_(earlier, addend)
            addend = earlier
        sums.append(addend)
    (total,) = sums
    return total


def _attempt() -> str:
    """Names this start of the ranks: after `--max-restarts`, torchrun's store still holds the addresses of those that died."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        # Launchers of different ages count different restarts, so no name is common to their ranks.
        raise UserError(
            "torchrun --max-restarts on several nodes shares one store between starts, in which ranks find the addresses of dead ones; "
            "wanted TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment on every node"
        )
    return f"attempt-{restarts if shared else 0}"


class Ranks:
    """The process group seen by the engine; `world == 1` needs no process group at all.

    context x tensor neighbours train on the same micro-batches.  tensor: those of them, neighbours too, that have other parts of the model and the
    same tokens as this one.  context: those with other tokens and the same part.  data: one of each such group, those with this rank's place in it,
    or these ranks themselves.  copies: all that have the same part of the model.  All are Ranks over a part of the processes.  dispatch,
    gradient_parts: of `parallel`.  num_parts: of an optimizer step on each data rank.  Raises UserError for numbers that do not divide the ranks, or
    that these do not divide.
    """

    group: dist.ProcessGroup | None = None  # None = of all ranks
    _num_boards = 0  # of this process

    def __init__(
        self, device: str = "auto", threads: int = 0, timeout_s: float = 600.0, context: int = 1, tensor: int = 1, dispatch: str = "group",
        gradient_parts: int = 1,
    ):  # fmt: skip
        self.dispatch = dispatch
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        size = context * tensor
        if self.world % size:
            names = [f"parallel.{name}" for name, peers in (("context", context), ("tensor", tensor)) if peers > 1]
            raise UserError(f"{' x '.join(names)} is {size}, wanted a divisor of the {self.world} ranks")
        self.ordered = gradient_parts > 1
        if self.ordered and gradient_parts % self.world:
            raise UserError(f"parallel.gradient_parts is {gradient_parts}, wanted a multiple of the {self.world} ranks, or 1")
        self.num_parts = gradient_parts // self.world if self.ordered else 1
        self.timeout = datetime.timedelta(seconds=timeout_s)
        local = int(os.environ.get("LOCAL_RANK", 0))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
        use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        # Ranks that share cores and spin on each other's threads are 20-100 times slower: each gets its own share.
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world))
        if self.world > 1 and not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://", timeout=self.timeout))
            # gloo too: scalars, and state that is kept in CPU memory, are summed where they are.
            backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
            dist.init_process_group(backend, store=dist.PrefixStore(_attempt(), store), rank=rank, world_size=world, timeout=self.timeout)
        self.is_main = self.rank == 0
        every = list(range(self.world))
        alone, groups = self._of([[rank] for rank in every]), [every[first : first + size] for first in range(0, self.world, size)]
        self.tensor = self._of([every[first : first + tensor] for first in range(0, self.world, tensor)]) if tensor > 1 else alone
        self.context = self._of([group[place::tensor] for group in groups for place in range(tensor)]) if context > 1 else alone
        self.data = self._of([every[place::size] for place in range(size)]) if size > 1 else self
        self.copies = self if tensor == 1 else self.data if context == 1 else self._of([every[place::tensor] for place in range(tensor)])
        self.copies.data = self.data

    def twin(self) -> "Ranks":
        """The same ranks in a process group of their own, over gloo: what a second thread exchanges does not meet what this one does."""
        twin = copy.copy(self)
        twin.device = torch.device("cpu")
        if self.world > 1:
            twin.group = dist.new_group(backend="gloo", timeout=self.timeout)
        return twin

    def _of(self, parts: list[list[int]]) -> "Ranks":
        """These ranks as the part sees them that this one is in; every rank makes all of them."""
        view = copy.copy(self)
        for part in parts:
            group = dist.new_group(part, self.timeout) if len(part) > 1 else None
            if self.rank in part:
                view.group, view.rank, view.world = group, part.index(self.rank), len(part)
        view.data = view.context = view.tensor = view.copies = view
        return view

    def __deepcopy__(self, memo) -> "Ranks":  # a process group cannot be copied, and a copy of a model is split over the same ranks
        return self

    def share(self, items: list) -> list:
        """This rank's items, in their order: every world-th."""
        return items[self.rank :: self.world]

    def parts(self, items: list, work: Sequence[float] | None = None) -> list[list]:
        """What each of this rank's parts of an optimizer step has of the items, in their order: every n-th where all ranks have n parts, or, by the
        `work` of each item, about as much as the others."""
        n, own = self.world * self.num_parts, slice(self.rank * self.num_parts, (self.rank + 1) * self.num_parts)
        if work is None:
            return [items[part::n] for part in range(n)[own]]
        return [[items[i] for i in part] for part in spread(work, n)[own]]

    @collective
    def sum_(self, *tensors: Tensor) -> None:
        """Sum tensors over ranks in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    @collective
    def max_(self, tensor: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    @collective
    def sum_int(self, value: int) -> int:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, group=self.group)
        return int(tensor)

    @collective
    def max_int(self, value: int) -> int:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    @collective
    def sum_gradients_(self, parameters: list[Tensor]) -> None:
        """Sum gradients in one flat bucket, in the order of `parameters`; a missing gradient counts as zero."""
        if self.world == 1 or not parameters:
            return
        flat = self._sum(torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters]))
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    @collective
    def sum_parts(self, values: Tensor) -> Tensor:
        """Sum values (num_parts, n), a row of each part, over the parts of all ranks, as gradients are."""
        return self._sum(pairwise([row] for row in values.clone())[0])

    def _sum(self, x: Tensor) -> Tensor:
        """Sum x (n,) over ranks, `ordered` as `pairwise` does; x may be overwritten."""
        if self.world == 1:
            return x
        if not self.ordered or self.world == 2:  # of two addends there is one sum
            dist.all_reduce(x, group=self.group)
            return x
        # Each rank adds its n-th of all addends: two times x travels, as in an all-reduce by a ring.
        whole = pad(x, (0, -len(x) % self.world))
        addends = torch.empty_like(whole)
        dist.all_to_all_single(addends, whole, group=self.group)
        (total,) = pairwise([part] for part in addends.chunk(self.world))
        all_gather(whole, total, group=self.group)
        return whole[: len(x)]

    @collective
    def gather(self, items: list) -> list:
        """Every rank's items in the order that `share` split them."""
        if self.world == 1:
            return items
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items, group=self.group)
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    @collective
    def concatenate(self, items: list) -> tuple[list, int]:
        """Every rank's items, rank after rank, and where this rank's begin; ranks may have different numbers of them."""
        if self.world == 1:
            return items, 0
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items, group=self.group)
        return [item for part in parts for item in part], sum(len(part) for part in parts[: self.rank])

    @collective
    def exchange(self, outgoing: list[list]) -> list[list]:
        """Give rank r the list outgoing[r]; return what every rank gave to this one."""
        if self.world == 1:
            return outgoing
        data = [pickle.dumps(items) for items in outgoing]
        sizes = torch.tensor([len(d) for d in data])
        received = torch.empty_like(sizes)
        dist.all_to_all_single(received, sizes, group=self.group)
        incoming = torch.empty(int(received.sum()), dtype=torch.uint8)
        payload = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
        dist.all_to_all_single(incoming, payload, received.tolist(), sizes.tolist(), group=self.group)
        return [pickle.loads(part.numpy().tobytes()) for part in incoming.split(received.tolist())]

    @collective
    def send(self, item, rank: int) -> None:
        """Give an object to one rank, which waits for it in `receive`."""
        dist.send_object_list([item], group=self.group, device=torch.device("cpu"), group_dst=rank)

    @collective
    def receive(self, rank: int):
        """What that rank sends."""
        box = [None]
        dist.recv_object_list(box, group=self.group, device=torch.device("cpu"), group_src=rank)
        return box[0]

    def board(self) -> dist.Store:
        """A key-value store that these ranks share, empty at first: the n-th one of each rank is the same.  Whoever is the last deletes its keys."""
        Ranks._num_boards += 1
        return dist.PrefixStore(f"board-{Ranks._num_boards}", dist.distributed_c10d._get_default_store())

    @collective
    def broadcast(self, item):
        """Rank 0's object on every rank."""
        if self.world == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    @collective
    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)

    @collective
    def close(self) -> None:
        """Leave the process group.  After work that ended well, `barrier` comes first: who leaves earlier breaks the connections of those at work."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
