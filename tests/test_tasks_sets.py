"""Published sets: their column formats on tiny invented rows, the real files where they are, and what junk does to every loader."""

import base64
import csv
import gzip
import io
import json
import os
import pickle
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from athanor.errors import UserError
from athanor.rewards import make_reward
from athanor.samples import Sample
from athanor.tasks import available_tasks, make_task

DATA = Path(os.environ.get("ATHANOR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def published(name):
    path = DATA / name
    return pytest.param(path, marks=pytest.mark.skipif(not path.exists(), reason=f"no {name} in {DATA}"), id=name)


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, kind, rows, **options):
    return make_task(f"{kind}:{write(tmp_path / f'{kind}.jsonl', rows)}", **options)


def said(problem, text):
    return Sample(problem, text, np.arange(3), np.zeros(3, np.float32))


def packed(tests, wrap=lambda text: text):
    return base64.b64encode(zlib.compress(pickle.dumps(wrap(json.dumps(tests))))).decode()


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL = [{"input": "[1, 2]\n5", "output": "8", "testtype": "functional"}]
ROWS = {  # one invented row per set, in its published columns
    "gsm8k": {"question": "Two boxes of 3 pens. How many pens?", "answer": "2 x 3 = <<2*3=6>>6\n#### 6"},
    "math": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"},
    "aime": {"ID": "2099-I-1", "Problem": "Find n.", "Solution": "...", "Answer": "073"},
    "amc": {"id": 0, "problem": "What is 71 twice?", "answer": 142.0, "url": "https://example.org"},
    "humaneval": {
        "task_id": "Invented/0", "prompt": "def one():\n    \"\"\"Return 1.\"\"\"\n", "entry_point": "one", "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "mbpp": {"task_id": 1, "text": "Write a function that doubles.", "code": "def f(x): return 2*x", "test_list": ["assert f(1) == 2"],
             "test_setup_code": "", "challenge_test_list": []},
    "livecodebench": {
        "question_title": "Sum", "question_content": "Add two numbers.", "platform": "atcoder", "question_id": "a",
        "contest_date": "2024-09-01T00:00:00", "starter_code": "", "difficulty": "easy", "metadata": "{}",
        "public_test_cases": json.dumps(STDIN), "private_test_cases": packed(STDIN),
    },
    "apps": {"question": "Echo.", "input_output": json.dumps({"inputs": ["a\n"], "outputs": ["a\n"]}), "starter_code": "", "difficulty": "interview"},
    "mmlu": {"question": "Which is a colour?", "subject": "art", "choices": ["red", "two", "loud", "cold"], "answer": 0},
    "gpqa": {"Question": "Which is right?", "Correct Answer": "right\n", "Incorrect Answer 1": "wrong", "Incorrect Answer 2": "bad",
             "Incorrect Answer 3": "ill", "Record ID": "r1", "Subdomain": "Physics"},
    "prompts": {"prompt": "Write a poem."},
    "preferences": {"prompt": "Say hi.", "chosen": "Hello!", "rejected": "No."},
    "jsonl": {"question": "What is 1 + 1?", "answer": "2"},
}  # fmt: skip


def test_every_set_has_a_row_here():
    assert set(ROWS) == set(available_tasks()) - {"arithmetic", "courtesy", "gym"}


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
    assert metadata["tests"] == [{"input": '[1, 2]\n"a"', "output": "3"}] and metadata["fn_name"] == "f"
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


# ---- files


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    rows = [{"question": f"q {i}, \"quoted\"\nand more", "answer": str(i)} for i in range(5)]
    write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", rows)
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.DictWriter(file, ["question", "answer"]).writeheader()
        csv.DictWriter(file, ["question", "answer"]).writerows(rows)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.csv"):
        task = make_task("jsonl", test=str(tmp_path / name))
        read = [task.problem("test", i) for i in range(5)]
        assert [(p.metadata["question"], p.answer) for p in read] == [(row["question"], row["answer"]) for row in rows]


def test_parquet_is_read_or_pyarrow_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(UserError, match=r"a\.parquet: a Parquet file needs the package pyarrow .*pip install pyarrow"):
            make_task(f"jsonl:{path}")
        return
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b", None], "choices": [["x", "y"]] * 3, "answer": [1, 0, 0]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:row 3: "):
        make_task(f"mmlu:{path}")
    with pytest.warns(UserWarning, match="1 of 3 rows left out"):
        task = make_task(f"mmlu:{path}", on_bad="skip")
    assert [task.problem("test", i).answer for i in range(2)] == ["B", "A"]
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        make_task(f"mmlu:{path}")


