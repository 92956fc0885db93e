import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def bench(*arguments, **options):
    return subprocess.run(
        [sys.executable, "bench/run.py", "--device", "cpu", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import run

    return run


def test_a_timed_row_says_what_where_and_against_which_ceiling(tmp_path):
    done = bench("--op", "group_advantage", "--repeats", "20", "--json", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["backend"] for row in rows] == ["reference", "eager"] and rows[0]["correct"]
    for row in rows:
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["repeats"] >= 20 and row["copy_gb_s"] > 0
        assert row["gb_s"] == pytest.approx(16 * row["sizes"]["S"] / row["median_us"] / 1e3)
        assert {"op", "sizes", "dtype", "machine", "commit", "torch", "triton", "work", "percent_of_ceiling", "times_eager"} <= set(row)


def test_every_operation_has_a_case_that_passes_the_gate(runner):
    from athanor.kernels._dispatch import OPS

    cases = runner.all_cases("cpu")
    assert {case.op for case in cases} == set(OPS)
    small = [case for case in cases if case.op in ("rope", "logprob", "sample", "policy_loss")]
    assert all(runner.gate(case, "cpu", "reference") is None for case in small)


@pytest.mark.parametrize("spoil", [lambda y: y * (1 + 1e-4), lambda y: y * torch.nan, lambda y: y[:-1]])
def test_a_wrong_result_is_reported_and_not_timed(spoil, runner):
    from dataclasses import replace

    case = next(case for case in runner.all_cases("cpu") if case.op == "swiglu")
    wrong = replace(case, run=lambda **inputs: (spoil(case.run(**inputs)[0]), *case.run(**inputs)[1:]))
    (row,) = runner.measure(wrong, "cpu", False, {}, {}, 20)
    assert row["wrong"].startswith("output 0: ") and "median_us" not in row


def test_listing_and_wrong_names():
    assert "linear_logprob" in bench("--list").stdout
    done = bench("--op", "rmsnrom")
    assert done.returncode == 2 and "did you mean 'rmsnorm'" in done.stderr
