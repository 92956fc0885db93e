"""Published sets: their column formats on tiny invented rows, and the real files where they are."""

import base64
import csv
import inspect
import io
import json
import os
import pickle
import re
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import make_reward
from athanor.samples import Sample
from athanor.tasks import available_tasks, make_task
from athanor.tasks.gym import EXECUTING, _datasets, families

DATA = Path(os.environ.get("ATHANOR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def published(name):
    path = DATA / name
    return pytest.param(path, marks=pytest.mark.skipif(not path.exists(), reason=f"no {name} in {DATA}"), id=name)


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, kind, rows, **options):
    return make_task(f"{kind}:{write(tmp_path / f'{kind}.jsonl', rows)}", **options)


ROWS = json.loads(Path(__file__).with_name("published_rows.json").read_text())  # one invented row per set, in its published columns
STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL = [{"input": "[1, 2]\n5", "output": "8", "testtype": "functional"}]


def packed(tests, wrap=lambda text: text):
    return base64.b64encode(zlib.compress(pickle.dumps(wrap(json.dumps(tests))))).decode()


def said(problem, text):
    return Sample(problem, text, np.arange(3), np.zeros(3, np.float32))


def test_every_set_has_a_row_here():
    assert set(ROWS) == set(available_tasks()) - {"arithmetic", "courtesy", "discretion", "gym"}


# ---- mathematics


def test_mathematics_is_asked_for_a_box_and_judged_by_it(tmp_path):
    reward = make_reward("accuracy", extract="boxed")
    for kind, answer, other in (("gsm8k", "6", "5"), ("math", "2", "3"), ("aime", "73", "37"), ("amc", "142", "141")):
        problem = load(tmp_path, kind, [ROWS[kind]]).problem("test", 0)
        assert (problem.answer, problem.task, problem.domain, problem.metadata["extract"]) == (answer, kind, "reasoning", "boxed")
        assert problem.prompt == problem.metadata["question"] + "\nPlease reason step by step, and put your final answer within \\boxed{}."
        assert reward([said(problem, f"so \\boxed{{{answer}}}"), said(problem, f"\\boxed{{{other}}}")]) == [1.0, 0.0]
    assert load(tmp_path, "gsm8k", [ROWS["gsm8k"]]).problem("test", 0).metadata["solution"] == "2 x 3 = <<2*3=6>>6"
    assert load(tmp_path, "math", [ROWS["math"]]).problem("test", 0).metadata["type"] == "Algebra"


@pytest.mark.parametrize("path", [published("gsm8k_test.jsonl")])
def test_gsm8k_as_published(path):
    task = make_task(f"gsm8k:{path}")
    assert task.size("test") == 1319 and task.size("train") == 0
    golds = [task.problem("test", i) for i in range(1319)]
    assert make_reward("accuracy", extract="boxed")([said(p, f"\\boxed{{{p.answer}}}") for p in golds]) == [1.0] * 1319


@pytest.mark.parametrize("path", [published("math500.jsonl")])
def test_math500_as_published(path):
    task = make_task(f"math:{path}")
    assert task.size("test") == 500
    levels = Counter(task.problem("test", i).metadata["level"] for i in range(500))
    assert set(levels) == {1, 2, 3, 4, 5} and sum(levels.values()) == 500


# ---- code: the metadata that the code reward runs


def test_code_problems_carry_their_tests(tmp_path):
    problems = {kind: load(tmp_path, kind, [ROWS[kind]]).problem("test", 0) for kind in ("humaneval", "mbpp", "livecodebench", "apps")}
    assert all(p.domain == "code" and p.answer is None and "code block" in p.prompt for p in problems.values())
    row = ROWS["humaneval"]
    assert {key: problems["humaneval"].metadata[key] for key in ("test", "entry_point", "prompt")} == {
        key: row[key] for key in ("test", "entry_point", "prompt")
    }
    assert problems["mbpp"].metadata["test_list"] == ["assert f(1) == 2"] and problems["mbpp"].metadata["test_setup_code"] == ""
    assert "assert f(1) == 2" in problems["mbpp"].prompt and problems["mbpp"].metadata["question"] == "Write a function that doubles."
    both = [{"input": "1 2\n", "output": "3\n"}] * 2
    wanted = {"tests": both, "fn_name": None, "language": "python"}
    assert {key: problems["livecodebench"].metadata[key] for key in wanted} == wanted
    assert problems["apps"].metadata["tests"] == [{"input": "a\n", "output": "a\n"}] and problems["apps"].metadata["fn_name"] is None


def test_mbpp_sanitized(tmp_path):
    row = {"source_file": "x", "task_id": 2, "prompt": "Root.", "code": "...", "test_imports": ["import math"], "test_list": ["assert f(4) == 2"]}
    metadata = load(tmp_path, "mbpp", [row]).problem("test", 0).metadata
    assert (metadata["test_setup_code"], metadata["test_list"]) == ("import math", ["assert f(4) == 2"])


def test_functions_to_write(tmp_path):
    row = ROWS["livecodebench"] | {
        "public_test_cases": json.dumps(CALL), "private_test_cases": "[]", "metadata": '{"func_name": "addAll"}',
        "starter_code": "class Solution:\n    def addAll(self, a, b):\n        ",
    }  # fmt: skip
    problem = load(tmp_path, "livecodebench", [row], program_language="cpp").problem("test", 0)
    assert problem.metadata["tests"] == [{"input": "[1, 2]\n5", "output": "8"}]
    assert (problem.metadata["fn_name"], problem.metadata["language"]) == ("addAll", "python") and "class Solution" in problem.prompt
    row = ROWS["apps"] | {"input_output": json.dumps({"fn_name": "f", "inputs": [[[1, 2], "a"]], "outputs": [[3]]})}
    metadata = load(tmp_path, "apps", [row]).problem("test", 0).metadata
    assert metadata["tests"] == [{"input": [[1, 2], "a"], "output": [3]}] and metadata["fn_name"] == "f"
    plain = load(tmp_path, "apps", [ROWS["apps"]], program_language="cpp").problem("test", 0)
    assert plain.metadata["language"] == "cpp" and "C++ program" in plain.prompt
    with pytest.raises(UserError, match="program_language is 'rust'"):
        load(tmp_path, "apps", [ROWS["apps"]], program_language="rust")


def test_livecodebench_window(tmp_path):
    months = ("2024-07", "2024-08", "2025-02")
    rows = [ROWS["livecodebench"] | {"question_content": month, "contest_date": f"{month}-01T00:00:00"} for month in months]
    assert load(tmp_path, "livecodebench", rows, start="2024-08-01", end="2025-01-31").size("test") == 1
    assert load(tmp_path, "livecodebench", rows, start="2024-08-01").size("test") == 2


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/athanor-evil",)


@pytest.mark.parametrize(
    "value, message",
    [
        (packed(STDIN, wrap=lambda text: Evil()), "asks for posix.mkdir"),
        (base64.b64encode(zlib.compress(b"junk")).decode(), "damaged pickle"),
        ("!!", "wanted JSON or base64"),
        (packed([{"input": 1, "output": "2"}]), "a test is"),
        (packed({"a": 1}), "wanted a JSON list"),
    ],
)
def test_a_hostile_test_file_runs_nothing(tmp_path, value, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "livecodebench", [ROWS["livecodebench"] | {"private_test_cases": value}])
    assert str(caught.value).startswith(f"{tmp_path}/livecodebench.jsonl:1: ") and not Path("/tmp/athanor-evil").exists()


@pytest.mark.parametrize("path", [published("HumanEval.jsonl.gz")])
def test_humaneval_as_published(path):
    task = make_task(f"humaneval:{path}")
    assert task.size("test") == 164
    for i in range(164):
        metadata = task.problem("test", i).metadata
        compile(metadata["prompt"] + metadata["solution"] + "\n" + metadata["test"], metadata["task_id"], "exec")


# ---- multiple choice


def test_mmlu_in_three_formats(tmp_path):
    listed = load(tmp_path, "mmlu", [ROWS["mmlu"]]).problem("test", 0)
    assert listed.answer == "A" and listed.metadata["subject"] == "art" and "one of ABCD" in listed.prompt
    assert listed.prompt.endswith("Which is a colour?\n\nA) red\nB) two\nC) loud\nD) cold")
    (tmp_path / "a.csv").write_text('"Which, is\na colour?",two,red,loud,cold,B\n')
    plain = make_task(f"mmlu:{tmp_path}/a.csv", header=["question", "A", "B", "C", "D", "answer"]).problem("test", 0)
    assert plain.answer == "B" and plain.metadata["choices"] == ["two", "red", "loud", "cold"]
    pro = {"question": "q?", "options": list("klmnopqrst"), "answer": "J", "answer_index": 9, "category": "law"}
    assert load(tmp_path, "mmlu", [pro]).problem("test", 0).answer == "J"
    for wrong in ({"answer": "E"}, {"answer": 4}, {"answer": True}, {"choices": ["red"]}, {"choices": "abcd"}, {"answer": None}):
        with pytest.raises(UserError, match=r"mmlu\.jsonl:1: "):
            load(tmp_path, "mmlu", [ROWS["mmlu"] | wrong])


def test_gpqa_options_are_permuted_by_seed_and_question(tmp_path):
    rows = [ROWS["gpqa"] | {"Question": f"Which of {i} is right?"} for i in range(400)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "gpqa.csv").write_text(buffer.getvalue())
    task = make_task(f"gpqa:{tmp_path}/gpqa.csv")
    problems = [task.problem("test", i) for i in range(400)]
    for problem in problems:
        assert problem.metadata["choices"]["ABCD".index(problem.answer)] == "right"
        assert sorted(problem.metadata["choices"]) == ["bad", "ill", "right", "wrong"]
    counts = Counter(problem.answer for problem in problems)
    assert all(70 <= counts[letter] <= 130 for letter in "ABCD")  # 100 each, 3.5 standard deviations
    again = load(tmp_path, "gpqa", rows[::-1])
    by_question = {again.problem("test", i).prompt for i in range(400)}
    assert {problem.prompt for problem in problems} == by_question  # the file's order and format do not matter
    other = make_task(f"gpqa:{tmp_path}/gpqa.csv", seed=1)
    assert by_question != {other.problem("test", i).prompt for i in range(400)}


@pytest.mark.parametrize(
    "text, letter",
    [
        ("<think> Answer: A </think> Answer: B", "B"),
        ("I think so.\nThe correct answer is: **(C)**.", "C"),
        ("**Answer: D**", "D"),
        ("Answer: A\nAnswer: $B$", "B"),
        ("so \\boxed{\\text{(B)}}", "B"),
        ("<think> r </think> <answer> b </answer>", "B"),
        ("Answer: B) 4 apples", "B"),
        ("Answer: the moon", "C"),
        ("Answer: 0.5", "D"),
        ("Answer: A or B", None),
        ("Answer: E", None),
        ("<think> Answer: A", None),
        ("A", None),
        ("", None),
    ],
)
def test_option_match(tmp_path, text, letter):
    choices = ["3 apples", "4 apples", "the moon", "1/2"]
    problems = [load(tmp_path, "mmlu", [{"question": "q", "choices": choices, "answer": i}]).problem("test", 0) for i in range(4)]
    scores = [make_reward("choice")([said(problem, text)])[0] for problem in problems]
    assert scores == [float("ABCD"[i] == letter) for i in range(4)]


def test_option_match_applies_to_options_alone_and_is_linear(tmp_path):
    assert make_reward("choice")([said(load(tmp_path, "aime", [ROWS["aime"]]).problem("test", 0), "Answer: A")]) == [None]
    problem = load(tmp_path, "mmlu", [ROWS["mmlu"]]).problem("test", 0)
    texts = ["answer " * 100_000, "*" * 500_000, "Answer: " + "A" * 500_000, "\\boxed{" * 50_000, "final " * 100_000]
    assert make_reward("choice")([said(problem, text) for text in texts]) == [0.0] * len(texts)


# ---- open-ended


def test_prompts_and_chats(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                         {"role": "assistant", "content": "d"}]}  # fmt: skip
    rows = [ROWS["prompts"], {"instruction": "Translate.", "input": "Haus"}, chat]
    task = make_task("prompts", test=write(tmp_path / "p.jsonl", rows), template="chat")
    a, b, c = (task.problem("test", i) for i in range(3))
    assert a.domain == "general" and a.answer is None and a.prompt == "Write a poem."
    assert b.prompt == "Translate.\n\nHaus"
    assert [m["content"] for m in c.metadata["messages"]] == ["a", "b", "c"]  # up to the question, not the reply that was recorded


