"""Looks at the validation split in between: they change nothing, survive a kill, and the best state by them is the one that is exported."""

import json
import sys
import typing
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import chaos

from athanor.config import ValidationConfig
from athanor.errors import UserError
from athanor.metrics_eval import evaluate_samples
from athanor.samples import Problem, Sample
from athanor.stages.validation import Validation, check
from athanor.tasks import make_task
from athanor.weights import load_model, weights_hash


def test_every_metric_that_may_be_named_is_one_that_is_measured():
    sample = Sample(Problem("t", "test", 0, "1 ?", "1"), "wait", token_ids=[1], logps=None, finish="eos", prompt_ids=[1])
    measured = {"cons@k" if name.startswith("cons@") else name for name in evaluate_samples([[sample] * 2], [[1.0] * 2], [["1"] * 2])}
    named = set(typing.get_args(ValidationConfig.model_fields["best"].annotation)) - {""}
    assert named == measured - {"pass@1_se", "num_problems", "num_samples"}


@pytest.mark.parametrize("mode, values, bests", [("max", [0.1, 0.3, 0.3, 0.2, 0.4], [1, 2, None, None, 5]), ("min", [3, 4, 2], [1, None, 3])])
def test_only_what_is_better_is_the_best(mode, values, bests):
    validation, best, found = Validation(None, ValidationConfig(task="t", best="mean_tokens", mode=mode), None), None, []
    for step, value in enumerate(values, 1):
        new = validation.best(step, {"validation_mean_tokens": value}, best)
        best = new or best
        found.append(new and new["step"])
    assert found == bests and best["value"] == (max if mode == "max" else min)(values) and best["metric"] == "mean_tokens"


def test_a_task_that_cannot_be_judged_is_refused():
    check("stages.x.validation", ValidationConfig(task="chain"), make_task("arithmetic"))
    with pytest.raises(UserError, match="stages.x.validation.task: 'c' is open-ended, wanted a task with answers"):
        check("stages.x.validation", ValidationConfig(task="c"), make_task("courtesy"))


LOOK = '{"task": "chain", "every": EVERY, "num_problems": 8, "samples_per_problem": 2, "sampling": {"max_tokens": 16}, "best": "BEST", "mode": "min"}'


def look(every: int, best: str) -> list[str]:
    return [word for stage in ("base", "zero") for word in (f"--stages.{stage}.validation", LOOK.replace("EVERY", str(every)).replace("BEST", best))]


@pytest.mark.slow
def test_the_best_model_is_kept_through_kills_and_training_is_what_it_was_without(tmp_path):
    words = [*look(2, "mean_tokens"), "--until", "zero", "--evaluation.stages", "[]", "--stages.base.keep_states", "1"]
    plain = chaos.start(tmp_path / "plain", 1, *words[4:])
    whole = chaos.start(tmp_path / "whole", 1, *words)
    words += ["--background_save", "true"]
    assert plain.returncode == whole.returncode == 0, whole.stderr[-2000:]
    wanted = chaos.outcome(tmp_path / "whole", whole)
    assert chaos.outcome(tmp_path / "plain", plain)["checkpoints/zero/model.safetensors"] == wanted["checkpoints/zero/model.safetensors"]
    kills = [("base", chaos.STEP, 9), ("zero", chaos.STEP, 6), ("zero", chaos.EXPORT, 3)]
    for stage, at, call in kills:
        fault = {"at": at, "call": call, "stage": stage, "do": "kill"}
        killed = chaos.start(tmp_path / "killed", 1, *words, faults=[fault])
        wrong = chaos.differences(chaos.outcome(tmp_path / "killed"), wanted)
        # All looks have the same seeds, so a part of them leaves a part of the digests under a name.
        assert "fault: kill" in killed.stderr and not [name for name in wrong if " validation " not in name]
    result = chaos.start(tmp_path / "killed", 1, *words)
    found = chaos.outcome(tmp_path / "killed", result)
    assert not chaos.differences(found, wanted) and found.keys() == wanted.keys()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "micro" / "metrics.jsonl").read_text().splitlines()]
    for stage, steps in (("base", 12), ("zero", 4)):
        looks = {row["step"]: row["validation_mean_tokens"] for row in rows if row["stage"] == stage and "validation_mean_tokens" in row}
        assert list(looks) == list(range(2, steps + 1, 2))
        folder = tmp_path / "whole" / "micro" / "checkpoints" / f"{stage}.best"
        step = min(looks, key=looks.get)
        assert json.loads((folder / "best.json").read_text()) == {"step": step, "metric": "mean_tokens", "value": looks[step]}
        same = weights_hash(load_model(folder)) == weights_hash(load_model(folder.with_name(stage)))
        assert same == (step == steps)
    manifest = json.loads((tmp_path / "whole" / "micro" / "manifest.json").read_text())
    assert manifest["stages"]["zero"]["outputs"].keys() == {"checkpoint", "best"}
