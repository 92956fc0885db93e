"""What every reward shares: the two ways to be called.

Native:  reward(samples, problems=None), problems defaulting to each sample's own.
TRL (GRPOTrainer, RLOOTrainer):  reward(prompts=, completions=, completion_ids=, **columns), prompts and completions being strings or chat lists
([{"role": ..., "content": ...}]).  The gold answer is the column `answer`, or `solution` where there is none; columns `domain`, `language`,
`task`, `split` and `id` fill the problem's fields; every other column of the right length goes into its metadata.
"""

from dataclasses import dataclass

import numpy as np

from athanor.samples import Problem, Sample


def chat_text(message: str | list) -> str:
    """Text of a prompt or completion as TRL passes it: a string, or a chat list whose contents are strings or lists of text parts."""
    if isinstance(message, str):
        return message
    parts = []
    for turn in message:
        content = turn.get("content") or ""
        parts.append(content if isinstance(content, str) else "".join(part.get("text") or "" for part in content))
    return "\n".join(parts)


def samples_from_columns(prompts, completions, completion_ids, columns: dict) -> list[Sample]:
    """Build samples from the columns that TRL passes.  token_ids is None where `completion_ids` was not passed."""
    size = len(completions)
    per_row = {name: column for name, column in columns.items() if isinstance(column, (list, tuple)) and len(column) == size}
    golds = per_row.pop("answer", None) or per_row.pop("solution", None) or [None] * size
    samples = []
    for i, completion in enumerate(completions):
        row = {name: column[i] for name, column in per_row.items()}
        problem = Problem(
            prompt=chat_text(prompts[i]) if prompts is not None else "",
            answer=None if golds[i] is None else str(golds[i]),
            id=row.pop("id", i),
            task=row.pop("task", ""),
            domain=row.pop("domain", "reasoning"),
            language=row.pop("language", "en"),
            split=row.pop("split", "train"),
            metadata=row,
        )
        ids = None if completion_ids is None else np.asarray(completion_ids[i], np.int64)
        samples.append(Sample(problem, chat_text(completion), ids, np.zeros(0, np.float32)))
    return samples


@dataclass(frozen=True)
class Reward:
    """Base of all rewards: a subclass sets `__name__` and defines `score`; settings are its fields, checked when built."""

    __name__ = "reward"

    def score(self, sample: Sample, problem: Problem) -> float | None:
        """Score one sample; None = does not apply."""
        raise NotImplementedError(f"{type(self).__qualname__}.score")

    def __call__(self, samples=None, problems=None, *, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        """Score samples, given natively or as TRL passes them (see the module).  Raises ValueError when neither or both are given."""
        if (samples is None) == (completions is None):
            raise ValueError(f"reward {self.__name__}: wanted either `samples` or `completions=`, got {'neither' if samples is None else 'both'}")
        if completions is not None:
            samples = samples_from_columns(prompts, completions, completion_ids, columns)
        if problems is None:
            problems = [sample.problem for sample in samples]
        if len(problems) != len(samples):
            raise ValueError(f"reward {self.__name__}: {len(samples)} samples but {len(problems)} problems")
        return [self.score(sample, problem) for sample, problem in zip(samples, problems, strict=True)]
