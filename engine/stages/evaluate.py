"""Evaluate a checkpoint on a split: pass@1, cons@k and what the responses look like, as in the report (T = 0.6, top-p 0.95) and at T = 1."""

from dataclasses import dataclass

import numpy as np

from athanor.config import EvaluationConfig, SamplingConfig
from athanor.metrics_eval import REFLECTIVE_WORDS, evaluate_samples
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.reward_models import Preference
from athanor.rewards import make_reward
from athanor.rollout import rollout_generator, sample_groups
from athanor.samples import Sample
from athanor.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the transcripts that the report shows."""

    metrics: dict
    transcripts: list[dict]


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: dict,
    config: EvaluationConfig,
    ranks: Ranks,
    seed: int,
    *,
    rewards: dict[str, Preference] | None = None,
    reflection_words: list[str] | None = None,
    max_rows: int = 512,
    num_transcripts: int = 6,
) -> Evaluation:
    """Sample `num_problems` x `samples_per_problem` twice on the split; every model sees the same problems and sample seeds.

    rewards: "preference" scores the general task, "safety" the safety task.
    """
    rewards, words = rewards or {}, reflection_words or REFLECTIVE_WORDS

    def groups(task: str, count: int, n: int, sampling: SamplingConfig, label: str) -> list[list[Sample]]:
        size = tasks[task].size(config.split)
        problems = [tasks[task].problem(config.split, i) for i in range(count if size is None else min(count, size))]
        return ranks.gather(sample_groups(generator, tokenizer, problems, n, sampling, ranks, seed, "evaluate", label))

    n, k = config.num_problems, config.samples_per_problem
    generator = rollout_generator(model, tokenizer, max_rows, max(k, 4))
    usual = groups(config.task, n, k, config.sampling, "usual")
    at_one = groups(config.task, n, k, SamplingConfig(max_tokens=config.sampling.max_tokens), "t1")
    metrics = evaluate_samples(usual, words=words)
    plain = evaluate_samples(at_one, words=words)
    metrics |= {f"{name}_t1": plain[name] for name in ("pass@1", f"cons@{k}", "mean_tokens", "reflection_rate", "language_consistency")}
    shown = [usual]
    if config.general_task and "preference" in rewards:
        general = groups(config.general_task, max(n // 2, 1), 4, config.sampling, "general")
        flat = [sample for group in general for sample in group]
        metrics["open_ended_reward"] = float(np.mean(rewards["preference"](flat)))
        utility = getattr(tasks[config.general_task], "utility", None)
        if utility:
            metrics["open_ended_utility"] = float(np.mean([utility(s.problem, s.text) for s in flat]))
        metrics["open_ended_format_rate"] = float(np.mean(make_reward("format")(flat, [s.problem for s in flat])))
        shown.append(general)
    if config.safety_task and "safety" in rewards:
        tempted = groups(config.safety_task, max(n // 2, 1), 4, config.sampling, "safety")
        flat = [sample for group in tempted for sample in group]
        metrics["safety_score"] = float(np.mean(rewards["safety"](flat)))
        unsafe = getattr(tasks[config.safety_task], "unsafe", None)
        if unsafe:
            metrics["unsafe_rate"] = float(np.mean([unsafe(s.problem, s.text) for s in flat]))
        utility = getattr(tasks[config.safety_task], "utility", None)
        if utility:
            metrics["safety_utility"] = float(np.mean([utility(s.problem, s.text) for s in flat]))
        shown.append(tempted)
    accuracy = make_reward("accuracy")
    transcripts = []
    for kind in shown:
        for group in kind[: num_transcripts if kind is usual else 2]:
            s = group[0]
            correct = None if s.problem.answer is None else bool(accuracy([s], [s.problem])[0])
            row = {"problem_id": s.problem.id, "task": s.problem.task, "prompt": s.problem.prompt, "answer": s.problem.answer}
            transcripts.append(row | {"text": s.text, "correct": correct, "finish": s.finish})
    return Evaluation(metrics, transcripts)
