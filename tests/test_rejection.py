"""What rejection sampling lets through: recomputed sample by sample from the definition (check T25)."""

from types import SimpleNamespace

import numpy as np
import pytest

from athanor.config import RejectionConfig
from athanor.rewards import Outcome, make_reward
from athanor.samples import Problem, Sample
from athanor.stages import rejection
from athanor.stages.sft import read_examples

PROBLEM = Problem("User: 3 + 1 - 2 ? Assistant:", "2", 7, "chain")
GOOD = "<think> 4 - 2 so 2 </think> <answer> 2 </answer>"


def verdict(text, finish="stop", problem=PROBLEM, **changes):
    tokens = np.array([hash(word) % 1000 for word in text.split()])
    sample, config = Sample(problem, text, tokens, np.zeros(len(tokens)), finish), RejectionConfig(kind="rejection", **changes)
    return rejection._verdict(sample, config, make_reward(config.verifier).outcomes([sample])[0])


@pytest.mark.parametrize(
    "text, wanted",
    [
        (GOOD, "kept"),
        (GOOD.replace("<answer> 2", "<answer> 3"), "incorrect"),
        ("4 - 2 so 2 <answer> 2 </answer>", "format"),
        (GOOD + " 2", "format"),
        (GOOD.replace("so", "则"), "language"),
        ("<think> " + "4 - 2 so 2 wait " * 30 + "</think> <answer> 2 </answer>", "repetition"),
    ],
)
def test_a_sample_is_kept_only_when_correct_well_formed_readable_and_in_one_language(text, wanted):
    assert verdict(text) == wanted


def test_long_paragraphs_and_code_blocks_go_unless_allowed():
    long = "<think> " + " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500)) + " </think> <answer> 2 </answer>"
    code = "<think> so\n```\nprint(2)\n``` </think> <answer> 2 </answer>"
    assert (verdict(long), verdict(code)) == ("paragraph", "code")
    assert verdict(long, max_paragraph_words=0) == verdict(long, max_paragraph_words=600) == verdict(code, code_blocks=True) == "kept"


def test_a_sample_without_a_verdict_is_not_kept():
    sample = Sample(PROBLEM, GOOD, np.arange(9), np.zeros(9))
    for status in ("error", "timeout"):
        assert rejection._verdict(sample, RejectionConfig(kind="rejection"), Outcome(status)) == "unjudged"


def test_truncated_samples_go_and_mixing_can_be_allowed():
    assert verdict(GOOD, finish="length") == "truncated"
    assert verdict(GOOD.replace("so", "则"), min_language_consistency=0.0) == "kept"


def test_open_ended_problems_are_not_judged_by_accuracy():
    assert verdict("<think> thank tom </think> <answer> thanks tom </answer>", problem=Problem("p", None, 0, "courtesy", "general")) == "kept"


def test_duplicates_and_surplus_are_dropped_and_counted(monkeypatch):
    other = GOOD.replace("4 - 2 so 2", "4 - 2 so 2 check 4 - 2 so 2 ok")
    texts = [GOOD, GOOD, other, other.replace("ok", "ok ok"), GOOD.replace("<answer> 2", "<answer> 9")]
    group = [Sample(PROBLEM, text, np.arange(len(text.split())), np.zeros(1)) for text in texts]
    monkeypatch.setattr(rejection, "sample_groups", lambda *a, **k: [group])
    monkeypatch.setattr(rejection, "rollout_generator", lambda *a, **k: None)
    monkeypatch.setattr(rejection, "ProblemStream", lambda *a, **k: SimpleNamespace(draw=lambda step: [PROBLEM]))
    ranks = SimpleNamespace(gather=lambda groups: groups, world=1)
    recipe = SimpleNamespace(seed=0, max_rows=8)
    context = SimpleNamespace(name="data", recipe=recipe, ranks=ranks, tasks={}, tokenizer=None, load=lambda source: None)
    rows, reasons = rejection._sampled(context, RejectionConfig(kind="rejection", source="zero", keep_per_prompt=2), None)
    assert [row["completion"] for row in rows] == [GOOD, other]
    assert reasons == {"kept": 2, "duplicate": 1, "surplus": 1, "incorrect": 1}


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"prompt": "a", "completion": 3}', '{"prompt": "a", "completion": ""}'])
def test_a_wrong_line_of_a_data_file_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"{path}:2"):
        read_examples(path)
