"""Code reward of R1: 1 when the answer's program passes all tests of its problem, otherwise 0 (or, `fraction`, the share of tests that it passes).

The program is the last complete fenced block of the answer - after the chain of thought, inside the <answer> block where there is one; an <answer>
block without a fence is taken whole.  ```cpp, ```c++ and ```cc are C++ (g++ -O2 -std=gnu++17), everything else is Python unless it has an #include.
The tests come from the problem's metadata (code_tests.py lists the formats); no tests = None.

Programs run in athanor.sandbox and nowhere else.  The verdict is made out of their reach: what they print or return leaves the sandbox as data and is
compared here with outputs that never go in; check(candidate) runs in a second sandbox, to which only the returned values go, rebuilt from plain
types.  So an early exit, a changed interpreter, an `__eq__` that is always true or a printed verdict gain nothing.  What stays possible is to answer
right without computing: a program may know the outputs by heart.

Three kinds of outcome.  Score: the program was judged; whatever it does - crash, use too much memory, print nothing - is its own fault and gives 0.
Timeout: the same, but it ran out of time (`Verdict.status` tells them apart).  Error: nothing is known - the sandbox failed (SandboxError) or the
problem's tests are unusable (UserError); these raise and are never a 0.
"""

import json
import re
import time
from dataclasses import dataclass, field, replace

from athanor.errors import UserError
from athanor.rewards.base import Reward
from athanor.rewards.code_tests import Tests, complete_stub, parse_tests, program_for_check, same_output, same_value
from athanor.rewards.response import parse_response
from athanor.samples import Problem, Sample
from athanor.sandbox import Limits, Result, Sandbox
from athanor.sandbox.values import pack

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*$")
_CPP = {"cpp", "c++", "cc", "cxx", "g++"}


@dataclass(frozen=True)
class Verdict:
    """How a program did."""

    status: str  # "score", or "timeout": a test or the whole ran out of time
    score: float  # in [0, 1]
    num_passed: int
    num_run: int  # all-or-nothing stops at the first failure
    num_tests: int  # a check(candidate) is one test
    detail: str  # why the first failing test failed


def extract_program(text: str, *, prompt: str = "") -> tuple[str, str] | None:
    """Program of a response and the tag of its fence ("" = none), or None.  A fence that is never closed holds no program: the text was cut."""
    response = parse_response(text, prompt=prompt)
    blocks = _fenced_blocks(response.summary if response.answer is None else response.answer)
    if blocks:
        return blocks[-1]
    return (response.answer, "") if response.answer and "```" not in response.answer else None


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    blocks, fence, tag, lines = [], None, "", []
    for line in text.splitlines():
        match = _FENCE.match(line)
        if fence is None:
            if match:
                fence, tag, lines = match[1], match[2].lower(), []
        elif match and match[1].startswith(fence) and not match[2]:
            blocks.append(("\n".join(lines) + "\n", tag))
            fence = None
        else:
            lines.append(line)
    return blocks


