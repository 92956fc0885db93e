"""Procedural families of the reasoning-gym package by name:  make_task("gym:chain_sum", min_terms=3, max_terms=5).

Settings that are not ours go to the family's configuration.  Answers are judged by the family's own scorer, which `make` registers for the accuracy
reward under the task's name.  What is guarded, because those scorers read what a policy under training writes:
- nine families execute the answer as Python: their scorers run in the sandbox (_sandboxed.py), refused where the machine has none;
- game_of_life_halting gives 1.0 to any text: refused;  composite can contain any of these: refused;
- any exception of a scorer (prime_factorization raises on junk) is a score of 0, counted in `num_scorer_errors`;
- scores below `junk_threshold` are 0.  Its default of 1.0 makes accuracy 0 or 1, as R1's is; a lower one lets partial credit through, and with it
  what junk earns: up to 0.63 in time_intervals, 0.48 in rectangle_count, 0.3 in spell_backward, 0.25 in propositional_logic (26 junk texts tried);
- the package's default scorer pays for any text that contains the answer ("1 2 3" for 2): equality (rewards/answers.py) stands in for it;
- complex_arithmetic gives 1.0 to "nan", rubiks_cube unrolls "R999999999" in memory, polynomial_equations without real roots gives 1.0 to any text;
- answers longer than 8,192 characters score 0.

Splits are disjoint by the hash of the question: of 8 classes one is test, one validation, 6 train.  Validation and test do not depend on the seed.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import math
import re
from functools import lru_cache
from typing import Literal

from athanor.errors import UserError
from athanor.registry import near_misses
from athanor.rewards.accuracy import scorers
from athanor.rewards.answers import same_answer
from athanor.samples import DOMAINS, SPLITS, Problem
from athanor.sandbox import SandboxError, why_not
from athanor.tasks._sandboxed import ALGEBRA, ARITHMETIC, LITERAL, SandboxedScorer
from athanor.tasks._templates import check_template, render

EXECUTING = LITERAL | ARITHMETIC | ALGEBRA
_CHUNK = 256  # size of a dataset object: what the families that build all their problems at once build
_MAX_DRAWS = 300  # a draw lands in the rarest split once in 8, so 300 misses mean that the family has next to no problems
_MAX_ANSWER_CHARS = 8192


class GymTask:
    """One reasoning-gym family with its configuration."""

    def __init__(self, family: str, config: dict, *, seed: int, name: str, template: str, system: str, language: str, junk_threshold: float,
                 domain: str = "reasoning"):  # fmt: skip
        self.name, self.domain = name, domain
        self.family = family
        self.seed = seed
        self.junk_threshold = junk_threshold
        self.num_scorer_errors = 0
        self._config = config
        self._template, self._system, self._language = template, system, language
        self._dataset = lru_cache(maxsize=64)(self._build_dataset)
        self._free_index = self._takes_any_index()
        self._exact = _has_default_scorer(family)
        self._score_answer = SandboxedScorer(family, config).score if family in EXECUTING else self._score_here
        self._entry = lru_cache(maxsize=8192)(self._draw_entry)

    def size(self, split: str) -> None:
        """None: procedural, without end."""
        self._check_split(split)
        return None

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of a split.  Its answer is None where the family has no single one; the scorer judges those too."""
        entry = self._entry(split, index)
        prompt, extra = render(entry["question"], self._template, system=self._system)
        answer = None if entry["answer"] is None else str(entry["answer"])
        return Problem(prompt, answer, index, self.name, self.domain, self._language, split, {"question": entry["question"], **extra})

    def score(self, answer: str, problem: Problem) -> float:
        """Score of an extracted answer in [0, 1] by the family's scorer, guarded as the module says."""
        entry = self._entry(problem.split, problem.id)
        if problem.metadata.get("question", entry["question"]) != entry["question"]:
            raise ValueError(f"task {self.name}: {problem.split} problem {problem.id} is another task's of the same name; give one of them a `name`")
        if len(answer) > _MAX_ANSWER_CHARS or not self._harmless(answer):
            return 0.0
        if self._exact:
            return float(same_answer(answer, entry["answer"]))
        try:
            value = float(self._score_answer(answer, entry))
        except SandboxError:
            raise
        except Exception as error:  # third-party code on hostile text: whatever it raises, the answer was not recognised as right
            if not self.num_scorer_errors:
                logging.getLogger("athanor.tasks").warning("task %s: first error of its scorer, which counts as 0: %r", self.name, error)
            self.num_scorer_errors += 1
            return 0.0
        if not math.isfinite(value) or value < self.junk_threshold - 1e-9:
            return 0.0
        return min(value, 1.0)

    def _score_here(self, answer: str, entry: dict) -> float:
        return self._dataset(0).score_answer(answer, entry)

    def _harmless(self, answer: str) -> bool:
        if self.family == "complex_arithmetic":
            return "nan" not in "".join(answer.split()).lower()
        if self.family == "rubiks_cube":
            return re.search(r"[0-9]{3}", answer) is None and answer.isascii()
        return True

    def _draw_entry(self, split: str, index: int) -> dict:
        self._check_split(split)
        if index < 0:
            raise IndexError(f"task {self.name}: index is {index}, wanted at least 0")
        stream = self.seed if split == "train" else 0
        for draw in range(_MAX_DRAWS):
            entry = self._item(stream, index, draw)
            # an empty gold answer is no solution at all, which scorers confuse with unreadable text
            if _split_of(entry["question"]) == split and entry["answer"] != "":
                return entry
        raise UserError(
            f"task {self.name}: no {split} problem in {_MAX_DRAWS} draws; this configuration has too few different problems for three splits"
        )

    def _item(self, stream: int, index: int, draw: int) -> dict:
        with contextlib.redirect_stdout(io.StringIO()):  # the family bf prints dots, and our last line of stdout is the result
            if self._free_index:
                return self._dataset(0)[_hash(f"{self.family}/{stream}/{index}/{draw}", 55)]
            chunk, row = divmod(index, _CHUNK)
            return self._dataset(_hash(f"{self.family}/{stream}/{chunk}/{draw}", 31))[row]

    def _build_dataset(self, seed: int):
        import reasoning_gym

        return reasoning_gym.create_dataset(self.family, size=_CHUNK, seed=seed, **self._config)

    def _takes_any_index(self) -> bool:
        # most families seed a generator with seed + index, a few look the index up in a list of `size` problems or hand it to numpy's 32 bits
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._dataset(0)[2**55 - 1]
        except (IndexError, ValueError):
            return False
        return True

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"task {self.name}: unknown split {split!r}, wanted train, validation or test")


