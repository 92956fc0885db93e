"""python -m athanor.rewards.check: the table, the JSON, the rows, and what it says about a wrong file."""

import gzip
import json
import subprocess
import sys

import pytest

from athanor.rewards.check import main, reward_line

ROWS = [
    {"prompt": "q", "completion": "<think> so </think> <answer> 1/2 </answer>", "answer": "0.5", "domain": "math"},
    {"prompt": "q", "completion": "<think> so </think> <answer> 2 </answer>", "answer": "0.5", "domain": "math"},
    {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "\\boxed{\\sqrt{8}}"}], "solution": "2\\sqrt{2}"},
    {"completion": "hello", "domain": "general"},
    {"completion": "\\boxed{3}", "answer": "\\frac{1}{", "domain": "math"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_means_counts_and_failures_of_each_reward(file, capsys, tmp_path):
    table = ["--reward", "math:domain=reasoning", "--reward", "format:weight=0.5"]
    assert main([str(file), "--json", *table, "--rows", str(tmp_path / "out.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out)
    math, form = summary["rewards"]
    assert (math["reward"], math["mean"], math["count"], math["errors"], math["timeouts"]) == ("math", pytest.approx(2 / 3), 3, 1, 0)
    assert (form["mean"], form["count"], form["errors"]) == (0.4, 5, 0) and math["seconds"] > 0
    assert (summary["samples"], summary["dropped"], summary["mean_total"]) == (5, 1, pytest.approx((1.5 + 0.5 + 1.0 + 0.0) / 4))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["total"] for row in rows] == [1.5, 0.5, 1.0, 0.0, 0.0] and [row["dropped"] for row in rows] == [False] * 4 + [True]
    assert rows[4]["raw"] is None and rows[3]["math"] is None


def test_the_table_is_for_people_and_strict_is_for_scripts(file, capsys, tmp_path):
    assert main([str(file), "--strict"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["reward", "mean", "count", "errors", "timeouts", "seconds"]
    assert out[1].split()[:5] == ["math", "0.6667", "3", "1", "0"] and "5 samples, 1 dropped" in out[-1]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert main([str(packed), "--strict"]) == 0


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("{", [], ":1: not JSON"),
        ("[]", [], ":1: no completion"),
        ('{"answer": "4"}', [], "got ['answer']"),
        ('{"completion": "a"}\n{"completion": "a", "domain": "maths"}', [], ":2: domain is 'maths'"),
        ("", [], "no lines"),
        ('{"completion": "a"}', ["--reward", "maths"], "did you mean math"),
        ('{"completion": "a"}', ["--reward", "math:extract"], "wanted KEY=VALUE"),
        ('{"completion": "a"}', ["--reward", "math:extract=last"], "extract is 'last'"),
        ('{"completion": "a", "token_ids": 3}', [], ":1: token_ids is 3"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_code_two(tmp_path, capsys, text, arguments, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main([str(path), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_missing_file_and_help(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl")]) == 2 and "cannot be read" in capsys.readouterr().err
    ran = subprocess.run([sys.executable, "-m", "athanor.rewards.check", "--help"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "completion" in ran.stdout and "--json" in ran.stdout and ran.stderr == ""


def test_settings_are_json_or_text():
    assert reward_line("overlong:max_tokens=8,buffer=4") == {"name": "overlong", "max_tokens": 8, "buffer": 4}
    assert reward_line("math:extract=boxed,require_format=true") == {"name": "math", "extract": "boxed", "require_format": True}
    assert reward_line("format") == {"name": "format"}
