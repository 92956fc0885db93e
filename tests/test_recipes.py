"""The packaged recipes: each is valid and of the published shape and numbers, says what it misses, and is ready once that is there."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from athanor.catalogue import recipe_names
from athanor.checkpoint import export_model
from athanor.config import ModelConfig, RecipeConfig
from athanor.dry_run import dry_run, meta_shape
from athanor.errors import UserError
from athanor.hf_config import model_config_to_hf
from athanor.model.transformer import Decoder
from athanor.pipeline import run
from athanor.planner.command import command as plan_command
from athanor.recipe_inputs import missing_inputs, named_paths
from athanor.recipe_io import load_recipe
from athanor.sandbox import why_not
from athanor.tokenizer import symbol_tokenizer

TRAIN = Path(__file__).parents[1] / "engine" / "train.py"
WITH_FILES = [name for name in recipe_names() if not name.startswith("tiny")]
# Billions of parameters as the model cards state them.
PARAMETERS = {"Qwen2.5-0.5B-Instruct": 0.494, "Qwen2.5-1.5B": 1.54, "Qwen2.5-3B": 3.09, "Qwen2.5-Math-1.5B": 1.54, "Qwen2.5-Math-7B": 7.61,
              "Qwen2.5-14B": 14.7, "Qwen2.5-32B": 32.5, "Llama-3.1-8B": 8.03, "Llama-3.3-70B-Instruct": 70.6, "Qwen3-30B-A3B-Base": 30.5,
              "DeepSeek-V3-Base": 671.0}  # fmt: skip
# arXiv 2501.12948 v2, Table 6.
STUDENTS = {"distill_qwen_1_5b": 1e-4, "distill_qwen_7b": 8e-5, "distill_llama_8b": 5e-5, "distill_qwen_14b": 7e-5, "distill_qwen_32b": 6e-5,
            "distill_llama_70b": 2e-5}  # fmt: skip
ROWS = {
    "gsm8k": {"question": "What is 2 + 2 ({})?", "answer": "It is 4. #### 4"},
    "math": {"problem": "What is 2 + 2 ({})?", "solution": "\\boxed{4}", "answer": "4"},
    "jsonl": {"prompt": "What is 2 + 2 ({})?", "answer": "4", "solution": "4"},
    "aime": {"problem": "What is 2 + 2 ({})?", "answer": "4"},
    "apps": {"question": "Print twice the number ({}).", "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})},
    "mmlu": {"question": "What is 2 + 2 ({})?", "choices": ["3", "4"], "answer": 1},
    "prompts": {"prompt": "Write a line about {}."},
    "preferences": {"prompt": "Write a line about {}.", "chosen": "A fine line.", "rejected": "No."},
    "labelled": {"prompt": "Write a line about {}.", "response": "A fine line.", "label": "safe"},
    "data": {"prompt": "What is 2 + 2 ({})?", "completion": "<think> two and two </think> <answer> 4 </answer>"},
}


def recipe_of(name, *overrides):
    config = load_recipe(RecipeConfig, name, [str(word) for word in overrides])
    if any(task.kind in ("apps", "gym:countdown") for task in config.tasks.values()) and (reason := why_not()):
        pytest.skip(f"the recipe needs the sandbox: {reason}")
    return config


@functools.cache
def dry(name) -> dict:
    """A dry run where nothing is, and nothing is after it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        summary = dry_run(recipe_of(name), name)
        assert os.listdir(folder) == []
    return summary


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer of any text without a download: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate([*alphabet, "<eos>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))


def provide(recipe: RecipeConfig) -> None:
    """Put everything that a recipe names where it names it, with few rows and, for models, config.json and a tokenizer alone."""
    for key, path in named_paths(recipe):
        kind, name, *_ = key.split(".")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if kind == "checkpoints":
            Path(path).mkdir(exist_ok=True)
            (Path(path) / "config.json").write_text(json.dumps(model_config_to_hf(recipe.models[name])))
            byte_tokenizer(Path(path))
        else:
            row = ROWS[recipe.tasks[name].kind if kind == "tasks" else "data"]
            rows = [{k: v.replace("{}", f"{path} {i}") if isinstance(v, str) and "input" not in k else v for k, v in row.items()} for i in range(20)]
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def slowly(name: str, *quick: str):
    """A case that the fast tests leave out, for the seconds that its families or its tensors take."""
    return name if name in quick else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slowly(name, *({*recipe_names()} - {"countdown_1_5b", "countdown_3b"})) for name in recipe_names()])
