"""Ranks that share the tokens of their micro-batches against one process: log-probs to the bit, gradients, updates, memory, and whole runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import context_worker  # noqa: E402
from test_sharding import distance, launch, run_recipe  # noqa: E402

from athanor.config import ModelConfig, ParallelConfig, RecipeConfig  # noqa: E402
from athanor.context_parallel import Part  # noqa: E402
from athanor.errors import UserError  # noqa: E402
from athanor.model.moe import sequence_balance_loss  # noqa: E402
from athanor.parallel import Ranks  # noqa: E402
from athanor.planner.memory import Layout, activations  # noqa: E402


class OneOf:
    """A place among ranks, without a process group."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 33, 200])  # empty, fewer rows than ranks, one whole step, ragged, and more
def test_every_row_of_a_batch_is_one_ranks(world, num_tokens):
    parts = [Part(num_tokens, OneOf(rank, world)) for rank in range(world)]
    filled = -(-max(num_tokens, 1) // parts[0].step) * parts[0].step
    rows = torch.arange(filled)
    assert torch.equal(torch.cat([part.rows(rows) for part in parts]), rows)
    assert {len(part.rows(rows)) for part in parts} == {filled // world} and filled // world % 16 == 0
    assert sum(part.num_tokens for part in parts) == num_tokens
    picked = torch.from_numpy(np.random.default_rng(0).permutation(num_tokens)[::2].copy())
    for part in parts:
        own, local = part.own(picked)
        assert torch.equal(part.rows(rows)[local], picked[own]) and (local < len(part.rows(rows))).all()
    assert sum(len(part.own(picked)[1]) for part in parts) == len(picked)


def test_a_balance_loss_of_parts_is_that_of_the_whole():
    """The sum over two parts is the definition's, and the gradient of each part its rows of the whole's."""
    generator = torch.Generator().manual_seed(0)
    scores, cu = torch.rand(21, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 4, 4, 15, 21], dtype=torch.int32)
    ids, weights = torch.rand(21, 5, generator=generator).topk(2).indices.int(), torch.tensor([0.2, 0.0, 0.5, 0.3])
    whole = scores.clone().requires_grad_()
    wanted = sequence_balance_loss(whole, ids, cu, weights)
    wanted.backward()
    for begin, end in ((0, 9), (9, 21)):
        own, rest = scores[begin:end].clone().requires_grad_(), []
        for first, last, part in ((0, begin, scores[:begin]), (end, 21, scores[end:])):
            sequence_balance_loss(part, ids[first:last], cu, weights, begin=first, across=lambda x, rest=rest: (rest.append(x), x)[1])
        found = sequence_balance_loss(own, ids[begin:end], cu, weights, begin=begin, across=lambda x, rest=rest: x + sum(rest))
        found.backward()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
        torch.testing.assert_close(own.grad, whole.grad[begin:end])


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(UserError, match="parallel.context is 2, wanted a divisor of the 1 ranks"):
        Ranks("cpu", threads=1, context=2)
    with pytest.raises(ValueError, match="parallel.context is 3, wanted a divisor of models.main.num_attention_heads = 4"):
        RecipeConfig(parallel={"context": 3}, models={"main": ModelConfig()})
    with pytest.raises(ValueError, match="parallel.context x parallel.tensor is 8, wanted a divisor of models.main.num_attention_heads = 4"):
        RecipeConfig(parallel={"context": 4, "tensor": 2}, models={"main": ModelConfig()})
    with pytest.raises(UserError, match="parallel.context x parallel.tensor is 4, wanted a divisor of the 1 ranks"):
        Ranks("cpu", threads=1, context=2, tensor=2)
    ranks = OneOf(0, 1)
    ranks.context, ranks.tensor = OneOf(0, 3), OneOf(0, 1)
    with pytest.raises(UserError, match="parallel.context is 3, wanted a divisor of the model's 4 query heads"):
        context_worker.parallelize_(context_worker.Decoder(context_worker.LONG.model_copy(update={"num_attention_heads": 4})),
                                    ParallelConfig(context=3), ranks)  # fmt: skip


def compare_with_one_process(everywhere: list[dict], alone: dict) -> None:
    for rank, sizes in enumerate(everywhere):
        for size, found in sizes.items():
            for name, values in found["logprobs"].items():
                assert torch.equal(values, alone["logprobs"][name]), (rank, size, name)
            for job in ("steps", "updates"):
                for name, case in found[job].items():
                    wanted = alone[job][name]
                    # In a second update the weights have already another last bit.
                    limit = 1e-6 if context_worker.UPDATES.get(name, ((), (), {}))[2].get("updates_per_rollout", 1) == 1 else 3e-6
                    assert distance(case["gradients"], wanted["gradients"]) < limit, (rank, size, name)
                    # abs: kl_old is a difference of log-probs that all but cancel.
                    assert case["figures"] == pytest.approx(wanted["figures"], rel=1e-6, abs=1e-8), (rank, size, name)
            for name, case in found.get("training", {}).items():
                wanted = alone["training"][name.replace("hsdp", "fsdp")]
                assert distance(case["gradients"], wanted["gradients"]) < 1e-6 > distance(case["weights"], wanted["weights"]), (rank, size, name)
                np.testing.assert_allclose(case["figures"], wanted["figures"], rtol=1e-6)
            for name, kept in found["kept"].items():
                # What comes out of attention is there twice, before and after it travels.
                assert alone["kept"][name] / size <= kept < 1.15 * alone["kept"][name] / size, (rank, size, name)
            predicted = activations(context_worker.LONG, 1024, Layout(context=size), 4, on_cpu=True)
            assert found["kept"]["all"] == pytest.approx(predicted.layers + predicted.top + predicted.head, rel=0.05)


@pytest.mark.multiproc
def test_two_ranks_of_a_context_train_as_one(tmp_path):
    launch(2, HERE / "context_worker.py", tmp_path / "two.pt", "quick")
    everywhere = torch.load(tmp_path / "two.pt")
    alone = context_worker.everything(Ranks("cpu", threads=1), quick=True)
    compare_with_one_process(everywhere, alone)
    alone["steps"]["late"], alone["steps"]["ragged"] = alone["steps"]["ragged"], alone["steps"]["late"]
    with pytest.raises(AssertionError):
        compare_with_one_process(everywhere, alone)  # the comparison can fail


@pytest.mark.slow
@pytest.mark.multiproc
def test_four_ranks_in_contexts_of_two_and_of_four_train_as_one(tmp_path):
    launch(4, HERE / "context_worker.py", tmp_path / "four.pt", "whole", timeout=600)
    everywhere = torch.load(tmp_path / "four.pt")
    assert len(everywhere) == 4 and all(found.keys() == {2, 4} and "hsdp" in found[2]["training"] for found in everywhere)
    compare_with_one_process(everywhere, context_worker.everything(Ranks("cpu", threads=1), quick=False))


@pytest.mark.slow
@pytest.mark.multiproc
def test_contexts_of_two_whose_ranks_have_half_of_the_model_each_train_as_one(tmp_path):
    """Cross entropy, multi-token prediction, policy updates with replayed routes, and a reward model: context x tensor = 2 x 2."""
    launch(4, HERE / "context_worker.py", tmp_path / "parts.pt", "parts")
    found, alone = torch.load(tmp_path / "parts.pt"), context_worker.with_parts(Ranks("cpu", threads=1))
    for job in ("steps", "updates"):
        for name, case in found[job].items():
            assert distance(case["gradients"], alone[job][name]["gradients"]) < 5e-6, name  # fp32, in another order
            assert case["figures"] == pytest.approx(alone[job][name]["figures"], rel=1e-5, abs=1e-5), name
    assert distance(found["steps"]["late"]["gradients"], alone["steps"]["ragged"]["gradients"]) > 0.1


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_run_in_contexts_draws_the_samples_of_one_process(tmp_path):
    """Base model, RL with a KL term, rejection, SFT and a reward model: on four ranks, two contexts of two, parameters split over all."""
    alone, _ = run_recipe(tmp_path / "one", 1)
    split, _ = run_recipe(tmp_path / "split", 4, "--parallel.context", "2", "--parallel.shard", "0")
    assert [(row["stage"], row["step"]) for row in alone] == [(row["stage"], row["step"]) for row in split]
    for one, other in zip(alone, split, strict=True):
        for name in ("reward", "mean_tokens", "truncated_rate", "accuracy", "format", "zero_advantage_rate", "pair_accuracy", "tokens"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-12)), (name, one, other)
        for name in ("loss", "entropy", "grad_norm", "kl_ref"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-3, abs=1e-7)), (name, one, other)
        assert other.get("logp_gap_max", 0) < 1e-5
