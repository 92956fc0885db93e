"""Decontamination by word n-grams, as the R1 report does it (arXiv 2501.12948 v2, D.1): a text that shares 10 consecutive words with a question or
reference solution of an evaluation set is contaminated.

Words: runs of letters and digits without regard to case; each Han, kana or Hangul character is one.  A question of fewer words than n has no n-gram:
it matches a text that consists of exactly its words.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from athanor.errors import UserError
from athanor.samples import Problem
from athanor.tasks import Task, make_task

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]+")


def words_of(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


class ReferenceNgrams:
    """n-grams of named evaluation sets."""

    def __init__(self, n: int = 10):
        if n < 1:
            raise ValueError(f"ReferenceNgrams: n is {n}, wanted at least 1")
        self.n = n
        self.names: list[str] = []
        self._sets: dict[tuple[str, ...], set[int]] = {}  # n-gram or whole short text -> sets that have it

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Add the texts of one set."""
        number = len(self.names)
        self.names.append(name)
        for text in texts:
            words = words_of(text)
            if not words:
                continue
            for gram in self._grams(words) or [tuple(words)]:
                self._sets.setdefault(gram, set()).add(number)

    def found_in(self, *texts: str) -> list[str]:
        """Names of the sets that share an n-gram with one of these texts, in the order in which the sets were added."""
        found: set[int] = set()
        for text in texts:
            words = words_of(text)
            if len(words) < self.n:
                found |= self._sets.get(tuple(words), set())
            for gram in self._grams(words):
                found |= self._sets.get(gram, set())
        return [self.names[i] for i in sorted(found)]

    def _grams(self, words: list[str]) -> list[tuple[str, ...]]:
        return list(zip(*(words[i:] for i in range(self.n)), strict=False))


def question_of(problem: Problem) -> str:
    """The bare question, without the template, which all problems share."""
    return str(problem.metadata.get("question") or problem.prompt)


def evaluation_ngrams(sources: Iterable[str], tasks: dict[str, Task], n: int = 10) -> ReferenceNgrams:
    """n-grams of evaluation sets: each source is a key of `tasks` (its test split) or a data file with a question per row (task "jsonl").

    Questions, and solutions where a set has them.  Raises UserError on an unknown source, a file that cannot be read, or a procedural task.
    """
    ngrams = ReferenceNgrams(n)
    for source in sources:
        if source in tasks:
            task = tasks[source]
        elif Path(source).is_file():
            task = make_task("jsonl", test=source, template="raw")
        else:
            raise UserError(f"decontamination: {source!r} is neither a task of this recipe nor a file; tasks: {', '.join(tasks) or 'none'}")
        size = task.size("test")
        if size is None:
            raise UserError(f"decontamination: task {source} is procedural, so its splits are disjoint already; wanted a task of files, or a file")
        ngrams.add(source, (text for i in range(size) for text in _reference_texts(task.problem("test", i), n)))
    return ngrams


def _reference_texts(problem: Problem, n: int) -> list[str]:
    solution = problem.metadata.get("solution")
    return [question_of(problem), *([solution] if isinstance(solution, str) and len(words_of(solution)) >= n else [])]
