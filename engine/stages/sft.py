"""Supervised fine-tuning on prompt/completion files, loss on the completion only."""

import json
from pathlib import Path

import numpy as np

from athanor.batch import work_of
from athanor.config import DistillConfig, SFTConfig
from athanor.errors import UserError
from athanor.model.transformer import Decoder
from athanor.optim import learning_rate
from athanor.seeds import derive_seed
from athanor.stages.context import StageContext, data_source
from athanor.stages.routing import RouterBalance
from athanor.stages.training import TrainingLoop, cross_entropy_step, packed_batches


def run(context: StageContext, config: SFTConfig) -> dict:
    """Fine-tune `init` on the data and export; return metrics and outputs."""
    examples = [example for name in config.data for example in read_examples(data_source(context.run_dir, context.recipe.stages, name))]
    model = context.load(config.init, parallel=True)
    return fit(context, config, model, examples)


def fit(context: StageContext, config: SFTConfig | DistillConfig, model: Decoder, examples: list[tuple[str, str]]) -> dict:
    """Train `config.steps` steps over shuffled epochs of (prompt, completion) texts and export; return metrics, with the last loss that was applied,
    and outputs."""
    tokenizer, n = context.tokenizer, len(examples)
    prompts = [np.array(tokenizer.encode_prompt(prompt), np.int64) for prompt, _ in examples]
    completions = [np.array([*ids, tokenizer.eos_id], np.int64) for ids in tokenizer.encode_batch([text for _, text in examples])]
    loop = TrainingLoop(context, config, model)
    loop.validate_on()
    size = min(config.batch_size, n)
    orders: dict[int, np.ndarray] = {}
    loss = float("nan")
    for step, metrics in loop.steps(config.steps, ("loss", "grad_norm")):
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, at = divmod(position, n)
            if epoch not in orders:
                orders = {epoch: np.random.default_rng(derive_seed(context.recipe.seed, context.name, epoch)).permutation(n)}
            chosen.append(int(orders[epoch][at]))
        work = [work_of(len(prompts[i]) + len(completions[i]), model.config.hidden_size) for i in chosen]
        texts = [([prompts[i] for i in part], [completions[i] for i in part]) for part in context.ranks.data.parts(chosen, work)]
        parts = [packed_batches(model, context.ranks, *part, config.micro_batch_tokens) for part in texts]
        batches = sum(parts, [])
        num_targets = context.ranks.data.sum_int(sum(b.num_targets for b in batches))
        lr = learning_rate(config.optimizer, step, config.steps)
        balance = RouterBalance(model, config, context.ranks.data)
        measured = cross_entropy_step(model, loop.optimizer, parts, num_targets, lr, balance, config.mtp_loss)
        applied = loop.applied(measured["grad_norm"], measured["loss"], lambda batches=batches: {"batches": batches})
        loss = measured["loss"] if applied else loss
        metrics |= {**measured, "lr": lr, "tokens": num_targets, "epoch": step * size / n, **balance.finish(applied)}
    return {"metrics": {"examples": n, "final_loss": loss}, "outputs": loop.export()}


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of every line of a JSONL file; UserError names the line that is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such data file, wanted JSONL with prompt and completion")
    examples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                prompt, completion = row["prompt"], row["completion"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: {error!r}, wanted a JSON object with prompt and completion") from None
            if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
                raise UserError(f"{path}:{number}: prompt and completion must be text, completion not empty")
            examples.append((prompt, completion))
    if not examples:
        raise UserError(f"{path}: no examples, wanted at least one line")
    return examples
