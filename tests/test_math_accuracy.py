"""The math reward: published sets, a truth table of its own, extraction, and what it never does with a model's text."""

import ast
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.errors import UserError
from athanor.rewards import make_reward
from athanor.rewards.answers import answer_key
from athanor.rewards.equivalence import Unreadable, compare, equivalent, structure
from athanor.rewards.extraction import find_answer, inner_answer, last_number
from athanor.rewards.math_accuracy import settle
from athanor.rewards.notation import canonical, split_unit
from athanor.samples import Problem, Sample

PAIRS = tomllib.loads(Path(__file__).with_name("math_pairs.toml").read_text())
DATA = Path(os.environ.get("ATHANOR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))  # GSM8K and MATH-500 as published
UNSCORABLE = ("\\frac{1}{0}", "9**9**9", "x\\ne -1", "all real numbers")  # gold answers without a value may be errors
REWARDS = Path(__file__).resolve().parents[1] / "engine" / "rewards"


def sample(answer, gold, text=None, **metadata):
    problem = Problem("q", gold, 0, "t", "math", metadata=metadata)
    return Sample(problem, f"<think> so </think> <answer> {answer} </answer>" if text is None else text, np.arange(3), np.zeros(3, np.float32))


def rows(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


# ---- truth tables


def test_the_truth_table_is_large_enough_and_holds_both_ways():
    # asked both ways round, as neither column is special; an empty answer or gold is another test's
    triples = [(a, g, kind == "equal") for kind in PAIRS for pair in PAIRS[kind] for a, g in (pair, pair[::-1]) if a and g]
    assert len(triples) >= 300 and len(PAIRS["equal"]) >= 60 and len(PAIRS["different"]) >= 60
    outcomes = make_reward("math").outcomes([sample(a, g) for a, g, _ in triples])
    wrong = [(a, g, outcome) for (a, g, equal), outcome in zip(triples, outcomes, strict=True) if outcome.value != float(equal)]
    assert [w for w in wrong if w[2].status == "score" or w[1] not in UNSCORABLE] == []


@pytest.mark.parametrize("kind", ["equal", "different"])
def test_what_is_settled_without_a_worker_agrees_with_the_worker(kind):
    settled = [(a, g, settle(a, g)) for a, g in PAIRS[kind]]
    assert [row for row in settled if row[2] not in (None, kind == "equal")] == []
    assert sum(row[2] is not None for row in settled) > 20


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train.jsonl", "math500.jsonl"])
def test_every_gold_answer_of_a_set_is_found_in_its_own_solution(name):
    data = rows(name)
    given_samples = [sample("", row["answer"], text=row.get("solution", row["answer"])) for row in data]
    outcomes = make_reward("math").outcomes(given_samples)
    assert [row["answer"] for row, outcome in zip(data, outcomes, strict=True) if outcome.value != 1.0] == []


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "math500.jsonl"])
def test_no_answer_is_accepted_against_the_gold_answer_of_another_problem(name):
    data = rows(name)
    golds = [inner_answer(row["answer"]) for row in data]
    order = list(range(len(data)))
    random.Random(0).shuffle(order)
    kept = [i for i in range(len(data)) if answer_key(golds[i]) != answer_key(golds[order[i]])]
    outcomes = make_reward("math").outcomes([sample("", golds[order[i]], text=data[i].get("solution", data[i]["answer"])) for i in kept])
    accepted = [(golds[i], golds[order[i]]) for i, outcome in zip(kept, outcomes, strict=True) if outcome.value != 0.0]
    assert len(kept) > 0.9 * len(data) and accepted == []


def test_an_answer_is_never_compared_as_text_when_numbers_say_otherwise():
    assert settle("0.1", "1/10") and not settle("0.30000000000000000001", "0.3") and not settle("50%", "5%") and settle("50", "50\\%")
    assert settle("18 eggs", "18") and settle("$18.00", "18") and not settle("18 cm", "18 m") and settle("18 cm", "18 centimeters")


def test_gold_answers_that_cannot_be_read_are_errors_and_not_zeros():
    outcomes = make_reward("math").outcomes([sample("5", "\\frac{1}{"), sample("5", " "), sample("\\sqrt{", "\\sqrt{5}"), sample("5", None)])
    assert [outcome.status for outcome in outcomes] == ["error", "error", "score", "score"]
    assert "cannot be read" in outcomes[0].message and "empty" in outcomes[1].message
    assert [outcome.value for outcome in outcomes[2:]] == [0.0, None]  # a broken answer is wrong, a problem without gold is not judged
    with pytest.raises(Unreadable, match="gold answer"):
        equivalent("x", "\\frac{y}{")


# ---- extraction


@pytest.mark.parametrize(
    "text, rule, wanted",
    [
        ("<think> 3 </think> <answer> 4 </answer>", "auto", "4"),
        ("<think> 3 </think> <answer> The answer is \\boxed{4}. </answer>", "auto", "4"),
        ("<think> <answer> 3 </answer> </think> so \\boxed{5}", "auto", "5"),
        ("<think> \\boxed{3} </think> <answer> 4 </answer> <answer> 5 </answer>", "auto", "5"),
        ("so \\boxed{\\frac{1}{\\sqrt{2}}} or \\boxed{4", "auto", "\\frac{1}{\\sqrt{2}}"),
        ("She pays 4.\n#### 1,234\nThanks", "auto", "1,234"),
        ("#### 3\n#### 4", "hash", "4"),
        ("so 3 and 4", "auto", None),
        ("so 3 and then $1,234.50.", "number", "$1,234.50"),
        ("so 3 and then -7/8, done", "number", "-7/8"),
        ("<think> 3 </think> it is 50%.", "number", "50%"),
        ("<think> 3 </think> x2 and 3x", "number", None),
        ("<think> \\boxed{3}", "auto", None),
        ("<answer> final answer: 7 </answer>", "answer", "7"),
        ("so \\boxed{4}", "answer", None),
    ],
)
def test_where_the_answer_is_looked_for(text, rule, wanted):
    assert find_answer(text, rule=rule) == wanted


def test_a_problem_may_say_where_its_answer_stands():
    assert make_reward("math")([sample("", "12", text="I count 12", extract="number"), sample("", "12", text="I count 12")]) == [1.0, 0.0]
    outcome = make_reward("math").outcomes([sample("", "12", text="12", extract="last")])[0]
    assert outcome.status == "error" and "extract is 'last'" in outcome.message


@pytest.mark.parametrize(
    "wrong, message",
    [({"extract": "last"}, "extract is 'last'"), ({"timeout_s": 0.0}, "timeout_s is 0.0"), ({"timeout": 1}, "timeout_s")],
)
def test_wrong_settings_name_what_was_wanted(wrong, message):
    with pytest.raises(UserError, match=message):
        make_reward("math", **wrong)


def test_format_can_be_a_condition_and_trl_calls_it():
    good = "<think> a </think> <answer> 1/2 </answer>"
    assert make_reward("math", require_format=True)([sample("", "0.5", text=good), sample("", "0.5", text="\\boxed{1/2}")]) == [1.0, 0.0]
    columns = dict(prompts=["p"] * 3, completions=[good, "\\boxed{\\sqrt{8}}", good], solution=["0.5", "so $\\boxed{2\\sqrt{2}}$", None])
    assert make_reward("math")(**columns) == [1.0, 1.0, None]


# ---- what it costs, and what it never does


def test_plain_answers_are_verified_faster_than_three_hundred_a_second():
    many = [sample(str(i % 37), "7") for i in range(3000)]
    start = time.process_time()
    assert sum(make_reward("math")(many)) == sum(i % 37 == 7 for i in range(3000))
    assert 3000 / (time.process_time() - start) > 300


PIECES = (
    r"\frac { } ( ) [ ] \sqrt sqrt( ^ _ \{ \} , ; 1 9 x pi \pm = < \le % $ \boxed{ </think> <answer> </answer> #### \\ & \begin{pmatrix} "
    r"\end{pmatrix} \text{ cm ² √ ∞ \cup ** \overline{ . e ! \ | - + * / ° ½ 字"
).split() + [" ", "\n", " and ", " or ", "\\le ", "\x00", "\U0001d7d9"]
TEXTS = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=150).map("".join))
UNITS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
REPEATS = st.tuples(UNITS, st.integers(1, 2000)).map(lambda t: (t[0] * t[1])[:20_000])


