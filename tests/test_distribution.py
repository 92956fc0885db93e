"""Samples of an update on several ranks, which are threads here: the same ones as on one rank, each once, and about as much work for each."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.batch import work_of
from athanor.parallel import Ranks, spread
from athanor.samples import Problem, Sample
from athanor.stages.distribution import shares

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from thread_ranks import on_threads


def rollout(num_groups: int, G: int) -> tuple[list[list[Sample]], torch.Tensor]:
    """Groups whose tokens say which sample they are of; long-tailed lengths; a third of the advantages is 0."""
    rng = np.random.default_rng(num_groups)
    problem = Problem("p", None, 0, "t")
    lengths = (1 + rng.pareto(1.0, (num_groups, G)) * 5).astype(int).clip(1, 400)
    groups = [[Sample(problem, "text", np.full(lengths[g, i], g * G + i), np.zeros(lengths[g, i], np.float32), prompt_ids=np.ones(3, np.int64))
               for i in range(G)] for g in range(num_groups)]  # fmt: skip
    advantages = torch.from_numpy(rng.normal(size=num_groups * G).astype(np.float32))
    advantages[::3] = 0
    return groups, advantages


def spread_over(world: int, groups, advantages, updates: int, all_live: bool, context: int = 1, num_parts: int = 1, **options):
    """Per rank its shares."""
    G = len(groups[0])

    def one(ranks):
        mine = list(range(len(groups)))[ranks.rank :: world]
        own = torch.cat([advantages[g * G : (g + 1) * G] for g in mine]) if mine else advantages[:0]
        return shares([groups[g] for g in mine], mine, own, updates, ranks, hidden_size=64, all_live=all_live, **options)

    return on_threads(world, one, peers=context, num_parts=num_parts)[0]


@pytest.mark.parametrize("world", [1, 2, 3, 5])  # the last has a rank without a group
@pytest.mark.parametrize("num_groups, updates", [(4, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize("all_live, shared", [(False, False), (True, False), (False, True)])
def test_an_update_has_the_same_samples_on_any_number_of_ranks(world, num_groups, updates, all_live, shared):
    groups, advantages = rollout(num_groups, 4)
    found = spread_over(world, groups, advantages, updates, all_live, shared_prompts=shared)
    per_update = num_groups // updates * 4
    for update in range(updates):
        parts = [rank[update] for rank in found]
        ids = [int(sample.token_ids[0]) for part in parts for sample in part.samples]
        wanted = [i for i in range(update * per_update, (update + 1) * per_update) if all_live or advantages[i]]
        assert sorted(ids) == wanted
        assert torch.equal(torch.cat([part.advantages for part in parts]), advantages[ids])
        whole = sum(groups, [])[update * per_update : (update + 1) * per_update]
        assert {(part.num_tokens, part.num_sequences) for part in parts} == {(sum(s.num_tokens for s in whole), per_update)}
        for part in parts:
            assert all(s.problem is None and s.text == "" for s in part.samples)
            assert [int(s.token_ids[0]) for s in part.samples] == sorted(int(s.token_ids[0]) for s in part.samples)


@pytest.mark.parametrize("num_groups, shared", [(4, False), (8, True), (1, True)])  # of one group, some parts have nothing
def test_a_part_has_the_same_samples_on_any_number_of_ranks(num_groups, shared):
    groups, advantages = rollout(num_groups, 4)

    def parts(world):
        found = []
        for share in (update[0] for update in spread_over(world, groups, advantages, 1, False, num_parts=8 // world, shared_prompts=shared)):
            rows, sizes = [(s.token_ids.tolist(), a) for s, a in zip(share.samples, share.advantages.tolist(), strict=True)], share.sizes
            assert len(sizes) == 8 // world and sum(sizes) == len(rows)
            found += [rows[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        return found

    assert parts(1) == parts(2) == parts(4) == parts(8) and sum(map(len, parts(1))) == int((advantages != 0).sum())


def test_samples_that_share_a_prompt_stay_together_as_far_as_the_ranks_stay_even():
    groups, advantages = rollout(8, 8)
    for world, most in ((1, 1), (2, 1), (4, 2), (8, 4)):  # pieces that a group comes in: 4 for each rank, of 8 groups
        ranks = [share[0].samples for share in spread_over(world, groups, advantages, 1, True, shared_prompts=True)]
        holders = [{rank for rank, samples in enumerate(ranks) for s in samples if int(s.token_ids[0]) // 8 == g} for g in range(8)]
        assert max(map(len, holders)) <= most
        loads = [sum(s.num_tokens for s in samples) for samples in ranks]
        assert max(loads) <= 1.5 * sum(loads) / world, loads


@pytest.mark.parametrize("world, context", [(2, 2), (6, 3)])
def test_ranks_of_a_context_have_the_samples_of_one_rank(world, context):
    groups, advantages = rollout(5, 4)
    alone = spread_over(world // context, groups, advantages, 2, False, shared_prompts=True)
    for rank, found in enumerate(spread_over(world, groups, advantages, 2, False, context, shared_prompts=True)):
        for part, wanted in zip(found, alone[rank // context], strict=True):
            assert [int(s.token_ids[0]) for s in part.samples] == [int(s.token_ids[0]) for s in wanted.samples]
            assert torch.equal(part.advantages, wanted.advantages)
            assert (part.num_tokens, part.num_sequences) == (wanted.num_tokens, wanted.num_sequences)


@pytest.mark.parametrize("num_ranks", [1, 2, 7, 64])
def test_work_is_spread_within_a_third_of_the_best(num_ranks):
    rng = np.random.default_rng(num_ranks)
    work = [work_of(int(n), 64) for n in 1 + rng.pareto(1.5, 200) * 50]
    loads = [sum(work[i] for i in share) for share in spread(work, num_ranks)]
    assert sorted(i for share in spread(work, num_ranks) for i in share) == list(range(200))
    assert max(loads) <= 4 / 3 * max(sum(work) / num_ranks, *work) + 1e-9
    if num_ranks > 1:
        by_index = max(sum(work[rank::num_ranks]) for rank in range(num_ranks))
        assert max(loads) <= by_index
    assert spread(work, num_ranks) == spread(work, num_ranks) and spread([], 2) == [[], []]


def test_attention_costs_as_much_as_the_matrices_at_twelve_widths():
    D, n = 64, 12 * 64
    assert work_of(n, D) == pytest.approx(2 * n) and work_of(1, D) == pytest.approx(1, rel=2e-3)


def test_one_rank_gives_itself_what_it_has():
    assert Ranks("cpu", threads=1).exchange([[1, 2]]) == [[1, 2]]
