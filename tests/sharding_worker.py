"""What every rank of the tests of sharding runs: the same training on another layout, with states saved and read; results whole, by rank 0."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from sparse_models import FAMILIES
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from athanor.checkpoint import StateWriter, load_latest_state
from athanor.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from athanor.kernels.fp8_quantize import fp8_quantize_dual
from athanor.model.moe import fp8_mode, mixtures, use_fp8_
from athanor.model.transformer import Decoder, PackedAttention
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.sharding import FullWeights, WholeParameters, parallelize_, split_parameters, whole
from athanor.stages.routing import RouterBalance
from athanor.stages.training import cross_entropy_step, packed_batches
from athanor.tensor_parallel import splits
from athanor.weights import hand_over, weights_hash, write_model

# By sys.modules: the package has functions of these names.
Fp8GroupedGemmFunction = sys.modules["athanor.kernels.fp8_grouped_gemm"].Fp8GroupedGemmFunction
Fp8MixtureFunction = sys.modules["athanor.kernels.fp8_mixture"].Fp8MixtureFunction

# Widths that two and four ranks do not divide: the last rank of a parameter holds fewer rows, or none.
SHAPE = dict(vocab_size=67, hidden_size=20, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=10, intermediate_size=27)
MODELS = {
    "qwen3": ModelConfig(**SHAPE, initializer_range=0.2),
    "qwen2, untied": ModelConfig(**SHAPE, architecture="qwen2", tie_word_embeddings=False, initializer_range=0.2),
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "qwen3, four heads": ModelConfig(**SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}, initializer_range=0.2, sliding_window=5,
                                     layer_types=("full_attention", "full_attention", "sliding_attention")),
    "qwen2, six heads": ModelConfig(**SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 3}, architecture="qwen2", initializer_range=0.2),
}  # fmt: skip
MODELS["deepseek_v3, fp8, mtp"] = MODELS["deepseek_v3"].model_copy(update={"num_nextn_predict_layers": 1})
# Adam divides by |g|, which turns the last bits of a small gradient into the first of an update; a large eps does not.
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2, eps=1e-2, weight_decay=0.1, grad_clip=0.5, warmup_steps=0),
    "muon": OptimizerConfig(name="muon", lr=1e-2, eps=1e-2, weight_decay=0.1, grad_clip=0.5, warmup_steps=0),
}
STEPS = 3


def sequences(step: int, tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nine sequences of 4 to 40 tokens, or of `tokens` inputs where these are few: ranks get different numbers of them and of micro-batches."""
    rng = np.random.default_rng(step)
    if tokens == 16:
        return [rng.integers(67, size=6) for _ in range(9)], [rng.integers(67, size=11) for _ in range(9)]
    return [rng.integers(67, size=n) for n in rng.integers(1, 12, 9)], [rng.integers(67, size=n) for n in rng.integers(3, 28, 9)]


def build(ranks: Ranks, name: str, optimizer: str, dtype=torch.float32, seed: int = 0, **parallel):
    model = use_fp8_(Decoder(MODELS[name]).initialize_(seed).to(dtype), "dgrad" if "fp8" in name else "off")
    if model.mtp is not None:
        model.train_mtp_(True)
    parallelize_(model, ParallelConfig(**parallel), ranks)
    return model, Optimizer(model, OPTIMIZERS[optimizer], ranks)


