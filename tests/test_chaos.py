"""A part of the kill matrix (chaos.py): kills in a rollout, in an update and in a checkpoint, on one rank and on two."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import chaos

PART = [
    point
    for point in chaos.POINTS
    if (point.stage, point.what) in {
        ("base", "state, before its rename"), ("zero", "rollout, between samples"), ("zero", "between the updates of a rollout"),
        ("data", "samples, before a group is written"), ("general", "after rewards"),
    }
]  # fmt: skip


def test_the_matrix_has_enough_points_of_every_kind():
    assert len(PART) == 5 and len(chaos.POINTS) >= 30 and len(set(chaos.POINTS)) == len(chaos.POINTS)
    assert {point.stage for point in chaos.POINTS} >= {"base", "zero", "data", "fine", "judge", "guard", "general", "student", "evaluate.zero"}


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_some_points_a_run_ends_as_one_that_nothing_interrupted(tmp_path, world):
    wanted = chaos.reference(tmp_path, world)
    assert any(name.startswith("samples zero") for name in wanted) and any(name.startswith("update general") for name in wanted)
    verdicts = chaos.chain(tmp_path, world, PART, wanted)
    assert [verdict for _, verdict in verdicts] == ["equal"] * len(PART), verdicts


def test_a_difference_is_found():
    wanted = {"metrics zero 1": {"loss": 1.0}, "update zero 1 1 0": {"a"}}
    assert chaos.differences({"metrics zero 1": {"loss": 1.0}}, wanted) == []
    assert chaos.differences({"metrics zero 1": {"loss": 1.0 + 1e-15}}, wanted) == ["metrics zero 1"]
    assert chaos.differences({"update zero 1 1 0": {"a", "b"}}, wanted) == ["update zero 1 1 0"]  # done again, and otherwise
