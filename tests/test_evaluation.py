"""torchrun engine/train.py eval: a tiny random checkpoint from end to end, what a kill leaves, and one line for what the user can fix."""

import csv
import html.parser
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from athanor import evaluation, sample_store
from athanor.checkpoint import export_model
from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.evaluation import all_metrics, breakdowns, command
from athanor.metrics_eval import elo_rating
from athanor.model.transformer import Decoder
from athanor.published import published_rows
from athanor.samples import Problem, Sample
from athanor.tasks import make_task
from athanor.tokenizer import symbol_tokenizer

ROOT = Path(__file__).parents[1]
QUESTIONS = [{"question": f"what is {a} plus {b}", "answer": str(a + b), "level": a} for a in (1, 2) for b in (1, 2, 3)]
SYMBOLS = [*"0123456789", "what", "is", "plus", "User:", "?", "Assistant:", "<think>", "</think>", "<answer>", "</answer>", "wait", "+", "-"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation")
    tokenizer = symbol_tokenizer(SYMBOLS)
    shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3, max_position_embeddings=256)
    export_model(Decoder(ModelConfig(**shape)).initialize_(0), tokenizer, path / "model")
    sparse = dict(architecture="deepseek_v3", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, kv_lora_rank=16,
                  q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)  # fmt: skip
    export_model(Decoder(ModelConfig(**shape, **sparse)).initialize_(0), tokenizer, path / "sparse")
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def arguments(folder, out, *more):
    return ["--model", str(folder / "model"), "--task", "jsonl", "--data", str(folder / "questions.jsonl"), "--set", "template=raw", "--k", "4",
            "--max-tokens", "10", "--threads", "1", "--out", str(out), *map(str, more)]  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


TASK = "jsonl_questions.jsonl"


def test_end_to_end_on_the_command_line(folder, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "engine" / "train.py"), "eval", *arguments(folder, tmp_path)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["out"] == str(tmp_path) and list(last["results"]) == ["jsonl:questions.jsonl"]
    metrics = last["results"]["jsonl:questions.jsonl"]
    wanted = {"pass@1", "pass@1_se", "pass@2", "pass@4", "cons@4", "cons@4_se", "mean_tokens", "truncated_rate", "unjudged_rate", "num_samples"}
    assert wanted <= metrics.keys() and metrics["num_samples"] == 24 and 0 < metrics["mean_tokens"] <= 10
    assert "jsonl:questions.jsonl" in result.stderr and "24" in result.stderr  # progress
    rows = rows_of(tmp_path / TASK / "samples.jsonl")
    assert [row["index"] for row in rows] == list(range(6)) and all(len(row["samples"]) == 4 for row in rows)
    assert rows[0]["prompt"] == "what is 1 plus 1" and rows[0]["answer"] == "2"
    assert metrics["mean_tokens"] == np.mean([len(sample["token_ids"]) for row in rows for sample in row["samples"]])
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert float(next(row["value"] for row in table if row["metric"] == "mean_tokens")) == metrics["mean_tokens"]
    data = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert data[0]["metrics"] == metrics and data[0]["breakdowns"]["level"]["1"]["num_problems"] == 3
    page = (tmp_path / "results.html").read_text()
    assert "jsonl:questions.jsonl" in page and "http" not in re.sub(r"<meta[^>]*>", "", page)
    html.parser.HTMLParser().feed(page)


