"""The scorers of reasoning-gym that execute the answer as Python, run where that does no harm.

Two walls, because these scorers evaluate the answer in the middle of the comparison, where `[oracle_answer]` or a call could decide its result:
- a grammar that lets no code through: literals for the four families that want a matrix or a list, numbers and operators for the arithmetic games,
  the same with single letters and the usual functions for algebra.  What does not pass is not evaluated;
- the sandbox, for what the grammar allows and nobody can afford (`9**9**9`): each answer in a process of its own with a time and a memory limit.
"""

import ast
import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from athanor.sandbox import Limits, Sandbox
from athanor.sandbox.values import pack, unpack

LITERAL = frozenset("string_insertion binary_matrix spiral_matrix n_queens".split())
ARITHMETIC = frozenset("countdown puzzle24".split())
ALGEBRA = frozenset("simple_integration intermediate_integration polynomial_multiplication".split())

_LIMITS = Limits(cpu_s=3, wall_s=10, memory_mb=1536, disk_mb=16, output_kb=64, processes=32)
_FUNCTIONS = frozenset("sin cos tan exp log ln sqrt asin acos atan sinh cosh tanh Abs pi E C X Y Z".split())
_PROGRAM = """
def score(family, config, answer, entry):
    import reasoning_gym

    return float(reasoning_gym.create_dataset(family, size=1, seed=0, **config).score_answer(answer, entry))
"""


def passes_grammar(family: str, answer: str) -> bool:
    """May the family's scorer evaluate this answer?"""
    if family in LITERAL:
        try:
            ast.literal_eval(answer.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False
        return True
    if family in ARITHMETIC:
        return re.fullmatch(r"[0-9+\-*/(). \n]+", answer) is not None
    words = re.findall(r"[A-Za-z]+", answer)
    return (
        re.fullmatch(r"[A-Za-z0-9+\-*/^(). \n]+", answer) is not None
        and re.search(r"\.\s*[A-Za-z]|[0-9][A-Za-z]", answer) is None
        and all(word in _FUNCTIONS or re.fullmatch("[a-z]", word) for word in words)
    )


class SandboxedScorer:
    """One family's scorer.  The sandbox is opened by the first answer that needs it (a few seconds: it imports reasoning-gym) and kept.

    Safe to call from several threads; one answer at a time.  Raises UserError when this machine cannot isolate programs.
    """

    def __init__(self, family: str, config: dict):
        import reasoning_gym
        import sympy

        folders = dict.fromkeys(str(Path(module.__file__).parents[1]) for module in (reasoning_gym, sympy))
        self._family, self._config = family, config
        self._sandbox = Sandbox(limits=_LIMITS, workers=1, packages=tuple(folders))
        self._thread = ThreadPoolExecutor(1)  # a sandbox ends with the thread that opened it
        self._opened = contextlib.ExitStack()
        self._box = None

    def score(self, answer: str, entry: dict) -> float:
        """The family's score of an answer.  Raises ValueError when the scorer raises, takes too long or too much memory; SandboxError."""
        if answer == entry["answer"] or answer in entry["metadata"].get("valid_answers", ()):
            return 1.0
        if not passes_grammar(self._family, answer):
            return 0.0
        return self._thread.submit(self._run, answer, entry).result()

    def _run(self, answer: str, entry: dict) -> float:
        if self._box is None:
            opened = self._sandbox.open(_PROGRAM, entry="score", preload="import reasoning_gym, sympy")
            self._box = self._opened.enter_context(opened)
        metadata = {}
        for name, value in entry["metadata"].items():
            with contextlib.suppress(TypeError):  # symbolic expressions stay outside: no scorer reads them
                pack(value)
                metadata[name] = value
        plain = {"question": entry["question"], "answer": entry["answer"], "metadata": metadata}
        result = None
        try:
            result = self._box.run(pack(((self._family, self._config, answer, plain), {})))
        finally:
            if result is None or result.exit_code is None:
                self._box = None
                self._opened.close()
        if result.status != "ok":
            raise ValueError(f"the scorer ended with {result.status}")
        outcome = unpack(result.stdout)
        if "return" not in outcome:
            raise ValueError(f"the scorer raised {outcome['raise']}: {outcome['message']}")
        return outcome["return"]


