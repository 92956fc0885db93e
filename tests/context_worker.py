"""What every rank of the tests of context parallelism runs: log-probs, training, policy updates and what is kept for backward."""

import sys
from types import SimpleNamespace

import numpy as np
import sharding_worker
import torch
from sharding_worker import MODELS
from sparse_models import FAMILIES, random_decoder

from athanor.batch import pack
from athanor.config import GRPOConfig, ModelConfig, OptimizerConfig, ParallelConfig, SamplingConfig, TrainConfig
from athanor.kernels import LossVariant
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.reward_models import RewardModel, packed
from athanor.rollout import rollout_generator, sample_groups
from athanor.sharding import parallelize_, split_parameters, whole
from athanor.stages.policy_update import update_policy
from athanor.stages.routing import RouterBalance
from athanor.stages.training import _hidden, completion_logprobs, cross_entropy_step, mtp_logprobs
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tensor_parallel import splits
from athanor.tokenizer import symbol_tokenizer

TASK = ArithmeticTask()
TOKENIZER = symbol_tokenizer(list(TASK.symbols))
LONG = ModelConfig(vocab_size=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=160)
MTP = FAMILIES["deepseek_v3"].model_copy(update={"num_nextn_predict_layers": 1})
# (prompt, completion) lengths: ragged; fewer tokens than ranks times row steps; all that is trained in the last rows, and in the first.
LENGTHS = {"ragged": [(5, 60), (1, 33), (17, 8), (0, 21)], "short": [(2, 3)], "late": [(150, 4)], "early": [(1, 9), (90, 2), (40, 1)]}


