"""Who judges what in an evaluation, and which answers are one vote."""

from dataclasses import dataclass

import numpy as np
import pytest

from athanor import judging
from athanor.errors import UserError
from athanor.judging import MAX_MERGED, judge_of, score_groups, vote_groups
from athanor.metrics_eval import cons_at_k
from athanor.rewards import make_reward
from athanor.rewards.accuracy import scorers
from athanor.rewards.answers import last_boxed
from athanor.rewards.base import Reward
from athanor.samples import Problem, Sample

PLAIN = Problem("q", "4", 0, "t")
BOXED = Problem("q", "x+1", 1, "math", metadata={"extract": "boxed"})
CHOICE = Problem("q", "B", 2, "mmlu", metadata={"choices": ["one", "two", "three"]})
OPEN = Problem("q", None, 3, "prompts", "general")
CODE = Problem("q", None, 4, "humaneval", "code")


def group(problem, *texts, finish="stop"):
    return [Sample(problem, text, np.arange(2), np.zeros(2, np.float32), finish) for text in texts]


@pytest.fixture
def math_reward(monkeypatch):
    """A reward "math" that knows that x+1 = 1+x and 7 = seven, counts its calls, and gives up on "hard"."""
    calls = []

    @dataclass(frozen=True)
    class Algebra(Reward):
        __name__ = "math"
        extract: str = "boxed"

        def answer_of(self, sample, problem):
            return last_boxed(sample.text)

        def score(self, sample, problem):
            calls.append(problem.answer)
            answer = self.answer_of(sample, problem)
            classes = [{"x+1", "1+x"}, {"y", "Y+0", "0+y"}]
            if answer == "hard":
                return None
            return float(answer == problem.answer or any({answer, problem.answer} <= same for same in classes))

    monkeypatch.setattr(judging, "make_reward", lambda name, **options: Algebra(**options) if name == "math" else make_reward(name, **options))
    return calls


def test_the_problem_says_who_judges(monkeypatch):
    assert judge_of(PLAIN).reward == "accuracy" and judge_of(BOXED).reward == "math"
    assert judge_of(CHOICE).reward == "choice" and judge_of(CODE).reward == "code" and judge_of(OPEN) is None
    assert judge_of(PLAIN, "format").reward == "format"
    with pytest.raises(UserError, match="here.jsonl:3: no gold answer"):
        judge_of(Problem("q", None, 0, "t", metadata={"source": "here.jsonl:3"}))
    monkeypatch.setitem(scorers, "own", lambda answer, problem: 0.5)
    assert judge_of(Problem("q", None, 0, "own")).reward == "accuracy"


def test_scores_keep_their_places_and_broken_samples_are_not_judged():
    groups = [
        group(PLAIN, "<answer> 4.0 </answer>", "<answer> 5 </answer>"), group(OPEN, "hi"), group(BOXED, "\\boxed{x+1}", "x+1"),
        group(CHOICE, "Answer: B", "Answer: A"), group(PLAIN, "<answer> 4 </answer>", finish="error"),
    ]  # fmt: skip
    seen = []
    assert score_groups(groups, progress=seen.append) == [[1.0, 0.0], [None], [1.0, 0.0], [1.0, 0.0], [None]]
    assert seen[-1] == 6
    assert score_groups(groups[:1], "format") == [[0.0, 0.0]]


def test_equal_answers_are_one_vote_and_programs_do_not_vote():
    groups = [group(PLAIN, *(f"<answer> {a} </answer>" for a in ("0.5", "1/2", "50%", "7", "7")), "none"), group(CHOICE, "Answer: b", "Answer: two")]
    numbers, letters = vote_groups(groups, score_groups(groups))
    assert len({numbers[0], numbers[1], numbers[2]}) == 1 and numbers[3] == numbers[4] != numbers[0] and numbers[5] is None
    assert letters == ["B", "B"]
    assert vote_groups([group(CODE, "```python\n```")], [[1.0]]) is None


def test_a_verifier_that_knows_more_merges_votes(math_reward):
    assert judge_of(BOXED).reward == "math"
    texts = [f"\\boxed{{{a}}}" for a in ("x+1", "1+x", "y", "Y+0", "0+y", "hard", "3")]
    groups = [group(BOXED, *texts)]
    scores = score_groups(groups)
    assert scores == [[1.0, 1.0, 0.0, 0.0, 0.0, None, 0.0]]
    votes = vote_groups(groups, scores)[0]
    assert votes[0] == votes[1] and votes[2] == votes[3] == votes[4] and len(set(votes)) == 4
    right = [float(score == 1.0) for score in scores[0]]
    assert cons_at_k(votes, right) == 0.0  # three for y against two for x+1: unmerged votes would have made it a win


def test_hopelessly_many_wrong_answers_are_not_compared(math_reward):
    groups = [group(BOXED, *(f"\\boxed{{a{'b' * i}}}" for i in range(MAX_MERGED + 1)))]
    scores = score_groups(groups)
    math_reward.clear()
    assert len(set(vote_groups(groups, scores)[0])) == MAX_MERGED + 1 and math_reward == []
