"""Train a reward model: pairwise on annotators' verdicts over pairs, or pointwise on responses labelled safe or unsafe.

The examples are a file's (tasks "preferences" and "labelled"), or a procedural task's: half of them replies of the policy `init`, half of the task's
own mixed quality, with the verdicts of its simulated annotators.
"""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from athanor.config import MixEntry, RewardModelConfig
from athanor.errors import UserError
from athanor.model.moe import use_fp8_
from athanor.optim import learning_rate
from athanor.reward_models import RewardModel, batches, judged_tokens, packed, save_reward_head
from athanor.rollout import ProblemStream, as_asked, rollout_generator, sample_groups
from athanor.samples import Problem
from athanor.seeds import derive_seed
from athanor.sharding import WholeParameters, missing_forwards
from athanor.stages.context import StageContext
from athanor.stages.routing import RouterBalance
from athanor.stages.training import TrainingLoop, optimizer_step

SOURCES = {"pairwise": ("pair", "preferred"), "pointwise": ("labelled", "judged_safe")}  # powers of a task, one of which the objective needs


@dataclass(frozen=True)
class Example:
    """What one verdict is about."""

    sequences: tuple[np.ndarray, ...]  # (chosen, rejected) tokens, or (response,)
    safe: bool = True  # of pointwise examples

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


