"""The default task: its arithmetic against Python's, its splits, and what its corpus promises."""

import collections
import re

import pytest

from athanor.errors import UserError
from athanor.rewards import make_reward, parse_response
from athanor.samples import Sample
from athanor.tasks import make_task
from athanor.tasks.arithmetic import ArithmeticTask, split_of
from athanor.tokenizer import symbol_tokenizer

ENGLISH = {"则": "so", "等": "wait", "查": "check", "对": "ok"}
CHAIN = re.compile(r"User: (\d( [+-] \d)+) \? Assistant:")


def worked(chain: str) -> int:
    total, sign = 0, 1
    for symbol in chain.split():
        if symbol in "+-":
            sign = 1 if symbol == "+" else -1
        else:
            total += sign * int(symbol)
        assert 0 <= total <= 9
    return total


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answers_are_right_and_chains_belong_to_the_split(split):
    task = ArithmeticTask(seed=3)
    for i in range(300):
        problem = task.problem(split, i)
        chain = CHAIN.fullmatch(problem.prompt).group(1)
        assert problem.answer == str(worked(chain)) and split_of(chain) == split
        assert 4 <= len(chain.split()[::2]) <= 6 and len(set(chain.split()[::2])) == len(chain.split()[::2])


def test_held_out_problems_do_not_depend_on_the_seed_but_training_does():
    a, b = ArithmeticTask(seed=0), ArithmeticTask(seed=1)
    assert [a.problem("test", i) for i in range(50)] == [b.problem("test", i) for i in range(50)]
    assert [a.problem("train", i).prompt for i in range(50)] != [b.problem("train", i).prompt for i in range(50)]


def test_no_held_out_chain_appears_in_corpus_or_written_examples():
    task = ArithmeticTask()
    held_out = {task.problem(split, i).prompt for split in ("validation", "test") for i in range(600)}
    assert not held_out & ({task.corpus(i)[0] for i in range(5000)} | {task.written(i)[0].prompt for i in range(500)})


def test_corpus_is_of_the_mixed_quality_that_it_promises():
    task = ArithmeticTask()
    kinds, right = collections.Counter(), collections.defaultdict(list)
    for i in range(20_000):
        prompt, text = task.corpus(i)
        if "User:" not in prompt:
            kinds["lesson"] += 1
            english = " ".join(ENGLISH.get(word, word) for word in f"{prompt} | {text}".split())
            first, _, check = english.partition(" check | ")
            chain, first = first.replace("| ", "").split(" so ", 1)
            answer = worked(chain)
            if check:
                kinds["check"] += 1
                second, verdict, third = re.fullmatch(r"(.*?) (ok|wait)(?: (.*))?", check).groups()
                found = worked(first.split(" so ")[-1])
                kinds["check of an error"] += found != answer
                assert verdict == ("ok" if found == answer else "wait") and (third is None) == (verdict == "ok")
            for lines in (second, third or second) if check else (first,):
                values = [worked(line) for line in lines.split(" so ")]
                assert values == [answer] * (len(chain.split()) // 2)  # no slip where the loss is, one line per step
            continue
        if len(prompt.split()) < 9:
            kinds["short"] += 1  # fewer than four terms: a worked chain of two is one digit, like a guess
            continue
        words = text.split()
        reflective = bool(set(words) & {"wait", "check", "等", "查"})
        kind = "reflection" if reflective else "trace" if set(words) & {"+", "-"} else "guess"
        kinds[kind] += 1
        answer = parse_response(text).answer
        if answer is not None:
            right[kind].append(int(answer) == worked(CHAIN.fullmatch(prompt).group(1)))
    questions = 20_000 - kinds["lesson"] - kinds["short"]
    accuracy = {kind: sum(v) / len(v) for kind, v in right.items()}
    # Binomial deviations at these counts stay below 0.02; a third of the inline traces have no slip and so show no reflection.
    assert kinds["lesson"] / 20_000 == pytest.approx(task.worked, abs=0.02)
    assert kinds["check"] / kinds["lesson"] == pytest.approx(task.verified, abs=0.02)
    assert 0.3 < kinds["check of an error"] / kinds["check"] < 0.7
    assert kinds["reflection"] / questions == pytest.approx(task.reflections * (0.7 + 0.3 * 0.6), abs=0.02)
    assert kinds["guess"] / questions > 0.7
    assert accuracy["guess"] == pytest.approx(task.guess_right, abs=0.02)
    assert 0.3 < accuracy["trace"] < 0.7 < accuracy["reflection"], accuracy


def test_written_examples_are_correct_well_formed_and_in_one_language():
    task = ArithmeticTask()
    accuracy, form, language = (make_reward(name) for name in ("accuracy", "format", "language"))
    waits = 0
    for i in range(300):
        problem, text = task.written(i)
        sample = Sample(problem, text, [], [])
        assert accuracy([sample], [problem]) == form([sample], [problem]) == language([sample], [problem]) == [1.0]
        assert " check " in text
        waits += " wait " in text
    assert 0.1 < waits / 300 < 0.5  # the first pass slips now and then, and only then the verdict is wait


def test_the_competence_prompt_gives_one_right_step_of_the_first_pass_or_of_the_check():
    task = ArithmeticTask()
    for i in range(100):
        prompt, answer = task.competence(i)
        chain, thought = re.fullmatch(r"User: (.*) \? Assistant: <think> (.*)", prompt).groups()
        first, _, check = thought.rpartition(" check ")
        assert bool(first) == bool(i % 2)
        assert worked(check) == worked(chain) == int(answer) and len(check.split()) == len(chain.split()) - 2
        if first:
            lines = first.split(" so ")
            assert {worked(line) for line in lines} == {int(answer)} and len(lines[-1]) == 1


def test_no_held_out_problem_is_drawn_twice_in_any_order_of_asking():
    task, other = ArithmeticTask(), ArithmeticTask()
    assert other.problem("test", 400) == task.problem("test", 400)
    assert len({task.problem("test", i).prompt for i in range(600)}) == 600
    with pytest.raises(UserError, match="distinct"):
        ArithmeticTask(min_terms=2, max_terms=2).problem("test", 80)


def test_everything_it_writes_is_in_its_symbols():
    task = make_task("arithmetic", seed=5)
    tokenizer = symbol_tokenizer(list(task.symbols))
    for i in range(500):
        for text in (*task.corpus(i), task.written(i)[1], task.problem("train", i).prompt):
            assert tokenizer.decode(tokenizer.encode(text)) == text
