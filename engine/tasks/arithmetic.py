"""Chains of small sums: `User: 3 + 1 - 2 + 7 ? Assistant:` worked from left to right, every running total one digit.

Small enough that a quarter-million parameters learn the 90 digit facts in a minute, long enough that a direct guess is near chance while rewriting
the chain step by step (`4 - 2 + 7 so 2 + 7 so 9`) is nearly sure.  The corpus is of mixed quality by design: mostly direct guesses, a minority of
worked traces whose steps slip with probability `slip`, a few that notice (`wait`) or verify (`check` ... `ok`), in two languages that sometimes mix.
So the reflective pattern is in the corpus, and RL selects it.

Splits are disjoint by construction: a hash of the chain decides which split it belongs to, and every writer draws chains of one split only.
"""

import hashlib
import random
from dataclasses import dataclass, field

from athanor.errors import UserError
from athanor.samples import Problem

LANGUAGES = {
    "en": {"so": "so", "wait": "wait", "check": "check", "ok": "ok"},
    "zh": {"so": "则", "wait": "等", "check": "查", "ok": "对"},
}
SYMBOLS = [*"0123456789+-?", *(word for words in LANGUAGES.values() for word in words.values())]
SYMBOLS += ["<think>", "</think>", "<answer>", "</answer>", "User:", "Assistant:"]
SPLITS = {0: "test", 1: "validation"}  # of 16 hash classes; the other 14 are train


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """Chains of `min_terms`..`max_terms` distinct digits 1-9 with running totals in 0-9; every draw is a pure function of (seed, stream, index)."""

    name: str = "chain"
    seed: int = 0
    min_terms: int = 4
    max_terms: int = 5
    slip: float = 0.35
    """Probability that a step of a corpus trace is wrong (where a wrong digit leaves the rest of the chain workable)."""
    written_slip: float = 0.08
    """The same for the first pass of a written example, so that its check sometimes finds something."""
    worked: float = 0.35
    """Share of corpus documents that are lessons: worked chains, or checks of worked chains, and nothing else."""
    verified: float = 0.4
    """Share of the lessons that are checks."""
    traces: float = 0.025
    """Share of question documents that are worked traces without reflection."""
    reflections: float = 0.07
    """Share of question documents that are worked traces with reflection."""
    guess_right: float = 0.08
    """Accuracy of direct guesses; a wrong one is any other digit, so that 0.1 is chance and a random walk of the weights gains nothing."""
    mixing: float = 0.15
    """Probability that a connective of a corpus document is in the other language."""
    domain: str = "reasoning"
    symbols: tuple[str, ...] = tuple(SYMBOLS)
    _drawn: dict[str, list[list[str]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Distinct held-out chains so far, per split."""

    def size(self, split: str) -> int | None:
        return None

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of a split; validation and test do not depend on the seed."""
        if split == "train":
            terms = self._chain(random.Random(f"{self.name}/{split}/{self.seed}/{index}"), split, self.min_terms)
        else:
            terms = self._held_out(split, index)
        return Problem(f"User: {' '.join(terms)} ? Assistant:", str(_result(terms)), index, self.name, split=split, metadata={"terms": terms})

    def corpus(self, index: int) -> tuple[str, str]:
        """Pre-training document `index`: (prompt without loss, text with loss)."""
        rng = random.Random(f"{self.name}/corpus/{self.seed}/{index}")
        words = _Words(rng, "en" if rng.random() < 0.6 else "zh", self.mixing)
        if rng.random() < self.worked:
            return self._lesson(rng, words)
        terms = self._chain(rng, "train", 2)
        kind = rng.random()
        if kind < self.traces:
            lines, answer = self._trace(rng, terms, words, self.slip)
            return self._document(rng, terms, lines, answer, well_formed=0.85, no_answer=0.08)
        if kind < self.traces + self.reflections:
            lines, answer = self._inline(rng, terms, words) if rng.random() < 0.3 else self._checked(rng, terms, words, self.slip, 0.02)
            return self._document(rng, terms, lines, answer, well_formed=0.85, no_answer=0.08)
        answer = str(_result(terms)) if rng.random() < self.guess_right else _wrong(rng, _result(terms))
        return self._document(rng, terms, [words("so"), answer], answer, well_formed=0.5, no_answer=0.25)

    def _lesson(self, rng: random.Random, words: "_Words") -> tuple[str, str]:
        """What a step is, and what a check is, apart from what it means to answer a question: no loss on any slip.

        Either a chain worked without slips, or a first pass as the prompt (half of them wrong) and the check of it as the text.
        """
        terms = self._chain(rng, "train", 2)
        right, answer = self._trace(rng, terms, words, 0.0)
        start = f"{' '.join(terms)} {words('so')}"
        if rng.random() >= self.verified:
            return start, " ".join(right)
        first, found = self._trace(rng, terms, words, self.slip if rng.random() < 0.75 else 0.0)
        second, _ = self._trace(rng, terms, words, 0.0)
        verdict = [words("ok")] if found == answer else [words("wait"), *self._trace(rng, terms, words, 0.0)[0]]
        return f"{start} {' '.join(first)} {words('check')}", " ".join([*second, *verdict])

    def written(self, index: int) -> tuple[Problem, str]:
        """A templated long chain of thought in one language, always right in the end: worked, checked, and redone when the passes disagree."""
        rng = random.Random(f"{self.name}/written/{self.seed}/{index}")
        problem = self.problem("train", 10**9 + index)
        terms = problem.metadata["terms"]
        lines, answer = self._checked(rng, terms, _Words(rng, problem.language, 0.0), self.written_slip, 0.0)
        return problem, f"<think> {' '.join(lines)} </think> <answer> {answer} </answer>"

    def competence(self, index: int) -> tuple[str, str]:
        """Validation prompt that has begun to reason, and the right answer of its greedy continuation: can the model do it if it reasons?

        Even indices give the first step of the first pass; odd ones a whole right pass and the first step of its check.
        """
        problem = self.problem("validation", index)
        terms = problem.metadata["terms"]
        start = _step(terms)
        if index % 2:
            words = _Words(random.Random(0), problem.language, 0.0)
            first, _ = self._trace(words.rng, terms, words, 0.0)
            start = [*first, words("check"), *start]
        return f"{problem.prompt} <think> {' '.join(start)}", problem.answer

    def _held_out(self, split: str, index: int) -> list[str]:
        """The `index`-th distinct chain of a fixed stream: no held-out problem is drawn twice."""
        chains = self._drawn.setdefault(split, [])
        while len(chains) <= index:
            rng = random.Random(f"{self.name}/{split}/{len(chains)}")
            for _ in range(1000):
                terms = self._chain(rng, split, self.min_terms)
                if terms not in chains:
                    break
            else:
                raise UserError(f"task {self.name}: problem {index} of {split} asked for, but it has about {len(chains)} distinct ones")
            chains.append(terms)
        return chains[index]

    def _chain(self, rng: random.Random, split: str, min_terms: int, max_terms: int = 0) -> list[str]:
        while True:
            digits = rng.sample(range(1, 10), rng.randint(min_terms, max_terms or self.max_terms))
            total, terms = digits[0], [str(digits[0])]
            for digit in digits[1:]:
                signs = [sign for sign in (1, -1) if 0 <= total + sign * digit <= 9]
                if not signs:
                    break
                sign = rng.choice(signs)
                total += sign * digit
                terms += ["+" if sign > 0 else "-", str(digit)]
            else:
                if split_of(" ".join(terms)) == split:
                    return terms

    def _trace(self, rng: random.Random, terms: list[str], words: "_Words", slip: float) -> tuple[list[str], str]:
        """Rewrite the chain one operation at a time; a slipped result is carried on."""
        lines: list[str] = []
        while len(terms) > 1:
            terms = _step(terms)
            if rng.random() < slip:
                terms = _slipped(rng, terms)
            lines += [words("so"), *terms] if lines else terms
        return lines, terms[0]

    def _inline(self, rng: random.Random, terms: list[str], words: "_Words") -> tuple[list[str], str]:
        """A trace in which each slip is noticed at once and the step redone."""
        lines: list[str] = []
        while len(terms) > 1:
            right = _step(terms)
            lines += [words("so")] if lines else []
            if rng.random() < self.slip:
                lines += [*_slipped(rng, right), words("wait")]
            lines += right
            terms = right
        return lines, terms[0]

    def _checked(self, rng: random.Random, terms: list[str], words: "_Words", slip: float, careful_slip: float) -> tuple[list[str], str]:
        """A first pass with slips, a careful second one, and a third when they disagree."""
        first, answer = self._trace(rng, terms, words, slip)
        second, checked = self._trace(rng, terms, words, careful_slip)
        lines = [*first, words("check"), *second]
        if checked == answer:
            return [*lines, words("ok")], answer
        third, answer = self._trace(rng, terms, words, careful_slip)
        return [*lines, words("wait"), *third], answer

    def _document(
        self, rng: random.Random, terms: list[str], lines: list[str], answer: str, *, well_formed: float, no_answer: float
    ) -> tuple[str, str]:
        prompt, thought, draw = f"User: {' '.join(terms)} ? Assistant:", " ".join(lines), rng.random()
        if draw < well_formed:
            return prompt, f"<think> {thought} </think> <answer> {answer} </answer>"
        if draw < well_formed + no_answer:
            return prompt, f"<think> {thought} </think>"
        return prompt, f"{thought} <answer> {answer} </answer>" if rng.random() < 0.5 else thought


make = ArithmeticTask


class _Words:
    """Connectives in one language, sometimes in the other."""

    def __init__(self, rng: random.Random, language: str, mixing: float):
        self.rng, self.language, self.mixing = rng, language, mixing

    def __call__(self, word: str) -> str:
        language = self.language
        if self.mixing and self.rng.random() < self.mixing:
            language = "zh" if language == "en" else "en"
        return LANGUAGES[language][word]


def split_of(chain: str) -> str:
    return SPLITS.get(hashlib.sha256(chain.encode()).digest()[0] % 16, "train")


def _step(terms: list[str]) -> list[str]:
    value = int(terms[0]) + int(terms[2]) if terms[1] == "+" else int(terms[0]) - int(terms[2])
    return [str(value), *terms[3:]]


def _totals(terms: list[str]) -> list[int]:
    """All running totals, the first term included."""
    totals = [int(terms[0])]
    for sign, digit in zip(terms[1::2], terms[2::2], strict=True):
        totals.append(totals[-1] + (int(digit) if sign == "+" else -int(digit)))
    return totals


def _result(terms: list[str]) -> int:
    return _totals(terms)[-1]


def _wrong(rng: random.Random, right: int) -> str:
    """Any other digit."""
    return str(rng.choice([digit for digit in range(10) if digit != right]))


def _slipped(rng: random.Random, terms: list[str]) -> list[str]:
    """The first term one or two off, such that the rest still stays within one digit; unchanged where that is impossible."""
    right = int(terms[0])
    near = [[str(d), *terms[1:]] for d in (right - 2, right - 1, right + 1, right + 2) if 0 <= d <= 9]
    possible = [chain for chain in near if all(0 <= total <= 9 for total in _totals(chain))]
    return rng.choice(possible) if possible else terms
