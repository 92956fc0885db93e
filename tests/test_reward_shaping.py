"""Format by tags, language by detector, length, cosine, readability: against the papers' formulae and by hand; and any text in bounded time."""

import math
import sys
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.rewards import Entry, RewardTable, make_reward, make_table
from athanor.rewards.language import SCRIPTS, language_consistency
from athanor.rewards.readability import objection, readability
from athanor.samples import Problem, Sample


def sample(text="", num_tokens=0, answer="4", prompt="q", language="en"):
    return Sample(Problem(prompt, answer, 0, "t", "math", language), text, np.arange(num_tokens), np.zeros(num_tokens, np.float32))


RIGHT, WRONG = "<think> a </think> <answer> 4 </answer>", "<think> a </think> <answer> 5 </answer>"


# ---- format


@pytest.mark.parametrize(
    "text, wanted",
    [
        (RIGHT, 1.0),
        ("<think> a </think> 4", 0.5),
        ("<answer> 4 </answer>", 0.5),
        ("4", 0.0),
        ("<think> a", 0.25),
        ("</think> a <think>", 0.0),  # out of order
        ("<think> <think> a </think> <answer> 4 </answer>", 0.75),
        ("<answer> 4 </answer> <think> a </think>", 0.0),
        (RIGHT + "<answer> 5 </answer>", 0.5),
    ],
)
def test_tag_count_gives_a_quarter_per_tag_and_nothing_out_of_order(text, wanted):
    assert make_reward("format", mode="tag_count")([sample(text)]) == [wanted]


def test_tag_count_knows_what_the_prompt_has_opened():
    assert make_reward("format", mode="tag_count")([sample("a </think> <answer> 4 </answer>", prompt="Assistant: <think>")]) == [1.0]


# ---- language


@pytest.mark.parametrize(
    "text, language, wanted",
    [
        ("저는 이것을 계산합니다 the answer", "ko", 0.6),
        ("أولا نحسب the", "ar", 2 / 3),
        ("πρώτα υπολογίζουμε", "el", 1.0),
        ("ראשית we", "he", 0.5),
        ("ฉันคิดว่า", "th", 1.0),
        ("まず計算 compute します", "ja", 0.8),  # まず, 計算, します: one and one and two words
        ("see https://例え.jp/パス now", "en", 1.0),
        ("\\begin{align} 變量 \\end{align} so", "en", 1.0),
    ],
)
def test_scripts_are_told_apart(text, language, wanted):
    assert language_consistency(f"<think>{text}</think>", language) == pytest.approx(wanted, abs=1e-12)


def test_a_detector_tells_languages_of_one_script_apart(monkeypatch):
    module = types.ModuleType("fake_detector")
    module.classify = lambda text: ("fr" if "nous" in text.split() else "en", 0.9)
    module.unsure = lambda text: None
    monkeypatch.setitem(sys.modules, "fake_detector", module)
    text = "<think>So we add. Puis nous ajoutons tout. 好的</think>"  # 3 and 4 Latin words and one Han word
    assert make_reward("language")([sample(text)]) == [pytest.approx(7 / 8)]
    assert make_reward("language", detector="fake_detector:classify")([sample(text), sample(text, language="fr")]) == [3 / 8, 4 / 8]
    assert make_reward("language", detector="fake_detector:unsure")([sample(text)]) == [pytest.approx(7 / 8)]
    assert make_reward("language", detector="fake_detector:classify", empty=0.5)([sample("<think> 3 </think>")]) == [0.5]


# ---- length


def kimi(lengths, correct):
    """The paper's formula, sample by sample."""
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(lengths)
    values = [0.5 - (n - low) / (high - low) for n in lengths]
    return [v if ok else min(0, v) for v, ok in zip(values, correct, strict=True)]


@pytest.mark.parametrize(
    "lengths, correct", [([10, 20, 30], [1, 0, 1]), ([10, 20, 30], [0, 0, 0]), ([7, 7], [1, 0]), ([5], [1]), ([3, 9, 4, 9], [1, 1, 0, 0])]
)
def test_length_is_kimis_within_a_group(lengths, correct):
    group = [sample(RIGHT if ok else WRONG, n) for n, ok in zip(lengths, correct, strict=True)]
    other = [sample(RIGHT, n, prompt="another") for n in (1, 1000)]  # another problem changes nothing
    assert make_reward("length")(group + other) == pytest.approx([*kimi(lengths, correct), 0.5, -0.5])
    assert make_reward("length", scale=2.0)(group) == pytest.approx([2 * v for v in kimi(lengths, correct)])


def test_length_takes_the_verdict_of_the_tables_verifier_and_none_without_one():
    table = make_table([{"name": "length"}, {"name": "math"}])  # listed first, scored after the verifier
    root, three = "<answer>\\sqrt{8}</answer>", "<answer>3</answer>"
    group = [sample(root, 2, "2\\sqrt{2}"), sample(three, 4, "2\\sqrt{2}"), sample(three, 3, None)]
    scores = table.score(group)
    assert scores.parts["math"] == [1.0, 0.0, None] and scores.parts["length"] == [0.5, -0.5, None]
    assert scores.total.tolist() == [1.5, -0.5, 0.0] and scores.raw.tolist() == [1.0, 0.0, 0.0]