def test_preference_pairs_in_their_formats(tmp_path):
    shared = [{"role": "user", "content": "Say hi."}]
    chats = {"chosen": [*shared, {"role": "assistant", "content": "Hello!"}], "rejected": [*shared, {"role": "assistant", "content": "No."}]}
    texts = {"chosen": "\n\nHuman: Say hi.\n\nAssistant: Hello!", "rejected": "\n\nHuman: Say hi.\n\nAssistant: No."}
    for row in (ROWS["preferences"], ROWS["preferences"] | chats, chats, texts):
        task = make_task("preferences", test=write(tmp_path / "p.jsonl", [row]))
        problem, chosen, rejected = task.pair("test", 0)
        assert "Say hi." in problem.prompt and (chosen, rejected) == ("Hello!", "No.")
    for wrong in ({"rejected": "Hello!"}, {"chosen": ""}, {"chosen": [{"role": "user", "content": "x"}]}, {"prompt": 3}):
        with pytest.raises(UserError, match=r"p\.jsonl:1: "):
            make_task("preferences", test=write(tmp_path / "p.jsonl", [ROWS["preferences"] | wrong]))
    with pytest.raises(UserError, match="no column 'prompt'"):
        make_task("preferences", test=write(tmp_path / "p.jsonl", [{"chosen": "a", "rejected": "b"}]))


