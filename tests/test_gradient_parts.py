"""`parallel.gradient_parts`: one process, two ranks and four train to the same bits, and all that a run makes is the same."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from athanor.config import ParallelConfig
from athanor.errors import UserError
from athanor.losses import resolve_preset
from athanor.parallel import Ranks, pairwise, spread
from athanor.rewards import RewardScores
from athanor.samples import Problem, Sample
from athanor.stages import grpo
from athanor.tokenizer import symbol_tokenizer
from athanor.transcript_log import write_transcripts
from athanor.watch_config import TranscriptConfig

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # tests/ is no package

import gradient_parts_worker  # noqa: E402
from same_run import differences  # noqa: E402
from test_tiny_moe import FP8_AND_AHEAD, SHORT  # noqa: E402
from thread_ranks import on_threads  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(world: int, *words, environment: dict | None = None) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0", "--standalone"]
    command = [sys.executable, *(torchrun if world > 1 else []), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=590, env=ENVIRONMENT | (environment or {}))


def tree(values: np.ndarray) -> np.ndarray:
    half = len(values) // 2
    return values[0] if not half else tree(values[:half]) + tree(values[half:])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_parts_are_added_in_pairs_and_few_wait(count):
    values = np.random.default_rng(count).normal(size=(count, 50)).astype(np.float32) * 10.0 ** np.arange(-3, 2).repeat(10).astype(np.float32)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def addends():
        nonlocal most
        for value in values:
            tensor = torch.from_numpy(value.copy())
            alive.add(tensor)
            most = max(most, len(alive))
            yield [tensor]
            del tensor

    (total,) = pairwise(addends())
    assert np.array_equal(total.numpy(), tree(values)) and most <= count.bit_length() + 1
    if count == 8:
        assert not np.array_equal(total.numpy(), np.add.reduce(values))  # another order has other bits


@pytest.mark.parametrize("work", [None, [5.0, 1.0, 1.0, 3.0, 2.0, 2.0, 9.0]])
def test_an_item_is_in_the_same_part_on_any_number_of_ranks(work):
    items = list("abcdefg")
    for world in (1, 2, 4):
        views = [SimpleNamespace(rank=rank, world=world, num_parts=4 // world) for rank in range(world)]
        parts = [part for view in views for part in Ranks.parts(view, items, work)]
        wanted = spread(work, 4) if work else [range(part, 7, 4) for part in range(4)]
        assert parts == [[items[i] for i in part] for part in wanted]


def test_what_cannot_hold_is_refused(monkeypatch):
    with pytest.raises(ValidationError, match="gradient_parts is 6, wanted a power of two"):
        ParallelConfig(gradient_parts=6)
    for name, size in (("shard", 0), ("shard", 2), ("expert", 2), ("context", 2), ("tensor", 2)):
        with pytest.raises(ValidationError, match=f"gradient_parts is 2 and {name} is {size}, .* wanted 1 for either"):
            ParallelConfig(gradient_parts=2, **{name: size})
    for world in (3, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        with pytest.raises(UserError, match=f"parallel.gradient_parts is 4, wanted a multiple of the {world} ranks, or 1"):
            Ranks("cpu", threads=1, gradient_parts=4)


def assert_same_bits(found: dict, wanted: dict) -> None:
    for kind in ("gradients", "weights", "state"):
        assert found[kind].keys() == wanted[kind].keys()
        # bytes, so that a zero has its sign
        unlike = [n for n, x in wanted[kind].items() if x.numpy().tobytes() != found[kind][n].numpy().tobytes()]
        assert not unlike, (kind, unlike)
    assert found["metrics"] == wanted["metrics"]


@pytest.mark.multiproc
def test_two_and_four_ranks_have_the_bits_of_one(tmp_path):
    done = launch(1, HERE / "gradient_parts_worker.py", tmp_path / "four.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = gradient_parts_worker.results(Ranks("cpu", threads=1, gradient_parts=4))
    together = torch.load(tmp_path / "four.pt")
    plain = gradient_parts_worker.results(Ranks("cpu", threads=1))
    for name, wanted in alone.items():
        for ranks in ("two", "four"):
            assert_same_bits(together[ranks][name], wanted)
        for n, x in plain[name]["gradients"].items():  # of the whole batch at once
            assert float((wanted["gradients"][n] - x).norm()) <= 1e-6 * float(x.norm()) + 1e-30, (name, n)
        assert wanted["metrics"][0] == pytest.approx(plain[name]["metrics"][0], rel=1e-6)
    with pytest.raises(AssertionError):  # in another order there are other bits
        assert_same_bits(plain["qwen3 adamw"], alone["qwen3 adamw"])


# ---- what a step of RL computes from the samples of all ranks

G, GROUPS = 4, 5


def rollout():
    """Groups of samples of some lengths, with their scores."""
    rng = np.random.default_rng(0)
    groups = [[Sample(Problem(f"q {g}", "4", g % 3, "t"), "a" * int(n), np.arange(1 + n), np.zeros(1 + n, np.float32)) for n in rng.integers(1, 9, G)]
              for g in range(GROUPS)]  # fmt: skip
    return groups, rng.normal(size=(GROUPS, G)), rng.integers(0, 2, (GROUPS, G)).astype(float)


def of_places(places: list[int]) -> tuple[list[list[Sample]], RewardScores]:
    groups, first, second = rollout()
    total = (first + second)[places].reshape(-1)
    parts = {"accuracy": second[places].reshape(-1).tolist(), "overlong": first[places].reshape(-1).tolist()}
    applied = np.arange(GROUPS * G).reshape(GROUPS, G)[places].reshape(-1) != 6
    return [groups[place] for place in places], RewardScores(total, parts, total, applied, ~applied)


@pytest.mark.parametrize("scaling, loss, control", [("sum", "reinforce_pp", "shuffle"), ("gdpo", "grpo", "shuffle"), ("sum", "grpo", "none")])
def test_advantages_and_means_are_those_of_one_rank(scaling, loss, control, tmp_path):
    config = SimpleNamespace(reward_scaling=scaling, group_size=G, control=control, rewards=[SimpleNamespace(reward="accuracy", weight=1.0),
                             SimpleNamespace(reward="overlong", weight=0.3)])  # fmt: skip
    tokenizer = symbol_tokenizer(["a"])

    def one(ranks):
        places = list(range(GROUPS))[ranks.rank :: ranks.world]
        groups, scores = of_places(places)
        context = SimpleNamespace(ranks=ranks, name="rl", recipe=SimpleNamespace(seed=0, reflection_words=[]))
        advantages = grpo._advantages(context, config, resolve_preset(loss), groups, places, scores, 3)
        path = tmp_path / f"{ranks.world}.jsonl"
        write_transcripts(path, 1, groups, places, scores, advantages.tolist(), TranscriptConfig(num=6), tokenizer, ranks)
        return dict(zip(places, advantages.view(-1, G).tolist(), strict=True)), grpo._describe(context, groups, scores, advantages)

    (wanted, means), *_ = on_threads(1, one)[0]
    assert any(value for group in wanted.values() for value in group)
    for world in (2, 3, 7):  # of seven, two have no group
        found = on_threads(world, one)[0]
        assert {place: group for groups, _ in found for place, group in groups.items()} == wanted
        assert all(measured == means for _, measured in found)
        assert (tmp_path / f"{world}.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 6


# ---- whole runs


def recipe(world: int, folder: Path, *words: str) -> None:
    done = launch(world, HERE.parent / "engine" / "train.py", *words, "--run_root", folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("name, changes", [("tiny", ()), ("tiny_moe", (*SHORT, *FP8_AND_AHEAD))])
def test_two_ranks_make_what_one_process_makes(tmp_path, name, changes):
    """All stages of the recipe: samples, data, weights, evaluations, transcripts and metrics but for times."""
    for world in (1, 2):
        recipe(world, tmp_path / str(world), name, "--quick", "--device", "cpu", *changes)
    assert differences(tmp_path / "1" / name, tmp_path / "2" / name) == []


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_run_goes_on_with_other_ranks_and_ends_with_the_same_bits(tmp_path):
    """Killed on one rank in pre-training, on four in RL, on two in the last RL stage; dynamic sampling draws again."""
    words = [HERE / "micro_recipe.toml", "--device", "cpu", "--parallel.gradient_parts", "4", "--stages.zero.loss", "dapo",
             "--stages.zero.loss_overrides", "{}"]  # fmt: skip
    recipe(1, tmp_path / "whole", *words)
    for world, stage, call in ((1, "base", 30), (4, "zero", 7), (2, "general", 5)):
        fault = {"at": "athanor.optim:Optimizer.step", "call": call, "stage": stage, "do": "kill", "rank": world - 1}
        faults = {"FAULTS": json.dumps([fault]), "TRACE": str(tmp_path)}
        assert launch(world, HERE / "faulty_train.py", *words, "--run_root", tmp_path / "parts", environment=faults).returncode != 0
        saved = list((tmp_path / "parts" / "micro" / "checkpoints" / f"{stage}.partial").glob("step-*"))
        assert saved, stage
    recipe(4, tmp_path / "parts", *words)
    whole, parts = tmp_path / "whole" / "micro", tmp_path / "parts" / "micro"
    assert differences(whole, parts) == []
    words[words.index("4")] = "2"  # other bits: what is done is not taken for the result of these settings
    recipe(1, tmp_path / "parts", *words, "--until", "base")
    changed = {line.split(":")[0] for line in differences(whole, parts)}
    assert {"manifest.json base", "checkpoints/base/model.safetensors"} <= changed and "manifest.json data" not in changed