def run(context: StageContext, config: RewardModelConfig) -> dict:
    """Collect examples, fit the model, and report how often it is right on a fifth of them that was held out."""
    examples = _pairs(context, config) if config.objective == "pairwise" else _labelled(context, config)
    if len(examples) < 5:
        raise UserError(f"stage {context.name}: task {config.task!r} gave {len(examples)} examples, wanted at least 5")
    held_out, training = examples[: len(examples) // 5], examples[len(examples) // 5 :]
    model = RewardModel(use_fp8_(context.load(config.init, parallel=True), "off"), config.objective)
    loop = TrainingLoop(context, config, model)
    size = min(config.batch_size, len(training))
    right = "pair_accuracy" if config.objective == "pairwise" else "label_accuracy"
    for step, metrics in loop.steps(config.steps, ("loss", right)):
        chosen = np.random.default_rng(derive_seed(context.recipe.seed, context.name, step)).choice(len(training), size, replace=False)
        drawn = [training[i] for i in chosen.tolist()]
        mine = context.ranks.data.parts(drawn, [example.num_tokens for example in drawn])
        balance = RouterBalance(model.decoder, config, context.ranks.data)

        def loss_of(batch: list[Example], balance=balance) -> tuple[Tensor, Tensor]:
            inputs = _packed(batch or training[:1], context.ranks.device)
            each = torch.arange(len(inputs[2]), device=context.ranks.device)  # a sequence has one score
            routes = balance.routes_over(len(inputs[0]), inputs[2], each) if batch else None
            margin = _margins(model(*inputs, routes), batch or training[:1])[: len(batch)]
            return -logsigmoid(margin).sum() / size + balance.loss(routes, len(batch) / size), (margin > 0).sum()

        parts = [_micro_batches(part, config.micro_batch_tokens) for part in mine]
        parts[-1] += [[]] * missing_forwards(model, context.ranks, len(parts[-1]))
        lr = learning_rate(config.optimizer, step, config.steps)
        sums, norm = optimizer_step(loop.optimizer, parts, loss_of, lr, num_figures=1)
        loss, num_right = sums.tolist()
        applied = loop.applied(norm, loss, lambda mine=mine: {"examples": sum(mine, [])})
        metrics |= {"loss": loss, right: num_right / size, "grad_norm": norm, "lr": lr, **balance.finish(applied)}
    model.eval()
    if config.objective == "pairwise":
        raw = model.score([ids for example in training for ids in example.sequences])
        model.mean, model.std = float(raw.mean()), float(raw.std()) or 1.0
    with torch.no_grad():
        parts = _micro_batches(held_out, config.micro_batch_tokens)
        margins = torch.cat([_margins(model(*_packed(part, context.ranks.device)), part) for part in parts])
    head = WholeParameters(model)["value_head.weight"]
    # The folder appears whole: decoder and head are written under another name first.
    staging = context.checkpoint_dir.with_name(context.checkpoint_dir.name + ".staging")
    context.export(model.decoder, staging)
    if context.ranks.is_main:
        save_reward_head(model, head, staging)
        shutil.rmtree(context.checkpoint_dir, ignore_errors=True)
        os.replace(staging, context.checkpoint_dir)
    context.ranks.barrier()
    measured = {f"held_out_{right}": float((margins > 0).float().mean()), "examples": len(examples)}
    if config.objective == "pointwise":
        measured["unsafe_share"] = float(np.mean([not example.safe for example in examples]))
    return {"metrics": measured, "outputs": {"checkpoint": context.checkpoint_dir}}


def _micro_batches(examples: list[Example], max_tokens: int) -> list[list[Example]]:
    return [examples[first:end] for first, end in batches([example.num_tokens for example in examples], max_tokens)]


def _packed(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return packed([ids for example in examples for ids in example.sequences], device)


def _margins(scores: Tensor, examples: Sequence[Example]) -> Tensor:
    """(n,): what the loss is -log sigmoid of, r(chosen) - r(rejected) of a pair, r of a safe response, -r of an unsafe one.

    scores: r of all sequences of the examples, (n,) or (2n,).
    """
    if len(examples[0].sequences) == 2:
        scores = scores.view(-1, 2)
        return scores[:, 0] - scores[:, 1]
    return torch.where(torch.tensor([example.safe for example in examples], device=scores.device), scores, -scores)


def _pairs(context: StageContext, config: RewardModelConfig) -> list[Example]:
    """Pairs as the judge reads them, in random order."""
    task, tokenizer, seed = context.tasks[config.task], context.tokenizer, context.recipe.seed
    problems = _problems(context, config)
    if hasattr(task, "pair"):  # people have judged already
        rows = [task.pair("train", i) for i in _distinct(problems)]
        return [_read(tokenizer, as_asked(problem, tokenizer), map(_as_answer, replies)) for problem, *replies in rows]
    half = len(problems) // 2
    texts = [(group[0], group[1]) for group in _policy_texts(context, config, problems[:half], 2)]
    for i, problem in enumerate(problems[half:]):
        texts.append(tuple(f"<answer> {task.reply(random.Random(derive_seed(seed, context.name, i, j)), problem)} </answer>" for j in range(2)))
    pairs = []
    for i, (problem, (a, b)) in enumerate(zip(problems, texts, strict=True)):
        pairs.append(_read(tokenizer, problem, (a, b) if task.preferred(problem, a, b, context.name, i) else (b, a)))
    return _shuffled(context, pairs)


def _labelled(context: StageContext, config: RewardModelConfig) -> list[Example]:
    """Whole responses with their labels, in random order."""
    task, tokenizer, seed = context.tasks[config.task], context.tokenizer, context.recipe.seed
    problems = _problems(context, config)
    if hasattr(task, "labelled"):
        rows = [task.labelled("train", i) for i in _distinct(problems)]
        rows = [(as_asked(problem, tokenizer), text, safe) for problem, text, safe in rows]
    else:
        half = len(problems) // 2
        texts = [group[0] for group in _policy_texts(context, config, problems[:half], 1)]
        texts += [task.response(random.Random(derive_seed(seed, context.name, i)), problem) for i, problem in enumerate(problems[half:])]
        rows = [(p, text, task.judged_safe(p, text, context.name, i)) for i, (p, text) in enumerate(zip(problems, texts, strict=True))]
    return _shuffled(context, [Example((judged_tokens(tokenizer, p, text, "pointwise"),), safe) for p, text, safe in rows])


def _problems(context: StageContext, config: RewardModelConfig) -> list[Problem]:
    entries = [MixEntry(task=config.task)]
    return ProblemStream(context.tasks, entries, config.num_examples, 1, context.recipe.seed, context.name).draw(0)


def _distinct(problems: list[Problem]) -> list[int]:
    """Rows of a file, each once: a second epoch would put training examples among those held out."""
    return list(dict.fromkeys(problem.id for problem in problems))


def _policy_texts(context: StageContext, config: RewardModelConfig, problems: list[Problem], n: int) -> list[list[str]]:
    """`n` replies of the policy `init` to each problem."""
    generator = rollout_generator(context.load(config.init), context.tokenizer, context.recipe.max_rows, n, context.recipe.speculation)
    key = context.recipe.seed, context.name
    groups = context.ranks.gather(sample_groups(generator, context.tokenizer, problems, n, config.sampling, context.ranks, *key))
    return [[sample.text for sample in group] for group in groups]


def _read(tokenizer, problem: Problem, replies) -> Example:
    return Example(tuple(judged_tokens(tokenizer, problem, text) for text in replies))


def _as_answer(text: str) -> str:
    """A reply of a file: a plain one is an answer without a chain of thought."""
    return text if "<answer>" in text or "</think>" in text else f"<answer> {text} </answer>"


def _shuffled(context: StageContext, examples: list[Example]) -> list[Example]:
    order = np.random.default_rng(derive_seed(context.recipe.seed, context.name, "order")).permutation(len(examples))
    return [examples[i] for i in order]
