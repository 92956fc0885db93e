"""The code reward: what it takes for the program, the test formats, the comparison, and verdicts that no program can forge."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import make_reward, make_table
from athanor.rewards.code import extract_program
from athanor.rewards.code_tests import parse_tests, same_output, same_value
from athanor.samples import Problem, Sample
from athanor.sandbox import Sandbox, SandboxError, why_not
from athanor.sandbox.values import pack

isolated = pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be isolated here: {why_not()}")
needs_gxx = pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="needs /usr/bin/g++")
DATA = Path(os.environ.get("ATHANOR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))  # HumanEval as published
STDIO = {"tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1\n", "output": "2\n"}, {"input": "-5 5\n", "output": "0\n"}]}
CALL = {"fn_name": "f", "inputs": [[1, 2], [5, 5]], "outputs": [3, 10]}
CHECK = {
    "entry_point": "f",
    "prompt": "import math\n\ndef f(a, b):\n    '''Add.'''\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
FORGERIES = tomllib.loads(Path(__file__).with_name("forgeries.toml").read_text())
ADD = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.fixture(scope="module")
def reward():
    return make_reward("code", timeout_s=2, workers=2)


def sample(program: str, metadata: dict, tag: str = "python") -> Sample:
    text = f"<think>\nhm\n```python\nprint(1)\n```\n</think>\nHere it is:\n```{tag}\n{program}\n```\nDone."
    return Sample(Problem("q", None, 0, "t", metadata=metadata), text, np.zeros(0, np.int64), np.zeros(0, np.float32))


def judge(reward, program: str, metadata: dict, tag: str = "python"):
    one = sample(program, metadata, tag)
    return reward.judge(one, one.problem)


# ---- which text is the program


@pytest.mark.parametrize(
    "text, found",
    [
        ("```python\nx\n```", ("x\n", "python")),
        ("```\nx\n```", ("x\n", "")),
        ("```py\na\n```\nor\n```c++\nb\n```", ("b\n", "c++")),
        ("<think>```python\na\n```</think>no code", None),
        ("<think>```python\na\n```</think>```python\nb\n```", ("b\n", "python")),
        ("<think>t</think><answer>```python\na\n```</answer>```python\nb\n```", ("a\n", "python")),
        ("<think>t</think><answer>print(1)</answer>", ("print(1)", "")),
        ("```python\na\n```\n```python\nb", ("a\n", "python")),  # cut
        ("```python\nb", None),
        ("````md\n```python\na\n```\n````", ("```python\na\n```\n", "md")),
        ("~~~python\na\n~~~", ("a\n", "python")),
        ("  ```python\n  a\n  ```", ("  a\n", "python")),
        ("text ```python\na\n```\nmore", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_closed_block_of_the_answer(text, found):
    assert extract_program(text) == found


# ---- tests


@pytest.mark.parametrize(
    "metadata",
    [
        {"tests": [{"input": "1", "output": "2"}]},
        {"tests": json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])},
        {"inputs": ["1"], "outputs": ["2"]},
        {"input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
        {"tests": {"input": ["1"], "output": ["2"]}},
    ],
)
def test_published_forms_of_stdin_tests_are_read_alike(metadata):
    tests = parse_tests(metadata)
    assert (tests.kind, tests.inputs, tests.outputs) == ("stdio", ("1",), ("2",))


def test_published_forms_of_call_tests_are_read():
    tests = parse_tests({"input_output": json.dumps({"fn_name": "f", "inputs": [[1, "a"]], "outputs": [[2]]})})
    assert (tests.kind, tests.entry, tests.inputs, tests.outputs, tests.wrapped) == ("call", "f", ([1, "a"],), ([2],), True)
    tests = parse_tests({"func_name": "f", "tests": [{"input": '[1, 2]\n"a"', "output": "[2]", "testtype": "functional"}]})
    assert (tests.kind, tests.entry, tests.inputs, tests.outputs, tests.wrapped) == ("call", "f", ([[1, 2], "a"],), ([2],), False)
    tests = parse_tests({"test_list": ["assert set(similar((1, 2))) == {1}", "assert similar((3,)) is None"]})
    assert (tests.kind, tests.entry) == ("check", "similar") and tests.test.startswith("def check(candidate):\n    assert set(")
    assert parse_tests({}) is None and parse_tests({"tests": [], "question": "?"}) is None


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"tests": "[1"}, "text that is no JSON"),
        ({"tests": [1]}, "wanted a list of"),
        ({"inputs": ["1"], "outputs": []}, "as many inputs as outputs"),
        ({"inputs": ["1"]}, "as many inputs as outputs"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "wanted JSON text"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "no list of arguments"),
        ({"test_list": ["assert True"]}, "calls no function"),
        ({"test_list": ["assert ("]}, "cannot be read"),
    ],
)
def test_tests_that_cannot_be_used_are_an_error_and_no_score(metadata, message):
    with pytest.raises(UserError, match=message):
        parse_tests(metadata)


@pytest.mark.parametrize(
    "got, wanted, same",
    [
        ("7\n", "7", True),
        (" 7 \r\n\n", "7\n", True),
        ("1  2\n3", "1 2\n3\n", True),
        ("1 2 3", "1 2\n3", False),
        ("8", "7", False),
        ("7.0", "7", False),
        ("0.3333333", "0.33333333", True),
        ("0.334", "0.33333333", False),
        ("1e3", "1000.0", True),
        ("nan", "0.5", False),
        ("YES", "Yes", False),
        ("", "", True),
        ("", "0", False),
        ("1_0.0", "10.0", False),
        ("0.5x", "0.5", False),
        ("9" * 500 + ".0", "1.0", False),
        ("inf", "1e999", False),
    ],
)
def test_outputs_agree_by_tokens_and_decimals_within_tolerance(got, wanted, same):
    assert same_output(got, wanted, tolerance=1e-6) is same


@pytest.mark.parametrize(
    "value, wanted, same",
    [
        (3, 3, True),
        ((1, [2]), [1, [2]], True),
        ([1, 2], [1, 2, 3], False),
        ({1, 2}, [1, 2], False),
        ({"a": (1,)}, {"a": [1]}, True),
        ({1: 2}, {"1": 2}, True),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, False),
        ({}, {}, True),
        ([], {}, False),
        ({}, [], False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (float("nan"), 0.5, False),
        (10**400, 0.5, False),
        (2**70, 2**70, True),
        ("3", 3, False),
        (None, None, True),
        (None, [], False),
        (b"x", "x", False),
        ({(1, 2): 3}, {"(1, 2)": 3}, False),
    ],
)
def test_values_agree_as_json(value, wanted, same):
    assert bool(same_value(json.loads(pack(value)), wanted, tolerance=1e-6)) is same


def test_a_wrapped_output_counts_both_ways():
    assert same_value(3, [3], tolerance=0, wrapped=True) and same_value([3], [3], tolerance=0, wrapped=True)
    assert not same_value(3, [3], tolerance=0)


# ---- verdicts


@isolated
def test_stdin_programs_are_judged(reward):
    right = judge(reward, ADD, STDIO)
    assert (right.status, right.score, right.num_passed, right.num_run, right.num_tests, right.detail) == ("score", 1.0, 3, 3, 3, "")
    wrong = judge(reward, ADD + " if a > 0 else print(1)", {"tests": STDIO["tests"][:2] + [{"input": "-5 6", "output": "2"}]})
    assert (wrong.status, wrong.score, wrong.num_passed, wrong.num_run) == ("score", 0.0, 2, 3) and "wrong output '1" in wrong.detail
    for program, detail in (("1 / 0", "ZeroDivision"), ("x = [0] * 10**10", "memory"), ("def f(:", "SyntaxError"), ("exit()", "wrong output ''")):
        verdict = judge(reward, program, STDIO)
        assert (verdict.status, verdict.score, verdict.num_run) == ("score", 0.0, 1) and detail in verdict.detail
    assert judge(reward, "while True: pass", STDIO | {"time_limit": 0.5}).status == "timeout"
    assert judge(reward, "no", {}) is None
    good = sample(ADD, STDIO)
    no_program = Sample(good.problem, "The answer is 7.", good.token_ids, good.logps)
    assert reward([no_program, good, sample("x", {})]) == [0.0, 1.0, None]


@isolated
@needs_gxx
def test_cpp_programs_are_judged(reward):
    program = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
    for tag in ("cpp", "C++", ""):
        assert judge(reward, program, STDIO, tag).score == 1.0
    assert "no_such" in judge(reward, program.replace("a + b", "no_such"), STDIO, "cpp").detail
    assert judge(reward, program, CALL, "cpp").score == 0.0


@isolated
def test_a_share_of_the_tests_counts_where_asked_for():
    reward = make_reward("code", fraction=True, timeout_s=1)
    metadata = {"tests": [{"input": str(i), "output": str(i)} for i in range(4)]}
    verdict = judge(reward, "i = int(input())\nif i == 1: raise OSError\nif i == 2:\n    while True: pass\nprint(i)", metadata)
    assert (verdict.status, verdict.score, verdict.num_passed, verdict.num_run) == ("timeout", 0.5, 2, 4)
    bound = make_reward("code", fraction=True, total_s=0.5)
    verdict = judge(bound, "import time\ntime.sleep(0.2)\nprint(input())", metadata)
    assert verdict.status == "timeout" and verdict.num_run < 4


@isolated
def test_functions_are_called_with_arguments(reward):
    for program in ("def f(a, b): return a + b", "class Solution:\n    def f(self, a, b):\n        print('noise')\n        return a + b"):
        assert judge(reward, program, CALL).score == 1.0
    for program, detail in (
        ("def f(a, b): return a - b", "wrong value"),
        ("def g(a, b): return a + b", "raised NameError"),
        ("def f(a): return a", "raised TypeError"),
        ("def f(a, b): return iter([])", "raised TypeError"),
        ("def f(a, b):\n    x = []\n    x.append(x)\n    return x", "raised RecursionError"),
    ):
        verdict = judge(reward, program, CALL)
        assert verdict.score == 0.0 and detail in verdict.detail


@isolated
def test_a_check_runs_with_the_stub_of_its_problem(reward):
    assert judge(reward, "def f(a, b):\n    return int(math.fsum([a, b]))", CHECK).score == 1.0  # the stub imports math
    assert judge(reward, "    return a + b", CHECK).score == 1.0  # goes on from the stub
    assert judge(reward, "f = lambda a, b: a + b", CHECK).score == 1.0
    assert judge(reward, "def f(a, b): return a", CHECK).detail.startswith("AssertionError")
    raising = CHECK | {"test": "def check(c):\n    try: c(1, 0)\n    except ZeroDivisionError: return\n    assert False"}
    assert judge(reward, "def f(a, b): return a / b", raising).score == 1.0
    assert judge(reward, "def f(a, b): return 0", raising).score == 0.0
    assert judge(reward, "def f(a, b):\n    while True: pass", CHECK | {"time_limit": 0.5}).status == "timeout"
    mbpp = {"test_list": ["assert f({1, 2}, (3,)) == {1, 2, 3}", "assert f(set(), ()) == set()"]}
    assert judge(reward, "def f(a, b): return a | set(b)", mbpp).score == 1.0
    assert judge(reward, "def f(a, b): return [*a, *b]", mbpp).score == 0.0


@isolated
def test_what_is_no_fault_of_the_program_raises(reward, monkeypatch):
    for broken in ("def check(candidate:", "x = 1", "import no_such_module\ndef check(c): pass"):
        with pytest.raises(UserError, match="test cannot be loaded"):
            judge(reward, "def f(a, b): return a + b", CHECK | {"test": broken})

    def fails(*_, **__):
        raise SandboxError("sandbox: ended in the middle of a run")

    monkeypatch.setattr(Sandbox, "open", fails)
    with pytest.raises(SandboxError):
        judge(reward, ADD, STDIO)
    assert reward([sample(ADD, STDIO)]) == [None]  # and a line in the log: an error is no score


@isolated
@pytest.mark.parametrize("name", FORGERIES)
def test_no_verdict_can_be_forged(reward, name):
    check = CHECK | {"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert not candidate(2, 2) != 4\n"}
    for metadata in (STDIO, CALL, check):
        verdict = judge(reward, FORGERIES[name], metadata)
        assert verdict.score == 0.0 and verdict.num_passed == 0, (metadata, verdict)


# ---- callers


@isolated
def test_trl_and_the_reward_table_call_it(reward):
    texts = [f"```python\n{program}\n```" for program in (ADD, "print(1)")]
    assert reward(prompts=["q"] * 2, completions=texts, tests=[STDIO["tests"]] * 2, difficulty=["easy", "hard"]) == [1.0, 0.0]
    assert judge(pickle.loads(pickle.dumps(reward)), ADD, STDIO).score == 1.0
    table = make_table([{"name": "code", "timeout_s": 2.0}, {"name": "format"}])
    assert table.score([sample(ADD, STDIO)]).parts["code"] == [1.0]


def test_settings_are_checked():
    cases = (({"timeout_s": 0}, "timeout_s is 0"), ({"tolerance": 2}, "tolerance is 2"), ({"fractions": True}, "did you mean fraction"))
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            make_reward("code", **settings)


@pytest.mark.skipif(why_not() is None, reason="programs can be isolated here")
def test_it_refuses_to_start_without_isolation():
    with pytest.raises(UserError, match="unsafe"):
        make_reward("code")


# ---- HumanEval


def human_eval() -> list[dict]:
    path = DATA / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs {path}; set ATHANOR_TEST_DATA to a folder that has it")
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def scores(reward, rows: list[dict], bodies: list[str]) -> list[float]:
    keys = ("prompt", "test", "entry_point")
    samples = [sample(row["prompt"] + body, {k: row[k] for k in keys}) for row, body in zip(rows, bodies, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda one: reward.score(one, one.problem), samples))


def off_by_one(body: str) -> str:
    """Each integer of a body one larger, as long as it stands alone."""
    return re.sub(r"(?<![\w.\"'])(\d+)(?![\w.\"'])", lambda match: str(int(match[1]) + 1), body)


def passes_unguarded(row: dict, body: str) -> bool:
    """Does the data set's own way of testing - everything in one interpreter - accept a body?  Only for bodies that are made here."""
    program = f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n"
    try:
        return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@isolated
def test_some_human_eval_solutions_pass_and_their_mutants_fail(reward):
    rows = human_eval()[::16]
    assert scores(reward, rows, [row["canonical_solution"] for row in rows]) == [1.0] * len(rows)
    assert scores(reward, rows, ["    return None\n"] * len(rows)) == [0.0] * len(rows)


@isolated
@pytest.mark.slow
def test_all_human_eval_solutions_pass_and_all_their_mutants_fail(reward):
    rows = human_eval()
    assert len(rows) == 164
    assert scores(reward, rows, [row["canonical_solution"] for row in rows]) == [1.0] * 164
    assert scores(reward, rows, ["    return None\n"] * 164) == [0.0] * 164
    mutants = [(row, off_by_one(row["canonical_solution"])) for row in rows]
    mutants = [(row, body) for row, body in mutants if body != row["canonical_solution"]]
    assert len(mutants) > 100
    wanted = [float(passes_unguarded(row, body)) for row, body in mutants]  # some changes make no difference
    assert sum(wanted) < 0.1 * len(mutants)
    assert scores(reward, *zip(*mutants, strict=True)) == wanted
