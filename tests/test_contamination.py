"""Decontamination by word n-grams, against a brute-force search for common runs of words."""

import json
import random

import pytest

from athanor.contamination import ReferenceNgrams, evaluation_ngrams, words_of
from athanor.errors import UserError
from athanor.tasks import make_task


def test_words():
    assert words_of("Tom's 3,5 apples_and PEARS!") == ["tom", "s", "3", "5", "apples", "and", "pears"]
    assert words_of("共有3个 x") == ["共", "有", "3", "个", "x"]
    assert words_of(" -- ") == []


@pytest.mark.parametrize("n", [1, 3, 10])
def test_matches_are_common_runs_of_n_words(n):
    rng = random.Random(n)
    vocabulary = [f"w{i}" for i in range(6 if n > 1 else 60)]
    references = {name: [[rng.choice(vocabulary) for _ in range(rng.randint(n, 40))] for _ in range(4)] for name in ("a", "b")}
    ngrams = ReferenceNgrams(n)
    for name, texts in references.items():
        ngrams.add(name, (", ".join(words).upper() for words in texts))
    for _ in range(200):
        words = [rng.choice(vocabulary) for _ in range(rng.randint(0, 40))]
        if rng.random() < 0.3:
            source = rng.choice(references["a"])
            start = rng.randrange(len(source) - n + 1)
            words[5:5] = source[start : start + n - rng.randint(0, 1)]
        runs = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        wanted = [
            name for name, texts in references.items() if any(tuple(text[i : i + n]) in runs for text in texts for i in range(len(text) - n + 1))
        ]
        assert ngrams.found_in(" ".join(words)) == wanted


def test_a_short_question_matches_only_itself():
    ngrams = ReferenceNgrams(10)
    ngrams.add("short", ["What is 2 + 2?", ""])
    assert ngrams.found_in("what is 2+2") == ["short"]
    assert ngrams.found_in("So what is 2 + 2? It is four.") == [] and ngrams.found_in("") == []


def test_sets_are_tasks_or_files(tmp_path):
    question = "A farmer has nine cows and sells four of them at the market."
    solution = "He keeps five because nine cows less four cows leaves five cows."
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": question, "answer": f"{solution}\n#### 5"}) + "\n")
    tasks = {"gsm": make_task(f"gsm8k:{path}"), "chain": make_task("arithmetic")}
    ngrams = evaluation_ngrams(["gsm", str(path)], tasks)
    assert ngrams.names == ["gsm", str(path)]
    assert ngrams.found_in(f"Once more: {question.lower()}") == ["gsm", str(path)]
    assert ngrams.found_in(solution) == ["gsm"]
    assert ngrams.found_in("Please reason step by step, and put your final answer within \\boxed{}.") == []  # the template is no question
    with pytest.raises(UserError, match="task chain is procedural"):
        evaluation_ngrams(["chain"], tasks)
    with pytest.raises(UserError, match="'nothing' is neither a task of this recipe nor a file"):
        evaluation_ngrams(["nothing"], tasks)