def test_a_packaged_recipe_is_valid_and_of_the_published_shape(name):
    recipe, summary = recipe_of(name), dry(name)
    assert summary["ready"] == name.startswith("tiny") and list(summary["stages"]) == list(recipe.stages)
    for checkpoint, folder in recipe.checkpoints.items():
        if Path(folder).name in PARAMETERS:
            assert summary["models"][checkpoint]["parameters"] == pytest.approx(1e9 * PARAMETERS[Path(folder).name], rel=0.01)
    if recipe.checkpoints:
        assert any(Path(folder).name in PARAMETERS for folder in recipe.checkpoints.values())
    for path in recipe.downloads:
        assert any(line.count(path) and recipe.downloads[path] in line for line in summary["missing"]), path
    assert len(summary["missing"]) == len(recipe.downloads)  # each missing thing has a line that says where it comes from


@pytest.mark.parametrize("name", [slowly(name, "gsm8k_0_5b", "distill_qwen_1_5b", "dapo") for name in WITH_FILES])
def test_with_its_files_there_a_recipe_is_ready(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parquet = ["--tasks.math.settings.train", "data/dapo.jsonl"] if name in ("dapo", "gspo") else []  # Parquet needs another package
    recipe = recipe_of(name, *parquet)
    provide(recipe)
    summary = dry_run(recipe, name)
    assert summary["ready"] and summary["missing"] == []
    assert all(model["source"].endswith("config.json") for model in summary["models"].values())
    for stage in summary["stages"].values():
        assert stage["parameters"] and (stage["kind"] != "grpo" or stage["longest_prompt"] > 10)


@pytest.mark.parametrize("name", ["r1_zero", "distill_llama_70b", "gsm8k_0_5b"])
def test_a_recipe_can_be_planned_before_anything_is_downloaded(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe_of(name)  # skips without a sandbox
    plan_command([name, "--plan"])
    shown = capsys.readouterr().out
    assert name in shown and "parameters" in shown


def test_students_have_the_published_learning_rates():
    for name, lr in STUDENTS.items():
        stage = load_recipe(RecipeConfig, name, []).stages["distill"]
        optimizer = stage.optimizer
        assert (optimizer.lr, optimizer.schedule, optimizer.final_lr_ratio, stage.batch_size) == (lr, "cosine", 0.1, 64)
        assert stage.steps * 64 / 804_745 == pytest.approx(2, abs=1e-4)  # "2-3 epochs"


def test_r1_zero_has_the_published_numbers():
    recipe, stages = recipe_of("r1_zero"), dry("r1_zero")["stages"]
    assert sum(stage["optimizer_steps"] for stage in stages.values()) == 10_400
    assert [recipe.stages[name].sampling.max_tokens for name in stages] == [32_768, 65_536]
    for name, facts in stages.items():
        stage = recipe.stages[name]
        assert facts["samples_per_update"] == 512 and stage.group_size == 16 and facts["samples"] == stage.steps * 8192
        assert stage.loss_overrides["reference_interval"] * stage.updates_per_rollout == 400
        assert (stage.optimizer.lr, stage.sampling.temperature) == (3e-6, 1.0)
    assert stages["zero"]["optimizer_steps"] == pytest.approx(8200, abs=16)


def test_r1_has_the_published_numbers():
    recipe = recipe_of("r1")
    stages, general = dry("r1")["stages"], recipe.stages["general_rl"]
    for name in ("cold_start", "rejection_sft"):
        stage = recipe.stages[name]
        assert (stage.optimizer.lr, stage.optimizer.final_lr_ratio, stage.batch_size, stage.init) == (5e-5, 0.1, 128, "base")
    assert stages["rejection_sft"]["examples"] == pytest.approx(2 * 804_745, rel=1e-4)
    rejection = recipe.stages["rejection_data"]
    assert rejection.max_kept + rejection.num_mixed == 804_745
    assert stages["general_rl"]["optimizer_steps"] == pytest.approx(1700, abs=8) and general.sampling.temperature == 0.7
    for entry in [*general.prompts, *general.rewards]:
        if entry.start:
            active = sum(step >= entry.start * general.steps for step in range(general.steps))
            assert active * general.updates_per_rollout == 400
    assert {entry.start > 0 for entry in general.rewards if entry.reward in ("preference", "safety")} == {True}
    for name, examples in (("reward_model", 66_000), ("safety_model", 106_000)):
        stage = recipe.stages[name]
        assert (stage.num_examples, stage.batch_size, stage.optimizer.lr) == (examples, 256, 6e-6)
        assert stages[name]["epochs"] == pytest.approx(1, abs=0.01)


def test_dapo_has_the_published_numbers():
    stage = load_recipe(RecipeConfig, "dapo", []).stages["rl"]
    assert (stage.prompts_per_step, stage.group_size, stage.updates_per_rollout, stage.sampling.max_tokens) == (512, 16, 16, 20_480)
    assert (stage.optimizer.lr, stage.optimizer.warmup_steps, stage.rewards[1].settings) == (1e-6, 20, {"max_tokens": 20_480, "buffer": 4096})


def test_a_missing_model_is_one_line_that_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run(load_recipe(RecipeConfig, "gsm8k_0_5b", []), "gsm8k_0_5b")
    for part in ("checkpoints.policy", "hf download Qwen/Qwen2.5-0.5B-Instruct", "put it at models/Qwen2.5-0.5B-Instruct", "2 more"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="checkpoints.policy: elsewhere/model does not exist; wanted a model folder"):
        run(load_recipe(RecipeConfig, "gsm8k_0_5b", ["--checkpoints.policy", "elsewhere/model"]), "gsm8k_0_5b")
    assert not list(tmp_path.iterdir())


def test_the_command_line_runs_dry(tmp_path):
    command = [sys.executable, str(TRAIN), "gsm8k_0_5b", "--dry-run"]
    dry = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=120)
    assert dry.returncode == 0 and json.loads(dry.stdout)["ready"] is False and "hf download" in dry.stderr and not list(tmp_path.iterdir())


def test_training_and_test_files_with_the_same_questions_are_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RecipeConfig, "gsm8k_0_5b", [])
    provide(recipe)
    Path("data/gsm8k/train.jsonl").write_text(Path("data/gsm8k/test.jsonl").read_text())
    with pytest.raises(UserError, match="'gsm8k' has no problems in its train split; 20 were dropped"):
        dry_run(recipe, "gsm8k_0_5b")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--stages.rl.sampling.max_tokens", "32768"], ["stages.rl", "max_position_embeddings = 32768"]),
        (["--evaluation.sampling.max_tokens", "40000"], ["evaluation of rl", "max_position_embeddings"]),
        (["--stages.rl.init", "polic"], ["stages.rl.init", "policy"]),
        (["--stages.rl.loss", "gropo"], ["gropo", "grpo"]),
        (["--tasks.gsm8k.settings.template", "poem"], ["poem"]),
        (["--models.policy.num_key_value_heads", "3"], ["num_key_value_heads", "divisor"]),
    ],
)
def test_a_dry_run_finds_what_is_wrong(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        recipe = load_recipe(RecipeConfig, "gsm8k_0_5b", overrides)
        provide(load_recipe(RecipeConfig, "gsm8k_0_5b", []))
        dry_run(recipe, "gsm8k_0_5b")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_vocabulary_that_is_too_small_for_its_tokenizer_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RecipeConfig, "gsm8k_0_5b", ["--models.policy.vocab_size", "100"])
    provide(recipe)
    with pytest.raises(UserError, match="vocab_size is 100, its tokenizer has ids up to 256"):
        dry_run(recipe, "gsm8k_0_5b")