def bounded(call, *arguments):
    """Call and insist on less than a second of processor time."""
    start = time.process_time()
    result = call(*arguments)
    assert time.process_time() - start < 1.0, f"{call.__name__} took too long"
    return result


@settings(max_examples=150, deadline=None)
@given(st.one_of(TEXTS, REPEATS), st.sampled_from(["5", "\\frac{1}{2}", "(1,2)", "x=3", "even", ""]))
def test_what_runs_in_the_trainer_is_quick_on_any_text(text, gold):
    for rule in ("auto", "answer", "boxed", "hash", "number"):
        bounded(lambda t, r=rule: find_answer(t, rule=r), text)
    bounded(last_number, text)
    bounded(inner_answer, text)
    assert bounded(settle, text, gold) in (True, False, None)
    assert bounded(settle, gold, text) in (True, False, None)
    whole = sample("", gold, text=f"<think>{text}</think><answer>{text}</answer>")
    decided = bounded(make_reward("math").quick, whole, whole.problem)
    assert decided is None or decided.status in ("score", "error")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_notation_and_structure_of_any_short_text(text):
    clean = bounded(canonical, text)
    bounded(split_unit, clean)
    node = bounded(structure, clean)
    assert node.kind in ("list", "set", "tuple", "union", "matrix", "equation", "inequality", "based", "leaf")


