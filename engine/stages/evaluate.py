"""Evaluate a checkpoint on a split: pass@1, cons@k and what the responses look like, as in the report (T = 0.6, top-p 0.95) and at T = 1."""

from dataclasses import dataclass

import numpy as np

from athanor import watchdog
from athanor.config import EvaluationConfig, SamplingConfig, SpeculationConfig
from athanor.judging import score_groups, vote_groups
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
    speculation: SpeculationConfig = SpeculationConfig(),
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

    def judged(groups: list[list[Sample]]) -> tuple[list[list[float | None]], dict]:
        scores = ranks.gather(score_groups(ranks.share(groups)))
        return scores, evaluate_samples(groups, scores, vote_groups(groups, scores), words=words)

    n, k = config.num_problems, config.samples_per_problem
    generator = rollout_generator(model, tokenizer, max_rows, max(k, 4), speculation)
    usual = groups(config.task, n, k, config.sampling, "usual")
    scores, metrics = judged(usual)
    _, plain = judged(groups(config.task, n, k, SamplingConfig(max_tokens=config.sampling.max_tokens), "t1"))
    metrics |= {f"{name}_t1": plain[name] for name in ("pass@1", f"cons@{k}", "mean_tokens", "reflection_rate", "language_consistency")}
    shown = [(usual, scores)]
    for label, task, reward, score, prefix in (
        ("general", config.general_task, "preference", "open_ended_reward", "open_ended"),
        ("safety", config.safety_task, "safety", "safety_score", "safety"),
    ):
        if not task or reward not in rewards:
            continue
        answers = groups(task, max(n // 2, 1), 4, config.sampling, label)
        flat = [sample for group in answers for sample in group]
        with watchdog.phase("reward"):
            metrics[score] = float(np.mean(rewards[reward](flat)))
        metrics[f"{prefix}_format_rate"] = float(np.mean(make_reward("format")(flat, [s.problem for s in flat])))
        for name, measure in ((f"{prefix}_utility", "utility"), ("unsafe_rate", "unsafe")):  # what the task's own annotators know
            if hasattr(tasks[task], measure):
                metrics[name] = float(np.mean([getattr(tasks[task], measure)(s.problem, s.text) for s in flat]))
        shown.append((answers, [[None] * len(group) for group in answers]))
    transcripts = []
    for i, (kind, scores) in enumerate(shown):
        for (s, *_), (score, *_) in list(zip(kind, scores, strict=True))[: 2 if i else num_transcripts]:
            row = {"problem_id": s.problem.id, "task": s.problem.task, "prompt": s.problem.prompt, "answer": s.problem.answer}
            transcripts.append(row | {"text": s.text, "correct": None if score is None else score >= 1.0, "finish": s.finish})
    return Evaluation(metrics, transcripts)
