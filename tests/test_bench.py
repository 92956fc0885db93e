import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def bench(*arguments, **options):
    return subprocess.run(
        [sys.executable, "bench/run.py", "--device", "cpu", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def modules(monkeypatch):
    """The bench's files, which are no package: bench/ is on sys.path when run.py runs."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gate
    import measure
    import peers
    import timing

    return SimpleNamespace(gate=gate, measure=measure, peers=peers, timing=timing)


def case_of(modules, op, device="cpu"):
    return next(case for case in modules.measure.all_cases(device) if case.op == op)


def test_a_timed_row_says_what_where_and_against_which_ceiling(tmp_path):
    done = bench("--op", "group_advantage", "--repeats", "20", "--json", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["backend"] for row in rows] == ["reference", "eager"] and rows[0]["correct"]
    for row in rows:
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["repeats"] >= 20 and row["copy_gb_s"] > 0 and row["matmul_tflop_s"] > 0
        assert row["gb_s"] == pytest.approx(16 * row["sizes"]["S"] / row["median_us"] / 1e3)
        assert row["percent_of_ceiling"] == pytest.approx(100 * row["gb_s"] / row["copy_gb_s"])
        assert {"op", "sizes", "dtype", "machine", "commit", "torch", "triton", "work", "times_eager", "peak_bytes", "gate"} <= set(row)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["rows"] == rows and last["wrong"] == [] and "only ratios within this run" in done.stdout


def test_every_operation_has_a_case_that_passes_the_gate(modules):
    from athanor.kernels._dispatch import OPS

    cases = modules.measure.all_cases("cpu")
    assert {case.op for case in cases} == set(OPS)
    for case in (case for case in cases if case.op in ("rope", "logprob", "sample", "policy_loss")):
        verdict = modules.gate.Gate(case, "cpu").check(lambda case=case, **inputs: case.run(**inputs, backend="reference"))
        assert verdict.wrong is None and all(error <= allowed for error, allowed in verdict.errors), case.op


@pytest.mark.parametrize("spoil", [lambda y: y * (1 + 1e-4), lambda y: y * torch.nan, lambda y: y[:-1], lambda y: y.clone().fill_(0)])
def test_a_wrong_result_is_reported_and_not_timed(spoil, modules):
    case = case_of(modules, "swiglu")
    wrong = replace(case, run=lambda **inputs: (spoil(case.run(**inputs)[0]), *case.run(**inputs)[1:]))
    (row,) = modules.measure.rows_of(wrong, "cpu", {}, 20, lambda text: None)
    assert row["wrong"].startswith("output 0: ") and not row["correct"] and "median_us" not in row


def test_what_a_backend_raises_is_its_own_row(modules):
    def broken(**inputs):
        raise RuntimeError("launch failed\nsecond line")

    (row,) = modules.measure.rows_of(replace(case_of(modules, "swiglu"), run=broken), "cpu", {}, 20, lambda text: None)
    assert row["wrong"] == "raised RuntimeError: launch failed"


def test_an_element_that_nobody_wrote_fails_even_where_zero_is_right(modules):
    from case import Case

    def unwritten(x, backend=None):
        y = torch.empty(len(x) + 1)
        y[:-1] = x
        return (y,)

    case = Case("swiglu", {"T": 8}, torch.float32, lambda g: {"x": torch.randn(8, generator=g)}, unwritten,
                lambda x: (torch.cat([x, x.new_zeros(1)]),), "")  # fmt: skip
    assert modules.gate.Gate(case, "cpu").check(unwritten).wrong == "output 0: 1 of 9 values are not finite"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_size_beyond_the_oracle_is_gated_smaller_and_by_sampled_rows(modules, monkeypatch):
    case = case_of(modules, "rmsnorm")
    small = replace(case, sizes={"T": 96, "D": 96}, make=lambda g: {k: v[:96] for k, v in case.make(g).items()})
    monkeypatch.setattr(modules.gate, "CPU_ORACLE_BYTES", 8 * 12 * 96 * 96)
    with pytest.raises(ValueError, match="rmsnorm .*: the fp64 oracle does not fit and the case names no smaller `gate`"):
        modules.gate.Gate(case, "cpu")
    gate = modules.gate.Gate(replace(case, gate=small, rows=("x", "dy")), "cpu")
    assert gate.scope.startswith("fp64 at T=96 D=96; here finite and ") and gate.chosen[0] == 0 and gate.chosen[-1] == case.sizes["T"] - 1

    def run(**inputs):
        return case.run(**inputs, backend="reference")

    def wrong_past_row_100(**inputs):
        y, dx, dw = run(**inputs)
        y = y.clone()
        y[100:] *= 1.001
        return y, dx, dw

    assert gate.check(run).wrong is None
    assert gate.check(wrong_past_row_100).wrong.startswith("output 0: error ")
    counted = modules.gate.Gate(case, "cpu", counterpart=lambda: small)
    assert counted.scope == "fp64 at T=96 D=96; here finite" and counted.check(wrong_past_row_100).wrong is None  # says so: nothing samples rows

    def nan_at_full_size(**inputs):
        return tuple(x * torch.nan if len(x) > 96 else x for x in run(**inputs))

    assert counted.check(nan_at_full_size).wrong == "output 0 at full size: not finite"


def test_a_peer_beyond_the_rule_is_timed_and_marked_and_nonsense_is_not(modules):
    case = case_of(modules, "swiglu")
    rivals = {"rounds": lambda **inputs: tuple(x.bfloat16().float() for x in case.eager(**inputs)), "partial": lambda **i: (case.eager(**i)[0], None),
              "nan": lambda **inputs: (case.eager(**inputs)[0] * torch.nan, None)}  # fmt: skip
    rows = modules.measure.rows_of(replace(case, rivals=rivals), "cpu", {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0}, 20, lambda text: None)
    rows = {row["backend"]: row for row in rows}
    assert rows["rounds"]["wrong"].startswith("output 0: error") and rows["rounds"]["median_us"] > 0
    assert rows["partial"]["correct"] and len(rows["partial"]["errors"]) == 1
    assert "not finite" in rows["nan"]["wrong"] and "median_us" not in rows["nan"]


def test_peak_memory_counts_temporaries_and_outputs(modules):
    def call():
        big = torch.empty(1000, 1000)
        del big
        return torch.empty(500, 1000)

    assert modules.timing.peak_bytes(call, "cpu") == 4_000_000


def test_peers_take_inputs_that_their_case_has(modules):
    import inspect

    seen = set()
    for case in modules.measure.all_cases("cpu"):  # the GPU's inputs would not fit here, and both devices' cases share their makers
        made = set(case.make(torch.Generator().manual_seed(0)))
        for name, adapter in modules.peers.adapters_of(case).items():
            assert set(inspect.signature(adapter).parameters) <= made, (case.op, case.sizes, name)
            seen.add(adapter)
    assert seen >= {f for group in (*modules.peers.PEERS.values(), modules.peers.RESIDUAL) for f in group.values()}


def test_an_installed_peer_is_called_with_its_own_conventions(modules, monkeypatch):
    """A stand-in for cut-cross-entropy with its documented signature: the adapter must turn a loss into a log-prob."""
    from torch.nn import functional as F

    def linear_cross_entropy(e, c, targets, *, reduction="mean"):
        return F.cross_entropy((e.float() @ c.float().T), targets, reduction=reduction)

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=linear_cross_entropy))
    case = case_of(modules, "linear_logprob")
    verdict = modules.gate.Gate(case, "cpu").check(modules.peers.bind(modules.peers.PEERS["linear_logprob"]["cce"]))
    assert verdict.wrong is None and len(verdict.errors) == 3  # log-prob and both gradients; it gives no entropy


def test_a_peer_with_a_padded_layout_is_fed_and_read_by_sequence(modules, monkeypatch):
    """A stand-in for liger's GRPO loss with its signature and layout: (B, L + 1, V) logits, the last row of each sequence unused."""

    def triton_grpo_loss(logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9, beta=0.04, eps_low=0.2,
                         eps_high=0.4, inplace=True, loss_type="dapo", reduce=False):  # fmt: skip
        assert ref_logp is None and beta == 0 and not inplace and loss_type == "bnpo" and reduce
        logps = (logits[:, :-1].float() / temperature).log_softmax(-1).gather(2, completion_ids[..., None]).squeeze(2)
        ratio = (logps - old_logp).exp()
        A = advantages[:, None]
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
        return (loss * completion_mask).sum() / completion_mask.sum(), []

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.grpo_loss", SimpleNamespace(triton_grpo_loss=triton_grpo_loss))
    case = case_of(modules, "logits_grpo")
    peer = modules.peers.bind(modules.peers.PEERS["logits_grpo"]["liger"])
    gate = modules.gate.Gate(case, "cpu")
    verdict = gate.check(peer)
    assert verdict.wrong is None and len(verdict.errors) == 2
    loss, gradient = peer.timed(**gate.inputs)()
    S, L = case.sizes["T"] // 20, max(gate.inputs["cu"].diff().tolist())
    assert gradient.shape == (20, L + 1, case.sizes["V"]) and L >= S and not gradient[:, -1].any()


def test_a_peer_that_gives_nothing_is_not_called_correct(modules):
    gate = modules.gate.Gate(case_of(modules, "swiglu"), "cpu")
    assert gate.check(lambda **inputs: (None, None)).wrong == "none of the outputs is given, so nothing was compared"


def test_older_kernels_are_measured_by_the_same_cases(tmp_path):
    """--base: athanor.kernels of HEAD from a worktree of its own; the ratio is old time / new time, and no worktree is left."""
    before = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True)
    if before.returncode:
        pytest.skip("no git repository here")
    done = bench("--op", "group_advantage", "--repeats", "20", "--base", "HEAD")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    assert row["times_base"] == pytest.approx(row["base_us"] / row["median_us"]) and not row["base_commit"].endswith("-dirty")
    after = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True)
    assert not [line for line in set(after.stdout.splitlines()) - set(before.stdout.splitlines()) if line.split()[0].endswith("/tree")]
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "__init__.py").write_text("import sys; print('another folder'); sys.exit(0)")
    assert subprocess.run([sys.executable, "bench/overlay.py", kernels, "-m", "athanor.kernels.rope"], cwd=ROOT, capture_output=True,
                          text=True).stdout == "another folder\n"  # fmt: skip