def test_help_names_every_option_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "exit codes: 0 done; 2" in text
    for option in "model task data k limit max-tokens temperature top-p seed out chat overwrite".split():
        assert f"--{option}" in text


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_reward_that_hangs_ends_the_evaluation(folder, tmp_path):
    code = """
import sys, time
from athanor import judging
from athanor.evaluation import command
class Hangs:
    def build(self): return lambda *_: time.sleep(60)
judging.judge_of = lambda *_, **__: Hangs()
command(sys.argv[1:])
"""
    more = ["--deadline", "rollout=100", "--deadline", "reward=2"]
    words = [sys.executable, "-c", code, *arguments(folder, tmp_path, *more)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 3, done.stderr[-2000:]
    assert "in phase reward, deadlines.reward_s is 2; rank 0 of 1, stage eval " in done.stderr


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("model", ["model", "sparse"])
def test_ranks_with_a_part_of_the_model_each_draw_what_one_process_draws(folder, tmp_path, model):
    alone = command(arguments(folder, tmp_path / "one", "--model", folder / model))["results"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    split = [str(ROOT / "engine" / "train.py"), "eval", *arguments(folder, tmp_path / "two", "--model", folder / model)]
    split += ["--tensor", "2", "--device", "cpu"]
    result = subprocess.run([*launcher, *split], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["results"] == alone
    one, two = (tmp_path / name / TASK / "samples.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_finished_problems_are_not_sampled_again(folder, tmp_path, monkeypatch):
    whole = command(arguments(folder, tmp_path / "whole"))["results"]
    original, drawn, members = sample_store.stream_samples, [], Counter()

    def counting(dispatch, problems, tokenizer, die=False):
        for item in original(dispatch, problems, tokenizer):
            members[problems[item[0]].id] += 1
            drawn.extend([problems[item[0]].id] * (members[problems[item[0]].id] == 4))
            yield item
            if die and len(drawn) == 2:
                raise Killed

    monkeypatch.setattr(sample_store, "stream_samples", lambda *a: counting(*a, die=True))
    with pytest.raises(Killed):
        command(arguments(folder, tmp_path / "killed"))
    samples = tmp_path / "killed" / TASK / "samples.jsonl"
    finished = {row["index"] for row in rows_of(samples)}
    assert finished == set(drawn[:2])
    with open(samples, "ab") as file:
        file.write(b'{"index": 5, "task')  # half a line
    drawn.clear()
    members.clear()
    monkeypatch.setattr(sample_store, "stream_samples", counting)
    assert command(arguments(folder, tmp_path / "killed"))["results"] == whole
    assert sorted(drawn) == sorted(set(range(6)) - finished)
    assert samples.read_bytes() == (tmp_path / "whole" / TASK / "samples.jsonl").read_bytes()
    drawn.clear()
    again = command(arguments(folder, tmp_path / "killed"))
    assert again["results"] == whole and drawn == []
    assert command(arguments(folder, tmp_path / "killed", "--limit", 3))["results"]["jsonl:questions.jsonl"]["num_problems"] == 3
    assert command(arguments(folder, tmp_path / "killed"))["results"] == whole and drawn == []  # the smaller limit threw nothing away


def test_samples_depend_on_their_own_problem_alone(folder, tmp_path):
    command(arguments(folder, tmp_path / "all"))
    command(arguments(folder, tmp_path / "two", "--limit", 2, "--max-rows", 4))
    assert rows_of(tmp_path / "all" / TASK / "samples.jsonl")[:2] == rows_of(tmp_path / "two" / TASK / "samples.jsonl")
    command(arguments(folder, tmp_path / "seed", "--seed", 1))
    assert rows_of(tmp_path / "all" / TASK / "samples.jsonl") != rows_of(tmp_path / "seed" / TASK / "samples.jsonl")


def test_other_settings_need_another_folder(folder, tmp_path):
    command(arguments(folder, tmp_path))
    for option, value, key in (("--k", 2, "k: 4 -> 2"), ("--temperature", 1.0, "sampling.temperature: 0.6 -> 1.0"), ("--seed", 3, "seed: 0 -> 3")):
        with pytest.raises(UserError, match=rf"drawn with other settings \(.*{re.escape(key)}.*--overwrite"):
            command(arguments(folder, tmp_path, option, value))
    result = command(arguments(folder, tmp_path, "--k", 2, "--overwrite"))
    assert result["results"]["jsonl:questions.jsonl"]["num_samples"] == 12
    (folder / "changed.jsonl").write_text("".join(json.dumps(row | {"question": row["question"] + " ?"}) + "\n" for row in QUESTIONS))
    changed = [str(folder / "changed.jsonl") if word.endswith("questions.jsonl") else word for word in arguments(folder, tmp_path, "--k", 2)]
    with pytest.raises(UserError, match=r"samples\.jsonl:1: 2 samples of .* with the same prompt; delete the file"):
        command([*changed, "--set", "name=jsonl:questions.jsonl"])


def test_several_tasks_share_one_table(folder, tmp_path):
    command(arguments(folder, tmp_path))
    result = command(["--model", str(folder / "model"), "--task", "arithmetic", "--limit", "3", "--k", "2", "--max-tokens", "8", "--threads", "1",
                      "--out", str(tmp_path)])  # fmt: skip
    assert list(result["results"]) == ["chain"]
    tables = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert [table["task"] for table in tables] == ["chain", "jsonl:questions.jsonl"]
    page = (tmp_path / "results.html").read_text()
    assert page.count("<h2>") == 2


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_ranks_give_the_samples_of_one(folder, tmp_path):
    command(arguments(folder, tmp_path / "one"))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone",
         str(ROOT / "engine" / "train.py"), "eval", *arguments(folder, tmp_path / "two", "--device", "cpu")],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert [path.name for path in sorted((tmp_path / "two" / TASK).glob("samples*"))] == ["samples.jsonl"]
    assert (tmp_path / "two" / TASK / "samples.jsonl").read_bytes() == (tmp_path / "one" / TASK / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--k", 0], "--k is 0, wanted at least 1"),
        (["--top-p", 0], "--top-p is 0.0: Input should be greater than 0"),
        (["--task", "gsm8k"], "--data: got 1 files for 2 tasks"),
        (["--deadline", "update=3"], "--deadline update=3: wanted PHASE=SECONDS above 0 with a phase of rollout, reward, collective"),
        (["--deadline", "reward=0"], "--deadline reward=0: wanted PHASE=SECONDS above 0"),
        (["--set", "template"], "--set template: wanted KEY=VALUE"),
        (["--set", "tempate=raw"], "unknown setting 'tempate': did you mean template"),
        (["--model", "/nowhere"], "--model: /nowhere is no folder"),
        (["--reward", "acuracy"], "unknown reward 'acuracy': did you mean accuracy"),
        (["--max-tokens", 1000], "max_position_embeddings = 256"),
        (["--chat", "on"], "no chat template"),
        (["--set", "template=boxed {prompt}"], "unknown symbol 'boxed'"),
    ],
)
def test_what_the_user_can_fix_is_one_line(folder, tmp_path, more, message):
    with pytest.raises(UserError) as caught:
        command(arguments(folder, tmp_path, *more))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_problems_without_answers_are_found_before_sampling(folder, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"question": "what is 1"}) + "\n")
    with pytest.raises(UserError, match=r"open\.jsonl:1: no gold answer"):
        command(["--model", str(folder / "model"), "--task", f"jsonl:{path}", "--set", "test_share=0.99", "--set", "validation_share=0"])
    with pytest.raises(UserError, match="has no problems in its validation split"):
        command(["--model", str(folder / "model"), "--task", "jsonl", "--split", "validation", "--set", f'test="{path}"'])


