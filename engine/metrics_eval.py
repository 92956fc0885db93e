"""Evaluation metrics over k samples per problem: pass@k, pass^k, cons@k, an Elo rating, and what the R1 report plots beside them.

    pass@k = 1 - C(n-c, k) / C(n, k)          at least one of k right (HumanEval, arXiv 2107.03374)
    pass^k = C(c, k) / C(n, k)                all k right
    cons@k = P(the majority answer of k samples is right)

over all k-subsets of n samples, c of them right.  cons@k: answers vote by equivalence class, a missing answer (None) does not vote, a tie is split
evenly, nothing but missing answers counts 0.  Everything is exact: k < n sums over vote counts with a polynomial product, the C(n, k) subsets are
never listed.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from athanor.rewards.language import language_consistency
from athanor.rewards.response import parse_response
from athanor.samples import Sample

# the reflective words that the R1 report counts, and their Chinese counterparts
REFLECTIVE_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
                    "等", "等等", "等一下", "错误", "然而", "但是", "重试", "验证", "不对", "评估", "查", "检查", "重新")  # fmt: skip


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k of the n samples, c of them right, is right."""
    _check_counts("pass_at_k", n, c, k)
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Probability that all k of the n samples, c of them right, are right (pass^k)."""
    _check_counts("pass_hat_k", n, c, k)
    return comb(c, k) / comb(n, k)


def _check_counts(name: str, n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"{name}: c is {c}, wanted 0 to n ({n})")
    if not 1 <= k <= n:
        raise ValueError(f"{name}: k is {k}, wanted 1 to n ({n})")


def cons_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool | float], k: int | None = None) -> float:
    """Probability that the majority class of k of the votes is right; k = None takes all of them.

    votes: one key per sample, equal keys = equivalent answers (`answer_key`), None = no answer.  correct: per sample; a class whose samples
    disagree (a verifier with partial credit) counts with their mean.  Exact; k < n costs about n * k^2 integer products.
    """
    n = len(votes)
    k = n if k is None else k
    if len(correct) != n:
        raise ValueError(f"cons_at_k: {n} votes but {len(correct)} flags")
    if not 1 <= k <= n:
        raise ValueError(f"cons_at_k: k is {k}, wanted 1 to n ({n})")
    classes: dict[Hashable, list[float]] = {}
    for vote, flag in zip(votes, correct, strict=True):
        if vote is not None:
            classes.setdefault(vote, []).append(float(flag))
    sizes = [len(flags) for flags in classes.values()]
    values = [sum(flags) / len(flags) for flags in classes.values()]
    if not sizes:
        return 0.0
    if k == n:
        winners = [value for size, value in zip(sizes, values, strict=True) if size == max(sizes)]
        return sum(winners) / len(winners)
    total = 0.0
    for i, (size, value) in enumerate(zip(sizes, values, strict=True)):
        if value:
            total += value * _win_probability(size, sizes[:i] + sizes[i + 1 :], n - sum(sizes), k)
    return total


def _win_probability(size: int, rivals: list[int], missing: int, k: int) -> float:
    """Probability over k-subsets that a class of `size` wins, a tie of r + 1 classes counting 1/(r + 1)."""
    wins = 0.0
    n = size + sum(rivals) + missing
    for top in range(1, min(size, k) + 1):
        # ways[r][d]: choices of d votes among the rivals, none above `top` votes and exactly r of them level with it
        room = k - top
        ways = [[1] + [0] * room]
        for rival in rivals:
            grown = [[0] * (room + 1) for _ in range(min(len(ways), room // top) + 1)]
            for r, row in enumerate(ways):
                for drawn, count in enumerate(row):
                    if count == 0:
                        continue
                    for more in range(min(rival, top, room - drawn) + 1):
                        grown[r + (more == top)][drawn + more] += count * comb(rival, more)
            ways = grown
        for r, row in enumerate(ways):
            level = sum(count * comb(missing, room - drawn) for drawn, count in enumerate(row))
            wins += comb(size, top) * level / comb(n, k) / (r + 1)
    return wins


def reflection_rate(texts: Sequence[str], words: Sequence[str] = REFLECTIVE_WORDS) -> float:
    """Share of texts that contain a reflective word: whole words without regard to case.

    Han words of two and more characters count anywhere, as text without spaces has no word boundaries; a single character only where it stands
    alone (等 is "wait" but 等于 is "equals").  0.0 for no texts.
    """
    if not texts or not words:
        return 0.0
    pattern = _word_pattern(tuple(words))
    return sum(pattern.search(text) is not None for text in texts) / len(texts)


@lru_cache
def _word_pattern(words: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(rf"\b{re.escape(w)}\b" if w.isascii() or len(w) == 1 else re.escape(w) for w in words), re.IGNORECASE)


def clustered_standard_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean of per-problem means: samples of one problem are not independent.  None for fewer than two problems."""
    means = [float(np.mean(group)) for group in groups]
    if len(means) < 2:
        return None
    return float(np.std(means, ddof=1) / np.sqrt(len(means)))