def test_compile_reports_every_kernel_and_fails_over_a_limit(modules, monkeypatch, capsys):
    pytest.importorskip("triton")
    import compile_report
    import run
    from rich.console import Console

    rows = list(compile_report.triton_rows("group_advantage"))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"} and not any(row["broken"] for row in rows)
    assert all(0 < row["registers"] <= row["registers_limit"] and row["local"] == 0 for row in rows)
    monkeypatch.setattr(compile_report, "triton_rows", lambda op: iter([rows[0], rows[1] | {"broken": ["spills"]}]))
    assert run.compile_all(run.parse(["--compile", "--op", "group_advantage"]), Console()) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["over"] == 1


def test_cuda_sources_are_compiled_with_warnings_as_errors(modules, monkeypatch, tmp_path):
    import compile_report

    monkeypatch.setattr(compile_report, "CUDA", tmp_path)
    assert compile_report.why_no_cuda() == "no CUDA sources (csrc/cuda holds no .cu file)" and list(compile_report.cuda_rows()) == []
    (tmp_path / "good.cu").write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }')
    (tmp_path / "warns.cu").write_text('extern "C" __global__ void unused(float* x) { int y; x[threadIdx.x] *= 2.0f; }')
    if compile_report.why_no_cuda():
        pytest.skip(compile_report.why_no_cuda())
    good, warns = compile_report.cuda_rows()
    assert good["broken"] == [] and good["op"] == "good" and '"y" was declared but never referenced' in warns["broken"][0]


@pytest.mark.parametrize("arguments, message", [
    (["--op", "rmsnrom"], "--op: no operation 'rmsnrom'; did you mean 'rmsnorm'"),
    (["--repeats", "3"], "--repeats 3: wanted at least 20"),
    (["--json", "/nowhere/rows.jsonl"], "--json /nowhere/rows.jsonl: there is no folder /nowhere"),
    (["--base", "no-such-revision"], "--base no-such-revision: no such revision"),
    (["--check", "--plot", "x.png"], "--plot needs times"),
    (["--chek"], "unrecognized arguments: --chek"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, modules, capsys):
    import run

    with pytest.raises(SystemExit) as stopped:
        run.parse(["--device", "cpu", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_listing():
    assert "linear_logprob" in bench("--list").stdout