def train(ranks: Ranks, model, optimizer, steps, tokens: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    config, figures = TrainConfig(balance_loss=0.01), []
    for step in steps:
        prompts, completions = sequences(step, tokens)
        pairs = ranks.data.parts(list(zip(prompts, completions, strict=True)))
        parts = [packed_batches(model, ranks, [prompt for prompt, _ in part], [text for _, text in part], tokens) for part in pairs]
        num_targets = ranks.data.sum_int(sum(b.num_targets for batches in parts for b in batches))
        balance = RouterBalance(model, config, ranks.data)
        metrics = cross_entropy_step(model, optimizer, parts, num_targets, 1e-2, balance, 0.3 if model.mtp is not None else 0.0)
        figures.append((metrics["loss"] + metrics.get("mtp_loss", 0.0), metrics["grad_norm"]))
        balance.finish()
    return figures


def result(ranks: Ranks, *case, tokens: int, **options) -> dict:
    """Gradients after the first step, weights after all, figures; and the rollout's copy, which must be the same."""
    model, optimizer = build(ranks, *case, **options)
    first = train(ranks, model, optimizer, range(1), tokens)
    gradients = {n: whole(p.grad, p.grad.dtype) for n, p in split_parameters(model).items() if p.requires_grad}
    full = FullWeights(model)
    addresses = [p.data_ptr() for p in full.model.parameters()]
    versions = [p._version for p in full.model.parameters()]
    figures = first + train(ranks, model, optimizer, range(1, STEPS), tokens)
    stale = weights_hash(full.model) if full.model is not model else ""
    full.refresh()
    assert weights_hash(model) == weights_hash(full.model) != stale
    assert fp8_mode(full.model) == fp8_mode(model)
    if fp8_mode(model) != "off":
        assert quantised_stacks(model, ranks) == quantised_stacks(full.model, ranks)
    assert addresses == [p.data_ptr() for p in full.model.parameters()]
    assert all(p._version > v for p, v in zip(full.model.parameters(), versions, strict=True))
    parameters = WholeParameters(model)
    return {"gradients": gradients, "weights": {n: parameters[n].clone() for n in parameters.names}, "figures": figures}


def quantised_stacks(model, ranks: Ranks) -> list[tuple[str, ...]]:
    """A hash of the FP8 bytes and scales of each stack that a forward multiplies by; of shared experts those of all ranks."""
    found, product, mixture = [], Fp8GroupedGemmFunction.apply, Fp8MixtureFunction.apply

    def seen(stack, copy):
        parts = fp8_quantize_dual(stack, block=(128, 128)) if copy is None else copy
        found.append([t.contiguous().view(torch.uint8).numpy().copy() for part in parts for t in part])

    def of_product(x, w, offsets, weight, *rest):
        seen(w, weight)
        return product(x, w, offsets, weight, *rest)

    def of_mixture(x, weights, gate_up, down, offsets, source, inverse, copies, *rest):
        seen(gate_up, copies[0])
        seen(down, copies[1])
        return mixture(x, weights, gate_up, down, offsets, source, inverse, copies, *rest)

    Fp8GroupedGemmFunction.apply, Fp8MixtureFunction.apply = of_product, of_mixture
    try:
        ids = torch.arange(16)
        model(ids, ids, PackedAttention(torch.tensor([0, 16], dtype=torch.int32)))
    finally:
        Fp8GroupedGemmFunction.apply, Fp8MixtureFunction.apply = product, mixture
    assert len(found) == 2 * sum(layer.moe is not None for layer in model.layers)
    elsewhere = mixtures(model)[0].elsewhere
    if elsewhere is not None:  # the first ranks have all experts, those behind them copies
        every = [ranks.concatenate([stack])[0][: elsewhere.world] for stack in found]
        found = [[np.concatenate(parts) for parts in zip(*stacks, strict=True)] for stacks in every]
    return [tuple(hashlib.sha256(part).hexdigest() for part in stack) for stack in found]


def cases(world: int) -> dict[str, tuple]:
    """Every layout for the first model, sharding alone for the others: name -> (model, optimizer), tokens of a micro-batch, [parallel]."""
    qwen3 = ("qwen3", "adamw")
    found = {
        "replicate": (qwen3, 48, {}),
        "fsdp": (qwen3, 48, {"shard": 0}),
        "fsdp, recomputed, kept": (qwen3, 48, {"shard": 0, "activation_checkpointing": True, "reshard_after_forward": False}),
        "replicate, one batch": (qwen3, 1000, {}),
        "fsdp, one batch": (qwen3, 1000, {"shard": 0}),
        "fsdp, untied": (("qwen2, untied", "adamw"), 48, {"shard": 0}),
        "fsdp, muon": (("qwen3", "muon"), 48, {"shard": 0}),
        "fsdp, sparse": (("deepseek_v3", "adamw"), 48, {"shard": 0}),
        "fsdp, sparse, muon": (("deepseek_v3", "muon"), 48, {"shard": 0}),
        "fsdp, sparse, recomputed": (("deepseek_v3", "adamw"), 48, {"shard": 0, "activation_checkpointing": True}),
    }
    sparse, ahead = ("deepseek_v3", "adamw"), ("deepseek_v3, fp8, mtp", "adamw")
    found["fsdp, fp8, mtp, recomputed"] = ahead, 48, {"shard": 0, "activation_checkpointing": True}
    if world > 1:
        found["experts, fsdp, recomputed"] = sparse, 48, {"expert": 2, "shard": 0, "activation_checkpointing": True}
        found["experts, fp8, mtp"] = ahead, 48, {"expert": 2}
        found["experts, muon"] = ("deepseek_v3", "muon"), 48, {"expert": 2}
    if world == 4:
        found |= {"hsdp": (qwen3, 48, {"shard": 2}), "hsdp, one batch": (qwen3, 1000, {"shard": 2}), "experts": (sparse, 48, {"expert": 2})}
    return found


def results(ranks: Ranks) -> dict[str, dict]:
    return {name: result(ranks, *case, tokens=tokens, **options) for name, (case, tokens, options) in cases(ranks.world).items()}


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    parameters, of = WholeParameters(model), splits(model)
    state = {f"model.{n}": parameters[n].clone() for n in parameters.names}
    moments = {n: (value, of.get(n.rpartition(".")[0]) if value.dim() else None) for n, value in optimizer.state_tensors().items()}
    return state | {f"optimizer.{n}": whole(value, value.dtype, split).clone() for n, (value, split) in moments.items()}


def save(ranks: Ranks, folder: Path, case: tuple, parallel: dict, *how: str) -> dict[str, dict]:
    """States after one and two steps, of which two are kept; the weights as a HuggingFace folder; and two steps more for comparison.

    how: "dies", the second rank in the second save; "background".
    """
    model, optimizer = build(ranks, *case, **parallel)
    states = StateWriter(ranks, background="background" in how)
    for step in range(2):
        train(ranks, model, optimizer, [step], 48)
        states.wait()
        if "dies" in how and step == 1 and ranks.rank == 1:
            HuggingFaceStorageWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        states.save(folder, step + 1, model, optimizer, {"step": step + 1})
    saved = whole_state(model, optimizer)
    if ranks.is_main:
        (folder / "hf").mkdir()
        write_model(model, folder / "hf", max_shard_bytes=4000)
    else:
        hand_over(model)
    ranks.barrier()
    train(ranks, model, optimizer, [2, 3], 48)
    states.wait()
    return {"saved": saved, "later": whole_state(model, optimizer)}


def load(ranks: Ranks, folder: Path, case: tuple, parallel: dict) -> dict[str, dict]:
    model, optimizer = build(ranks, *case, seed=1, **parallel)
    state = load_latest_state(folder, model, optimizer, ranks)
    assert state.extra == {"step": state.step}
    loaded = whole_state(model, optimizer)
    train(ranks, model, optimizer, [2, 3], 48)
    return {"step": state.step, "loaded": loaded, "later": whole_state(model, optimizer)}


if __name__ == "__main__":
    ranks = Ranks("cpu", threads=1)
    job, target, *rest = sys.argv[1:]
    if job == "train":
        found = results(ranks)
    else:
        folder, case, parallel, *more = rest
        found = {"save": save, "load": load}[job](ranks, Path(folder), json.loads(case), json.loads(parallel), *more)
    if ranks.is_main:
        torch.save(found, target)
    ranks.close()
