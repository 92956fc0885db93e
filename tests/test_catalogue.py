"""train.py --list and --help TOPIC: everything that can be named is there, and says what it is."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from athanor.catalogue import first_sentence, help_on, listing, recipe_names, stage_kinds
from athanor.config import GRPOConfig, RecipeConfig
from athanor.config_fields import list_fields
from athanor.errors import UserError
from athanor.losses import PRESETS
from athanor.rewards import available_rewards
from athanor.tasks import available_tasks

TRAIN = Path(__file__).parents[1] / "engine" / "train.py"


def train(*arguments):
    command = [sys.executable, str(TRAIN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


def test_the_list_has_a_line_for_everything_that_a_recipe_can_name():
    text = listing()
    sections = dict(zip(("recipes", "tasks", "rewards", "losses", "stages"), text.split("\n\n"), strict=True))
    known = {"recipes": recipe_names(), "tasks": available_tasks(), "rewards": [*available_rewards(), "preference", "safety"],
             "losses": list(PRESETS), "stages": ["pretrain", "sft", "rejection", "grpo", "reward_model", "distill"]}  # fmt: skip
    for group, names in known.items():
        lines = [line for line in sections[group].splitlines()[1:] if line[2] != " "]
        assert [line.split()[0] for line in lines] == list(names), group
        assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines), group


def test_every_name_has_a_page_of_its_own():
    for name in recipe_names():
        assert help_on(f"recipes.{name}").startswith("#")
    for group, names in {"tasks": available_tasks(), "rewards": available_rewards(), "losses": PRESETS, "stages": stage_kinds()}.items():
        for name in names:
            assert len(help_on(f"{group}.{name}")) > 60, (group, name)
    assert "extract" in help_on("rewards.math") and "max_tokens int  (required)" in help_on("rewards.overlong")
    assert "clip(rho, 0.8, 1.28)" in help_on("losses.dapo")


def test_the_help_of_a_stage_lists_its_own_fields_and_no_other_stages():
    text = help_on("stages.grpo")
    assert all(f"--stages.<name>.{field} " in text or f"--stages.<name>.{field}." in text for field in GRPOConfig.model_fields)
    assert "batch_size" not in text and "docs_per_step" not in text
    assert inspect.getdoc(GRPOConfig) in text


def test_a_field_is_found_by_its_path_and_by_its_last_part():
    assert help_on("evaluation").count("--evaluation.") == sum(f.path.startswith("evaluation.") for f in list_fields(RecipeConfig))
    assert help_on("top_p").count("--") == 1 and "smallest set of tokens" in help_on("top_p")
    assert help_on("sampling").count("temperature number") == 1  # once, though five places have it


def test_all_fields_are_still_listed():
    text = help_on("all")
    assert all(f"--{field.path} " in text for field in list_fields(RecipeConfig))


@pytest.mark.parametrize(
    "topic, near", [("rewards.maht", "math"), ("losses.gropo", "grpo"), ("evalution", "evaluation"), ("stages.gpro", "grpo"), ("zzz", "all")]
)
def test_an_unknown_topic_names_what_there_is(topic, near):
    with pytest.raises(UserError, match=topic) as error:
        help_on(topic)
    assert near in str(error.value) and "\n" not in str(error.value)


def test_a_first_sentence_ends_where_it_should():
    assert first_sentence("GSM8K (arXiv 1):  make_task('x').") == "GSM8K (arXiv 1)"
    assert first_sentence("R1 (v2, eq. 7):  words\nin it.") == "R1 (v2, eq. 7)"
    assert first_sentence("One: two\nthree. Four.\n\nFive.") == "One: two three" and first_sentence(None) == ""


def test_the_command_line_knows_list_and_topics():
    listed, short = train("--list"), train("--help", "losses.gspo")
    assert listed.returncode == 0 and "tiny_moe" in listed.stdout and listed.stderr == ""
    assert short.returncode == 0 and "arXiv 2507.18071" in short.stdout
    wrong = train("--help", "lossses")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "losses" in wrong.stderr