def test_a_model_on_the_meta_device_counts_as_a_real_one_does():
    config = ModelConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False)
    assert meta_shape(config, "here").parameters == sum(p.numel() for p in Decoder(config).parameters())


MINE = """
name = "mine"
threads = 1
tokenizer = { kind = "file", path = "start" }
[checkpoints]
start = "start"
[downloads]
"teacher.jsonl" = "ask the teacher"
[stages.student]
kind = "distill"
init = "start"
data = ["teacher.jsonl"]
steps = 2
batch_size = 4
"""


def test_a_named_checkpoint_and_a_file_of_samples_train_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    Path("mine.toml").write_text(MINE)
    recipe = load_recipe(RecipeConfig, "mine.toml", [])
    assert list(missing_inputs(recipe)) == ["start", "teacher.jsonl"]
    tokenizer = symbol_tokenizer(["one", "two", "is"])
    export_model(Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1)).initialize_(0), tokenizer, "start")
    Path("teacher.jsonl").write_text('{"prompt": "one is", "completion": "two"}\n' * 8)
    run(recipe, "mine")
    manifest = json.loads(Path("runs/mine/manifest.json").read_text())
    assert manifest["stages"]["student"]["metrics"]["examples"] == 8 and Path("runs/mine/checkpoints/student/config.json").is_file()
    wrong = load_recipe(RecipeConfig, "mine.toml", ["--stages.student.init", "strat"])
    with pytest.raises(UserError, match="stages.student.init: got 'strat', wanted an earlier stage, a checkpoint or a model folder.*start"):
        run(wrong, "mine")
