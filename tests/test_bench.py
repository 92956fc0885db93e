import importlib
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


CEILING = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
TINY = {"model": "0.8M", "prompts": 2, "G": 3, "prompt": 5, "new": 4}


@pytest.fixture
def rollout(modules):
    import cases.rollout
    import rollout_engine
    import rollout_peers
    import workloads

    return SimpleNamespace(cases=cases.rollout, engine=rollout_engine, peers=rollout_peers, workloads=workloads)


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
    assert {case.op for case in cases} == set(OPS) - {"linear_logprob_parallel"}  # which takes several ranks
    for case in (case for case in cases if case.op in ("rope", "logprob", "sample", "policy_loss")):
        verdict = modules.gate.Gate(case, "cpu").check(lambda case=case, **inputs: case.run(**inputs, backend="reference"))
        assert verdict.wrong is None and all(error <= allowed for error, allowed in verdict.errors), case.op


@pytest.mark.parametrize("spoil", [lambda y: y * (1 + 1e-4), lambda y: y * torch.nan, lambda y: y[:-1], lambda y: y.clone().fill_(0)])
def test_a_wrong_result_is_reported_and_not_timed(spoil, modules):
    case = case_of(modules, "swiglu")
    wrong = replace(case, run=lambda **inputs: (spoil(case.run(**inputs)[0]), *case.run(**inputs)[1:]))
    rows = modules.measure.rows_of(wrong, "cpu", {}, 20, lambda text: None)
    assert [row["kind"] for row in rows] == ["backend"] * len(rows) and rows
    assert all(row["wrong"].startswith("output 0: ") and not row["correct"] and "median_us" not in row for row in rows)


def test_what_a_backend_raises_is_its_own_row(modules):
    def broken(**inputs):
        raise RuntimeError("launch failed\nsecond line")

    rows = modules.measure.rows_of(replace(case_of(modules, "swiglu"), run=broken), "cpu", {}, 20, lambda text: None)
    assert {row["backend"] for row in rows} >= {"reference"} and {row["wrong"] for row in rows} == {"raised RuntimeError: launch failed"}


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

    rows = list(compile_report.triton_rows(["group_advantage"]))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"} and not any(row["broken"] for row in rows)
    assert all(0 < row["registers"] <= row["registers_limit"] and row["local"] == 0 for row in rows)
    monkeypatch.setattr(compile_report, "triton_rows", lambda ops: iter([rows[0], rows[1] | {"broken": ["spills"]}]))
    status, said = in_process(monkeypatch, capsys, "--compile", "--op", "group_advantage")
    assert status == 1 and json.loads(said.splitlines()[-1])["over"] == 1


@pytest.mark.parametrize("over, wrong", [(False, False), (True, False), (False, True)])
def test_check_and_compile_in_one_run_have_one_status_and_one_report(over, wrong, modules, monkeypatch, capsys, tmp_path):
    """The rows of the gate and those of the compiler, which is replaced here: its own test compiles."""
    pytest.importorskip("triton")
    import compile_report
    import run

    row = {"kind": "compiled", "op": "group_advantage", "case": "c", "arch": "sm_90", "broken": ["spills"] if over else []}
    monkeypatch.setattr(compile_report, "triton_rows", lambda ops: iter([row]))
    if wrong:
        measured = [{"kind": "backend", "op": "group_advantage", "sizes": {}, "dtype": "float32", "backend": "reference", "wrong": "in y"}]
        monkeypatch.setattr(run, "measure", lambda *_: iter(measured))
    status, said = in_process(monkeypatch, capsys, "--op", "group_advantage", "--check", "--compile", "--json", str(tmp_path / "rows.jsonl"))
    last = json.loads(said.splitlines()[-1])
    assert status == int(over or wrong), said
    assert (last["mode"], last["over"], len(last["wrong"])) == ("check and compile", int(over), int(wrong)) and last["ceilings"] is None
    assert {row["kind"] for row in last["rows"]} == {"backend", "compiled"} and last["rows"][-1] == row
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == last["rows"]


def test_compiling_an_operation_takes_all_kernels_that_serve_it(modules):
    """Those of its backends and those behind them, and none of an operation whose name begins alike."""
    pytest.importorskip("triton")
    import compile_report

    def files(*ops):
        return {name for name, _ in compile_report.triton_cases(list(ops))}

    hopper = {"fp8_grouped_gemm_hopper", "fp8_grouped_gemm_few_hopper"}
    assert files("fp8_grouped_gemm") == {"fp8_grouped_gemm", *hopper} and files("fp8_rmsnorm") == {"fp8_producers"}
    assert files("fp8_grouped_gemm", "fp8_grouped_wgrad") == {"fp8_grouped_gemm", *hopper, "fp8_grouped_wgrad_hopper"}
    assert files("linear") == {"linear"} and files("grpo_loss") == set()
    assert set().union(*map(files, compile_report.OPS)) == {name for name, _ in compile_report.triton_cases()}