def test_pairs_of_a_file_train_the_reward_model(tmp_path):
    from athanor.config import RewardModelConfig
    from athanor.stages import reward_model
    from athanor.tokenizer import symbol_tokenizer

    rows = [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": f"<think> r </think> <answer> bad {i} </answer>"} for i in range(4)]
    task = make_task("preferences", train=write(tmp_path / "p.jsonl", rows), validation_share=0, test_share=0)
    tokenizer = symbol_tokenizer(["ask", "good", "bad", *"0123"])
    context = SimpleNamespace(tasks={"p": task}, tokenizer=tokenizer, recipe=SimpleNamespace(seed=0), name="judge")
    pairs = reward_model._pairs(context, RewardModelConfig(kind="reward_model", task="p", num_examples=10))  # ten of four: each pair once
    texts = sorted(tuple(map(tokenizer.decode, pair.sequences)) for pair in pairs)
    assert texts == [(f"ask {i} good {i}", f"ask {i} bad {i}") for i in range(4)]


# ---- reasoning-gym


def test_gym_no_other_family_executes_text():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    read = {  # these execute what they have written themselves, or have a parser of that name
        "basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic",
    }  # fmt: skip
    calls = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
    found = {name for name in families() if calls.search(inspect.getsource(inspect.getmodule(_datasets()[name][0])))} - EXECUTING
    assert found <= read, f"new in this reasoning-gym: {found - read}; read their scorers, then add them here or to EXECUTING"
