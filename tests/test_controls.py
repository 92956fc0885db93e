"""Negative controls of the default recipe: RL with advantages that carry no signal must not learn, with the wrong sign it must unlearn.

Slow: trains the base model of `tiny` once (minutes on two cores), then three short RL runs from it on the validation split.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def until_zero(folder, name, *arguments):
    command = [sys.executable, str(ROOT / "engine" / "train.py"), "tiny", "--run_root", str(folder), "--name", name, "--until", "zero"]
    changes = ["--evaluation.split", "validation", "--stages.zero.steps", "10", *arguments]
    result = subprocess.run([*command, *changes], capture_output=True, text=True, timeout=1800, env=os.environ)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])["stages"]


@pytest.mark.slow
def test_only_the_right_signal_teaches(tmp_path):
    learnt = until_zero(tmp_path, "signal")
    base = learnt["base"]["pass@1_t1"]
    shuffled = until_zero(tmp_path, "shuffle", "--reuse", str(tmp_path / "signal"), "--stages.zero.control", "shuffle")
    flipped = until_zero(tmp_path, "flip", "--reuse", str(tmp_path / "signal"), "--stages.zero.control", "flip")
    assert shuffled["base"] == pytest.approx(learnt["base"])
    assert learnt["zero"]["pass@1_t1"] > base + 0.2
    assert shuffled["zero"]["pass@1_t1"] < base + 0.03
    assert flipped["zero"]["pass@1_t1"] < base
