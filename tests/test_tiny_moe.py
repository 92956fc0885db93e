"""The recipe of a small mixture of experts with latent attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from athanor.config import RecipeConfig
from athanor.model.transformer import Decoder
from athanor.recipe_io import load_recipe

ROOT = Path(__file__).parents[1]


def test_its_model_is_what_it_says():
    recipe = load_recipe(RecipeConfig, "tiny_moe")
    model = Decoder(recipe.models["main"].model_copy(update={"vocab_size": 50})).initialize_(0)
    assert [layer.moe is not None for layer in model.layers] == [False, True, True] and all(layer.mla is not None for layer in model.layers)


@pytest.mark.slow
def test_its_quick_form_runs_and_sampler_and_trainer_agree_to_the_bit(tmp_path):
    command = [sys.executable, str(ROOT / "engine" / "train.py"), "tiny_moe", "--quick", "--run_root", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    stages = json.loads(result.stdout.splitlines()[-1])["stages"]
    assert stages["zero"]["logp_gap_max"] == stages["reasoning_rl"]["logp_gap_max"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "tiny_moe" / "metrics.jsonl").read_text().splitlines()]
    assert any("router_imbalance" in json.dumps(row) for row in rows)