def test_columns_go_by_other_names(tmp_path):
    row = {"frage": "Zwei mal drei?", "loesung": "#### 6", "question": "not this one"}
    path = write(tmp_path / "a.jsonl", [row])
    problem = make_task(f"gsm8k:{path}", columns={"question": "frage", "answer": "loesung"}).problem("test", 0)
    assert (problem.metadata["question"], problem.answer) == ("Zwei mal drei?", "6")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'fragen', which the setting columns names; did you mean frage"):
        make_task(f"gsm8k:{path}", columns={"question": "fragen"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'answer' \(or set columns\)"):
        make_task(f"gsm8k:{path}")


def test_bad_rows_are_skipped_on_request_and_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS["gsm8k"], "{", {"question": "x"}, ROWS["gsm8k"] | {"question": "y"}, '{"question": NaN}'])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        make_task(f"gsm8k:{path}")
    with pytest.warns(UserWarning, match=r"3 of 5 rows left out: .*a\.jsonl:2: .*a\.jsonl:3: .*a\.jsonl:5: "):
        task = make_task(f"gsm8k:{path}", on_bad="skip")
    assert task.size("test") == 2 and [row.split(": ")[0] for row in task.bad_rows] == [f"{path}:{n}" for n in (2, 3, 5)]
    with pytest.raises(UserError, match="none of 1 rows can be used; the first: .*:1: "):
        make_task("gsm8k", on_bad="skip", test=write(tmp_path / "b.jsonl", ["{"]))
    with pytest.raises(UserError, match="on_bad is 'ignore'"):
        make_task(f"gsm8k:{path}", on_bad="ignore")


def test_csv_mistakes_have_their_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'question,answer\n"two\nlines",1\nshort\nx,2\ncaf\xe9,3\n')
    with pytest.raises(UserError, match=r"a\.csv:4: 1 cells, wanted 2 \(question, answer\)"):
        make_task("jsonl", test=f"{tmp_path}/a.csv")
    with pytest.warns(UserWarning, match=r"a\.csv:4: .*a\.csv:6: a text with half a surrogate pair"):
        assert make_task("jsonl", test=f"{tmp_path}/a.csv", on_bad="skip").size("test") == 2
    (tmp_path / "b.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match=r"b\.csv:1: column names"):
        make_task("jsonl", test=f"{tmp_path}/b.csv")


def test_wrong_names_list_near_misses():
    with pytest.raises(UserError, match="unknown task 'gsm8:x.jsonl': did you mean gsm8k"):
        make_task("gsm8:x.jsonl")
    with pytest.raises(UserError, match="unknown setting 'tempate': did you mean template"):
        make_task("gsm8k:x.jsonl", tempate="raw")
    with pytest.raises(UserError, match='task aime: no files, wanted "aime:<path>"'):
        make_task("aime")


# ---- property: any junk line is an error with file:line, and nothing is half read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def check_line(folder, kind, line: bytes):
    """Put a line between two good rows: it is named, or it is one more problem."""
    path = folder / f"{kind}.jsonl"
    key = next(key for key in ROWS[kind] if key.lower() in ("question", "problem", "prompt", "text", "question_content"))
    rows = [ROWS[kind], ROWS[kind] | {key: f"{ROWS[kind][key]} once more"}]
    good = [json.dumps(row).encode() for row in rows]
    path.write_bytes(good[0] + b"\n" + line + b"\n" + good[1] + b"\n")
    try:
        make_task(kind, test=str(path))
        wrong = False
    except UserError as error:
        assert str(error).startswith(f"{path}:2: ") and "\n" not in str(error), str(error)
        wrong = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = make_task(kind, test=str(path), on_bad="skip")
    assert len(task.bad_rows) == wrong and task.size("test") + task.num_dropped == 3 - wrong - (not line.strip())
    for i in range(task.size("test")):
        problem = task.problem("test", i)
        assert problem.prompt.strip() and problem.prompt.encode() and problem.metadata["source"].startswith(f"{path}:")
        assert problem.answer is None or problem.answer.strip()


@PROPERTY
@given(line=st.binary(max_size=40).filter(lambda line: b"\n" not in line))
def test_junk_bytes(tmp_path_factory, line):
    for kind in ("jsonl", "livecodebench"):
        check_line(tmp_path_factory.getbasetemp(), kind, line)


@pytest.mark.parametrize("kind", sorted(ROWS))
@PROPERTY
@given(data=st.data())
def test_junk_in_a_column(tmp_path_factory, kind, data):
    row = dict(ROWS[kind])
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=2)):
        value = data.draw(JSON)
        row[key] = json.dumps(value) if key in ("metadata", "input_output", "public_test_cases") and data.draw(st.booleans()) else value
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            del row[key]
    check_line(tmp_path_factory.getbasetemp(), kind, json.dumps(row).encode())
