"""Train the preference reward model on annotators' verdicts over pairs: of the policy's own replies, or of a file (task "preferences")."""

import os
import random
import shutil

import numpy as np
import torch

from athanor.checkpoint import export_model
from athanor.config import MixEntry, RewardModelConfig, SamplingConfig
from athanor.optim import learning_rate
from athanor.reward_models import RewardModel, judged_tokens, packed, save_reward_head
from athanor.rollout import ProblemStream, as_asked, rollout_generator, sample_groups
from athanor.seeds import derive_seed
from athanor.stages.context import StageContext
from athanor.stages.training import TrainingLoop


def run(context: StageContext, config: RewardModelConfig) -> dict:
    """Sample pairs from `init`, have them judged, fit the Bradley-Terry model; report its accuracy on pairs that were held out."""
    pairs = _pairs(context, config)
    held_out, training = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
    model = RewardModel(context.load(config.init))
    loop = TrainingLoop(context, config, model)
    size = min(config.batch_size, len(training))
    for step, metrics in loop.steps(config.steps, ("loss", "pair_accuracy")):
        chosen = np.random.default_rng(derive_seed(context.recipe.seed, context.name, step)).choice(len(training), size, replace=False)
        mine = context.ranks.share(chosen.tolist())
        loop.optimizer.zero_grad()
        margin = _margins(model, [training[i] for i in mine], context)
        loss = -torch.nn.functional.logsigmoid(margin).sum() / size
        loss.backward()
        lr = learning_rate(config.optimizer, step, config.steps)
        norm = loop.optimizer.step(lr)
        totals = torch.tensor([float(loss.detach()), float((margin > 0).sum()) / size], dtype=torch.float64)
        context.ranks.sum_(totals)
        metrics |= {"loss": float(totals[0]), "pair_accuracy": float(totals[1]), "grad_norm": norm, "lr": lr}
    model.eval()
    replies = [ids for pair in training for ids in pair]
    raw = model.score(replies)
    model.mean, model.std = float(raw.mean()), float(raw.std()) or 1.0
    with torch.no_grad():
        accuracy = float((_margins(model, held_out, context) > 0).float().mean())
    if context.ranks.is_main:
        # The folder appears whole: decoder and head are written under another name first.
        staging = context.checkpoint_dir.with_name(context.checkpoint_dir.name + ".staging")
        export_model(model.decoder, context.tokenizer, staging)
        save_reward_head(model, staging)
        shutil.rmtree(context.checkpoint_dir, ignore_errors=True)
        os.replace(staging, context.checkpoint_dir)
    context.ranks.barrier()
    return {"metrics": {"held_out_pair_accuracy": accuracy, "pairs": len(pairs)}, "outputs": {"checkpoint": context.checkpoint_dir}}


def _pairs(context: StageContext, config: RewardModelConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """(chosen, rejected) token sequences as the judge reads them; half of the pairs are the policy's, half are of the corpus' mixed quality."""
    task, tokenizer, seed = context.tasks[config.task], context.tokenizer, context.recipe.seed
    stream = ProblemStream(context.tasks, [MixEntry(task=config.task)], config.num_pairs, 1, seed, context.name)
    problems = stream.draw(0)
    if hasattr(task, "pair"):  # people have judged already
        ids = list(dict.fromkeys(problem.id for problem in problems))  # a second epoch would put training pairs among those held out
        return [_written_pair(tokenizer, *task.pair("train", i)) for i in ids]
    half = len(problems) // 2
    policy = context.load(config.init)
    generator = rollout_generator(policy, tokenizer, context.recipe.max_rows, 2)
    groups = sample_groups(generator, tokenizer, problems[:half], 2, SamplingConfig(max_tokens=32), context.ranks, seed, context.name)
    groups = context.ranks.gather(groups)
    texts = [(group[0].text, group[1].text) for group in groups]
    for i, problem in enumerate(problems[half:]):
        texts.append(tuple(f"<answer> {task.reply(random.Random(derive_seed(seed, context.name, i, j)), problem)} </answer>" for j in range(2)))
    pairs = []
    for i, (problem, (a, b)) in enumerate(zip(problems, texts, strict=True)):
        chosen, rejected = (a, b) if task.preferred(problem, a, b, context.name, i) else (b, a)
        pairs.append((judged_tokens(tokenizer, problem, chosen), judged_tokens(tokenizer, problem, rejected)))
    order = np.random.default_rng(derive_seed(seed, context.name, "order")).permutation(len(pairs))
    return [pairs[i] for i in order]


def _written_pair(tokenizer, problem, chosen: str, rejected: str) -> tuple[np.ndarray, np.ndarray]:
    """A pair of a file: plain replies are answers without a chain of thought."""
    problem = as_asked(problem, tokenizer)
    texts = [text if "<answer>" in text else f"<answer> {text} </answer>" for text in (chosen, rejected)]
    return judged_tokens(tokenizer, problem, texts[0]), judged_tokens(tokenizer, problem, texts[1])


def _margins(model: RewardModel, pairs: list[tuple[np.ndarray, np.ndarray]], context: StageContext) -> torch.Tensor:
    """r(chosen) - r(rejected) (n,) of each pair."""
    scores = model(*packed([ids for pair in pairs for ids in pair], context.ranks.device)).view(-1, 2)
    return scores[:, 0] - scores[:, 1]