def test_trl_rows_of_one_prompt_are_one_group():
    columns = dict(prompts=["p", "p", "r"], completions=[RIGHT, RIGHT, RIGHT], completion_ids=[[1] * 2, [1] * 4, [1] * 9], answer=["4"] * 3)
    assert make_reward("length")(**columns) == [0.5, -0.5, 0.0]
    with pytest.raises(ValueError, match="reward length: needs token counts"):
        make_reward("length")(prompts=["p"], completions=[RIGHT], answer=["4"])


@pytest.mark.parametrize(
    "n, right, wanted",
    [(0, 1, 1.0), (500, 1, 0.75), (999, 1, 0.5), (1000, 1, -1.0), (1500, 1, -1.0), (2000, 0, -1.0), (0, 0, -1.0), (500, 0, -0.75)],
)
def test_cosine_falls_from_start_to_end_and_never_rises_again(n, right, wanted):
    assert make_reward("cosine", max_tokens=1000)([sample(RIGHT if right else WRONG, n)]) == [pytest.approx(wanted, abs=1e-5)]


def test_cosine_with_the_papers_shape():
    reward = make_reward("cosine", max_tokens=80, right_start=2.0, right_end=1.0, wrong_start=-10.0, wrong_end=0.0, exceeded=-10.0)
    for n in (0, 1, 40, 79):
        assert reward.value(n, True) == pytest.approx(1 + 0.5 * (2 - 1) * (1 + math.cos(n * math.pi / 80)))
        assert reward.value(n, False) == pytest.approx(0 + 0.5 * (-10 - 0) * (1 + math.cos(n * math.pi / 80)))
    assert reward.value(80, True) == -10 and reward([sample(RIGHT, 3, answer=None)]) == [None]


# ---- readability


def test_readability_measures_what_r1_filters_by():
    text = "<think> so we add\nit up\n\n\nfour more words here\n```\ncode\n``` </think> <answer> 4 </answer>"
    r = readability(text, "en")
    assert (r.language, r.longest_paragraph, r.code_blocks, r.repetition, r.finished) == (1.0, 7, 2, 0.0, True)
    assert readability("so 则", "en").finished is False and readability("<think> so", "en").finished is False
    assert readability("<think> so </think> <answer> 4 </answer>", "en", token_ids=[1] * 17).repetition == pytest.approx(0.9)
    assert readability("<think>" + "则" * 12 + "</think> x", "zh").longest_paragraph == 12
    limits = dict(min_language=1.0, max_repetition=0.5, max_paragraph_words=6, code_blocks=False)
    assert objection(r, **limits) == "paragraph" and objection(r, **limits | {"max_paragraph_words": 0}) == "code"
    assert objection(r, **limits | {"max_paragraph_words": 7, "code_blocks": True}) is None


def test_readability_reward_is_the_share_of_checks_that_hold():
    good = "<think> so we add it up </think> <answer> 4 </answer>"
    mixed = good.replace("add", "加")
    cut = "<think> so 则 " + "word " * 600 + "\n```"
    values = make_reward("readability")([sample(good, 9), sample(mixed, 9), Sample(sample().problem, cut, np.zeros(90, int), np.zeros(90))])
    assert values == [1.0, 0.8, 0.0]


# ---- any text


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "so ", "则", "word", "\n\n", "```", "`", "$", "\\(", "\\begin{", "}", "https://"]
PIECES += ["\u0300", "'", "3", "ｗ", "ア", "한"]
ANY_TEXT = st.one_of(st.text(max_size=400), st.lists(st.sampled_from(PIECES), max_size=200).map("".join))
UNITS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)
LONG_TEXT = st.tuples(UNITS, st.integers(1, 4000)).map(lambda t: (t[0] * t[1])[:30_000])


@settings(max_examples=120, deadline=None)
@given(st.one_of(ANY_TEXT, LONG_TEXT), st.sampled_from(sorted(SCRIPTS)))
def test_every_pure_reward_is_bounded_on_any_text(text, language):
    given_samples = [sample(text, 5, language=language), sample(f"<think>{text}</think><answer>{text}</answer>", 9, language=language)]
    names = [("format", {}), ("format", {"mode": "tag_count"}), ("language", {}), ("repetition", {"unit": "words"}), ("readability", {})]
    for name, own in [*names, ("accuracy", {}), ("length", {}), ("cosine", {"max_tokens": 10})]:
        start = time.process_time()
        values = make_reward(name, **own)(given_samples)
        assert time.process_time() - start < 1.0, name
        assert all(v is not None and -1.0 <= v <= 1.0 for v in values), (name, values)


def test_rewards_that_need_verdicts_come_last_whatever_their_place():
    calls = []

    def verifier(samples, problems):
        calls.append("verifier")
        return [1.0] * len(samples)

    verifier.__name__ = "accuracy"
    scores = RewardTable([Entry(make_reward("cosine", max_tokens=8)), Entry(verifier)]).score([sample(WRONG, 4)])
    assert calls == ["verifier"] and scores.parts["cosine"] == [pytest.approx(0.75)] and scores.raw.tolist() == [1.0]
