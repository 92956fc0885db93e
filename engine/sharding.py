"""Parameters, gradients and optimizer state split over ranks, and layers that are computed again in backward: applied to a model from outside.

FSDP (ZeRO-3, arXiv 1910.02054; PyTorch's `fully_shard`): each rank holds rows of every parameter as a DTensor; a layer's are gathered before it runs,
and its gradients are summed and split again behind it.  Where a copy is split over fewer than all ranks (HSDP), gradients are summed over the copies
as well.  A bf16 model keeps its split parameters in fp32, computes in bf16 and sums gradients in fp32.  A rank's loss has the global denominators,
so gradients are summed, not averaged, as without sharding.

With tensor parallelism (tensor_parallel.py) each rank first keeps its part of every matrix, and FSDP splits the parts over the ranks that have the
same one: a mesh of replicate x shard x tensor.  Expert parallelism (expert_parallel.py) splits the stacks of experts so: replicate x expert x tensor.

The rollout needs weights that FSDP has not split: `FullWeights` has a plain model of its own, refreshed in place after an optimizer step: the whole,
which must fit one device in its own type, or one rank's part of tensor parallelism.
"""

import contextvars
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from athanor.config import ParallelConfig
from athanor.context_parallel import context_parallel_
from athanor.errors import UserError
from athanor.expert_parallel import shard_experts_
from athanor.model.moe import Routes, fp8_mode, mixtures, use_fp8_
from athanor.model.transformer import Decoder, DecoderLayer
from athanor.parallel import Ranks, all_gather
from athanor.tensor_parallel import Split, split_, splits

BUCKET_BYTES = 256 * 2**20  # of whole parameters in one all-gather


def shard_size(config: ParallelConfig, ranks: Ranks) -> int:
    """Ranks that one copy of the parameters is split over.  UserError where the ranks cannot be divided so."""
    size, world = config.shard or ranks.copies.world, ranks.copies.world
    if world % size:
        raise UserError(f"parallel.shard is {size}, wanted 0 (all) or a divisor of the {world} ranks{' / tensor' if world < ranks.world else ''}")
    return size


def expert_size(config: ParallelConfig, ranks: Ranks) -> int:
    """Ranks that share the experts of a layer, or of a tensor parallel rank's part of it.  UserError where the ranks cannot be divided so."""
    if (world := ranks.copies.world) % config.expert:
        raise UserError(f"parallel.expert is {config.expert}, wanted a divisor of the {world} ranks{' / tensor' if world < ranks.world else ''}")
    return config.expert


def will_split(config: ParallelConfig, ranks: Ranks) -> bool:
    """Whether `parallelize_` leaves a rank with less than a whole model of experts."""
    return shard_size(config, ranks) * expert_size(config, ranks) * ranks.tensor.world > 1