def evaluate_samples(
    groups: Sequence[Sequence[Sample]],
    scores: Sequence[Sequence[float | None]],
    votes: Sequence[Sequence[Hashable | None]] | None,
    *,
    words: Sequence[str] = REFLECTIVE_WORDS,
) -> dict:
    """Metrics of groups of samples, one group per problem, of any sizes; scores and votes as for `score_metrics`.

    Returns pass@1 and its problem-clustered standard error pass@1_se, cons@k for k = the smallest group, mean_tokens, reflection_rate, format_rate,
    language_consistency, truncated_rate, num_problems, num_samples.  A right sample has accuracy 1 (partial credit is not right).  Problems without
    gold answers do not enter pass@1 and cons@k; a metric with nothing to measure is None.
    """
    if not groups:
        raise ValueError("evaluate_samples: no samples")
    result = score_metrics(scores, votes)
    k = min(len(group) for group in groups)
    return {"pass@1": None, "pass@1_se": None, f"cons@{k}": None} | result | text_metrics(groups, words=words)


def score_metrics(
    scores: Sequence[Sequence[float | None]],
    votes: Sequence[Sequence[Hashable | None]] | None = None,
    *,
    ks: Sequence[int] = (),
    errors: bool = False,
) -> dict:
    """pass@1 with its problem-clustered standard error pass@1_se, pass@k for each k of `ks`, and cons@k, k being the smallest group.

    scores: per problem, per sample; 1 = right, less = wrong, None = not judged, which counts as wrong beside judged samples.  Problems without any
    judged sample do not enter; {} when there is none left.  votes: as in `cons_at_k`; None = no cons@k.  errors: standard errors of the others too.
    """
    judged = [i for i, group in enumerate(scores) if any(score is not None for score in group)]
    if not judged:
        return {}
    right = [[float(score is not None and score >= 1.0) for score in scores[i]] for i in judged]
    k = min(len(group) for group in right)
    result = {"pass@1": float(np.mean([np.mean(group) for group in right])), "pass@1_se": clustered_standard_error(right)}
    others = {f"pass@{j}": [pass_at_k(len(group), int(sum(group)), j) for group in right] for j in ks if 1 < j <= k}
    if votes is not None:
        others[f"cons@{k}"] = [cons_at_k(votes[i], group, k) for i, group in zip(judged, right, strict=True)]
    for name, values in others.items():
        result[name] = float(np.mean(values))
        if errors:
            result[f"{name}_se"] = clustered_standard_error([[value] for value in values])
    return result


def text_metrics(groups: Sequence[Sequence[Sample]], *, words: Sequence[str] = REFLECTIVE_WORDS) -> dict:
    """What the responses look like, without judging their answers."""
    samples = [sample for group in groups for sample in group]
    return {
        "mean_tokens": float(np.mean([sample.num_tokens for sample in samples])),
        "reflection_rate": reflection_rate([sample.text for sample in samples], words),
        "format_rate": float(np.mean([parse_response(s.text, prompt=s.problem.prompt).well_formed for s in samples])),
        "language_consistency": float(np.mean([language_consistency(s.text, s.problem.language, prompt=s.problem.prompt) for s in samples])),
        "truncated_rate": float(np.mean([sample.finish == "length" for sample in samples])),
        "num_problems": len(groups),
        "num_samples": len(samples),
    }


@dataclass(frozen=True)
class Rating:
    """Elo rating of a solver."""

    value: float
    standard_error: float | None  # None where `bound` is set
    bound: str = ""  # "at least" when every attempt was right, "at most" when none was


def elo_rating(ratings: Sequence[float], attempts: Sequence[int], solved: Sequence[float]) -> Rating:
    """Rating r that makes the results likeliest when a problem of rating d is solved with probability  P(r, d) = 1 / (1 + 10^((d - r) / 400)).

    That is Elo's expected score as Codeforces uses it (codeforces.com/blog/entry/20762: a problem's rating is that of the solver who has even odds).
    With n attempts per problem, c of them right, the likelihood is concave in r and its maximum solves  sum n P(r, d) = sum c  (bisection).
    The standard error is the clustered (sandwich) one, since attempts at one problem are not independent:
        sqrt(sum (c - n P)^2) / (s * sum n P (1 - P)),  s = ln(10) / 400.
    When all (no) attempts are right the maximum is at infinity: the rating is then where half an attempt fails (succeeds), and `bound` says so.
    Not the report's own procedure, which ranks a model among the participants of ten contests; comparable in scale, not to the point.
    Raises ValueError for empty or impossible counts.
    """
    d, n, c = (np.asarray(values, np.float64) for values in (ratings, attempts, solved))
    if not len(d) or d.shape != n.shape or d.shape != c.shape or not np.isfinite(d).all() or (n < 1).any() or (c < 0).any() or (c > n).any():
        counts = f"{len(d)} ratings, {len(n)} attempts, {len(c)} solved"
        raise ValueError(f"elo_rating: {counts}; wanted as many of each, finite, attempts >= 1, 0 <= solved <= attempts")
    bound = "at least" if c.sum() == n.sum() else "at most" if c.sum() == 0 else ""
    target = c.sum() + {"at least": -0.5, "at most": 0.5, "": 0.0}[bound]

    def expected(rating: float) -> np.ndarray:
        return 1 / (1 + 10.0 ** np.clip((d - rating) / 400, -300, 300))

    reach = 400 * (np.log10(2 * n.sum()) + 1)  # beyond it even the nearest problem is solved (missed) more often than the target asks
    low, high = d.min() - reach, d.max() + reach
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (n * expected(middle)).sum() < target else (low, middle)
    p = expected(low)
    slope = np.log(10) / 400 * (n * p * (1 - p)).sum()
    error = None if bound or len(d) < 2 else float(np.sqrt(((c - n * p) ** 2).sum()) / slope)
    return Rating(float(low), error, bound)