@pytest.mark.parametrize("text", ["(1,2)", "[0,1)", "1, 2", "x=5", "\\{1\\}", "1011_2", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x<3", "even"])
def test_an_answer_equals_itself(text):
    assert compare(structure(canonical(text)), structure(canonical(text)))


def test_no_text_of_a_model_is_evaluated_in_rewards_and_sympy_is_named_in_one_file():
    forbidden = {"eval", "exec", "compile", "parse_expr", "sympify", "literal_eval", "S"}
    for path in REWARDS.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)} - {"re.compile"}
        found = {call for call in calls if call.rpartition(".")[2] in forbidden}
        assert not found, f"{path.name} calls {found}"
        imports = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        imports |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        outside = {name for name in imports if name.split(".")[0] in ("sympy", "math_verify", "latex2sympy2_extended")}
        assert not outside or path.name == "equivalence.py", f"{path.name} imports {outside}"


AUDITED = r"""
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, repr(arguments)[:2000])) if event in ("compile", "exec") else None)
import numpy as np
from athanor.rewards import make_reward
from athanor.samples import Problem, Sample
answers = ["271828+3*4", "271828**2", "__import__('os').getpid()+271828", "\\frac{271828}{\\sqrt{7}}", "271828*sin(x)", "(271828, 2)"]
samples = [Sample(Problem("q", gold, 0, "t"), f"<answer>{a}</answer>", np.arange(1), np.zeros(1)) for a in answers for gold in ("\\sqrt{5}", "7")]
outcomes = make_reward("math").outcomes(samples)
assert sum(o.status == "score" for o in outcomes) >= 10, outcomes
print(sorted(m for m in sys.modules if m in ("sympy", "math_verify", "latex2sympy2_extended", "torch")), [s for s in seen if "271828" in s[1]])
"""


def test_an_audit_hook_sees_no_model_text_compiled_in_the_trainer():
    ran = subprocess.run([sys.executable, "-c", AUDITED], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "[] []\n", ran.stderr