def _hash(text: str, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def _split_of(question: str) -> str:
    return {0: "test", 1: "validation"}.get(_hash(question, 3), "train")


def _has_default_scorer(family: str) -> bool:
    from reasoning_gym.dataset import ProceduralDataset

    return _datasets()[family][0].score_answer is ProceduralDataset.score_answer


def families() -> list[str]:
    """Families that can be made, sorted.  Raises UserError when reasoning-gym is not installed."""
    refused = {"game_of_life_halting", "composite"} | (EXECUTING if why_not() else frozenset())
    return sorted(set(_datasets()) - refused)


def _datasets() -> dict:
    try:
        import reasoning_gym  # noqa: F401  (fills the table)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"task gym: the package reasoning-gym cannot be imported ({error}); pip install reasoning-gym") from error
    return DATASETS


def make(
    family: str,
    /,
    *,
    seed: int = 0,
    template: str = "r1_zero",
    system: str = "",
    language: str = "en",
    junk_threshold: float = 1.0,
    domain: Literal[DOMAINS] = "reasoning",
    name: str | None = None,
    **config,
) -> GymTask:
    """Build the task of one family and register its scorer under `name` (default "gym:<family>").  config: the family's own settings."""
    known = _datasets()
    full_name = f"gym:{family}"
    if family in EXECUTING and (reason := why_not()):
        raise UserError(f"task {full_name}: its scorer executes the model's answer as Python, so it needs the sandbox: {reason}")
    if family == "game_of_life_halting":
        raise UserError(f"task {full_name}: its scorer gives 1.0 to any text, so nothing can be learnt from it")
    if family == "composite":
        raise UserError(f"task {full_name}: name its families one by one, so that each one is checked")
    if family not in known:
        raise UserError(f"unknown task {full_name!r}: {near_misses(family, families())}")
    fields = [field.name for field in dataclasses.fields(known[family][1]) if field.name not in ("seed", "size")]
    for key in config:
        if key not in fields:
            own = ["seed", "template", "system", "language", "domain", "name"]
            raise UserError(f"task {full_name}: unknown setting {key!r}: {near_misses(key, [*fields, *own])}")
    if not 0 <= junk_threshold <= 1:
        raise UserError(f"task {full_name}: junk_threshold is {junk_threshold}, wanted 0 to 1")
    check_template(template)
    try:
        task = GymTask(
            family, config, seed=seed, name=name or full_name, template=template, system=system, language=language, junk_threshold=junk_threshold,
            domain=domain,
        )
    except Exception as error:  # the family's own checks are assertions, and whatever its constructor raises
        raise UserError(f"task {full_name}: configuration refused: {str(error) or type(error).__name__}") from error
    scorers[task.name] = task.score
    return task