def texts(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(len(name))
    return tuple([rng.integers(67, size=n) for n in column] for column in zip(*LENGTHS[name], strict=True))


def split(ranks: Ranks, config: ModelConfig | torch.nn.Module, **parallel) -> torch.nn.Module:
    model = random_decoder(config) if isinstance(config, ModelConfig) else config
    return parallelize_(model, ParallelConfig(context=ranks.context.world, **parallel), ranks)


@torch.no_grad()
def logprobs(ranks: Ranks, kinds: list[str]) -> dict[str, torch.Tensor]:
    """Of every kind of model over every kind of batch: what one process computes, to the bit."""
    found = {}
    for name in ("qwen3, four heads", "qwen3_moe", "deepseek_v3"):
        model = split(ranks, MODELS[name])
        for kind in kinds:
            (batch,) = pack(*texts(kind), 1000)
            found[f"{name}, {kind}"] = torch.stack(completion_logprobs(model, batch, 0.7)[:2])
    (batch,), model = pack(*texts("ragged"), 1000), split(ranks, MTP)
    found["mtp"] = mtp_logprobs(model, batch, _hidden(model, batch, None))
    return found


def gradients_of(model) -> dict[str, torch.Tensor]:
    of = splits(model)
    return {n: whole(p.grad, p.grad.dtype, of.get(n)) for n, p in split_parameters(model).items() if p.requires_grad}


def steps(ranks: Ranks, kinds: list[str]) -> dict[str, dict]:
    """Cross entropy of each batch alone, with all the losses of a mixture and of multi-token prediction; scores of a reward model."""
    found = {}
    for kind in kinds:
        model = split(ranks, MTP)
        batches = pack(*texts(kind), 1000) if ranks.data.rank == 0 else []
        optimizer, balance = Optimizer(model, OptimizerConfig(lr=1e-3), ranks), RouterBalance(model, TrainConfig(balance_loss=0.5), ranks.data)
        figures = cross_entropy_step(model, optimizer, [batches], sum(c for _, c in LENGTHS[kind]), 1e-3, balance, 0.3)
        found[kind] = {"gradients": gradients_of(model), "figures": figures | balance.finish()}
    model = RewardModel(random_decoder(MODELS["qwen3, four heads"]))
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    sequences = [np.concatenate(pair) for pair in zip(*texts("early"), strict=True)]
    scores = split(ranks, model)(*packed(sequences, ranks.device))
    if ranks.data.rank == 0:
        scores.square().sum().backward()
    ranks.copies.sum_gradients_(list(model.parameters()))
    found["reward model"] = {"gradients": gradients_of(model), "figures": {"scores": float(scores.detach().double().square().sum())}}
    return found


CORRECTED = LossVariant(ratio="sequence", clip_low=0.3, clip_high=0.4, kl="k3", beta=0.05, aggregation="sequence_mean", correction="tis",
                        correction_high=2.0)  # fmt: skip
UPDATES = {  # model, loss, settings, [parallel]
    "grpo": ("qwen3", LossVariant(), {}, {}),
    "sequences, reference, fsdp, recomputed": ("qwen3", CORRECTED, {"updates_per_rollout": 2}, {"shard": 0, "activation_checkpointing": True}),
    "truncated sampling": ("qwen3", LossVariant(), {"sampling": SamplingConfig(max_tokens=12, top_p=0.9)}, {}),
    "routes of the sampler": ("qwen3_moe", LossVariant(), {"routing_replay": "rollout", "balance_loss": 0.1}, {}),
    "routes of the trainer": ("deepseek_v3", LossVariant(), {"routing_replay": "trainer", "updates_per_rollout": 2}, {}),
}


def updates(ranks: Ranks, names: list[str]) -> dict[str, dict]:
    """Metrics and last gradients of one rollout's updates; every rank samples the groups of its own prompts."""
    found = {}
    for name in names:
        family, variant, changes, parallel = UPDATES[name]
        shape = dict(hidden_size=32, num_hidden_layers=2, initializer_range=0.2) if family == "qwen3" else FAMILIES[family].model_dump()
        shape = ModelConfig(**shape | {"vocab_size": TOKENIZER.vocab_size})
        config = GRPOConfig(
            kind="grpo", init="base", prompts=[{"task": "chain"}], rewards=[{"reward": "accuracy"}], prompts_per_step=6, group_size=4,
            optimizer=OptimizerConfig(lr=1e-3, eps=1e-2, warmup_steps=0), micro_batch_tokens=200,
            **{"sampling": SamplingConfig(max_tokens=12), "updates_per_rollout": 1} | changes,
        )  # fmt: skip
        model = Decoder(shape).initialize_(0)
        record = config.routing_replay == "rollout"
        generator = rollout_generator(model, TOKENIZER, 64, 4, record_routes=record)
        problems = [TASK.problem("train", i) for i in range(6)]
        groups = sample_groups(generator, TOKENIZER, problems, 4, config.sampling, ranks, 0)
        advantages = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
        advantages[0, 1] = advantages[1, :3] = 0.0
        places = ranks.share(list(range(6)))
        advantages = torch.from_numpy(advantages[places]).flatten()
        reference = None if variant.kl == "none" else split(ranks, Decoder(shape).initialize_(1).requires_grad_(False), **parallel)
        split(ranks, model, **parallel)
        context = SimpleNamespace(name="zero", ranks=ranks, console=SimpleNamespace(warn=print))
        loop = SimpleNamespace(model=model, optimizer=Optimizer(model, config.optimizer, ranks), applied=lambda norm, *_: True)
        figures = update_policy(context, config, variant, loop, reference, groups, places, advantages, 0)
        found[name] = {"gradients": gradients_of(model), "figures": figures}
    return found


def kept_bytes(ranks: Ranks, tokens: int = 1024, **parallel) -> int:
    """Bytes that a forward over one long sequence keeps for its backward, each storage once, without the parameters."""
    model = split(ranks, Decoder(LONG).initialize_(0), **parallel)
    ids = np.random.default_rng(0).integers(32, size=tokens)
    (batch,) = pack([ids[:1]], [ids[1:]], tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() > 16 * tokens:  # the batch's own numbers are whole on every rank
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = completion_logprobs(model, batch).logps.sum()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def training(ranks: Ranks) -> dict[str, dict]:
    """Three steps of micro-batches of 48 tokens with other layouts besides."""
    layouts = {"replicas": {}, "fsdp": {"shard": 0}, "fsdp, recomputed": {"shard": 0, "activation_checkpointing": True}}
    if ranks.world == 4:
        layouts["hsdp"] = {"shard": 2}
    found = {name: ("qwen3, four heads", layout) for name, layout in layouts.items()} | {"sparse": ("deepseek_v3", {"shard": 0})}
    found |= {"six heads": ("qwen2, six heads", {})} if 6 % ranks.context.world == 0 else {}
    return {name: sharding_worker.result(ranks, model, "adamw", tokens=48, context=ranks.context.world, **layout)
            for name, (model, layout) in found.items()}  # fmt: skip


QUICK = {"logprobs": ["late"], "steps": ["ragged", "late"], "updates": ["sequences, reference, fsdp, recomputed", "routes of the sampler"]}
WHOLE = {"logprobs": list(LENGTHS), "steps": list(LENGTHS), "updates": list(UPDATES)}


def everything(ranks: Ranks, quick: bool) -> dict:
    names = QUICK if quick else WHOLE
    found = {job.__name__: job(ranks, names[job.__name__]) for job in (logprobs, steps, updates)}
    found["kept"] = {"all": kept_bytes(ranks), "inputs": kept_bytes(ranks, activation_checkpointing=True)}
    return found if quick else found | {"training": training(ranks)}


def with_parts(ranks: Ranks) -> dict[str, dict]:
    """Ranks with a part of the model each, too; of one process, what these should find."""
    return {"steps": steps(ranks, ["ragged", "late"]), "updates": updates(ranks, ["grpo", "routes of the sampler", "routes of the trainer"])}


if __name__ == "__main__":
    ranks, (target, kind) = Ranks("cpu", threads=1), sys.argv[1:]
    if kind == "parts":
        found = with_parts(Ranks("cpu", threads=1, context=2, tensor=2))
        if ranks.is_main:
            torch.save(found, target)
        ranks.barrier()
        ranks.close()
        sys.exit()
    sizes = [n for n in (2, 4) if ranks.world % n == 0]
    found = {n: everything(Ranks("cpu", threads=1, context=n), kind == "quick") for n in sizes}
    everywhere = ranks.concatenate([found])[0]
    if ranks.is_main:
        torch.save(everywhere, target)
    ranks.barrier()
    ranks.close()
