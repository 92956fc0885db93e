"""A look at the validation split while a stage trains; by a metric of it, the best state is kept (`TrainingLoop`).

Every look samples the same problems with the same seeds, so that two differ by the weights alone.  It changes nothing in the training.
"""

from athanor.config import ValidationConfig
from athanor.errors import UserError
from athanor.judging import judge_of, score_groups, vote_groups
from athanor.metrics_eval import REFLECTIVE_WORDS, evaluate_samples
from athanor.rollout import rollout_generator, sample_groups
from athanor.sharding import FullWeights
from athanor.stages.context import StageContext


def check(where: str, config: ValidationConfig, task) -> None:
    """Refuse a task that has no validation problems or none that can be judged."""
    if task.size("validation") == 0:
        raise UserError(f"{where}.task: {config.task!r} has no problems in its validation split")
    if judge_of(task.problem("validation", 0)) is None:
        raise UserError(f"{where}.task: {config.task!r} is open-ended, wanted a task with answers")


class Validation:
    """Measures the weights as they are."""

    def __init__(self, context: StageContext, config: ValidationConfig, weights: FullWeights):
        self.context, self.config, self.weights = context, config, weights

    def due(self, step: int, *, last: bool) -> bool:
        return last or step % self.config.every == 0

    def measure(self) -> dict[str, float]:
        """validation_pass@1 and so on, over all ranks; every rank calls it."""
        context, config = self.context, self.config
        task, n = context.tasks[config.task], config.samples_per_problem
        size = task.size("validation")
        problems = [task.problem("validation", i) for i in range(config.num_problems if size is None else min(config.num_problems, size))]
        self.weights.refresh()
        # Made for one look: the memory of its KV pool belongs to the training in between.
        generator = rollout_generator(self.weights.model, context.tokenizer, context.recipe.max_rows, n)
        key = context.recipe.seed, context.name, "validation"
        groups = context.ranks.gather(sample_groups(generator, context.tokenizer, problems, n, config.sampling, context.ranks, *key))
        scores = context.ranks.gather(score_groups(context.ranks.share(groups)))
        metrics = evaluate_samples(groups, scores, vote_groups(groups, scores), words=context.recipe.reflection_words or REFLECTIVE_WORDS)
        return {f"validation_{name}": value for name, value in metrics.items() if value is not None}

    def best(self, step: int, measured: dict[str, float], before: dict | None) -> dict | None:
        """{step, metric, value} when this is better than the best before; None when it is not, or none is asked for."""
        if not self.config.best:
            return None
        metric = f"cons@{self.config.samples_per_problem}" if self.config.best == "cons@k" else self.config.best
        value = measured.get(f"validation_{metric}")
        if value is None:
            where = f"stages.{self.context.name}.validation.best"
            raise UserError(f"{where} is {self.config.best}, but there is nothing to measure it on in task {self.config.task!r}")
        sign = 1 if self.config.mode == "max" else -1
        better = before is None or sign * value > sign * before["value"]
        return {"step": step, "metric": metric, "value": value} if better else None
