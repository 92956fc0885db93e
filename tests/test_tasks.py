"""Tasks: by name, JSONL files with their errors and splits, reasoning-gym families with their guards."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import make_reward
from athanor.samples import Sample
from athanor.sandbox import why_not
from athanor.tasks import R1_ZERO, SPLITS, Task, _sandboxed, available_tasks, make_task, require_answers
from athanor.tasks.gym import EXECUTING, families

DATA = Path(os.environ.get("ATHANOR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))  # GSM8K and MATH-500 as published


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(n, start=0):
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(start, start + n)]


def questions(task, split):
    return {task.problem(split, i).prompt for i in range(task.size(split))}


def answered(problem, answer):
    return Sample(problem, f"<think> r </think> <answer> {answer} </answer>", np.arange(3), np.zeros(3, np.float32))


# ---- by name


def test_files_of_the_folder_are_tasks():
    assert {"jsonl", "gym"} <= set(available_tasks())
    for name in ("_templates", "jsnol", "nothing"):
        with pytest.raises(UserError, match=f"unknown task '{name}'"):
            make_task(name)
    with pytest.raises(UserError, match="did you mean jsonl"):
        make_task("json")


def test_rewards_tasks_and_metrics_import_without_torch():
    modules = "athanor.rewards, athanor.tasks.jsonl, athanor.tasks.gym, athanor.metrics_eval"
    code = f"import sys, {modules}; print({{'torch', 'pydantic'}} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr


# ---- JSONL


def test_one_file_makes_three_disjoint_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(400))
    task = make_task(f"jsonl:{path}", validation_share=0.2, test_share=0.1)
    assert isinstance(task, Task) and task.name == "jsonl:a.jsonl"
    parts = {split: questions(task, split) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 400 == len(set.union(*parts.values()))
    # three standard deviations of a binomial around 40 and 80 of 400
    assert 22 <= len(parts["test"]) <= 58 and 56 <= len(parts["validation"]) <= 104
    shuffled = write(tmp_path / "b.jsonl", rows(100, start=400) + rows(400)[::-1])
    again = make_task("jsonl", train=shuffled, validation_share=0.2, test_share=0.1)
    assert all(parts[split] <= questions(again, split) for split in SPLITS)  # order and growth move no question


def test_problems_are_the_same_at_every_call(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(20))
    a, b = (make_task("jsonl", train=path) for _ in range(2))
    assert [a.problem("train", i) for i in range(a.size("train"))] == [b.problem("train", i) for i in range(b.size("train"))]
    assert [a.problem("train", i).id for i in range(a.size("train"))] == list(range(a.size("train")))
    with pytest.raises(IndexError, match="got index 99"):
        a.problem("train", 99)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        a.size("dev")


def test_a_question_of_the_test_file_leaves_the_other_splits(tmp_path):
    train = write(tmp_path / "train.jsonl", rows(30) + [{"question": "What  is 1 + 1? ", "answer": "2"}])
    test = write(tmp_path / "test.jsonl", rows(5))
    task = make_task("jsonl", train=train, test=test, validation_share=0.3)
    assert task.num_dropped == 6 and task.size("test") == 5
    assert task.size("train") + task.size("validation") == 25 and task.size("validation") > 0
    assert not questions(task, "test") & (questions(task, "train") | questions(task, "validation"))


def test_fields_are_found_or_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"frage": "Wie viel?", "gold": 7, "sprache": "de", "level": 2}])
    task = make_task("jsonl", test=path, prompt_field="frage", answer_field="gold", language_field="sprache", template="raw")
    problem = task.problem("test", 0)
    assert (problem.prompt, problem.answer, problem.language, problem.split, problem.metadata["level"]) == ("Wie viel?", "7", "de", "test", 2)
    with pytest.raises(UserError, match=r"a\.jsonl:1: no question, wanted one of the fields prompt, question"):
        make_task("jsonl", test=path)
    with pytest.raises(UserError, match=r"a\.jsonl:1: no question, wanted the field 'fragen'; did you mean frage"):
        make_task("jsonl", test=path, prompt_field="fragen")


def test_templates(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1 + {prompt} {x}", "answer": "2"}])
    prompts = {name: make_task("jsonl", test=path, template=name).problem("test", 0) for name in ("raw", "r1_zero", "chat", "Q: {prompt}\nA:")}
    assert prompts["raw"].prompt == prompts["chat"].prompt == "1 + {prompt} {x}"
    assert prompts["r1_zero"].prompt == R1_ZERO.replace("{prompt}", "1 + {prompt} {x}")
    assert prompts["r1_zero"].prompt.endswith("<answer> answer here </answer>. User: 1 + {prompt} {x}. Assistant:")
    assert prompts["Q: {prompt}\nA:"].prompt == "Q: 1 + {prompt} {x}\nA:"
    assert prompts["chat"].metadata["messages"] == [{"role": "user", "content": "1 + {prompt} {x}"}]
    with_system = make_task("jsonl", test=path, template="chat", system="Think.").problem("test", 0)
    assert with_system.metadata["messages"][0] == {"role": "system", "content": "Think."}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chat = make_task("jsonl", test=write(tmp_path / "chat.jsonl", [{"messages": turns}]), template="chat").problem("test", 0)
    assert chat.prompt == "c" and chat.metadata["messages"] == turns
    chat = make_task("jsonl", test=write(tmp_path / "chat.jsonl", [{"messages": turns}]), template="chat", system="Think.").problem("test", 0)
    assert chat.metadata["messages"] == [{"role": "system", "content": "Think."}, *turns]
    with pytest.raises(UserError, match="unknown template 'r1'"):
        make_task("jsonl", test=path, template="r1")


BAD_LINES = [
    ('{"question": "a", "answer": "1"', "not JSON"),
    ("[1, 2]", "a JSON list, wanted an object"),
    ('"text"', "a JSON str, wanted an object"),
    ('{"answer": "1"}', "no question"),
    ('{"question": "", "answer": "1"}', "field 'question' is \"\", wanted a non-empty text"),
    ('{"question": 5, "answer": "1"}', "field 'question' is 5"),
    ('{"question": [{"role": "system", "content": "x"}]}', "with a user turn"),
    ('{"question": "a", "answer": ["1"]}', "field 'answer' is a JSON list, wanted a text or a number"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", [*rows(2), "", line])
    with pytest.raises(UserError) as caught:
        make_task(f"jsonl:{path}")
    assert str(caught.value).startswith(f"{path}:4: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="nope.jsonl: cannot be read"):
        make_task(f"jsonl:{tmp_path}/nope.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        make_task(f"jsonl:{tmp_path}")
    with pytest.raises(UserError, match="empty.jsonl: no lines"):
        make_task(f"jsonl:{write(tmp_path / 'empty.jsonl', [])}")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl:1: not JSON"):
        make_task(f"jsonl:{tmp_path}/latin.jsonl")
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="cannot be read"):
        make_task(f"jsonl:{tmp_path}/not.jsonl.gz")
    with gzip.open(tmp_path / "ok.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows(1)[0]))
    assert make_task("jsonl", test=f"{tmp_path}/ok.jsonl.gz").size("test") == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "no files"),
        ({"train": "x", "test_share": 1.5}, "test_share is 1.5"),
        ({"train": "x", "test_share": 0.5, "validation_share": 0.5}, "wanted less than 1"),
        ({"train": "x", "domain": "maths"}, "domain is 'maths'"),
        ({"trian": "x"}, "unknown setting 'trian': did you mean train"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings, message):
    with pytest.raises(UserError, match=message):
        make_task("jsonl", **settings)


def test_missing_answers_are_found_when_a_rule_needs_them(tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(1), {"question": "Write a poem.", "answer": None}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: task without answers"):
        make_task("jsonl", train=path, require_answers=True)
    task = make_task("jsonl", train=path, validation_share=0, test_share=0)
    with pytest.raises(UserError, match=r"task without answers: jsonl:a\.jsonl has none for .*a\.jsonl:2, the reward 'accuracy'"):
        require_answers(task)
    require_answers(make_task("jsonl", train=path, validation_share=0, test_share=0, domain="general"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'answer' has no '####'"):
        make_task("jsonl", train=path, answer_after="####")


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl").exists(), reason=f"no GSM8K in {DATA}")
def test_gsm8k_loads():
    task = make_task("jsonl", train=str(DATA / "gsm8k_train.jsonl"), test=str(DATA / "gsm8k_test.jsonl"), answer_after="####")
    assert sum(task.size(split) for split in SPLITS) + task.num_dropped == 7473 + 1319
    problem = task.problem("train", 0)
    assert problem.answer == "72" and "Natalia" in problem.prompt
    reward = make_reward("accuracy")
    golds = [task.problem("test", i) for i in range(task.size("test"))]
    assert all(problem.answer and reward([answered(problem, problem.answer)]) == [1.0] for problem in golds)
    assert reward([answered(problem, "$72.00"), answered(problem, "27")]) == [1.0, 0.0]


@pytest.mark.skipif(not (DATA / "math500.jsonl").exists(), reason=f"no MATH-500 in {DATA}")
def test_math500_loads():
    task = make_task("jsonl", test=str(DATA / "math500.jsonl"), template="chat")
    problems = [task.problem("test", i) for i in range(task.size("test"))]
    assert len(problems) == 500 and problems[0].metadata["subject"] == "Precalculus"
    boxed = make_reward("accuracy", extract="boxed")
    samples = [Sample(problem, f"so ${{\\boxed{{{problem.answer}}}}}$.", np.arange(3), np.zeros(3)) for problem in problems]
    assert boxed(samples) == [1.0] * 500
    require_answers(task, split="test")


# ---- reasoning-gym


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


def test_gym_problems_are_a_function_of_seed_split_and_index(gym):
    a, b = (make_task("gym:chain_sum", seed=3) for _ in range(2))
    forward = [a.problem(split, i) for split in SPLITS for i in range(12)]
    backward = [b.problem(split, i) for split in reversed(SPLITS) for i in reversed(range(12))]
    assert forward == backward[::-1]
    other = make_task("gym:chain_sum", seed=4)
    assert other.problem("train", 0) != a.problem("train", 0) and other.problem("test", 0) == a.problem("test", 0)
    assert a.size("train") is None and isinstance(a, Task)
    assert json.dumps(forward[0].metadata)


def test_gym_splits_are_disjoint_in_a_small_family(gym):
    task = make_task("gym:chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)  # a few hundred questions in all
    parts = [{task.problem(split, i).prompt for i in range(60)} for split in SPLITS]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize("family", ["acre", "gsm_symbolic", "pool_matrix"])  # families that take no index beyond their size
def test_gym_families_that_build_lists_work_too(gym, family):
    task = make_task(f"gym:{family}")
    problem = task.problem("train", 300)
    assert problem == make_task(f"gym:{family}").problem("train", 300)
    assert make_reward("accuracy")([answered(problem, problem.answer)]) == [1.0]


def test_gym_accuracy_uses_the_familys_scorer(gym):
    reward = make_reward("accuracy")
    problem = make_task("gym:letter_jumble").problem("train", 0)
    assert reward([answered(problem, problem.answer), answered(problem, "junk")]) == [1.0, 0.0]
    decimal = make_task("gym:decimal_chain_sum").problem("train", 0)
    assert reward([answered(decimal, f"{decimal.answer}0" if "." in decimal.answer else f"{decimal.answer}.0")]) == [1.0]


def test_gym_family_without_a_single_answer_is_scored(gym):
    task = make_task("gym:graph_color")
    problem = task.problem("train", 0)
    assert problem.answer is None
    require_answers(task)
    entry = task._entry("train", 0)
    right = json.dumps({str(k): v for k, v in entry["metadata"]["possible_answer"].items()})
    assert make_reward("accuracy")([answered(problem, right), answered(problem, "{}"), answered(problem, "junk")]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", sorted(EXECUTING))
def test_gym_families_that_execute_the_answer_are_refused_without_a_sandbox(gym, family, monkeypatch):
    monkeypatch.setattr("athanor.tasks.gym.why_not", lambda: "bubblewrap is not installed")
    with pytest.raises(UserError, match="executes the model's answer as Python, so it needs the sandbox: bubblewrap is not installed"):
        make_task(f"gym:{family}")
    assert family not in families()


@pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be isolated here: {why_not()}")
@pytest.mark.parametrize("family", sorted(EXECUTING))
def test_gym_families_that_execute_the_answer_are_scored_in_the_sandbox(gym, family):
    task = make_task(f"gym:{family}")
    problem = task.problem("train", 0)
    assert family in families() and task.score(problem.answer, problem) == 1.0
    for answer in ("junk", "__import__('os').system('id')", "[oracle_answer]", "valid_solutions[0]", "entry['answer']", "x.__class__", "f(1)(2)"):
        assert task.score(answer, problem) == 0.0
    assert task.num_scorer_errors == 0


@pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be isolated here: {why_not()}")
def test_gym_answers_in_another_form_are_evaluated_in_the_sandbox(gym, monkeypatch):
    monkeypatch.setattr(_sandboxed, "_LIMITS", replace(_sandboxed._LIMITS, cpu_s=1, wall_s=4))
    game = make_task("gym:countdown")
    problem = game.problem("train", 0)
    assert game.score(f" 0 + ({problem.answer})", problem) == 0.0  # a number that was not given
    assert game.score(f" ( {problem.answer} ) ", problem) == 1.0
    assert game.score("9**9**9**9", problem) == 0.0 and game.num_scorer_errors == 1
    assert game.score(f"+({problem.answer})", problem) == 1.0  # in a new sandbox where the last answer has ended the old one
    letters = make_task("gym:string_insertion", junk_threshold=0.1)
    problem = letters.problem("train", 0)
    assert letters.score(str(list(problem.answer)), problem) == pytest.approx(0.1)


def test_gym_other_refusals(gym):
    with pytest.raises(UserError, match="gives 1.0 to any text"):
        make_task("gym:game_of_life_halting")
    with pytest.raises(UserError, match="one by one"):
        make_task("gym:composite")
    with pytest.raises(UserError, match="did you mean chain_sum"):
        make_task("gym:chainsum")
    with pytest.raises(UserError, match='wanted "gym:<family>"'):
        make_task("gym")
    with pytest.raises(UserError, match="unknown setting 'min_term': did you mean min_terms"):
        make_task("gym:chain_sum", min_term=3)
    with pytest.raises(UserError, match="configuration refused: max_terms must be"):
        make_task("gym:chain_sum", min_terms=9, max_terms=3)
    with pytest.raises(UserError, match="too few different problems"):
        task = make_task("gym:count_bits", min_n=1, max_n=1)  # a single question cannot be in three splits
        for split in SPLITS:
            task.problem(split, 0)


def test_gym_scorer_that_raises_scores_zero_and_is_counted(gym):
    task = make_task("gym:prime_factorization")
    problem = task.problem("train", 0)
    reward = make_reward("accuracy")
    assert reward([answered(problem, "seven × junk"), answered(problem, problem.answer)]) == [0.0, 1.0]
    assert task.num_scorer_errors == 1


@pytest.mark.parametrize(
    "family, answer",
    [
        ("complex_arithmetic", "nan"),
        ("complex_arithmetic", "n a n"),
        ("complex_arithmetic", "nani"),
        ("rubiks_cube", "R" + "9" * 12),
        ("spell_backward", "a"),
        ("propositional_logic", "junk"),
        ("gcd", "1 2 3 4 5 6 7 8 9"),
        ("maze", "R9"),
        ("syllogism", "None"),
        ("power_function", "1e999999999"),
        ("decimal_arithmetic", "1e999999999"),
        ("chain_sum", "1" * 100_000),
        ("rectangle_count", "0"),
        ("time_intervals", "1"),
    ],
)
def test_gym_junk_earns_nothing(gym, family, answer):
    task = make_task(f"gym:{family}")
    problems = [problem for i in range(4) if (problem := task.problem("train", i)).answer != answer]
    assert make_reward("accuracy")([answered(problem, answer) for problem in problems]) == [0.0] * len(problems)


def test_gym_partial_credit_is_let_through_on_request_alone(gym):
    lenient, strict = make_task("gym:rectangle_count", junk_threshold=0.1, name="lenient"), make_task("gym:rectangle_count")
    near = str(int(strict.problem("train", 0).answer) + 1)
    assert 0.1 <= lenient.score(near, lenient.problem("train", 0)) < 1.0
    assert strict.score(near, strict.problem("train", 0)) == 0.0


def test_gym_tasks_of_one_name_cannot_score_each_other(gym):
    easy = make_task("gym:chain_sum", max_terms=2).problem("train", 0)
    make_task("gym:chain_sum", min_terms=5)
    with pytest.raises(ValueError, match="another task's of the same name; give one of them a `name`"):
        make_reward("accuracy")([answered(easy, easy.answer)])
    named = make_task("gym:chain_sum", max_terms=2, name="easy").problem("train", 0)
    make_task("gym:chain_sum", min_terms=5, name="hard")
    assert make_reward("accuracy")([answered(named, named.answer)]) == [1.0]


def test_gym_keeps_stdout_clean(gym, capsys):
    make_task("gym:bf").problem("train", 0)
    assert capsys.readouterr().out == ""  # the family itself prints a dot per problem


def test_gym_polynomials_without_roots_are_not_given_away(gym):
    task = make_task("gym:polynomial_equations", min_degree=2, max_degree=2)
    problems = [task.problem("train", i) for i in range(10)]
    assert all(problem.answer for problem in problems)
    assert make_reward("accuracy")([answered(problem, "junk") for problem in problems]) == [0.0] * 10
