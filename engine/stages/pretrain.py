"""Base model: next-token training on the tasks' corpora, then the gate that RL needs a base which can do the arithmetic if it reasons."""

import numpy as np

from athanor.config import GateConfig, PretrainConfig, SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.model.moe import use_fp8_
from athanor.model.transformer import Decoder
from athanor.optim import learning_rate
from athanor.samples import Request
from athanor.seeds import derive_seed
from athanor.sharding import FullWeights
from athanor.stages.context import StageContext
from athanor.stages.routing import RouterBalance
from athanor.stages.training import TrainingLoop, cross_entropy_step, packed_batches
from athanor.tokenizer import Tokenizer


def run(context: StageContext, config: PretrainConfig) -> dict:
    """Train from scratch (or from `init`) and export; return metrics, gates and outputs."""
    shape = context.recipe.models[config.model].model_copy(update={"vocab_size": context.tokenizer.vocab_size})
    if config.init:
        model = context.load(config.init, parallel=True)
    else:
        model = Decoder(shape).initialize_(derive_seed(context.recipe.seed, context.name, "init")).to(context.dtype)
        use_fp8_(model, context.recipe.fp8)
    loop = TrainingLoop(context, config, model)
    loop.validate_on()
    rounds = loop.extra.setdefault("rounds", 0)
    while True:
        _train(context, config, loop, rounds)
        if config.gate is None:
            gates = {}
            break
        weights = FullWeights(model, parts=context.recipe.parallel.rollout == "split")
        value = competence(weights.model, context.tokenizer, context.tasks[config.gate.task], config.gate, context.recipe.max_rows)
        gates = {"competence": {"value": value, "wanted": config.gate.threshold, "passed": value >= config.gate.threshold, "extra_rounds": rounds}}
        if value >= config.gate.threshold:
            break
        if rounds == config.gate.max_rounds:
            raise UserError(
                f"stage {context.name}: competence is {value:.3f} after {rounds} extra rounds, wanted {config.gate.threshold}; "
                f"train longer (--stages.{context.name}.steps) or accept less (--stages.{context.name}.gate.threshold)"
            )
        rounds += 1
        loop.extra["rounds"] = rounds
        context.console.note(f"{context.name}: competence {value:.3f} < {config.gate.threshold}, training on for {config.gate.extra_steps} steps")
        loop.save()
    return {"metrics": {}, "gates": gates, "outputs": loop.export()}


def _train(context: StageContext, config: PretrainConfig, loop: TrainingLoop, rounds: int) -> None:
    """Train to the end of extra round `rounds` (0 = the main one); each extra round has a schedule of its own at half the peak."""
    start = config.steps + (rounds - 1) * config.gate.extra_steps if rounds else 0
    end = config.steps + rounds * config.gate.extra_steps if rounds else config.steps
    peak = config.optimizer.lr / 2 if rounds else config.optimizer.lr
    for step, metrics in loop.steps(end, ("loss", "grad_norm")):
        parts = [packed_batches(loop.model, context.ranks, *part, config.micro_batch_tokens) for part in _documents(context, config, step)]
        batches = sum(parts, [])
        num_targets = context.ranks.data.sum_int(sum(b.num_targets for b in batches))
        lr = learning_rate(config.optimizer, step - start, end - start, peak)
        balance = RouterBalance(loop.model, config, context.ranks.data)
        metrics |= cross_entropy_step(loop.model, loop.optimizer, parts, num_targets, lr, balance, config.mtp_loss)
        applied = loop.applied(metrics["grad_norm"], metrics["loss"], lambda batches=batches: {"batches": batches})
        metrics |= {"lr": lr, "tokens": num_targets, **balance.finish(applied)}


def _documents(context: StageContext, config: PretrainConfig, step: int) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """The documents of this rank's parts of a step, as (prompts, texts) token ids; tasks are drawn by weight, per document."""
    rng = np.random.default_rng(derive_seed(context.recipe.seed, context.name, step))
    weights = np.array([entry.weight for entry in config.corpus])
    chosen = rng.choice(len(weights), size=config.docs_per_step, p=weights / weights.sum())
    pairs = [context.tasks[config.corpus[c].task].corpus(step * config.docs_per_step + i) for i, c in enumerate(chosen)]
    return [_encoded(context.tokenizer, part) for part in context.ranks.data.parts(pairs)]


def _encoded(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    eos = [tokenizer.eos_id]
    texts = [np.array(ids + eos, np.int64) for ids in tokenizer.encode_batch([text for _, text in pairs])]
    return [np.array(tokenizer.encode_prompt(prompt), np.int64) for prompt, _ in pairs], texts


def competence(model: Decoder, tokenizer: Tokenizer, task, gate: GateConfig, max_rows: int) -> float:
    """Greedy accuracy of the reasoning on validation problems whose first step is given: what the model can do if it reasons.

    The last number of the chain of thought counts, not the tagged answer: base models that forget their tags are what RL is for.
    """
    pairs = [task.competence(i) for i in range(gate.num_problems)]
    requests = [Request(np.array(tokenizer.encode_prompt(prompt), np.int64), np.zeros(1, np.int64)) for prompt, _ in pairs]
    groups = Generator(model, tokenizer.eos_ids, max_rows=max_rows).generate(requests, SamplingConfig(temperature=0.0, max_tokens=128))
    texts = [tokenizer.decode(group[0].token_ids.tolist()) for group in groups]
    thoughts = [[word for word in text.split("</think>")[0].split() if word.isdigit()] for text in texts]
    return float(np.mean([thought[-1:] == [answer] for thought, (_, answer) in zip(thoughts, pairs, strict=True)]))
