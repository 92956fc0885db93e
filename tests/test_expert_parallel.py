"""Experts on 1, 2 and 4 gloo ranks against one process that has them all: bits of forward and gradients, a rank without tokens, an update."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from athanor.errors import UserError
from athanor.expert_parallel import reduce_gradients_, shard_experts, sharded_parameters, unshard_experts
from athanor.model.moe import mixtures, use_fp8_

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, our_logits, random_decoder  # noqa: E402

WORLDS = (1, 2, 4)
# Tokens of 4 parts that the ranks take, one or more in a row: whole row steps, as the engine's forwards have them, and none.
PARTS = (48, 64, 0, 16)


def ranks_of(world: int, run, *arguments) -> list:
    """What run(rank, world, *arguments) returns on each of `world` processes."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    folder, arguments = arguments[0], arguments[1:]
    store = f"{folder}/store-{run.__name__}-{world}"
    processes = [context.Process(target=_rank, args=(rank, world, store, queue, run, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    failed = [text for text in results.values() if isinstance(text, str)]
    assert not failed, failed[0]
    return [torch.load(f"{folder}/{run.__name__}-{world}-{r}.pt") for r in range(world)]


def _rank(rank, world, store, queue, run, arguments):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        # tensors go by file: through a queue they would need the process to live on
        torch.save(run(rank, world, *arguments), f"{Path(store).parent}/{run.__name__}-{world}-{rank}.pt")
        dist.destroy_process_group()
        queue.put((rank, None))
    except Exception as error:
        queue.put((rank, repr(error)))


def a_layer(name: str, mode: str = "off"):
    return use_fp8_(copy.deepcopy(mixtures(random_decoder(FAMILIES[name]))[0]), mode)


def layer_inputs():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(n, 48, generator=generator) for _ in range(2)) for n in PARTS]


CASES = [("qwen3_moe", "off"), ("deepseek_v3", "off"), ("deepseek_v3", "dgrad"), ("qwen3_moe", "wgrad")]


def layers(rank: int, world: int) -> list[dict]:
    """Forward and backward of one layer of each case over this rank's parts, end to end; world 0: without sharding."""
    parts, found = layer_inputs(), []
    mine = parts[rank * len(parts) // max(world, 1) : (rank + 1) * len(parts) // max(world, 1)]
    for name, mode in CASES:
        moe = a_layer(name, mode)
        if world:
            shard_experts(moe)
            assert len(moe.down_proj) == moe.num_experts // world
        x, dy = (torch.cat(tensors) for tensors in zip(*mine, strict=True))
        x.requires_grad_()
        y = moe(x)
        y.backward(dy)
        found.append({"y": y.detach(), "dx": x.grad, "gate_up": moe.gate_up_proj.grad, "down": moe.down_proj.grad})
        if world:
            reduce_gradients_(moe)
        found[-1]["router"] = moe.router.weight.grad
    return found


@pytest.mark.multiproc
@pytest.mark.slow
def test_a_layer_has_the_bits_of_one_process(tmp_path):
    torch.set_num_threads(1)
    whole = layers(0, 0)
    for world in WORLDS:
        ranks = ranks_of(world, layers, tmp_path)
        for i, want in enumerate(whole):
            for key in ("y", "dx", "gate_up", "down"):
                assert torch.equal(torch.cat([found[i][key] for found in ranks]), want[key]), (world, CASES[i], key)
            for found in ranks:  # summed over ranks in another order
                torch.testing.assert_close(found[i]["router"], want["router"], rtol=1e-4, atol=1e-5)


def sequences_of(rank: int, world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    every = [torch.randint(67, (n,), generator=generator) for n in (16, 32, 48, 16)]
    return every[rank * 4 // max(world, 1) : (rank + 1) * 4 // max(world, 1)]


def training(rank: int, world: int, steps: int) -> dict:
    """Steps of AdamW on this rank's sequences, then all weights."""
    model = random_decoder(FAMILIES["deepseek_v3"])
    if world:
        shard_experts(model)
        assert len(sharded_parameters(model)) == 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids, found = sequences_of(rank, world), {}
    for step in range(steps):
        optimizer.zero_grad()
        logits = our_logits(model, ids)
        torch.nn.functional.cross_entropy(logits, torch.cat([x.roll(-1) for x in ids]), reduction="sum").backward()
        found.setdefault("logits", logits.detach())
        if step == 0:
            found["experts"] = [p.grad.clone() for moe in mixtures(model) for p in (moe.gate_up_proj, moe.down_proj)]
        if world:
            found.setdefault("norm", reduce_gradients_(model))
        else:
            found.setdefault("norm", float(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()))
        if step == 0:
            found["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if world and step:
            reduce_gradients_(model)
        optimizer.step()
    if world:
        unshard_experts(model)
        assert sharded_parameters(model) == []
    return found | {"weights": {name: p.detach() for name, p in model.named_parameters()}}


@pytest.mark.multiproc
@pytest.mark.slow
def test_training_steps_are_those_of_one_process(tmp_path):
    torch.set_num_threads(1)
    whole = training(0, 0, 1)
    for world in WORLDS:
        parts = ranks_of(world, training, tmp_path, 1)
        assert torch.equal(torch.cat([part["logits"] for part in parts]), whole["logits"]), world
        for i, want in enumerate(whole["experts"]):
            assert torch.equal(torch.cat([part["experts"][i] for part in parts]), want), (world, i)
        assert all(part["norm"] == pytest.approx(whole["norm"], rel=1e-6) for part in parts)
        for name, want in whole["gradients"].items():
            if not name.endswith(("gate_up_proj", "moe.down_proj")):
                assert float((parts[0]["gradients"][name] - want).norm()) <= 1e-5 * float(want.norm()) + 1e-7, name
        for name, want in whole["weights"].items():
            assert all(torch.equal(part["weights"][name], parts[0]["weights"][name]) for part in parts), name
            assert float((parts[0]["weights"][name] - want).abs().max()) <= 2.1e-3, name  # a gradient near 0 may change sign in AdamW's first step
            assert float((parts[0]["weights"][name] - want).abs().mean()) <= 1e-5, name


def alone(rank: int, world: int) -> dict:
    model, ids = random_decoder(FAMILIES["qwen3_moe"]), sequences_of(0, 1)
    with torch.no_grad():
        want = our_logits(model, ids)
        sharded = shard_experts(copy.deepcopy(model))
        got, twin = our_logits(sharded, ids), our_logits(copy.deepcopy(sharded), ids)
    refused = {}
    for key, broken in {
        "dense": lambda: shard_experts(random_decoder(FAMILIES["qwen3_moe"].model_copy(update={"mlp_only_layers": (0, 1, 2)}))),
        "odd": lambda: shard_experts(random_decoder(FAMILIES["qwen3_moe_unnormalised_some_dense_untied"])),
        "twice": lambda: shard_experts(sharded),
        "none": lambda: unshard_experts(model),
    }.items():
        try:
            broken()
        except (UserError, ValueError) as error:
            refused[key] = str(error)
    state = unshard_experts(sharded).state_dict()
    return {"same": torch.equal(got, want) and torch.equal(twin, want), "refused": refused,
            "state": all(torch.equal(state[name], value) for name, value in model.state_dict().items())}  # fmt: skip


def test_one_rank_is_the_layer_as_it_was(tmp_path):
    """The fast part: everything but a second process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for found, want in zip(layers(0, 1), layers(0, 0), strict=True):
            assert all(torch.equal(found[key], want[key]) for key in want)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


@pytest.mark.multiproc
@pytest.mark.slow
def test_experts_come_back_as_they_were_and_what_cannot_be_shared_is_refused(tmp_path):
    for found in ranks_of(2, alone, tmp_path):
        assert found["same"] and found["state"]
        assert found["refused"] == {
            "dense": "shard_experts: the model has no experts",
            "odd": "shard_experts: 5 experts on 2 ranks; wanted a multiple",
            "twice": "shard_experts: the model's experts are shared already; wanted unshard_experts first",
            "none": "unshard_experts: the model's experts are not shared",
        }