def parallelize_(model: nn.Module, config: ParallelConfig, ranks: Ranks) -> nn.Module:
    """Apply what the configuration asks for to a model that every rank has whole, in place; without effect for the defaults.

    Frozen models keep their type; of others, parameters narrower than fp32 become fp32.  A model on the CPU goes to the ranks' device layer by layer.
    Make the optimizer afterwards.  Raises UserError for sizes that do not divide the ranks or the experts, or heads that context ranks do not divide.
    """
    assert config.context == ranks.context.world, "the ranks were made for another recipe"
    if config.context > 1:
        context_parallel_(model, ranks)
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    size, experts, tensor, kind = shard_size(config, ranks), expert_size(config, ranks), ranks.tensor.world, ranks.device.type
    if config.activation_checkpointing:
        for layer in layers:
            layer.forward = _Recomputed(layer.forward)
    if tensor > 1:
        split_(model, ranks.tensor)
    if experts > 1 and mixtures(model):
        narrow = next(model.parameters()).dtype.itemsize < 4 and any(p.requires_grad for p in model.parameters())
        wide = torch.float32 if size > 1 and narrow else None
        shard_experts_(model, _mesh(kind, tensor, replicate=ranks.copies.world // experts, expert=experts), wide)
    if size == 1:
        return model.to(ranks.device)
    return fully_shard_(model, _mesh(kind, tensor, replicate=ranks.copies.world // size, shard=size), config)


def _mesh(kind: str, tensor: int, **lengths: int) -> DeviceMesh:
    """Of the ranks that have the same part of the model: axes longer than 1, and the last one, which parameters are split along."""
    axes = {name: length for name, length in lengths.items() if name != "replicate" or length > 1}
    every = axes | ({"tensor": tensor} if tensor > 1 else {})
    return init_device_mesh(kind, tuple(every.values()), mesh_dim_names=tuple(every))[tuple(axes)]


def fully_shard_(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> nn.Module:
    """Split over the mesh's last dimension: each layer is gathered by itself, what lies outside of them (embedding, final norm, heads) together.

    Experts that are shared already stay as they are.
    """
    compute = next(model.parameters()).dtype
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    layers = [layer for decoder in decoders for layer in decoder.layers]
    ahead = [decoder.mtp for decoder in decoders if decoder.mtp is not None]  # runs behind the forward, or not at all
    # Selection biases of routers are no weights: they have no gradient, stay fp32 and are the same everywhere.
    frozen = {p for name, p in model.named_parameters() if name.endswith("router.bias")}
    shared = {p for p in model.parameters() if isinstance(p, DTensor)}
    trained = any(p.requires_grad for p in model.parameters())
    options = dict(
        mesh=mesh,
        # The model sees to its own types: `cast_forward_inputs` would round cosines and scores.
        mp_policy=MixedPrecisionPolicy(compute, torch.float32 if compute.itemsize < 4 else None, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if config.offload and mesh.device_type == "cuda" else OffloadPolicy(),
        ignored_params=frozen | shared,
    )
    for module in (*layers, *ahead, model):
        if trained and compute.itemsize < 4:
            for p in module.parameters():
                if not isinstance(p, DTensor) and p not in frozen:
                    p.data = p.data.float()
        # The heads' weights are used behind the root's forward, so that stays gathered until its backward ends.
        fully_shard(module, **options, reshard_after_forward=config.reshard_after_forward if module is not model else False)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    for p in frozen:
        p.data = p.data.to(next(model.buffers()).device)
    for decoder in decoders:
        decoder.compute_dtype = compute
    for moe in mixtures(model):
        moe.gathered = moe.elsewhere is None
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank has no more than a part of some parameters."""
    return _is_distributed(model) or bool(splits(model))


def _is_distributed(model: nn.Module) -> bool:
    """Whether some of them are DTensors, but for the time of a forward."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(moe.elsewhere is not None for moe in mixtures(model))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The type that the model computes in and is exported in; split parameters may be wider."""
    return next((m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")), None) or next(model.parameters()).dtype


def split_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, split ones as DTensors even where a forward without a backward has left them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def whole(parameter: Tensor, dtype: torch.dtype, split: Split | None = None) -> Tensor:
    """The parameter itself, or of a split one a whole copy in `dtype` on the ranks' device: then a collective call, which every rank makes.

    split: how tensor parallelism has split it.
    """
    full = parameter.detach()
    if isinstance(parameter, DTensor):
        mesh, local = parameter.device_mesh, full.to_local()
        local = local.to(mesh.device_type, dtype)  # split parameters may lie on the CPU
        full = DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()).full_tensor()
    return full if split is None else split.whole(full)


@torch.no_grad()
def assign_(parameter: Tensor, full: Tensor, split: Split | None = None) -> None:
    """Make a parameter, or this rank's part of one, that of a whole tensor that every rank has."""
    full = full if split is None else split.mine(full)
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


def as_rows(value: Tensor, split: Split, ranks: Ranks) -> DTensor:
    """A part of a parameter, or of the optimizer's state of one, as rows of the whole spread over all ranks: so a saved state has it, whatever the
    layout."""
    full = whole(value, value.dtype, split)
    rows = -(-full.shape[0] // ranks.world) * ranks.rank
    local = full[rows : rows + -(-full.shape[0] // ranks.world)].clone()
    mesh = init_device_mesh(full.device.type, (ranks.world,))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


def for_sampling(model: Decoder, config: ParallelConfig, ranks: Ranks) -> Decoder:
    """A model that every rank has whole, on its device and, if the configuration asks for it, split: what a generator reads outside of training."""
    return (split_(model, ranks.tensor) if config.rollout == "split" else model).to(ranks.device)


class WholeParameters:
    """The whole parameters by name, gathered as they are asked for: every rank asks for the same in the same order.

    The last two are kept: a HuggingFace folder takes the experts of a layer in turn from two stacks.
    """

    def __init__(self, model: nn.Module):
        self.parameters, self.dtype, self.splits = split_parameters(model), compute_dtype(model), splits(model)
        self.names, self._kept = list(self.parameters), {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            if len(self._kept) == 2:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = whole(self.parameters[name], self.dtype, self.splits.get(name))
        return self._kept[name]

    def dtype_of(self, name: str) -> torch.dtype:
        parameter = self.parameters[name]
        return self.dtype if isinstance(parameter, DTensor) else parameter.dtype


@torch.no_grad()
def copy_weights_(source: nn.Module, target: nn.Module) -> None:
    """Make the weights of `target` those of `source`, which is the same model split the same way."""
    for to, of in zip(split_parameters(target).values(), split_parameters(source).values(), strict=True):
        to.copy_(of)


class FullWeights:
    """What the rollout reads: `model` is the trained model itself, or, where that is split, a plain one with the same weights.

    parts: a rank's part of tensor parallelism is enough; the ranks sample together.
    Its tensors are made once and keep their addresses, which captured steps depend on; `refresh` writes them in place, so that PyTorch's version
    counters tell a generator.  Every rank calls both.
    """

    def __init__(self, trained: Decoder, *, parts: bool = False):
        self.trained, self.model, self.parts = trained, trained, splits(trained) if not parts else {}
        if self.parts or _is_distributed(trained):
            with torch.device("meta"):
                model = Decoder(trained.config)
                if parts:
                    split_(model, trained.ranks)
            parameter = next(iter(split_parameters(trained).values()))
            model = model.to(compute_dtype(trained)).to_empty(device=_device(parameter)).requires_grad_(False)
            self.model = use_fp8_(model, fp8_mode(trained))
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights after an optimizer step."""
        if self.model is self.trained:
            return
        target = dict(self.model.named_parameters())
        split = {}
        for name, parameter in split_parameters(self.trained).items():
            if name in self.parts:
                target[name].copy_(whole(parameter, target[name].dtype, self.parts[name]))
            elif isinstance(parameter, DTensor):
                split[name] = parameter
            else:
                target[name].copy_(parameter)
        for bucket in _buckets(split, self.model.embed.weight.dtype):
            _gather_into([split[name] for name in bucket], [target[name] for name in bucket])


def _buckets(parameters: dict[str, DTensor], dtype: torch.dtype) -> Iterator[list[str]]:
    """Names of parameters that are split over the same ranks."""
    for mesh in dict.fromkeys(parameter.device_mesh for parameter in parameters.values()):
        names, filled = [], 0
        for name, parameter in parameters.items():
            if parameter.device_mesh != mesh:
                continue
            size = parameter.numel() * dtype.itemsize
            if names and filled + size > BUCKET_BYTES:
                yield names
                names, filled = [], 0
            names.append(name)
            filled += size
        yield names


def _gather_into(parameters: list[DTensor], targets: list[Tensor]) -> None:
    """Write the whole parameters into `targets`, in their type, by one all-gather."""
    mesh, device, dtype = parameters[0].device_mesh, targets[0].device, targets[0].dtype
    group = mesh.get_group(mesh.ndim - 1)
    world = group.size()
    rows = [-(-p.shape[0] // world) for p in parameters]  # of each rank; the last ones may have fewer
    sizes = [n * p[:1].numel() if p.shape[0] else 0 for n, p in zip(rows, targets, strict=True)]
    mine = torch.zeros(sum(sizes), dtype=dtype, device=device)
    for part, parameter in zip(mine.split(sizes), parameters, strict=True):
        local = parameter.to_local()
        part[: local.numel()].copy_(local.reshape(-1))
    gathered = torch.empty(world, len(mine), dtype=dtype, device=device)
    all_gather(gathered.view(-1), mine, group=group)
    for part, target in zip(gathered.split(sizes, 1), targets, strict=True):
        target.copy_(part.reshape(-1)[: target.numel()].view_as(target))


def _device(parameter: Tensor) -> torch.device:
    if not isinstance(parameter, DTensor):
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def missing_forwards(model: nn.Module, ranks: Ranks, num_batches: int) -> int:
    """Empty micro-batches that this rank adds to its own: each forward and backward of a split model is a collective call."""
    return ranks.max_int(num_batches) - num_batches if is_sharded(model) else 0


class _Recomputed:
    """A layer's forward that keeps its inputs alone and runs again in backward (arXiv 1604.06174), to the same bits."""

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, x, residual, cos, sin, attend, routes: Routes | None = None):
        if not torch.is_grad_enabled():
            return self.forward(x, residual, cos, sin, attend, routes)
        # Backward may run in a thread of autograd's, outside of strict mode and `use_backend`.
        context = contextvars.copy_context()
        # The layers write down what they choose, and find their place by what is there: the second run must neither see nor add to the first's.
        before, first = None if routes is None else list(routes.ids), True

        def run(x, residual):
            nonlocal first
            adding, first = first, False
            if routes is None:
                return context.run(self.forward, x, residual, cos, sin, attend)
            own = routes.unwritten()
            own.ids += before
            out = context.run(self.forward, x, residual, cos, sin, attend, own)
            if adding:
                routes.ids += own.ids[len(before) :]
                for name in ("counts", "changed", "balance"):
                    getattr(routes, name).extend(getattr(own, name))
            return out

        return checkpoint(run, x, residual, use_reentrant=False, preserve_rng_state=False)
