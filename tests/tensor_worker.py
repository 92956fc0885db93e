"""What every rank of the tests of tensor parallelism runs: the training of sharding_worker with parts of layers, states, and whole copies."""

import os
import sys
from pathlib import Path

import numpy as np
import sharding_worker
import torch
import torch.distributed as dist
from sharding_worker import STEPS, build, train, whole_state
from sparse_models import FAMILIES, random_decoder

from athanor.checkpoint import load_latest_state, save_state
from athanor.config import ModelConfig, ParallelConfig, SamplingConfig, SpeculationConfig
from athanor.generator import Generator
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.samples import Request
from athanor.sharding import FullWeights, WholeParameters, for_sampling, is_sharded, split_parameters, whole
from athanor.tensor_parallel import splits
from athanor.weights import hand_over, load_model, weights_hash, write_model

# Four key and value heads, for four ranks; SwiGLU and vocabulary of sizes that neither two nor four ranks divide.
SHAPE = dict(vocab_size=67, hidden_size=20, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=6, intermediate_size=27)
sharding_worker.MODELS |= {  # under names of their own: other tests of the process have that module, too
    "qwen3, eight heads": ModelConfig(**SHAPE, initializer_range=0.2, sliding_window=5, layer_types=("full_attention", "sliding_attention")),
    "qwen2, eight heads": ModelConfig(**SHAPE, architecture="qwen2", tie_word_embeddings=False, initializer_range=0.2),
    # Four heads and eight experts; with a layer for multi-token prediction; queries without a latent, and the first layer sparse.
    "deepseek_v3, mtp": FAMILIES["deepseek_v3"].model_copy(update={"num_nextn_predict_layers": 1}),
    "deepseek_v3, plain queries": FAMILIES["deepseek_v3_plain_queries_no_groups_halves_all_sparse"],
    "qwen3_moe, four keys": FAMILIES["qwen3_moe"].model_copy(update={"num_key_value_heads": 4, "head_dim": 12}),
}


def cases(world: int) -> dict[str, tuple]:
    """name -> (model, optimizer), [parallel]; every layout that fits, in tensor parallel groups of two and more."""
    # In fp64, where what differs by more than the last digits is wrong; Muon multiplies in bf16 anyway.
    adamw, muon = ("qwen3, eight heads", "adamw", torch.float64), ("qwen3, eight heads", "muon")
    qwen2 = ("qwen2, eight heads", "adamw", torch.float64)
    if world == 1:
        return {"tensor": (adamw, {}), "tensor, untied": (qwen2, {}), "tensor, muon": (muon, {}), "tensor, fp32": (adamw[:2], {})}
    if world == 2:
        again = {"activation_checkpointing": True}
        return {"tensor": (adamw, {}), "tensor, untied": (qwen2, again), "tensor, fp32": (adamw[:2], {}), "tensor, muon": (muon, {})}
    return {
        "tensor": (adamw, {}),  # of all four
        "two groups, untied": (qwen2, {"tensor": 2}),
        "two groups, fsdp": (adamw, {"tensor": 2, "shard": 0}),
        "contexts": (adamw, {"tensor": 2, "context": 2}),
        "two groups, fsdp, muon": (muon, {"tensor": 2, "shard": 0, "activation_checkpointing": True}),
    }


def sparse_cases(world: int) -> dict[str, tuple]:
    """The same of mixtures of experts and latent attention."""
    deepseek, plain, qwen3 = (tuple((name, "adamw", torch.float64) for name in
                              ("deepseek_v3, mtp", "deepseek_v3, plain queries", "qwen3_moe, four keys")))  # fmt: skip
    again, muon = {"activation_checkpointing": True}, ("deepseek_v3, mtp", "muon")
    if world < 4:
        return {"deepseek": (deepseek, {}), "muon": (muon, {}), "plain": (plain, {}), "qwen3": (qwen3, again if world > 1 else {})}
    return {
        "deepseek": (deepseek, {}),
        "muon, experts of parts, fsdp": (muon, {"tensor": 2, "expert": 2, "shard": 0}),
        "qwen3, two groups, fsdp": (qwen3, {"tensor": 2, "shard": 0, **again}),
        "plain, contexts": (plain, {"tensor": 2, "context": 2, **again}),
        "qwen3, contexts and experts": (qwen3, {"tensor": 1, "context": 2, "expert": 2}),
        "deepseek, experts of parts, fsdp": (deepseek, {"tensor": 2, "expert": 2, "shard": 0}),
    }


def exactly(ranks: Ranks, model, optimizer, steps: range) -> list[tuple[float, float]]:
    """`train`, in whose balance loss the weights of sequences are quotients of integers, and these of the default type."""
    torch.set_default_dtype(next(model.parameters()).dtype)
    figures = train(ranks, model, optimizer, steps, 48)
    torch.set_default_dtype(torch.float32)
    return figures


def result(ranks: Ranks, case: tuple, parallel: dict) -> dict:
    """Gradients after the first step, weights after all, figures; and the rollout's copy, which must be the same on every rank."""
    model, optimizer = build(ranks, *case, **parallel)
    figures, of = exactly(ranks, model, optimizer, range(1)), splits(model)
    assert bool(of) == (ranks.tensor.world > 1) and is_sharded(model) == (parallel.get("tensor", 1) * parallel.get("expert", 1) > 1)
    gradients = {n: whole(p.grad, p.grad.dtype, of.get(n)) for n, p in split_parameters(model).items() if p.requires_grad}
    full = FullWeights(model)
    stale = weights_hash(full.model) if full.model is not model else ""
    figures += exactly(ranks, model, optimizer, range(1, STEPS))
    full.refresh()
    assert weights_hash(model) == weights_hash(full.model) != stale
    assert not of or weights_hash(FullWeights(model, parts=True).model) == weights_hash(model)
    hashes = ranks.concatenate([weights_hash(full.model)])[0]
    assert len(set(hashes)) == 1, "the ranks differ"
    parameters = WholeParameters(model)
    return {"gradients": gradients, "weights": {n: parameters[n].clone() for n in parameters.names}, "figures": figures}


