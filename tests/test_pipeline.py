"""The command line end to end on a micro recipe: the JSON line, what a kill leaves, and what bad input says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from athanor.config import RecipeConfig
from athanor.errors import UserError
from athanor.metrics import MetricsWriter
from athanor.pipeline import run
from athanor.recipe_io import load_recipe
from athanor.stages import grpo

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).with_name("micro_recipe.toml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(tmp_path, *arguments):
    return [sys.executable, str(ROOT / "engine" / "train.py"), str(RECIPE), "--run_root", str(tmp_path), *map(str, arguments)]


def train(tmp_path, *arguments, **options):
    return subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options)


def figures(result):
    """The last line without times and places."""
    summary = json.loads(result.stdout.splitlines()[-1])
    return {name: {key: value for key, value in row.items() if key != "wall_s"} for name, row in summary["stages"].items()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = train(folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "micro", result


def test_the_last_line_and_the_run_folder_are_complete(whole_run):
    run_dir, result = whole_run
    summary = json.loads(result.stdout.splitlines()[-1])
    assert {"recipe", "seed", "wall_s", "run_dir", "stages"} <= summary.keys()
    assert list(summary["stages"]) == ["base", "zero", "fine", "general", "student"]
    wanted = {"pass@1", "pass@1_t1", "cons@4", "mean_tokens", "reflection_rate", "format_rate", "language_consistency", "wall_s"}
    for row in summary["stages"].values():
        assert wanted <= row.keys() and all(isinstance(row[key], float) for key in wanted)
    assert 0 <= summary["stages"]["general"]["unsafe_rate"] <= 1 and 0 <= summary["stages"]["general"]["safety_score"] <= 1
    files = ("manifest.json", "config.json", "metrics.jsonl", "report.html", "samples.jsonl", "data/data.jsonl", "checkpoints/general/config.json")
    for name in files:
        assert (run_dir / name).is_file(), name
    assert not list(run_dir.glob("checkpoints/*.partial"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "zero"] == [1, 2, 3, 4, 5, 6]
    gaps = [row["logp_gap_max"] for row in rows if "logp_gap_max" in row]
    assert len(gaps) == 10 and max(gaps) <= 1e-5


def test_rl_writes_transcripts_and_shows_what_people_watch(whole_run):
    run_dir, result = whole_run
    rows = [json.loads(line) for line in (run_dir / "transcripts" / "zero.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 8 and [row["place"] for row in rows] == ["best"] * 4 + ["worst"] * 4
    assert min(row["reward"] for row in rows[:4]) >= max(row["reward"] for row in rows[4:])
    assert (run_dir / "transcripts.html").is_file() and (run_dir / "transcripts" / "general.jsonl").is_file()
    line = next(line for line in result.stderr.splitlines() if "zero  step 1/6" in line)
    assert all(word in line for word in ("left", "reward", "length", "pass@1", "reflection", "logp gap", "tokens/s"))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["pass@1"] == row["accuracy"] and 0 <= row["language_consistency"] <= 1 for row in metrics if row["stage"] == "zero")


def test_a_second_start_does_nothing_and_says_the_same(whole_run):
    run_dir, result = whole_run
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = train(run_dir.parent)
    assert again.returncode == 0 and figures(again) == figures(result)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


# In each kind of stage that saves states, and just after a save, a refresh of the reference or an earlier kill.
@pytest.mark.parametrize("stage, step", [("base", 30), ("zero", 3), ("fine", 3), ("judge", 5), ("general", 3)])
def test_killed_anywhere_it_ends_with_the_same_figures(whole_run, tmp_path, stage, step):
    run_dir, result = whole_run
    metrics = tmp_path / "micro" / "metrics.jsonl"
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.time() + 120
    pattern = re.compile(rf'"stage": "{stage}", "step": {step}\b')
    while time.time() < deadline and not (metrics.exists() and pattern.search(metrics.read_text())):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert figures(resumed) == figures(result)
    for path in (run_dir / "transcripts").iterdir():
        assert (tmp_path / "micro" / "transcripts" / path.name).read_bytes() == path.read_bytes()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == stage]
    assert steps == sorted(set(steps))
    def untimed(path):
        lines = map(json.loads, path.read_text().splitlines())
        return sorted(({k: v for k, v in row.items() if not k.endswith("_s")} for row in lines), key=lambda row: (row["stage"], row["step"]))

    assert untimed(metrics) == untimed(run_dir / "metrics.jsonl")


def test_another_run_lends_its_finished_stages(whole_run, tmp_path):
    run_dir, result = whole_run
    lent = train(tmp_path, "--reuse", run_dir)
    assert lent.returncode == 0 and figures(lent) == figures(result)
    assert "taken from" in lent.stderr
    assert not any(json.loads(line)["stage"] == "base" for line in (tmp_path / "micro" / "metrics.jsonl").read_text().splitlines())


def test_reinforcement_learning_can_stop_at_an_accuracy(whole_run, tmp_path, monkeypatch):
    run_dir, _ = whole_run
    rising = iter([0.1, 0.5, 0.9])  # so small a model never answers right
    describe = grpo._describe
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # this process has other tests to run
    monkeypatch.setattr(grpo, "_describe", lambda *arguments: describe(*arguments) | {"accuracy": next(rising)})
    overrides = ["--run_root", tmp_path, "--reuse", run_dir, "--until", "zero", "--stages.zero.stop_at_accuracy", "0.5"]
    summary = run(load_recipe(RecipeConfig, str(RECIPE), [str(word) for word in overrides]), "micro")
    rows = [json.loads(line) for line in (tmp_path / "micro" / "metrics.jsonl").read_text().splitlines()]
    assert [row["accuracy"] for row in rows if row["stage"] == "zero"] == [0.1, 0.5]
    assert summary["stages"]["zero"]["rl_steps"] == 2


def test_the_weights_that_the_sampler_reads_are_verified(whole_run, tmp_path, monkeypatch):
    """Hashes after every step are in the metrics; weights that somebody changes between two steps stop the run."""
    run_dir, _ = whole_run
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def zero(name):
        overrides = ["--run_root", tmp_path, "--name", name, "--reuse", run_dir, "--until", "zero", "--verify_weights", "true",
                     "--stages.zero.max_refills", "4"]  # fmt: skip
        run(load_recipe(RecipeConfig, str(RECIPE), [str(word) for word in overrides]), "micro")
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["weights_hash"] for row in rows if row["stage"] == "zero"]

    assert len(set(zero("honest"))) == 6
    made, generators = grpo.rollout_generator, []
    monkeypatch.setattr(grpo, "rollout_generator", lambda *a, **k: generators.append(made(*a, **k)) or generators[-1])
    write = MetricsWriter.write

    def tampering(self, stage, step, values):
        write(self, stage, step, values)
        if step == 3:
            with torch.no_grad():
                generators[-1].model.norm.weight[0] += 1e-3

    monkeypatch.setattr(MetricsWriter, "write", tampering)
    with pytest.raises(UserError, match="step 4: the sampler's weights are not those of the last optimizer step"):
        zero("tampered")


def test_rewards_in_workers_are_measured_and_each_can_be_normalised_by_itself(whole_run, tmp_path, monkeypatch):
    run_dir, _ = whole_run
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    rewards = '[{reward = "math"}, {reward = "format", weight = 0.3, end = 0.5}, {reward = "length", weight = 0.1}]'
    overrides = ["--run_root", tmp_path, "--reuse", run_dir, "--until", "zero", "--stages.zero.rewards", rewards,
                 "--stages.zero.reward_scaling", "gdpo", "--stages.zero.reward_workers", "1"]  # fmt: skip
    run(load_recipe(RecipeConfig, str(RECIPE), [str(word) for word in overrides]), "micro")
    rows = [json.loads(line) for line in (tmp_path / "micro" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "zero"]
    assert len(rows) == 6 and all(row["reward_errors"] == row["reward_timeouts"] == row["reward_dropped"] == 0 for row in rows)
    assert all(row["reward_wait_s"] >= 0 and row["reward_busy_share"] >= 0 and "math" in row and "length" in row for row in rows)
    assert [("format" in row) for row in rows] == [True] * 3 + [False] * 3


def test_another_seed_gives_another_run_folder_or_an_error(whole_run):
    run_dir, _ = whole_run
    refused = train(run_dir.parent, "--seed", "1")
    assert refused.returncode == 2 and "seed" in refused.stderr and "--overwrite" in refused.stderr


def test_eval_measures_any_checkpoint(whole_run, tmp_path):
    run_dir, _ = whole_run
    result = subprocess.run(
        [sys.executable, str(ROOT / "engine" / "train.py"), "eval", "--model", str(run_dir / "checkpoints" / "zero"), "--task", "arithmetic",
         "--limit", "4", "--k", "2", "--max-tokens", "12", "--out", str(tmp_path)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["results"]["chain"]["num_samples"] == 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stages.zero.group_size", "1"], ["group_size", "2"]),
        (["--stages.zero.sampling.max_tokens", "0"], ["max_tokens", "1"]),
        (["--stages.zero.stepz", "3"], ["stepz", "steps"]),
        (["--stages.zero.init", "bass"], ["stages.zero.init", "bass", "base"]),
        (["--stages.zero.loss", "gropo"], ["gropo", "grpo"]),
        (["--stages.zero.stop_at_accuracy", "0.5", "--stages.zero.rewards", '[{reward = "format"}]'], ["stop_at_accuracy", "accuracy"]),
        (["--stages.zero.reward_scaling", "gdpo", "--stages.zero.loss_overrides", '{scale = "none"}'], ["gdpo", "group mean and std"]),
        (["--stages.zero.rewards", '[{reward = "math", start = 0.5, end = 0.5}]'], ["math", "start < end"]),
        (["--stages.zero.sampling.temperature", "0"], ["stages.zero.sampling.temperature", "greedy"]),
        (["--stages.zero.prompts", '[{task = "courtesy"}]'], ["courtesy", "answer"]),
        (["--stages.fine.data", '["/nowhere.jsonl"]'], ["/nowhere.jsonl"]),
        (["--run_root", "/proc/nothing"], ["/proc/nothing"]),
        (["--loggers", '["wandb"]'], ["loggers", "pip install wandb"]),
        (["--checkpoints", '{ base = "/nowhere" }'], ["checkpoints.base", "/nowhere"]),
        (["--device", "cuda"], ["cuda"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(tmp_path, arguments, words):
    if arguments[0] == "--device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    result = train(tmp_path, *arguments)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.stderr
    assert result.stdout == "" and not (tmp_path / "micro").exists()


def test_unknown_recipe_and_help():
    script = [sys.executable, str(ROOT / "engine" / "train.py")]
    unknown = subprocess.run([*script, "tinny"], capture_output=True, text=True, env=ENVIRONMENT)
    assert unknown.returncode == 2 and "tiny" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    text = subprocess.run([*script, "--help", "all"], capture_output=True, text=True, env=ENVIRONMENT)
    assert text.returncode == 0 and "stages.<name>" in text.stdout and "group_size" in text.stdout