def test_cuda_kernels_are_compiled_with_warnings_as_errors(modules, monkeypatch, tmp_path):
    import compile_report

    from athanor.kernels import _cuda

    if compile_report.why_no_cuda():
        pytest.skip(compile_report.why_no_cuda())
    (tmp_path / "good.cu").write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= BY; }')
    (tmp_path / "warns.cu").write_text('extern "C" __global__ void unused(float* x) { int y; x[threadIdx.x] *= BY; }')
    monkeypatch.setattr(_cuda, "FOLDER", tmp_path)
    stems = [_cuda.AheadOfTime(stem, stem, {"BY": "2.0f"}, 1, registers, 0, ("90a",)) for stem, registers in (("good", 9), ("warns", 9), ("good", 1))]
    monkeypatch.setattr(compile_report, "cases_of", lambda kind, ops: [(kind, case) for case in stems])
    good, warns, greedy = compile_report.cuda_rows()
    assert good["broken"] == [] and good["op"] == "cuda" and '"y" was declared but never referenced' in warns["broken"][0]
    assert greedy["broken"] == [f"{good['registers']} registers; at most 1"]


@pytest.mark.parametrize("arguments, message", [
    (["--op", "rmsnrom"], "--op: no operation 'rmsnrom'; did you mean 'rmsnorm'"),
    (["--repeats", "3"], "--repeats 3: wanted at least 20"),
    (["--json", "/nowhere/rows.jsonl"], "--json /nowhere/rows.jsonl: there is no folder /nowhere"),
    (["--base", "no-such-revision"], "--base no-such-revision: no such revision"),
    (["--check", "--plot", "x.png"], "--plot needs times"),
    (["--list", "--check"], "--list: not with --check"),
    (["--compile", "--op", "rollout"], "--compile is for kernels: rollout is a workload of the engine"),
    (["--check", "--compile", "--op", "rollout"], "--compile is for kernels: rollout is a workload of the engine"),
    (["--base", "HEAD", "--op", "grpo_step"], "--base is for kernels: grpo_step is a workload of the engine"),
    (["--chek"], "unrecognized arguments: --chek"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, modules, capsys):
    import run

    with pytest.raises(SystemExit) as stopped:
        run.parse(["--device", "cpu", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def in_process(monkeypatch, capsys, *arguments):
    """Status and standard output of bench/run.py, without a process that imports PyTorch again."""
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", *arguments])
    return run.main(), capsys.readouterr().out


def test_listing(modules, monkeypatch, capsys):
    status, listed = in_process(monkeypatch, capsys, "--list")
    assert status == 0 and "linear_logprob" in listed and "grpo_step" in listed and "trl_step" in listed


def test_a_workload_is_measured_beside_its_peers_behind_its_gate(rollout):
    rows = rollout.workloads.rows_of(rollout.cases.generate("cpu", TINY), CEILING, 1, lambda text: None)
    rows = {row["backend"]: row for row in rows}
    assert list(rows) == ["athanor", "eager", "transformers"] and rows["athanor"]["errors"][0][0] <= 1e-5
    for name in ("athanor", "eager"):
        row = rows[name]
        assert row["correct"] and row["repeats"] == 5 and row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["peak_bytes"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 * 3 * 4 / row["median_us"] * 1e6)
        assert row["times_rival"] == pytest.approx(rows["eager"]["median_us"] / row["median_us"]) and row["first_token_s"] > 0
    assert rows["athanor"]["kind"] == "backend" and rows["athanor"]["logp_gap"] <= 1e-5 and "greedy = eager loop" in rows["athanor"]["gate"]
    assert all(row["correct"] or "pip install transformers" in row["skipped"] for row in [rows["transformers"]])


def test_a_row_holds_the_split_that_the_generator_reports(rollout):
    row = rollout.workloads.rows_of(rollout.cases.generate("cpu", TINY), CEILING, 1, lambda text: None)
    ours = next(iter(row))
    parts = [ours[name] for name in ("prefill_s", "forward_s", "sample_s", "host_s")]
    assert min(parts) > 0 and sum(parts) < 2e-6 * ours["median_us"]  # of one run, the median of others


def test_drafts_take_fewer_steps_for_the_same_samples(rollout):
    sizes = TINY | {"G": 1, "new": 32}
    ours, plain = rollout.workloads.rows_of(rollout.cases.stragglers("cpu", sizes), CEILING, 1, lambda text: None)
    assert ours["correct"] and plain["correct"] and ours["tokens_per_forward"] > 1.1 and plain["tokens_per_forward"] == 1


def test_a_workload_says_what_a_peer_would_need(rollout, monkeypatch):
    found = rollout.workloads.importlib.util.find_spec
    monkeypatch.setattr(rollout.workloads.importlib.util, "find_spec", lambda name: None if name in ("trl", "datasets") else found("json"))
    ours, trl, adapted = rollout.workloads.rows_of(rollout.cases.grpo_step("cpu", TINY), CEILING, 1, lambda text: None)
    assert ours["correct"] and ours["median_us"] == pytest.approx(1e6 * (ours["rollout_s"] + ours["update_s"]), rel=0.5)
    assert trl["skipped"] == adapted["skipped"] == "not installed: pip install trl==1.16.0 datasets" and "times_rival" not in ours
    monkeypatch.setattr(rollout.workloads.importlib.util, "find_spec", lambda name: None if name == "pydantic" else found(name))
    (alone,) = rollout.workloads.rows_of(rollout.cases.grpo_step("cpu", TINY), CEILING, 1, lambda text: None)
    assert alone["skipped"] == "not installed: pip install pydantic"


@pytest.mark.parametrize("spoil, message", [
    (lambda c, requests, sampling: c.logps.__setitem__(2, c.logps[2] + 2e-5), "sampled log-probs differ from the training forward's by 2"),
    (lambda c, requests, sampling: c.logps.__setitem__(2, float("nan")), "sampled log-probs differ from the training forward's by nan"),
    (lambda c, requests, sampling: sampling.temperature or c.token_ids.__setitem__(3, (c.token_ids[3] + 1) % 512), "greedy: 1 of 8 tokens differ"),
    (lambda c, requests, sampling: len(requests) == 6 and c.token_ids.__setitem__(0, (c.token_ids[0] + 1) % 512), "1 tokens of samples that share"),
    (lambda c, requests, sampling: len(requests) == 6 and c.logps.__setitem__(0, 0.0), "log-probs of samples that share a prompt differ"),
])  # fmt: skip
def test_the_gate_of_sampling_refuses(spoil, message, rollout, monkeypatch):
    """Wrong log-probs, another greedy token, and samples that depend on whether their prompt was shared; 6 requests are those of one sample each."""
    honest = rollout.engine.Generator.generate

    def spoiled(self, requests, sampling):
        groups = honest(self, requests, sampling)
        spoil(groups[0][0], requests, sampling)
        return groups

    monkeypatch.setattr(rollout.engine.Generator, "generate", spoiled)
    (row,) = rollout.workloads.rows_of(rollout.cases.generate("cpu", TINY), CEILING, 1, lambda text: None)
    assert row["wrong"].startswith(message) and not row["correct"] and "median_us" not in row


def test_a_step_off_the_policy_is_not_timed(rollout, monkeypatch):
    honest = rollout.engine.Generator.generate

    def spoiled(self, requests, sampling):
        groups = honest(self, requests, sampling)
        groups[1][2].logps[0] -= 3e-5
        return groups

    monkeypatch.setattr(rollout.engine.Generator, "generate", spoiled)
    (row,) = rollout.workloads.rows_of(rollout.cases.grpo_step("cpu", TINY), CEILING, 1, lambda text: None)
    assert row["wrong"].startswith("sampled log-probs differ from the training forward's by 3.0") and "median_us" not in row


@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen3", "head_dim": 24, "tie_word_embeddings": False}])
def test_the_plain_loop_and_transformers_have_the_weights_of_the_engine(changes, rollout):
    """Log-probs of the plain loop's own samples, given to transformers whole."""
    pytest.importorskip("transformers")
    model = rollout.engine.random_model(rollout.cases.MODELS["0.8M"] | changes, "cpu", torch.float32)
    prompts = rollout.engine.random_prompts(model, 2, 5)
    tokens, logps = rollout.peers.eager_generate(model, prompts, 3, 7, 1.0)
    twin = rollout.peers.huggingface_model(model)
    with torch.no_grad():
        logits = twin(torch.cat((prompts.repeat_interleave(3, 0), tokens), 1)).logits[:, 4:-1]
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0], rtol=0, atol=1e-5)
    assert len({tuple(row) for row in tokens.tolist()}) == 6


def test_a_peer_of_another_model_is_not_timed(rollout, monkeypatch):
    pytest.importorskip("transformers")
    honest = rollout.peers.huggingface_model

    def other(model):
        twin = honest(model)
        twin.model.layers[1].self_attn.k_proj.bias.data.zero_()
        return twin

    monkeypatch.setattr(rollout.peers, "huggingface_model", other)
    rows = rollout.workloads.rows_of(rollout.cases.generate("cpu", TINY | {"new": 16}), CEILING, 1, lambda text: None)
    assert rows[2]["wrong"].startswith("greedy: ") and "median_us" not in rows[2] and rows[0]["median_us"] > 0


@pytest.fixture
def trl(rollout):
    for name in ("trl", "datasets", "accelerate", "transformers"):
        pytest.importorskip(name)
    return importlib.import_module("cases.trl")


def test_trls_step_on_our_parts_is_measured_beside_trl_alone(rollout, trl):
    ours, alone = rollout.workloads.rows_of(trl.trl_step("cpu", TINY), CEILING, 1, lambda text: None)
    assert ours["correct"] and ours["errors"][0][0] <= 1e-4 and alone["correct"] and alone["kind"] == "peer"
    for row in (ours, alone):
        assert row["tokens_per_s"] == pytest.approx(2 * 3 * 4 / row["median_us"] * 1e6) and row["peak_bytes"] > 0
        assert row["rollout_s"] > 0 and row["update_s"] > 0
    assert ours["times_rival"] == pytest.approx(alone["median_us"] / ours["median_us"])


def test_a_step_of_trl_with_other_log_probs_is_not_timed(rollout, trl, monkeypatch):
    trainer = importlib.import_module("athanor.adapters.trl").AthanorGRPOTrainer
    honest = trainer._get_per_token_logps_and_entropies

    def spoiled(self, *args, **kwargs):
        logps, *rest = honest(self, *args, **kwargs)
        return logps + 2e-4, *rest

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spoiled)
    (row,) = rollout.workloads.rows_of(trl.trl_step("cpu", TINY), CEILING, 1, lambda text: None)
    assert row["wrong"].startswith("log-probs differ from plain transformers' by 2.0") and "median_us" not in row


def test_the_size_for_a_gpu_is_that_of_qwen(rollout, trl):
    """494 million parameters, as published."""
    (workload,) = trl.workloads("cuda")
    assert workload.dtype == torch.bfloat16 and workload.tokens == 64 * 256
    with torch.device("meta"):
        model = rollout.engine.Decoder(rollout.engine.ModelConfig(**rollout.cases.MODELS[workload.sizes["model"]]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(494e6, rel=1e-3)


def test_a_shared_prompt_is_prefilled_once(rollout):
    """Its work is that of one prompt; a request per sample pays for each."""
    sizes = TINY | {"prompts": 1, "prompt": 300, "G": 4, "new": 1}
    shared, apart = rollout.workloads.rows_of(rollout.cases.group_prefill("cpu", sizes), CEILING, 1, lambda text: None)
    assert shared["goal"] == 8 and shared["rival"] == apart["backend"] and apart["times_rival"] == 1.0 and shared["times_rival"] > 1.5
    assert shared["flops"] == pytest.approx(300 * 2 * 725_000, rel=0.25)  # the layers' matrices, and some attention
    shared, apart = rollout.workloads.rows_of(rollout.cases.group_update("cpu", sizes | {"new": 30}), CEILING, 1, lambda text: None)
    assert shared["correct"] and apart["correct"] and (shared["packed_tokens"], apart["packed_tokens"]) == (299 + 4 * 30, 4 * 329)
    assert shared["times_rival"] > 1.5 and shared["peak_bytes"] < apart["peak_bytes"] / 2


@pytest.mark.parametrize("name, rows, tokens_per_s", [("Qwen2.5-7B", 64, 10_200), ("Qwen2.5-7B", 256, 16_300)])
def test_the_decode_bound_is_bandwidth_over_weights_and_keys(name, rows, tokens_per_s, rollout):
    """At 4.8 TB/s, bf16, 4,096 tokens of context each; computed elsewhere with the input embedding among the weights, 4 % more of them."""
    step_s = 2 * rollout.cases.step_elements(rollout.cases.MODELS[name], rows, 4096) / 4.8e12
    assert rows / step_s == pytest.approx(tokens_per_s, rel=0.04)


def test_the_bench_checks_a_workload_from_the_command_line(modules, monkeypatch, capsys, tmp_path):
    status, said = in_process(monkeypatch, capsys, "--op", "group_prefill", "--check", "--json", str(tmp_path / "rows.jsonl"))
    assert status == 0, said
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["family"] == "rollout" and row["correct"] and row["commit"] and json.loads(said.splitlines()[-1])["rows"] == [row]