def samples(ranks: Ranks) -> list[tuple]:
    """(tokens, log-probs, finish) drawn from the split model by all ranks of a group together; more samples than rows, one prompt in pieces."""
    model = Decoder(sharding_worker.MODELS["qwen3, eight heads"]).initialize_(0).requires_grad_(False)
    if ranks.tensor.world > 1:
        model = for_sampling(model, ParallelConfig(tensor=ranks.tensor.world, rollout="split"), ranks)
    generator = Generator(model, {66}, max_rows=6, max_prefill_tokens=16, block_size=16)
    prompts = [np.arange(1, 8), np.arange(3, 43), np.arange(20, 30)]
    requests = [Request(prompt, np.arange(4) + 10 * i) for i, prompt in enumerate(prompts)]
    drawn = [c for sampling in (SamplingConfig(max_tokens=20), SamplingConfig(max_tokens=9, temperature=0.7, top_p=0.8))
             for group in generator.generate(requests, sampling) for c in group]  # fmt: skip
    drafting = Generator(model, {66}, max_rows=6, block_size=16, speculation=SpeculationConfig(tokens=3))
    drafted = [c for group in drafting.generate(requests, SamplingConfig(max_tokens=20)) for c in group]
    assert [c.token_ids.tolist() for c in drafted] == [c.token_ids.tolist() for c in drawn[: len(drafted)]]
    found = [(c.token_ids.tolist(), c.logps.tolist(), c.finish) for c in drawn]
    everyone = ranks.tensor.concatenate([found])[0]
    assert all(other == found for other in everyone), "the ranks of a group differ"
    cache = model.own_config.num_key_value_heads
    assert generator.cache.keys[0].shape[1] == cache == SHAPE["num_key_value_heads"] // ranks.tensor.world
    return found


def sparse_samples(ranks: Ranks) -> dict[str, list[tuple]]:
    """(tokens, log-probs, finish, routes) of mixtures, drafts by multi-token prediction among them; and of the folder that one has written."""
    found = {}
    for name in ("deepseek_v3, mtp", "qwen3_moe, four keys"):
        model = random_decoder(sharding_worker.MODELS[name]).requires_grad_(False)
        if ranks.tensor.world > 1:
            model = for_sampling(model, ParallelConfig(tensor=ranks.tensor.world, rollout="split"), ranks)
        requests = [Request(prompt, np.arange(3) + 10 * i) for i, prompt in enumerate([np.arange(1, 8), np.arange(3, 43)])]
        drafts = [SpeculationConfig(), *([SpeculationConfig(tokens=2, draft="mtp")] if model.mtp is not None else [])]
        drawn = []
        for speculation in drafts:
            generator = Generator(model, {66}, max_rows=4, max_prefill_tokens=16, block_size=16, record_routes=True, speculation=speculation)
            groups = generator.generate(requests, SamplingConfig(max_tokens=16))
            drawn.append([(c.token_ids.tolist(), c.logps.tolist(), c.finish, [r.tolist() for r in c.routes]) for group in groups for c in group])
            assert generator.cache.keys[0].shape[1] == (1 if model.config.latent else 4 // ranks.tensor.world)
        assert all([sample[0] for sample in other] == [sample[0] for sample in drawn[0]] for other in drawn)
        assert all(other == drawn[0] for other in ranks.tensor.concatenate([drawn[0]])[0]), "the ranks of a group differ"
        found[name] = drawn[0]
    return found


def states(ranks: Ranks, folder: Path, case: tuple, parallel: dict) -> dict:
    """A state that another layout has left is read, one is written, and so is a HuggingFace folder; weights and moments of both times."""
    model, optimizer = build(ranks, *case, seed=1, **parallel)
    assert load_latest_state(folder / "theirs", model, optimizer, ranks).step == 1
    loaded = whole_state(model, optimizer)
    train(ranks, model, optimizer, [1], 48)
    save_state(folder / "ours", 2, model, optimizer, {}, ranks)
    if ranks.is_main:
        (folder / "hf").mkdir()
        write_model(model, folder / "hf")
    else:
        hand_over(model)
    ranks.barrier()
    exported = {f"model.{name}": p.detach() for name, p in load_model(folder / "hf").named_parameters()}
    return {"loaded": loaded, "later": whole_state(model, optimizer), "exported": exported}


KINDS = {"dense": (cases, samples), "sparse": (sparse_cases, sparse_samples)}


def main(folder: Path, kind: str) -> dict:
    found, made, (layouts, draw) = {}, {}, KINDS[kind]
    world = Ranks("cpu", threads=1).world
    for name, (case, parallel) in layouts(world).items():
        parallel = {"tensor": world} | parallel
        size = parallel["tensor"], parallel.get("context", 1)
        made.setdefault(size, Ranks("cpu", threads=1, tensor=size[0], context=size[1]))
        found[name] = result(made[size], case, parallel)
    found["samples"] = draw(made[min(world, 2), 1])
    if world > 1:  # in the last layout
        found["states"] = states(made[size], folder, case, parallel)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = main(folder, sys.argv[2])
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
