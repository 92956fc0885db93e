"""python -m athanor.generate: what it prints, and one line for what the user can fix."""

import json
import subprocess
import sys

import pytest

from athanor.checkpoint import export_model
from athanor.config import ModelConfig
from athanor.generate import main
from athanor.model.transformer import Decoder
from athanor.tokenizer import symbol_tokenizer

TOKENIZER = symbol_tokenizer(["one", "two", "three", "four", "five", "plus", "is"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    model = Decoder(ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)).initialize_(0)
    export_model(model, TOKENIZER, path)
    return str(path)


def sample(capsys, folder, *arguments):
    code = main(["--model", folder, "--max-tokens", "12", "--threads", "1", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_lines_hold_every_sample_and_repeat_with_the_seed(capsys, folder):
    code, out, err = sample(capsys, folder, "--prompt", "one plus", "--prompt", "two", "-n", "3", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and sorted((row["prompt"], row["sample"]) for row in rows) == [(p, i) for p in ("one plus", "two") for i in range(3)]
    for row in rows:
        assert row["text"] == TOKENIZER.decode(row["token_ids"]) and len(row["logps"]) == len(row["token_ids"]) <= 12
        assert row["finish"] in ("stop", "length")
    assert "tokens of 6 samples" in err
    again = sample(capsys, folder, "--prompt", "one plus", "--prompt", "two", "-n", "3", "--json", "--speculate", "3")[1]  # drafts change nothing
    other = sample(capsys, folder, "--prompt", "one plus", "--prompt", "two", "-n", "3", "--json", "--seed", "1")[1]
    assert sorted(out.splitlines()) == sorted(again.splitlines()) != sorted(other.splitlines())


def test_one_sample_is_written_as_it_grows_and_equals_its_json(capsys, folder):
    shown = sample(capsys, folder, "--prompt", "one plus")[1]
    row = json.loads(sample(capsys, folder, "--prompt", "one plus", "--json")[1])
    assert shown == row["text"] + "\n"


def test_several_samples_have_heads(capsys, folder):
    out = sample(capsys, folder, "--prompt", "one", "-n", "2", "--temperature", "0")[1]
    assert out.count("--- prompt 1/1 sample ") == 2 and "log-prob 0.00" in out


def test_a_stop_string_ends_the_sample(capsys, folder):
    rows = [json.loads(line) for line in sample(capsys, folder, "--prompt", "one", "-n", "20", "--stop", "two", "--json")[1].splitlines()]
    assert any(row["text"].endswith("two") and row["finish"] == "stop" for row in rows)
    assert all("two" not in row["text"][:-3] for row in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prompt is missing"),
        (["--prompt", "one", "-n", "0"], "-n 0, wanted at least 1"),
        (["--prompt", "one", "--top-p", "0"], "--top-p: Input should be greater than 0"),
        (["--prompt", "one", "--stop", ""], "--stop: Value error, stop has an empty text"),
        (["--prompt", "one", "--speculate", "16"], "--speculate: Input should be less than or equal to 15"),
        (["--prompt", "one", "--speculate", "2", "--draft", "mtp"], "no layer for multi-token prediction; wanted ngram"),
        (["--prompt", "nine"], "unknown symbol 'nine'"),
        (["--prompt", "one", "--chat"], "no chat template"),
        (["--prompt", "one", "--max-tokens", "5000"], "more than max_position_embeddings = 4096"),
    ],
)
def test_what_the_user_can_fix_is_one_line(capsys, folder, arguments, message):
    code, out, err = sample(capsys, folder, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_missing_folder_is_one_line(capsys):
    assert main(["--model", "/nowhere", "--prompt", "x"]) == 2
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.multiproc
def test_the_module_runs(folder):
    command = [sys.executable, "-m", "athanor.generate", "--model", folder, "--prompt", "one", "-n", "8", "--max-tokens", "5", "--threads", "1"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count("--- prompt") == 8, out.stderr