def test_a_chat_is_asked_as_a_message(folder, tmp_path):
    tokenizer = symbol_tokenizer(SYMBOLS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Assistant: <think>"
    options = evaluation.parser().parse_args(arguments(folder, tmp_path))
    task = make_task("jsonl", test=str(folder / "questions.jsonl"), template="raw")
    problem = evaluation.problems_of(task, options, tokenizer)[0]
    assert problem.prompt == "what is 1 plus 1 Assistant: <think>" and "messages" not in problem.metadata  # parse_response sees the open tag
    options.chat = "off"
    assert evaluation.problems_of(task, options, tokenizer)[0].prompt == "what is 1 plus 1"
    options.chat = "auto"
    whole = make_task("jsonl", test=str(folder / "questions.jsonl"), template="User: {prompt} ? Assistant:")
    assert evaluation.problems_of(whole, options, tokenizer)[0].prompt == "User: what is 1 plus 1 ? Assistant:"


# ---- metrics and tables


def rated_group(rating, right, n=4, **metadata):
    problem = Problem("q", "4", 0, "t", metadata={"rating": rating} | metadata)
    return [Sample(problem, f"<answer> {4 if i < right else 5} </answer>", np.arange(3), np.zeros(3, np.float32)) for i in range(n)]


def test_rated_problems_give_a_rating():
    groups = [rated_group(1000, 4, level="a"), rated_group(1500, 2, level="b"), rated_group(2000, 0, level="b")]
    scores = [[1.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    metrics = all_metrics(groups, scores, None)
    assert metrics["rating"] == elo_rating([1000, 1500, 2000], [4] * 3, [4, 2, 0]).value == pytest.approx(1500)
    assert "cons@4" not in metrics and "rating_bound" not in metrics
    assert all_metrics(groups[:1], scores[:1], None)["rating_bound"] == "at least"
    assert breakdowns(groups, scores)["level"]["b"]["pass@1"] == 0.25
    assert "rating" not in all_metrics([rated_group("hard", 1)], [[1.0, 0.0, 0.0, 0.0]], None)


def test_reference_rows_are_the_reports():
    rows = {row["model"]: row for row in published_rows("aime")}
    assert rows["DeepSeek-R1"]["pass@1"] == 0.798 and rows["R1-Distill-Qwen-1.5B"]["cons@64"] == 0.527
    assert {row["model"]: row["pass@1"] for row in published_rows("math")}["R1-Distill-Llama-70B"] == 0.945
    assert {row["model"]: row["pass@1"] for row in published_rows("gpqa")}["DeepSeek-R1-Zero"] == 0.758
    assert published_rows("livecodebench")[0]["rating"] == 717 and published_rows("gsm8k") == []
    assert "OpenAI-o1-mini" in rows and "QwQ-32B-Preview" not in {row["model"] for row in published_rows("mmlu")}


def test_reference_rows_stand_beside_ones_own(folder, tmp_path):
    path = tmp_path / "aime.jsonl"
    path.write_text(json.dumps({"problem": "what is 1 plus 1", "answer": 2}) + "\n")
    command(["--model", str(folder / "model"), "--task", "aime", "--data", str(path), "--set", "template=raw", "--k", "2", "--max-tokens", "4",
             "--threads", "1", "--out", str(tmp_path / "out")])  # fmt: skip
    page = (tmp_path / "out" / "results.html").read_text()
    assert "DeepSeek-R1-Zero" in page and "77.9 %" in page and "cons@64" in page
    published = [row for row in csv.DictReader((tmp_path / "out" / "results.csv").open()) if row["model"] == "DeepSeek-R1"]
    assert [(row["metric"], row["value"], row["source"]) for row in published] == [("pass@1", "0.798", "DeepSeek-R1 report, arXiv 2501.12948")]
