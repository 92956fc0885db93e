"""Losses and gradients that are not finite, planted into real runs: nothing changes, everything is counted, and the batch can be looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from athanor.config import RecipeConfig
from athanor.errors import UserError
from athanor.pipeline import build_tasks, build_tokenizer, run
from athanor.recipe_io import load_recipe
from athanor.stages import policy_update, training

TESTS = Path(__file__).parent
SHORT = ["--stages.base.steps", "6", "--stages.base.save_every", "4", "--stages.zero.steps", "3", "--evaluation.num_problems", "2"]


def short_run(folder, *overrides):
    words = ["--run_root", str(folder), "--until", "zero", "--stages.base.docs_per_step", "8", *SHORT, *overrides]
    run(load_recipe(RecipeConfig, str(TESTS / "micro_recipe.toml"), [str(word) for word in words]), "micro")
    return rows(folder)


def rows(folder):
    return [json.loads(line) for line in (folder / "micro" / "metrics.jsonl").read_text().splitlines()]


def broken(monkeypatch, module, name, calls):
    """The log-probs of these calls, counted from 1, become NaN."""
    real, count = getattr(module, name), 0

    def sometimes(*args, **options):
        nonlocal count
        count += 1
        result = real(*args, **options)
        return result._replace(logps=result.logps * float("nan")) if count in calls else result

    monkeypatch.setattr(module, name, sometimes)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_kept(tmp_path, monkeypatch):
    seen = []
    step = training.optimizer_step

    def watched(optimizer, *rest, **options):
        def snapshot():
            return [p.detach().clone() for p in optimizer.parameters], [value.clone() for value in optimizer.state_tensors().values()]

        before = snapshot()
        result = step(optimizer, *rest, **options)
        seen.append(tuple(not all(map(torch.equal, old, new)) for old, new in zip(before, snapshot(), strict=True)))
        return result

    monkeypatch.setattr(training, "optimizer_step", watched)
    broken(monkeypatch, training, "_scored", {3, 4, 6})
    broken(monkeypatch, policy_update, "completion_logprobs", {2})
    found = short_run(tmp_path)
    assert seen[:6] == [(True, True), (True, True), (False, False), (False, False), (True, True), (False, False)]
    base = [row for row in found if row["stage"] == "base"]
    assert [row["skipped_updates"] for row in base] == [0, 0, 1, 2, 2, 3]
    assert [row["grad_norm"] is None for row in base] == [False, False, True, True, False, True]
    zero = [row for row in found if row["stage"] == "zero"]
    assert len(zero) == 3 and zero[-1]["skipped_updates"] == 1
    names = ["base-step-00000003-1.pt", "base-step-00000004-2.pt", "base-step-00000006-3.pt"]
    files = sorted((tmp_path / "micro" / "skipped").iterdir())
    assert [file.name for file in files][:3] == names and len(files) == 4 and files[3].name.startswith("zero-step-0000000")
    kept = torch.load(files[0], weights_only=True)
    assert (kept["stage"], kept["step"], len(kept["parts"])) == ("base", 3, 1)
    part = torch.load(files[3], weights_only=True)["parts"][0]
    assert part["rank"] == 0 and part["loss"] != part["loss"]
    for batch in part["batches"]:  # the batch is that of the update: the sampler's tokens, packed
        for at, sequence in enumerate(batch["sequences"].tolist()):
            scored = slice(*batch["loss_cu_seqlens"][at : at + 2].tolist())
            prompt, completion = part["prompt_ids"][sequence], part["token_ids"][sequence]
            assert torch.equal(batch["targets"][scored], completion)
            assert torch.equal(batch["input_ids"][batch["loss_rows"][scored]], torch.cat((prompt[-1:], completion[:-1])))
    assert len(part["advantages"]) == len(part["logps"]) == len(part["token_ids"])


def test_a_skipped_batch_replays_from_the_state_that_was_saved_with_it(tmp_path, monkeypatch):
    """Documents that overflow: the kept batch, on the weights of the kept state, gives the loss that was seen."""
    from athanor.batch import PackedBatch
    from athanor.checkpoint import load_latest_state
    from athanor.model.transformer import Decoder
    from athanor.optim import Optimizer
    from athanor.parallel import Ranks

    real = training._scored
    losses = []

    def overflowing(*args, **options):
        result = real(*args, **options)
        losses.append(float(result.logps.detach().sum()))
        return result._replace(logps=result.logps * float("inf")) if len(losses) in (3, 4) else result

    monkeypatch.setattr(training, "_scored", overflowing)
    with pytest.raises(UserError, match=r"stage base, step 4: 2 updates in a row .*max_skipped_in_row.*base-step-00000004-2.pt"):
        short_run(tmp_path, "--stages.base.max_skipped_in_row", "2")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    part = torch.load(tmp_path / "micro" / "skipped" / "base-step-00000004-2.pt", weights_only=True)["parts"][0]
    recipe = load_recipe(RecipeConfig, str(TESTS / "micro_recipe.toml"), [])
    vocabulary = build_tokenizer(recipe, build_tasks(recipe)).vocab_size
    model = Decoder(recipe.models["main"].model_copy(update={"vocab_size": vocabulary}))
    optimizer = Optimizer(model, recipe.stages["base"].optimizer, Ranks("cpu"))
    state = load_latest_state(tmp_path / "micro" / "checkpoints" / "base.partial", model, optimizer, Ranks("cpu"))
    assert state.step == 3 and state.extra["skipped_in_row"] == 1
    batches = [PackedBatch(**batch) for batch in part["batches"]]
    assert sum(float(training.completion_logprobs(model, batch).logps.detach().sum()) for batch in batches) == losses[3]


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_ranks_skip_together_when_one_of_them_has_no_number(tmp_path):
    fault = {"at": "athanor.stages.training:_scored", "call": 2, "do": "nan", "rank": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TESTS / "faulty_train.py")]
    words = [str(TESTS / "micro_recipe.toml"), "--run_root", str(tmp_path), "--until", "base", *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": json.dumps([fault]), "TRACE": str(tmp_path)}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [0, 1, 1, 1, 1, 1]
    kept = torch.load(tmp_path / "micro" / "skipped" / "base-step-00000002-1.pt", weights_only=True)
    assert [part["rank"] for part in kept["parts"]] == [0, 1] and all(part["batches"] for part in kept["parts"])
    digests = [[json.loads(line) for line in (tmp_path / f"trace.{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    updates = [[digest for key, digest in lines if key[0] == "update"] for lines in digests]
    assert updates[0] == updates[1] and len(set(updates[0])) == 5  # one for each of the six steps but the skipped one
