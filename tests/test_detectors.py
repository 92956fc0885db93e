"""Each detector on a series that it must see and on one that it must not; episodes; resuming."""

import pytest

from athanor.config import DetectorConfig
from athanor.detectors import NAMES, Detectors

STEPS = 40
HEALTHY = {  # metric as a function of the step: what a good run of RL looks like, R1-Zero's growing answers included
    "entropy": lambda t: 0.6 - 0.4 * t / STEPS,
    "mean_tokens": lambda t: 100 * 1.08**t,
    "reward": lambda t: 0.2 + 0.03 * t,
    "zero_advantage_rate": lambda t: 0.2 + 0.015 * t,
    "format": lambda t: min(1.0, 0.5 + 0.03 * t),
    "accuracy": lambda t: 0.1 + 0.02 * t,
    "language_consistency": lambda t: 0.95 - 0.002 * t,
}
SICK = {
    "entropy_collapse": {"entropy": lambda t: 0.6 * 0.8**t},
    "length_explosion": {"mean_tokens": lambda t: 100 * 1.15**t, "reward": lambda t: 0.5},
    "reward_saturation": {"zero_advantage_rate": lambda t: min(1.0, 0.5 + 0.02 * t)},
    "format_hacking": {"format": lambda t: 0.2 + 0.02 * t, "accuracy": lambda t: 0.9 - 0.02 * t},
    "language_drift": {"language_consistency": lambda t: 0.95 - 0.01 * t},
}
CONTROLS = {  # close to the sick ones, and well
    "entropy_collapse": {"entropy": lambda t: max(0.1, 0.6 * 0.8**t)},
    "length_explosion": {"mean_tokens": lambda t: 100 * 1.15**t, "reward": lambda t: 0.1 + 0.02 * t},
    "reward_saturation": {"zero_advantage_rate": lambda t: 0.94},
    "format_hacking": {"format": lambda t: 0.2 + 0.02 * t, "accuracy": lambda t: 0.5},
    "language_drift": {"language_consistency": lambda t: 0.6 + 0.005 * t},
}


def series(**changed):
    return [{name: f(t) for name, f in (HEALTHY | changed).items()} for t in range(STEPS)]


def warnings(rows, config=None):
    detectors = Detectors(config or DetectorConfig())
    return [(t, name) for t, row in enumerate(rows) for name in detectors.update(row)]


def test_a_healthy_run_gets_no_warning():
    assert warnings(series()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_sees_its_illness_once_and_no_other_does(name):
    found = warnings(series(**SICK[name]))
    assert [warned for _, warned in found] == [name] and found[0][0] >= 4


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_is_silent_on_a_run_that_only_looks_like_it(name):
    assert name not in [warned for _, warned in warnings(series(**CONTROLS[name]))]


@pytest.mark.parametrize("name, threshold", [("entropy_collapse", {"entropy_ratio": 0.0}), ("length_explosion", {"length_ratio": 9.0}),
                                             ("reward_saturation", {"saturation_share": 1.0}), ("format_hacking", {"min_gain": 0.9}),
                                             ("language_drift", {"language_drop": 0.9})])  # fmt: skip
def test_thresholds_are_fields_and_a_window_of_0_switches_all_off(name, threshold):
    rows = series(**SICK[name])
    assert warnings(rows, DetectorConfig(**threshold)) == [] == warnings(rows, DetectorConfig(window=0))


def test_an_episode_that_comes_back_is_told_again():
    rows = series(zero_advantage_rate=lambda t: 1.0 if t % 20 < 10 else 0.2)
    found = [t for t, name in warnings(rows) if name == "reward_saturation"]
    assert found == [4, 24]  # the first windows of five that are full of it


def test_the_messages_say_the_figures():
    parts = {"entropy_collapse": "nats per token", "length_explosion": "tokens per response", "reward_saturation": "no advantage",
             "format_hacking": "accuracy fell by 0.100", "language_drift": "93 % at best"}  # fmt: skip
    for name in NAMES:
        detectors = Detectors(DetectorConfig())
        (said,) = [text for row in series(**SICK[name]) for text in detectors.update(row).values()]
        assert parts[name] in said


def test_a_resumed_stage_warns_where_an_uninterrupted_one_does():
    rows = series(**SICK["entropy_collapse"])
    whole = warnings(rows)
    for cut in (3, whole[0][0], whole[0][0] + 1, 30):
        resumed = Detectors(DetectorConfig(), rows[:cut])
        assert [(t, name) for t, row in enumerate(rows) if t >= cut for name in resumed.update(row)] == [w for w in whole if w[0] >= cut]


def test_metrics_that_are_not_there_or_not_finite_are_left_out():
    detectors = Detectors(DetectorConfig())
    assert all(detectors.update({"entropy": None, "reward": 0.5}) == {} for _ in range(20))


def test_any_verifier_counts_as_accuracy():
    rows = [{**row, "math": row["accuracy"], "accuracy": None} for row in series(**SICK["format_hacking"])]
    assert [name for _, name in warnings(rows)] == ["format_hacking"]
