"""Recipes with judges and reward models: a run whose reward is an endpoint, and what is refused before anything is written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.checkpoint import export_model
from athanor.config import ModelConfig, RecipeConfig
from athanor.errors import UserError
from athanor.judging import score_groups
from athanor.model.transformer import Decoder
from athanor.pipeline import build_tasks, build_tokenizer, check, run
from athanor.recipe_io import load_recipe
from athanor.samples import Problem, Sample

sys.path.insert(0, str(Path(__file__).parent))
from chat_server import server  # noqa: E402

REWARDS = "--stages.rl.rewards"
KEY = "sk-very-secret-0123456789"
RECIPE = """
name = "judged"
[tasks.courtesy]
kind = "courtesy"
[tasks.discretion]
kind = "discretion"
[tasks.chain]
kind = "arithmetic"
[stages.taste]
kind = "reward_model"
init = "POLICY"
task = "courtesy"
[stages.guard]
kind = "reward_model"
objective = "pointwise"
init = "POLICY"
task = "discretion"
[stages.rl]
kind = "grpo"
init = "POLICY"
steps = 2
loss = "grpo"
loss_overrides = { kl = "none" }
prompts = [{ task = "courtesy" }]
prompts_per_step = 2
group_size = 3
reward_failures = "drop_sample"
reward_workers = 2
sampling = { max_tokens = 4 }
rewards = [
  { reward = "judge", domain = "general", settings = { url = "http://127.0.0.1:1/v1", model = "m", key_env = "JUDGE_KEY", retries = 1 } },
  { reward = "format", weight = 0.3 },
]
"""


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    """A function from overrides to the recipe; its policy is a random model."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # this process has other tests to run

    def recipe(*overrides, text=RECIPE):
        path = tmp_path / "recipe.toml"
        path.write_text(text.replace("POLICY", str(tmp_path / "policy")))
        (tmp_path / "policy").mkdir(exist_ok=True)
        return load_recipe(RecipeConfig, str(path), ["--run_root", str(tmp_path), *map(str, overrides)])

    return recipe


def export_policy(recipe, folder):
    tokenizer = build_tokenizer(recipe, build_tasks(recipe))
    decoder = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, intermediate_size=16)).initialize_(0)
    export_model(decoder, tokenizer, folder)


def test_a_judge_behind_an_endpoint_is_a_reward_of_a_recipe(recipe_of, tmp_path, capsys):
    def answer(prompt, n):  # one verdict in seven is none
        return "no opinion" if n % 7 == 3 else "[[A>B]]" if n % 2 else "[[A=B]]"

    whole = RECIPE[: RECIPE.index("[stages.taste]")] + RECIPE[RECIPE.index("[stages.rl]") :]
    with server(answer) as (url, seen):
        recipe = recipe_of("--stages.rl.rewards.0.settings.url", url, text=whole)
        export_policy(recipe, tmp_path / "policy")
        run(recipe, "judged")
    rows = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "rl"]
    assert len(seen) == 2 * 2 * 3 * 2  # both orders of six samples in two steps
    assert seen[0]["key"] == f"Bearer {KEY}"
    failed = sum(row["reward_errors"] for row in rows)
    assert failed >= 2 and sum(row["reward_dropped"] for row in rows) == failed and all("judge" in row for row in rows)
    manifest = json.loads((tmp_path / "judged" / "manifest.json").read_text())
    assert manifest["stages"]["rl"]["metrics"]["reward_failures"] == failed
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "judged").rglob("*") if path.is_file())
    assert KEY not in written + "".join(capsys.readouterr()) and "JUDGE_KEY" in written


def test_the_engines_own_generator_is_a_judge_of_a_recipe(recipe_of, tmp_path):
    whole = RECIPE[: RECIPE.index("[stages.taste]")] + RECIPE[RECIPE.index("[stages.rl]") :]
    judge = f'[{{reward = "judge", settings = {{checkpoint = "{tmp_path / "policy"}", max_tokens = 4}}}}, {{reward = "format"}}]'
    recipe = recipe_of(REWARDS, judge, "--stages.rl.reward_failures", "zero", text=whole)
    export_policy(recipe, tmp_path / "policy")
    run(recipe, "judged")
    rows = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    # its few symbols cannot spell the question: six errors a step, counted, and zero as configured
    assert [(row["reward_errors"], row["judge"]) for row in rows] == [(6, 0.0)] * 2
    manifest = json.loads((tmp_path / "judged" / "manifest.json").read_text())
    assert "rewards.0.settings.checkpoint" in manifest["stages"]["rl"]["inputs"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--stages.rl.rewards.0.settings.model", ""], "model is empty"),
        (["--stages.rl.rewards.0.settings.key_env", "ATHANOR_TEST_UNSET"], "ATHANOR_TEST_UNSET"),
        (["--stages.rl.rewards.0.settings.reference", "chosen"], "courtesy problem 0 has no text 'chosen'"),
        ([REWARDS, '[{reward = "judge", settings = {checkpoint = "nowhere"}}]'], "rewards.0.settings.checkpoint.*nowhere"),
        ([REWARDS, '[{reward = "judge", settings = {checkpoint = "taste", round = 2}}]'], "unknown setting 'round'"),
        ([REWARDS, '[{reward = "safety"}]'], "safety_model is empty"),
        ([REWARDS, '[{reward = "safety"}]', "--stages.rl.safety_model", "taste"], "'taste' is pairwise, wanted.*pointwise"),
        (["--stages.rl.reward_model", "guard"], "'guard' is pointwise, wanted.*pairwise"),
        (["--stages.guard.task", "chain"], "offers no verdicts of that kind.*labelled or judged_safe"),
        (["--stages.taste.task", "discretion"], "pair or preferred"),
        (["--evaluation.safety_model", "gard"], "unknown stage 'gard'.*guard"),
        (["--evaluation.stages", '["rl"]', "--evaluation.safety_task", "discretio"], "unknown task 'discretio'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(recipe_of, overrides, message):
    recipe = recipe_of(*overrides)
    with pytest.raises(UserError, match=message):
        check(recipe, build_tasks(recipe))


def test_rejection_sampling_may_ask_a_judge_about_the_gold_answer():
    problem = Problem("Capital of France?", "Paris", 0, "quiz", "stem")
    group = [Sample(problem, f"<answer> {text} </answer>", np.zeros(1, np.int64), np.zeros(1, np.float32)) for text in ("Paris, France", "Rome", "?")]
    with server(lambda prompt, n: "[[yes]]" if "Paris, France" in prompt else "[[no]]" if "Rome" in prompt else "who knows") as (url, _):
        scores = score_groups([group], "judge_answer", settings={"url": url, "model": "m"})
    assert scores == [[1.0, 0.0, None]]