@dataclass(frozen=True)
class Code(Reward):
    """1.0 for a program that passes all tests, 0.0 for one that does not and for an answer without one, None without tests."""

    __name__ = "code"
    runs_in = "thread"  # it waits for processes of its own, each under a deadline
    fraction: bool = False
    """Share of passed tests instead of all or nothing.  A check(candidate) is all or nothing in any case."""
    timeout_s: float = 5.0
    """CPU seconds per test, where the problem has no time_limit; wall-clock time is twice that and 2 s more."""
    memory_mb: int = 512
    """Memory per test, where the problem has no memory_limit."""
    total_s: float = 60.0
    """Wall-clock seconds for all tests of one answer, compiling (at most 60 s) and waiting for a free sandbox not included."""
    tolerance: float = 1e-6
    """For numbers that the wanted output writes with a decimal point: relative, or absolute below 1."""
    workers: int = 0
    """Programs at a time; 0 = one per usable CPU core."""
    unsafe: bool = False
    """Run programs without isolation where the machine offers none.  Whatever the model writes then has the rights of this user."""
    sandbox: Sandbox = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("timeout_s", "memory_mb", "total_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"reward code: {name} is {getattr(self, name)}, wanted more than 0")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"reward code: tolerance is {self.tolerance}, wanted 0 to 1")
        object.__setattr__(self, "sandbox", Sandbox(limits=self._limits({}), workers=self.workers, unsafe=self.unsafe))

    def _limits(self, metadata: dict) -> Limits:
        seconds = float(metadata.get("time_limit") or self.timeout_s)
        return Limits(cpu_s=seconds, wall_s=2 * seconds + 2, memory_mb=int(metadata.get("memory_limit") or self.memory_mb))

    def score(self, sample: Sample, problem: Problem) -> float | None:
        verdict = self.judge(sample, problem)
        return None if verdict is None else verdict.score

    def judge(self, sample: Sample, problem: Problem) -> Verdict | None:
        """Run the answer's program against the problem's tests.  None without tests.  Raises SandboxError and UserError (see the module)."""
        tests = parse_tests(problem.metadata)
        if tests is None:
            return None
        num_tests = max(1, len(tests.inputs))
        found = extract_program(sample.text, prompt=problem.prompt)
        if found is None:
            return Verdict("score", 0.0, 0, 0, num_tests, "no program in the answer")
        program, tag = found
        tag = tag or str(problem.metadata.get("language") or "").lower()
        language = "cpp" if tag in _CPP or (not tag and "#include" in program) else "python"
        if language == "cpp" and tests.kind != "stdio":
            return Verdict("score", 0.0, 0, 0, num_tests, f"C++, but the tests call the Python function {tests.entry}")
        limits = self._limits(problem.metadata)
        if tests.kind == "check":
            return self._check(program, tests, limits)
        return self._run_tests(program, language, tests, limits)

    def _check(self, program: str, tests: Tests, limits: Limits) -> Verdict:
        checked = self.sandbox.check(
            program_for_check(program, tests),
            setup=complete_stub(tests.setup),
            test=tests.test,
            entry=tests.entry,
            limits=limits,
            total_s=self.total_s,
        )
        if checked.status == "unusable":
            raise UserError(f"reward code: the problem's test cannot be loaded: {checked.detail}")
        passed = checked.status == "pass"
        status = "timeout" if checked.status == "timeout" else "score"
        return Verdict(status, float(passed), int(passed), 1, 1, "" if passed else checked.detail)

    def _run_tests(self, program: str, language: str, tests: Tests, limits: Limits) -> Verdict:
        passed = run = 0
        status, detail = "score", ""
        with self.sandbox.open(program, language=language, limits=limits, entry=tests.entry) as box:
            deadline = time.monotonic() + self.total_s
            for given, wanted in zip(tests.inputs, tests.outputs, strict=True):
                left = deadline - time.monotonic()
                if left <= 0:
                    status, detail = "timeout", detail or f"{self.total_s:g} s for all tests are over"
                    break
                result = box.run(_stdin(tests, given), replace(limits, wall_s=min(limits.wall_s, left)))
                why = self._why_wrong(result, wanted, tests)
                run += 1
                passed += not why
                if result.status == "timeout":
                    status = "timeout"
                detail = detail or why
                # a sandbox that had to be ended as a whole, or a program that never compiled, fails the rest as well
                if why and (not self.fraction or result.exit_code is None or result.status == "compile"):
                    break
        total = len(tests.inputs)
        score = passed / total if self.fraction else float(passed == total)
        return Verdict(status, score, passed, run, total, detail)

    def _why_wrong(self, result: Result, wanted, tests: Tests) -> str:
        """Why a test failed, or "" for a pass."""
        if result.status != "ok":
            return f"{result.status}: {result.stderr.strip()[-300:]}"
        if tests.kind == "stdio":
            return "" if same_output(result.stdout, wanted, tolerance=self.tolerance) else f"wrong output {result.stdout[:100]!r}"
        try:
            outcome = dict(json.loads(result.stdout)["d"][:2])  # no more: keys that all collide would take minutes
            if "raise" in outcome:
                return f"raised {str(outcome['raise'])[:60]}"
            good = same_value(outcome["return"], wanted, tolerance=self.tolerance, wrapped=tests.wrapped)
        except (ValueError, TypeError, KeyError, LookupError, RecursionError, AttributeError):
            return "no value came back"
        return "" if good else f"wrong value {result.stdout[:100]!r}"


def _stdin(tests: Tests, given) -> str:
    if tests.kind == "stdio":
        return given
    return pack((tuple(given), {}))


make = Code
