"""Evaluation metrics against brute force over all subsets (acceptance check T35) and the published example values."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from athanor.judging import score_groups, vote_groups
from athanor.metrics_eval import (
    clustered_standard_error,
    cons_at_k,
    elo_rating,
    evaluate_samples,
    pass_at_k,
    pass_hat_k,
    reflection_rate,
    score_metrics,
)
from athanor.samples import Problem, Sample


def brute_force_vote(votes, correct, k):
    """Mean over all k-subsets of the tie-split majority vote, None not voting."""
    total, count = Fraction(0), 0
    for subset in combinations(range(len(votes)), k):
        tally = {}
        for i in subset:
            if votes[i] is not None:
                tally[votes[i]] = tally.get(votes[i], 0) + 1
        top = max(tally.values(), default=0)
        winners = [vote for vote, n in tally.items() if n == top]
        if winners:
            total += Fraction(sum(correct[vote] for vote in winners), len(winners))
        count += 1
    return float(total / count)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_equals_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        flags = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(flags, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)
            assert pass_hat_k(n, c, k) == pytest.approx(sum(all(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_published_values():
    assert [round(pass_at_k(16, 3, k), 6) for k in (1, 2, 4, 8, 16)] == [0.1875, 0.35, 0.607143, 0.9, 1.0]
    assert pass_at_k(10_000, 1, 64) == pytest.approx(0.0064, abs=1e-12)  # no overflow at sizes where C(n, k) exceeds a float


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    for metric in (pass_at_k, pass_hat_k):
        with pytest.raises(ValueError, match=f"{metric.__name__}: "):
            metric(n, c, k)


def test_cons_at_k_ignores_missing_answers_and_splits_ties():
    votes, right = ["4", "4", "5", None], [True, True, False, False]
    assert [cons_at_k(votes, right, k) for k in (1, 2, 3, 4)] == pytest.approx([0.5, 2 / 3, 0.75, 1.0], abs=1e-12)
    assert cons_at_k(["5", None, None, "4", "4"], [False, False, False, True, True]) == 1.0
    assert cons_at_k(["4", "5"], [True, False]) == 0.5
    assert cons_at_k([None, None], [False, False]) == 0.0
    assert cons_at_k([None, "4"], [False, True], 1) == 0.5


@pytest.mark.parametrize("seed", range(12))
def test_cons_at_k_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    votes = [None if v == 0 else int(v) for v in rng.integers(0, 2 + seed % 4, n)]
    correct = {vote: bool(rng.integers(2)) for vote in set(votes)}
    flags = [vote is not None and correct[vote] for vote in votes]
    for k in range(1, n + 1):
        assert cons_at_k(votes, flags, k) == pytest.approx(brute_force_vote(votes, correct, k), abs=1e-12)
    assert cons_at_k(votes, flags) == pytest.approx(cons_at_k(votes, flags, n), abs=1e-12)


def test_cons_at_k_does_not_enumerate_subsets():
    votes = [i % 9 for i in range(64)]  # C(64, 16) is 4.9e14
    value = cons_at_k(votes, [vote == 0 for vote in votes], 16)
    assert 1 / 9 < value < 0.2  # class 0 has 8 votes, the others 7
    assert sum(cons_at_k(votes, [vote == v for vote in votes], 16) for v in range(9)) == pytest.approx(1.0, abs=1e-12)


def test_cons_at_k_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="2 votes but 1 flags"):
        cons_at_k(["4", "5"], [True])
    with pytest.raises(ValueError, match="k is 3"):
        cons_at_k(["4", "5"], [True, False], 3)


# ---- Elo rating


def log_likelihood(rating, d, n, c):
    p = 1 / (1 + 10 ** ((d - rating) / 400))
    return float((c * np.log(p) + (n - c) * np.log1p(-p)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_rating_is_the_maximum_of_the_likelihood(seed):
    rng = np.random.default_rng(seed)
    d, n = rng.uniform(800, 3000, 20), rng.integers(1, 9, 20)
    c = rng.binomial(n, 1 / (1 + 10 ** ((d - 1700) / 400)))
    found = elo_rating(d, n, c)
    grid = np.arange(500, 3300, 0.05)
    best = grid[np.argmax([log_likelihood(r, d, n, c) for r in grid])]
    assert found.value == pytest.approx(best, abs=0.06) and found.bound == ""


def test_rating_of_even_odds_is_the_problems_own():
    assert elo_rating([1500], [2], [1]).value == pytest.approx(1500, abs=1e-6)
    assert elo_rating([1500], [11], [10]).value == pytest.approx(1900, abs=1e-6)  # 10 to 1 is 400 points
    assert elo_rating([1000, 2000], [1, 1], [1, 0]).value == pytest.approx(1500, abs=1e-6)


def test_rating_has_a_bound_where_there_is_no_maximum():
    above, below = elo_rating([1500, 1500], [5, 5], [5, 5]), elo_rating([1500, 1500], [5, 5], [0, 0])
    assert (above.bound, below.bound) == ("at least", "at most") and above.standard_error is None
    assert above.value - 1500 == pytest.approx(400 * np.log10(19), abs=1e-6) and 1500 - below.value == pytest.approx(400 * np.log10(19), abs=1e-6)
    for wrong in (([], [], []), ([1], [0], [0]), ([1], [2], [3]), ([float("nan")], [1], [1]), ([1, 2], [1], [1])):
        with pytest.raises(ValueError, match="elo_rating"):
            elo_rating(*wrong)


def test_rating_error_covers_repeated_draws():
    draws = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        d = rng.uniform(1000, 2400, 50)
        skill = 1700 + rng.normal(0, 150, 50)  # attempts at one problem go together
        draws.append(elo_rating(d, [8] * 50, rng.binomial(8, 1 / (1 + 10 ** ((d - skill) / 400)))))
    spread, stated = np.std([r.value for r in draws]), np.mean([r.standard_error for r in draws])
    assert 0.8 < stated / spread < 1.25
    assert np.mean([r.value for r in draws]) == pytest.approx(1700, abs=15)


def test_score_metrics_by_hand():
    scores = [[1.0, 0.5, None, 1.0], [0.0, 0.0, 0.0, 1.0], [None, None, None, None]]
    votes = [["a", "b", None, "a"], ["b", "b", "b", "a"], ["x"] * 4]
    result = score_metrics(scores, votes, ks=(1, 2, 4, 8), errors=True)
    assert result["pass@1"] == 0.375 and result["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2) and result["pass@4"] == 1.0
    assert result["cons@4"] == 0.5 and result["cons@4_se"] == pytest.approx(0.5) and result["pass@4_se"] == 0.0
    assert "pass@8" not in result and "cons@4" not in score_metrics(scores) and score_metrics([[None]]) == {}


def test_reflection_rate_counts_whole_words():
    assert reflection_rate(["so 3 Wait 4", "waiter", "I made a MISTAKE.", "butter", "检查", "等于 4", "3 等 4", ""]) == 4 / 8
    assert reflection_rate(["hmm no"], words=("hmm",)) == 1.0
    assert reflection_rate([]) == 0.0 and reflection_rate(["wait"], words=()) == 0.0


def group(texts, answer="4", id=0, language="en", finish="stop", domain="reasoning", **metadata):
    problem = Problem("q", answer, id, "t", domain, language, metadata=metadata)
    return [Sample(problem, text, np.arange(len(text.split())), np.zeros(len(text.split()), np.float32), finish) for text in texts]


def evaluated(*groups):
    scores = score_groups(groups)
    return evaluate_samples(groups, scores, vote_groups(groups, scores))


def test_evaluate_samples_by_hand():
    right, wrong = "<think> so wait 检查 </think> <answer> 4 </answer>", "<answer> 5 </answer>"
    groups = [
        group([right, right, right, wrong]),
        group([wrong, "none", "none", right], id=1, finish="length"),
        group(["free"] * 4, answer=None, id=2, domain="general"),
    ]
    result = evaluated(*groups)
    assert result == {
        "pass@1": 0.5,
        "pass@1_se": pytest.approx(0.25),  # per-problem means .75 and .25
        "cons@4": 0.75,  # the second problem's vote is a tie
        "mean_tokens": pytest.approx((8 * 4 + 3 * 2 + 6) / 12),
        "reflection_rate": 4 / 12,
        "format_rate": 4 / 12,
        "language_consistency": pytest.approx((4 * 2 / 3 + 8) / 12),
        "truncated_rate": 4 / 12,
        "num_problems": 3,
        "num_samples": 12,
    }


def test_evaluate_votes_by_equal_answers_not_by_spelling():
    texts = [f"<answer> {a} </answer>" for a in ("0.5", "1/2", "50%", "7", "7")]
    assert evaluated(group(texts, answer="0.5"))["cons@5"] == 1.0


def test_evaluate_takes_uneven_groups_and_another_rule():
    result = evaluated(group(["\\boxed{4}", "\\boxed{5}"], extract="boxed"), group(["\\boxed{4}"], id=1, extract="boxed"))
    assert result["pass@1"] == 0.75 and result["cons@1"] == 0.75


def test_evaluate_without_answers_measures_the_rest():
    result = evaluated(group(["so", "so 则"], answer=None, domain="general"))
    assert result["pass@1"] is None and result["cons@2"] is None and result["pass@1_se"] is None
    assert result["language_consistency"] == 0.75
    with pytest.raises(ValueError, match="no samples"):
        evaluate_samples([], [], [])


def test_standard_error_is_clustered_by_problem():
    assert clustered_standard_error([[1, 1, 1, 1], [0, 0, 0, 0]]) == pytest.approx(0.5)  # four identical samples add no certainty
    assert clustered_standard_error([[1, 0]]) is None
