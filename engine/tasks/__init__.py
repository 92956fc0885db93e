"""Tasks by name: one file per task, `make_task("jsonl:questions.jsonl", template="r1_zero")`, `make_task("gym:chain_sum", min_terms=3)`.

A task hands out problems that are a pure function of (seed, split, index), so nothing about its position has to be saved for a resume.  The
splits train, validation and test are disjoint.
"""

from typing import Protocol, runtime_checkable

from athanor.errors import UserError
from athanor.registry import build, registered
from athanor.samples import SPLITS, Problem, in_domain
from athanor.tasks._templates import R1_ZERO, render

__all__ = ["R1_ZERO", "SPLITS", "Task", "available_tasks", "make_task", "render", "require_answers"]


@runtime_checkable
class Task(Protocol):
    """What the rest of the engine needs of a task.  `corpus(index) -> (prompt, text)` is optional: a pre-training document."""

    name: str
    domain: str

    def size(self, split: str) -> int | None:
        """Number of problems of a split; None = procedural, without end."""

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` (from 0) of a split, the same at every call."""


def make_task(name: str, /, **settings) -> Task:
    """Build a task from "name" or "name:variant".  Raises UserError on an unknown name or setting, with near misses."""
    return build(__name__, "task", name, settings)


def available_tasks() -> list[str]:
    """Names that `make_task` takes, without variants."""
    return registered(__name__)


def require_answers(task: Task, reward: str = "accuracy", *, split: str = "train", limit: int = 10_000) -> None:
    """Raise UserError when a problem that `reward` should judge has no gold answer and its task no scorer of its own.

    Looks at every problem of a finite split (at most `limit`), and at the first one of a procedural split.
    """
    from athanor.rewards.accuracy import scorers

    size = task.size(split)
    for index in range(1 if size is None else min(size, limit)):
        problem = task.problem(split, index)
        if problem.answer is None and in_domain(problem.domain, "reasoning") and problem.task not in scorers:
            where = problem.metadata.get("source", f"{split} problem {index}")
            raise UserError(f"task without answers: {task.name} has none for {where}, the reward {reward!r} needs one per reasoning problem")
