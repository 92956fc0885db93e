"""T10: DAPO's dynamic sampling drops groups on the raw score, whole groups only, within a bound that it reports."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from athanor.parallel import Ranks
from athanor.rewards import RewardService, make_table
from athanor.samples import Problem, Sample
from athanor.stages import grpo

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from thread_ranks import on_threads  # noqa: E402

G, WANTED = 4, 3
RIGHT, WRONG = "<answer> 4 </answer>", "<answer> 5 </answer>"
# accuracy, shaped by length: a group of all-right or all-wrong answers of unequal length has contrast in its total, but not in its raw score
SHAPED = [{"name": "accuracy"}, {"name": "overlong", "max_tokens": 10, "buffer": 10}]


def group(pattern, number):
    """One group of the answers that `pattern` names (1 = right), of unequal lengths."""
    problem = Problem("q", "4", number, "t")
    return [Sample(problem, RIGHT if ok == "1" else WRONG, np.arange(2 + 2 * i), np.zeros(2 + 2 * i, np.float32)) for i, ok in enumerate(pattern)]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def rollout(monkeypatch, warnings):
    """Run one step's rollout over scripted draws; returns the kept groups, their scores, the refills and the problems that were asked for."""

    def run(draws, attempts):
        asked, script = [], iter(draws)
        monkeypatch.setattr(grpo, "sample_groups", lambda *args, **options: [group(p, len(asked) * 10 + i) for i, p in enumerate(next(script))])
        stream = SimpleNamespace(draw=lambda step: asked.append(step) or [])
        context = SimpleNamespace(recipe=SimpleNamespace(seed=0, max_rows=8), ranks=Ranks(threads=1), name="rl", tokenizer=None,
                                  console=SimpleNamespace(warn=warnings.append))  # fmt: skip
        config = SimpleNamespace(prompts_per_step=WANTED, group_size=G, sampling=None)
        kept, places, scores, refills = grpo._rollout(context, config, RewardService(make_table(SHAPED)), None, stream, 5, attempts)
        assert places == sorted(set(places)) and len(places) == len(kept)
        return kept, scores, refills, asked

    return run


def patterns(groups):
    return ["".join("1" if s.text == RIGHT else "0" for s in members) for members in groups]


def test_groups_without_contrast_in_the_raw_score_are_drawn_again(rollout):
    kept, scores, refills, asked = rollout([["1111", "0000", "1000"], ["0110", "1111", "0000"], ["0000", "0001", "1110"]], attempts=4)
    assert patterns(kept) == ["1000", "0110", "0001"] and refills == 2
    assert asked == [20, 21, 22]  # each attempt of step 5 has problems of its own
    # the total has contrast even where the raw score has none, which is why the raw score decides
    total = make_table(SHAPED).score(group("1111", 0), 5)
    assert len(set(total.total.tolist())) > 1 and len(set(total.raw.tolist())) == 1
    assert scores.total.shape == (WANTED * G,)


def test_only_whole_groups_are_kept(rollout):
    kept, *_ = rollout([["1000", "1100", "1110"], []], attempts=2)
    assert all(len(members) == G and len({s.problem.id for s in members}) == 1 for members in kept) and len(kept) == WANTED


def test_too_many_are_cut_in_the_order_in_which_they_came(rollout):
    kept, _, refills, _ = rollout([["1111", "1000", "0100"], ["0010", "0001", "1100"]], attempts=3)
    assert patterns(kept) == ["1000", "0100", "0010"] and refills == 1


def test_the_loop_ends_at_its_bound_with_what_it_has_and_says_so(rollout, warnings):
    kept, scores, refills, asked = rollout([["1111", "0000", "1010"], ["1111", "0000", "1111"]], attempts=2)
    assert patterns(kept) == ["1010"] and refills == 1 and len(asked) == 2 and scores.total.shape == (G,)
    assert not warnings
    kept, scores, refills, _ = rollout([["1111"] * 3, ["0000"] * 3], attempts=2)
    assert kept == [] and refills == 1 and scores.total.shape == (0,) and "trains on nothing" in warnings[0]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_keep_the_groups_that_one_rank_keeps(monkeypatch, world):
    draws = [["1111", "1000", "0000", "0100", "1111"], ["0010", "1111", "0001", "1100", "0111"], ["1011", "1101", "1110", "1010", "0101"]]

    def drawn(*arguments, **options):
        ranks, attempt = arguments[5], arguments[-1]
        return [group(pattern, attempt * 10 + i) for i, pattern in enumerate(draws[attempt])][ranks.rank :: ranks.world]

    monkeypatch.setattr(grpo, "sample_groups", drawn)
    stream, config = SimpleNamespace(draw=lambda step: []), SimpleNamespace(prompts_per_step=5, group_size=G, sampling=None)

    def one(ranks):
        context = SimpleNamespace(recipe=SimpleNamespace(seed=0, max_rows=8), ranks=ranks, name="rl", tokenizer=None)
        kept, places, _, refills = grpo._rollout(context, config, RewardService(make_table(SHAPED)), None, stream, 5, 3)
        return dict(zip(places, patterns(kept), strict=True)), refills

    found = on_threads(world, one)[0]
    assert found[0][1] == 1
    merged = {place: pattern for kept, _ in found for place, pattern in kept.items()}
    assert [merged[place] for place in sorted(merged)] == ["1000", "0100", "0010", "0001", "1100"]


def test_without_dynamic_sampling_every_group_is_kept(rollout):
    kept, _, refills, asked = rollout([["1111", "0000", "1000"]], attempts=1)
    assert patterns(kept) == ["1111", "0000", "1000"] and refills == 0 and asked == [5]
