"""Which reward judges a problem in an evaluation, and which answers of its samples are the same vote.

    domain "code"                      reward "code": the program is run against the problem's tests; programs do not vote
    metadata has "choices"             reward "choice"; the letter votes
    metadata has "extract"             reward "math" on what it names, the last box for instance
    anything else with an answer       reward "accuracy" on the <answer> block, or the task's own scorer

Votes are equivalence classes: answers with equal keys (rewards/answers.py) are one, and with a verifier that knows more than keys, so are all right
answers and all wrong ones that it calls equal.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

from athanor import watchdog
from athanor.errors import UserError
from athanor.rewards import make_reward
from athanor.rewards.accuracy import Accuracy, scorers
from athanor.rewards.answers import answer_key
from athanor.rewards.choice import chosen_letter
from athanor.samples import Problem, Sample

BATCH = 256  # samples per call of a reward, between two updates of the progress
MAX_MERGED = 24  # distinct wrong answers of a problem that are compared with each other; more are left as they are


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward by name with its settings."""

    reward: str
    settings: tuple[tuple[str, object], ...] = ()

    def build(self):
        return make_reward(self.reward, **dict(self.settings))


def judge_of(problem: Problem, reward: str = "", settings: dict | None = None) -> Judge | None:
    """Who judges a problem; None = nobody: it is open-ended.  reward, settings: take this one.

    Raises UserError when a reasoning problem has no answer.
    """
    if reward:
        return Judge(reward, tuple(sorted((settings or {}).items())))
    if problem.domain == "code":
        return Judge("code")
    if problem.metadata.get("choices"):
        return Judge("choice")
    if problem.task in scorers:
        return Judge("accuracy")
    if problem.answer is None:
        if problem.domain not in ("general", "safety"):
            raise UserError(f"{problem.metadata.get('source', f'{problem.task} {problem.id}')}: no gold answer, which a reasoning problem needs")
        return None
    return Judge("accuracy" if problem.metadata.get("extract", "answer") == "answer" else "math")


def score_groups(
    groups: Sequence[Sequence[Sample]], reward: str = "", progress: Callable[[int], None] | None = None, *, settings: dict | None = None
) -> list[list[float | None]]:
    """Score per problem and sample, 0 to 1; None = not judged.  progress(samples): how many are done.  reward, settings: as for `judge_of`."""
    scores: list[list[float | None]] = [[None] * len(group) for group in groups]
    judges = [judge_of(group[0].problem, reward, settings) for group in groups]
    done = 0
    for judge in dict.fromkeys(judge for judge in judges if judge):
        # a sample whose logits became NaN says nothing about its problem
        places = [(i, j) for i, group in enumerate(groups) if judges[i] == judge for j, sample in enumerate(group) if sample.finish != "error"]
        built = judge.build()
        for first in range(0, len(places), BATCH):
            part = places[first : first + BATCH]
            samples = [groups[i][j] for i, j in part]
            with watchdog.phase("reward"):
                values = built(samples, [sample.problem for sample in samples])
            for (i, j), value in zip(part, values, strict=True):
                scores[i][j] = value
            done += len(part)
            if progress:
                progress(done)
    return scores


def vote_groups(
    groups: Sequence[Sequence[Sample]], scores: Sequence[Sequence[float | None]], reward: str = ""
) -> list[list[Hashable | None]] | None:
    """Votes as `cons_at_k` takes them, per problem and sample; None where problems are programs, which do not vote."""
    judges = [judge_of(group[0].problem, reward) for group in groups]
    if any(judge and judge.reward == "code" for judge in judges):
        return None
    votes = [_votes(group, judge) for group, judge in zip(groups, judges, strict=True)]
    for judge in dict.fromkeys(judge for judge in judges if judge and judge.reward not in ("accuracy", "choice")):
        with watchdog.phase("reward", "votes"):
            _merge(judge, [i for i, other in enumerate(judges) if other == judge], groups, scores, votes)
    return votes


def _votes(group: Sequence[Sample], judge: Judge | None) -> list[Hashable | None]:
    if judge is None:
        return [None] * len(group)
    if judge.reward == "choice":
        return [chosen_letter(s.text, s.problem.metadata["choices"], prompt=s.problem.prompt) for s in group]
    answers = [_final_answer(judge)(sample, sample.problem) for sample in group]
    return [None if answer is None else answer_key(answer) for answer in answers]


def _final_answer(judge: Judge) -> Callable[[Sample, Problem], str | None]:
    """How the judge finds the answer that it compares; the last <answer> block where it compares none."""
    return getattr(judge.build(), "answer_of", Accuracy().answer_of)


def _merge(judge: Judge, chosen: list[int], groups, scores, votes) -> None:
    """Give all right answers of a problem one key, and wrong ones that the verifier calls equal the key of the first."""
    samples, problems, pairs = [], [], []
    answer_of = _final_answer(judge)
    for i in chosen:
        if groups[i][0].problem.task in scorers:
            continue
        wrong: dict[Hashable, Sample] = {}
        for j, sample in enumerate(groups[i]):
            if scores[i][j] is not None and scores[i][j] >= 1.0:
                votes[i][j] = ("right",)
            elif votes[i][j] is not None:
                wrong.setdefault(votes[i][j], sample)
        if len(wrong) <= MAX_MERGED:
            for (a, first), (b, second) in combinations(wrong.items(), 2):
                if isinstance(a, str):  # numbers are exact as they are; text is what a verifier can read as an answer
                    samples.append(second)
                    problems.append(dataclasses.replace(first.problem, answer=answer_of(first, first.problem)))
                    pairs.append((i, a, b))
    if not samples:
        return
    for (i, a, b), value in zip(pairs, judge.build()(samples, problems), strict=True):
        if value is not None and value >= 1.0:
            votes[i] = [a if vote == b else vote for vote in votes[i]]
