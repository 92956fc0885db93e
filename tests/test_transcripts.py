"""Transcripts: which samples are written, what a line holds, the texts of tokens, and the page that shows them."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from athanor.parallel import Ranks
from athanor.rewards import RewardScores
from athanor.samples import Problem, Sample
from athanor.tokenizer import Tokenizer, symbol_tokenizer
from athanor.transcript_log import rewind_transcripts, token_texts, transcript_path, write_transcripts
from athanor.transcripts import LEVELS, MAX_HEAD, MAX_STEPS, MAX_TAIL, Piece, main, split_thought, write_page
from athanor.watch_config import TranscriptConfig

SYMBOLS = symbol_tokenizer(["one", "two", "is", "<think>", "</think>", "<answer>", "</answer>"])


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate([*alphabet, "<eos>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>"})


def sample_of(i, text="<think> one </think> <answer> two </answer>"):
    ids = np.array([*SYMBOLS.encode(text), SYMBOLS.eos_id], np.int64)
    return Sample(Problem(f"User: one {i} ?", "two", i, "chain"), text, ids, -np.arange(len(ids), dtype=np.float32))


def scores_of(total, applied=None):
    total = np.array(total, np.float64)
    applied = np.ones(len(total), bool) if applied is None else np.array(applied)
    return RewardScores(total, {"accuracy": list(total), "format": [None] * len(total)}, total, applied, ~applied)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, step, total, applied=None, **config):
    samples = [sample_of(i) for i in range(len(total))]
    groups, places, advantages = [[sample] for sample in samples], list(range(len(total))), list(range(len(total)))
    write_transcripts(path, step, groups, places, scores_of(total, applied), advantages, TranscriptConfig(**config), SYMBOLS, Ranks(threads=1))


def test_the_best_and_the_worst_of_a_step_are_written(tmp_path):
    path = transcript_path(tmp_path, "zero")
    total = [0.5, 1.0, 0.0, 0.7, 0.1, 9.0]
    write(path, 11, total, [True] * 5 + [False], num=4)  # the last has no verdict
    rows = lines(path)
    assert [(row["place"], row["id"]) for row in rows] == [("best", 1), ("best", 3), ("worst", 4), ("worst", 2)]
    assert rows[0]["reward"] == 1.0 and rows[0]["rewards"] == {"accuracy": 1.0, "format": None} and rows[0]["advantage"] == 1.0
    assert rows[0]["prompt"] == "User: one 1 ?" and rows[0]["step"] == 11 and "tokens" not in rows[0]


def test_few_samples_are_written_once_each(tmp_path):
    write(tmp_path / "z.jsonl", 1, [0.0, 1.0, 0.5], num=8)
    assert [(row["place"], row["id"]) for row in lines(tmp_path / "z.jsonl")] == [("best", 1), ("best", 2), ("worst", 0)]


def test_of_equal_samples_those_of_different_problems_come_first(tmp_path):
    samples = [sample_of(i // 4) for i in range(16)]  # four problems
    scores = scores_of([1.0, 1.0, 0.0, 0.0] * 4)
    groups = [samples[i : i + 4] for i in range(0, 16, 4)]
    write_transcripts(tmp_path / "z.jsonl", 1, groups, [0, 1, 2, 3], scores, [0.0] * 16, TranscriptConfig(num=8), SYMBOLS, Ranks(threads=1))
    rows = lines(tmp_path / "z.jsonl")
    assert [row["place"] for row in rows] == ["best"] * 4 + ["worst"] * 4
    assert {row["id"] for row in rows[:4]} == {row["id"] for row in rows[4:]} == {0, 1, 2, 3}


def test_log_probs_of_every_token_are_an_option(tmp_path):
    write(tmp_path / "z.jsonl", 1, [0.0, 1.0], logps=True)
    row = lines(tmp_path / "z.jsonl")[0]
    assert "".join(row["tokens"]) == row["text"] and row["logps"] == [-float(i) for i in range(7)] and row["tokens"][-1] == ""


def test_a_resumed_stage_cuts_the_file_back(tmp_path):
    path = tmp_path / "z.jsonl"
    rewind_transcripts(path, 0)  # there is none yet
    for step in (1, 11, 21):
        write(path, step, [0.0, 1.0])
    with open(path, "ab") as file:
        file.write(b'{"step": 31, "pl')  # a kill
    rewind_transcripts(path, 11)
    assert [row["step"] for row in lines(path)] == [1, 1, 11, 11]


@pytest.mark.parametrize("tokenizer, text", [
    (byte_tokenizer(), "plain text, twenty-odd bytes"),
    (byte_tokenizer(), "3 × 4 = 12, 所以 🙂 wait … à la fin, 查"),
    (SYMBOLS, "<think> one is two </think> <answer> two </answer> one one one one one one"),
    (byte_tokenizer(), ""),
])  # fmt: skip
def test_texts_of_tokens_joined_are_the_text(tokenizer, text):
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int64)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and texts[-1] == "" and not any("\ufffd" in piece for piece in texts)


def test_half_a_character_at_the_end_is_not_lost():
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer.encode("ab所")[:-1], np.int64)
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_thought_is_split_from_the_rest_even_inside_a_token():
    row = {"tokens": ["<th", "ink> a", " </think> b", " c"], "logps": [-0.1, -0.2, -0.3, -0.4], "text": "<think> a </think> b c"}
    thought, rest = split_thought(row)
    assert "".join(p.text for p in thought) == "<think> a </think>" and rest == [Piece(" b", -0.3), Piece(" c", -0.4)]
    assert split_thought({"text": "<think> never closed"}) == ([], [Piece("<think> never closed", None)])


def test_colours_follow_the_log_probs():
    assert [Piece("x", logp).level for logp in (0.0, -0.2, -1.0, -2.0, -4.0, -9.0)] == list(range(len(LEVELS) + 1))
    assert Piece("x", None).level == 0


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.urls, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.urls += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_model_text_is_only_text(tmp_path):
    hostile = '<think> <script>alert(1)</script> </think> <img src=x onerror=alert(2)> {{ 7 * 7 }} <a href="//evil">'
    folder = tmp_path / "transcripts"
    folder.mkdir()
    row = {"step": 1, "place": "best", "task": "t", "id": 0, "prompt": hostile, "answer": hostile, "text": hostile, "finish": "stop", "num_tokens": 9,
           "reward": 1.0, "rewards": {"accuracy": None}, "advantage": 0.5}  # fmt: skip
    coloured = row | {"tokens": [hostile[:30], hostile[30:]], "logps": [-0.05, -7.0], "place": "worst"}
    (folder / "zero.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(coloured) + "\n")
    path = write_page(tmp_path)
    page = Page(path.read_text())
    assert page.urls == [] and not {"script", "img", "iframe", "link", "a"} & set(page.tags)
    assert "{{ 7 * 7 }}" in "".join(page.text) and 'class="l5" title="-7.00"' in path.read_text()
    assert "default-src 'none'" in path.read_text() and page.tags.count("details") == 1 + 2 * 2


def test_of_many_steps_and_of_long_samples_the_page_shows_some(tmp_path):
    folder = tmp_path / "transcripts"
    folder.mkdir()
    long = ["word "] * (MAX_HEAD + MAX_TAIL + 77)
    with open(folder / "zero.jsonl", "w") as file:
        for step in range(1, 101):
            row = {"step": step, "place": "best", "task": "t", "id": 0, "prompt": "p", "answer": None, "text": "".join(long), "finish": "length",
                   "num_tokens": len(long), "reward": 0.0, "rewards": {}, "advantage": 0.0, "tokens": long if step == 100 else ["x"],
                   "logps": [-0.5] * (len(long) if step == 100 else 1)}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    text = write_page(tmp_path).read_text()
    assert text.count("<summary>Step ") == MAX_STEPS and "<summary>Step 1 " in text and "<summary>Step 100 " in text
    assert "[... 77 tokens ...]" in text


def test_the_command_makes_the_page_or_says_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "no transcripts" in capsys.readouterr().err
    write(transcript_path(tmp_path, "zero"), 1, [0.0, 1.0])
    assert main([str(tmp_path)]) == 0 and (tmp_path / "transcripts.html").is_file()
    (tmp_path / "transcripts" / "zero.jsonl").write_text('{"step": 1\n')
    assert main([str(tmp_path)]) == 2 and "zero.jsonl:1" in capsys.readouterr().err
    assert main([]) == 2
