"""Would the tests notice?  Each row plants one bug in a copy of kernels/ and runs the tests of that operation against the copy: they must fail.

The copy is put in the place of athanor.kernels by bench/overlay.py, in a process of its own; Triton files run under the interpreter.  The same tests
must pass on an untouched copy.  A new kernel adds rows; a row whose text no longer occurs exactly once in its file fails and must be adapted.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Bug:
    what: str
    file: str  # in kernels/
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # file in tests/kernels/ that must notice; *_triton.py runs under the interpreter
    fast: bool = False  # in the fast suite as well

    @property
    def interpreted(self) -> bool:
        return self.tests.endswith("_triton.py") or self.tests == WINDOW


GRPO, LINEAR = "test_grpo_loss_triton.py", "test_linear_logprob_triton.py"
SAMPLE, WINDOW = "test_sample_triton.py", "test_sliding_window.py"
PAGED, PACKED, PRODUCT = "test_paged_attention_triton.py", "test_attention_triton.py", "test_linear_triton.py"
FP8, GROUPED, FP8_GROUPED = "test_fp8_quantize_triton.py", "test_grouped_gemm_triton.py", "test_fp8_grouped_gemm_triton.py"
MANY = "test_fp8_quantize_many_triton.py"
GLUON = "test_gluon_emulated.py"
PRODUCERS = "test_fp8_producers_triton.py"
ROUTE, PERMUTE = "test_moe_route_triton.py", "test_moe_permute_triton.py"
BUGS = [
    # mlp_cpu
    Bug("the first block's rows for all", "mlp_cpu.py", "weight_gradient(d_g, x[rows], add_to=d_gate_up)",
        "weight_gradient(d_g, x[:n], add_to=d_gate_up)", "test_mlp_cpu.py"),
    Bug("blocks that cut a run of the sums", "mlp_cpu.py", "BLOCK_ROWS = 512", "BLOCK_ROWS = 500", "test_mlp_cpu.py"),
    # policy_loss, grpo_loss
    Bug("dropped mask", "policy_loss.py", "loss = loss * m\n", "loss = loss * 1\n", "test_policy_loss.py"),
    Bug("masked tokens not cleaned", "policy_loss.py", "torch.where(mask, x.to(dtype), 0.0)", "x.to(dtype)", "test_policy_loss.py"),
    Bug("wrong clip side", "policy_loss.py", "return -torch.minimum(inner * A, r.clamp(lo, hi) * A), below, above",
        "return -torch.maximum(inner * A, r.clamp(lo, hi) * A), below, above", "test_policy_loss.py", fast=True),
    Bug("clip range mirrored", "policy_loss.py", "lo, hi = 1 - v.clip_low, 1 + v.clip_high\n",
        "lo, hi = 1 - v.clip_high, 1 + v.clip_low\n", "test_policy_loss.py"),
    Bug("swapped normaliser", "policy_loss.py", "loss = loss.sum() / num_tokens.clamp_min(1)", "loss = loss.sum() / num_sequences.clamp_min(1)",
        "test_policy_loss.py"),
    Bug("gradient through the reference's KL sign", "policy_loss.py", "e = clean(ref_logps.detach()) - logps\n",
        "e = logps - clean(ref_logps.detach())\n", "test_policy_loss.py"),
    Bug("dropped mask", "policy_loss_triton.py", "keep = keep & (tl.load(keep_ptr + t, mask=inside, other=0) != 0)", "keep = inside", GRPO),
    Bug("wrong clip side", "policy_loss_triton.py", "    below, above = (A < 0) & (r < lo), (A > 0) & (r > hi)\n",
        "    below, above = (A > 0) & (r < lo), (A < 0) & (r > hi)\n", GRPO),
    Bug("off-by-one segment", "policy_loss_triton.py", "s += (t >= end)", "s += (t > end)", GRPO, fast=True),
    Bug("missing grad scale", "policy_loss_triton.py", "return (dlogps * dloss).to(ctx.dtype)", "return dlogps.to(ctx.dtype)", GRPO),
    Bug("missing 1/n of the sequence ratio", "policy_loss_triton.py", "tl.load(sequence_ptr + 3 * S + s, mask=keep, other=0.0) / n",
        "tl.load(sequence_ptr + 3 * S + s, mask=keep, other=0.0)", GRPO),
    Bug("swapped normaliser", "policy_loss_triton.py", '    if v.aggregation == "token_mean":\n        given = count.sum() if',
        '    if v.aggregation != "token_mean":\n        given = count.sum() if', GRPO),
    Bug("fp16 accumulation", "policy_loss_triton.py", "        log_ratio += tl.load(logps_ptr + t, mask=keep, other=0.0).to(tl.float32) - old\n",
        "        log_ratio = (log_ratio + tl.load(logps_ptr + t, mask=keep, other=0.0).to(tl.float32) - old).to(tl.float16).to(tl.float32)\n", GRPO),
    Bug("slope of a clamped ratio", "policy_loss_triton.py", "tl.where(unclamped, 1.0, 0.0), lo", "tl.where(unclamped, 1.0, 1.0), lo", GRPO),
    Bug("length compiled in", "policy_loss_triton.py", '@triton.jit(do_not_specialize=["N", "S", "steps"], ', "@triton.jit(",
        "test_recompilation.py"),
    Bug("alignment of a micro-batch compiled in", "policy_loss_triton.py", '@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=CUT)',
        '@triton.jit(do_not_specialize=["S"])', "test_recompilation.py"),
    # group_advantage
    Bug("sample std", "group_advantage.py", "(total(centred.square()) / count.clamp_min(1))",
        "(total(centred.square()) / (count - 1).clamp_min(1))", "test_group_advantage.py"),
    Bug("constant group not recognised", "group_advantage.py", "torch.where(valid & (low < high)[group], advantages, 0.0)",
        "torch.where(valid, advantages, 0.0)", "test_group_advantage.py"),
    Bug("own group's first block alone", "group_advantage_triton.py", "        count += tl.sum(", "        count = tl.sum(",
        "test_group_advantage_triton.py"),
    Bug("missing leave-one-out factor", "group_advantage_triton.py", "(count / tl.maximum(count - 1.0, 1.0))", "(count / tl.maximum(count, 1.0))",
        "test_group_advantage_triton.py"),
    Bug("fp16 accumulation", "group_advantage_triton.py", "tl.sum(tl.where(same, r[None, :], 0.0), 1)",
        "tl.sum(tl.where(same, r[None, :], 0.0).to(tl.float16), 1).to(tl.float32)", "test_group_advantage_triton.py"),
    # logprob, linear_logprob
    Bug("missing 1/temperature", "logprob.py", "        z = z / temperature\n", "        z = z + 0\n", "test_logprob.py"),
    Bug("missing vocabulary tail mask", "logprob_triton.py", 'mask=i + lanes < V, other=float("-inf")).to(tl.float32)\n        if',
        "mask=i + lanes < V, other=0.0).to(tl.float32)\n        if", "test_logprob_triton.py"),
    Bug("missing 1/temperature in the gradient", "logprob_triton.py", "tl.load(dlogps_ptr + row) * inv_temperature, 0.0)",
        "tl.load(dlogps_ptr + row), 0.0)", "test_logprob_triton.py"),
    Bug("fp16 accumulation", "logprob_triton.py", "S, U, m = S + e, U + de, new",
        "S, U, m = (S + e).to(tl.float16).to(tl.float32), U + de, new", "test_logprob_triton.py"),
    Bug("missing grad scale", "logprob_triton.py", "tl.load(dlogps_ptr + row) * inv_temperature, 0.0)", "inv_temperature, 0.0)",
        "test_logprob_triton.py"),
    Bug("missing 1/temperature", "linear_logprob.py", "c = (dlogps.masked_fill(skip, 0.0) / ctx.temperature)", "c = (dlogps.masked_fill(skip, 0.0))",
        "test_linear_logprob.py"),
    Bug("tiles joined without rescaling", "linear_logprob.py", "S[rows] = S[rows] * factor + e.sum(1)", "S[rows] = S[rows] + e.sum(1)",
        "test_linear_logprob.py"),
    Bug("off-by-one tile", "linear_logprob.py", "slice(col, min(col + TILE[1], V))", "slice(col, min(col + TILE[1], V - 1))",
        "test_linear_logprob.py"),
    Bug("missing vocabulary tail mask", "linear_logprob_triton.py", 'x = tl.where((cols < V)[None, :], x, float("-inf"))', "x = x + 0.0", LINEAR),
    Bug("fp16 accumulation", "linear_logprob_triton.py", 'weight.load([col0, k]).T, acc, input_precision="ieee")',
        'weight.load([col0, k]).T, acc, input_precision="ieee").to(tl.float16).to(tl.float32)', LINEAR),
    Bug("off-by-one slice", "linear_logprob_triton.py", "for i in range(0, slices, SLICES):", "for i in range(0, slices - 1, SLICES):", LINEAR),
    Bug("missing 1/temperature", "linear_logprob_triton.py", "dlogps, 0.0) / ctx.temperature", "dlogps, 0.0)", LINEAR),
    Bug("missing grad scale", "linear_logprob_triton.py", "torch.mul(dw, unit, out=", "torch.mul(dw, 1.0, out=", LINEAR),
    Bug("last kept index not relative to its tile", "linear_logprob.py", "support[1][rows] - cols.start", "support[1][rows]",
        "test_linear_logprob.py"),
    Bug("recomputed tiles not truncated", "linear_logprob.py", "if support and i >= len(ctx.kept):", "if False:", "test_linear_logprob.py"),
    Bug("last kept index not relative to its slice", "linear_logprob_triton.py", "mask=rows < T, other=0)[:, None] - first",
        "mask=rows < T, other=0)[:, None]", LINEAR),
    Bug("argmax of the kept tokens", "linear_logprob_triton.py", "index = tl.where(largest > (top if SUPPORT else m), at, index)",
        "index = tl.where(largest > m, at, index)", LINEAR),
    Bug("target outside the support dropped", "logprob_triton.py", " & (v != target), float", ", float", LINEAR),
    # sample
    Bug("ties of earlier segments forgotten", "sample_filter_triton.py", "room - (tl.cumsum(ties, 0) - ties)", "room - 0 * ties", SAMPLE),
    Bug("a miss not noticed", "sample_filter_triton.py", "if below | beyond:", "if below & beyond:", SAMPLE),
    Bug("top-p of the whole row after top-k", "sample_filter_triton.py", "tl.minimum(wanted_mass(limit, top_p)",
        "tl.minimum(wanted_mass(row_mass, top_p)", SAMPLE),
    Bug("tiles of other segments", "sample_tiles_triton.py", "j = i * TILES + tl.where(greedy", "j = tl.where(greedy", SAMPLE),
    Bug("missing vocabulary tail mask", "sample_tiles_triton.py", 'wanted & (v < V), other=float("-inf"))', "wanted & (v < V), other=0.0)", SAMPLE),
    # logits_grpo, linear_grpo
    Bug("dropped mask", "logits_grpo.py", "        keep = keep & mask\n", "        pass\n", "test_logits_grpo.py"),
    Bug("off-by-one segment", "logits_grpo.py", "torch.arange(targets.numel(), device=device), right=True)",
        "torch.arange(targets.numel(), device=device), right=False)", "test_logits_grpo.py"),
    Bug("missing 1/temperature", "logits_grpo.py", "coefs[some] / temperature", "coefs[some]", "test_logits_grpo.py"),
    Bug("missing grad scale", "logits_grpo.py", "                ctx.scale(x, dloss)\n", "                pass\n", "test_logits_grpo.py"),
    Bug("swapped normaliser", "logits_grpo.py", 'if v.aggregation == "token_mean" else (num_seq',
        'if v.aggregation != "token_mean" else (num_seq', "test_logits_grpo.py"),
    Bug("last chunk's dweight alone", "linear_grpo.py", "torch.addmm(self.dweight, dz, x, **options, out=self.dweight)",
        "torch.mm(dz, x, **options, out=self.dweight)", "test_linear_grpo.py"),
    Bug("compacted rows put back elsewhere", "linear_grpo.py", "live + rows.start if isinstance(rows, slice)", "live if isinstance(rows, slice)",
        "test_linear_grpo.py"),
    # rmsnorm, rope, swiglu
    Bug("fp16 accumulation", "rmsnorm_triton.py", "rstd_of(tl.sum(x * x, 1), D, eps)",
        "rstd_of(tl.sum((x * x).to(tl.float16), 1).to(tl.float32), D, eps)", "test_rmsnorm_triton.py"),
    Bug("last run of rows left out of dweight", "rmsnorm_triton.py", "mask = (rows < slabs)[:, None]", "mask = (rows < slabs - 1)[:, None]",
        "test_rmsnorm_triton.py"),
    Bug("gradient without its projection", "rmsnorm_triton.py", "dx = (g - normed * (tl.sum(g * normed, 1) / D)[:, None]) * rstd", "dx = g * rstd",
        "test_rmsnorm_triton.py"),
    Bug("eps left out", "rmsnorm.py", ".div_(x.shape[-1]).add_(eps))", ".div_(x.shape[-1]))", "test_rmsnorm.py"),
    Bug("rotation backwards", "rope.py", "_rotate(dy, cos, -sin)", "_rotate(dy, cos, sin)", "test_rope.py"),
    # paged_attention, kv_append; a bug that follows a poisoned table entry would crash, so there is none
    Bug("shared past the prefix", "paged_attention_triton.py", "begin + CHUNK <= prefix", "begin + CHUNK <= prefix + 16", PAGED),
    Bug("wrong query head", "paged_attention_triton.py", "head * REPEAT + lanes % REPEAT", "head + lanes % REPEAT * HKV", PAGED),
    Bug("missing rescale", "paged_attention_triton.py", "acc * alpha[:, None]", "acc", PAGED),
    Bug("fp16 accumulation", "paged_attention_triton.py", "l * alpha + tl.sum(p, 1)", "(l * alpha + tl.sum(p, 1)).to(tl.float16).to(tl.float32)",
        PAGED),
    Bug("unweighted merge", "paged_attention_triton.py", "L = L * old + tl.load(l_ptr + c) * new", "L = L + tl.load(l_ptr + c)", PAGED),
    Bug("rest of the prefix left out", "paged_attention.py", "prefix.long() // CHUNK\n", "-(-prefix.long() // CHUNK)\n", "test_paged_attention.py"),
    Bug("unused slots not cleaned", "paged_attention.py", "            values[:, :, short:].masked_fill_(behind[..., None], 0)\n", "",
        "test_paged_attention.py"),
    Bug("off-by-one slot", "kv_append.py", "positions % block_size\n", "(positions + 1) % block_size\n", "test_kv_append.py"),
    # sliding windows
    Bug("off-by-one window", "paged_attention_triton.py", "(lens - 1 - keys).to(tl.uint32) < WINDOW",
        "(lens - 1 - keys).to(tl.uint32) <= WINDOW", WINDOW),
    Bug("last queries of a key left out", "attention_triton.py", "first + BN - 1 + WINDOW - before", "first + WINDOW - before", WINDOW),
    Bug("first chunk left out", "paged_attention_triton.py", "first = tl.maximum(length - WINDOW, 0) // CHUNK",
        "first = (tl.maximum(length - WINDOW, 0) + CHUNK - 1) // CHUNK", WINDOW),
    # strict mode, linear, attention
    Bug("strict mode not asked", "_dispatch.py", "candidate.strict if strict else candidate.usual", "candidate.usual", "test_dispatch.py"),
    Bug("a backend by name in strict mode", "_dispatch.py", "if reason is None and strict and", "if False and", "test_dispatch.py"),
    Bug("fp16 accumulation", "linear_triton.py", "BM, BN, BK, DESCRIPTORS)\n", "BM, BN, BK, DESCRIPTORS).to(tl.float16).to(tl.float32)\n", PRODUCT),
    Bug("last band as high as the others", "linear_triton.py", "width = tl.minimum(tl.cdiv(T, BM) - pid // band * GROUP, GROUP)", "width = GROUP",
        PRODUCT),
    Bug("a row's neighbour in its sum", "linear_triton.py", "    if BIAS:\n", "    y += tl.sum(y, 0)[None, :] * 1e-7\n    if BIAS:\n", PRODUCT),
    Bug("gradient of the first token alone", "linear_triton.py", "dy.sum(0) if need_bias", "dy[0] if need_bias", PRODUCT),
    Bug("chunk of another size", "attention_triton.py", "if start % CHUNK == 0", "if start % (2 * CHUNK) == 0", PACKED),
    Bug("unweighted merge", "attention_triton.py", "return M, L * old + l * new,", "return M, L + l,", PACKED),
    Bug("a key of the future", "attention_triton.py", "before + position[None, :] + 1,", "before + position[None, :] + 2,", PACKED),
    Bug("off-by-one segment", "attention_triton.py", "// ROWS + s <= index", "// ROWS + s < index + (s == 0)", PACKED),
    Bug("gradient without its projection", "attention_triton.py", " - delta[None, :])", ")", PACKED),
    Bug("missing scale", "attention_triton.py", "dk * (factor * LN2)", "dk", PACKED),
    # fp8_quantize, grouped_gemm, fp8_grouped_gemm
    Bug("half way rounded away from even", "fp8_quantize_triton.py", "0x7FFFF + ((size >> 20) & 1)", "0x80000", FP8),
    Bug("NaN dropped by the maximum", "fp8_quantize_triton.py", "finite = amax_bits < 0x7F800000", "finite = amax_bits < 0x7FFFFFFF", FP8),
    Bug("scale of the rows for the columns", "fp8_quantize_triton.py", "scale, factor = scales_of(tl.max(size, 0), POWER_OF_TWO)",
        "scale, factor = scales_of(tl.max(size, 1), POWER_OF_TWO)", FP8),
    Bug("power of two rounded down", "fp8_quantize.py", "+ 0x7FFFFF) >> 23  # rounded up", ") >> 23", "test_fp8_quantize.py"),
    Bug("one type taken for another", "fp8_quantize_many_triton.py", "    if kind == 0:", "    if kind <= 1:", MANY),
    Bug("scales of the columns forgotten", "fp8_quantize_many_triton.py", "column_scales_ptr = tl.load(at + 4)",
        "column_scales_ptr = tl.load(at + 2)", MANY),
    Bug("writes that PyTorch does not see", "fp8_quantize_many_triton.py", "torch.autograd.graph.increment_version(written)", "del written", MANY),
    Bug("masters rounded half up", "fp8_quantize_triton.py", "0x7FFF + ((bits >> 16) & 1)", "0x8000", MANY),
    Bug("masters not rounded", "fp8_quantize_many.py", "weight.to(dtype or weight.dtype)", "weight", "test_fp8_quantize_many.py"),
    Bug("tile of the next expert", "grouped_gemm_triton.py", "(last[None, :] <= t[:, None])", "(last[None, :] < t[:, None])", GROUPED),
    Bug("an expert's last row not stored", "grouped_gemm_triton.py",
        "acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])",
        "acc.to(y_ptr.dtype.element_ty), mask=(rows < end - 1)[:, None] & (cols < N)[None, :])", GROUPED),
    Bug("last, partial step left out of dw", "grouped_gemm_triton.py", "for t in range(whole, end, BK):", "for t in range(whole, end - 1, BK):",
        GROUPED),
    Bug("scales of the weight transposed", "fp8_grouped_gemm_triton.py", "col0 // 128 * ws_row", "col0 // 128 * ws_column", FP8_GROUPED),
    Bug("one scale for the whole sum", "fp8_grouped_gemm_triton.py", "        xs_ptr += xs_column\n", "", FP8_GROUPED),
    Bug("wrong scale of the columns in dw", "fp8_grouped_gemm_triton.py", "xs_ptr += (start // BK).to(tl.int64) * xs_stride + cols",
        "xs_ptr += cols", FP8_GROUPED),
    Bug("gradient without the transpose's scales", "fp8_grouped_gemm.py", "Quantized(qw.mT, sw.mT)", "Quantized(qw.mT, sw.mT.flip(1))",
        "test_fp8_grouped_gemm.py"),
    Bug("a gradient quantised before it is rounded", "fp8_producers_triton.py", "x = x.to(a_ptr.dtype.element_ty)\n    at =", "at =", PRODUCERS),
    Bug("gradient of up in place of gate's", "fp8_producers_triton.py", "of_gate = (columns < F)[None, :]",
        "of_gate = (columns >= F)[None, :]", PRODUCERS),
    Bug("rows of no token not cleared", "fp8_producers_triton.py", "mask=mask & (slot >= 0)[:, None], other=0.0)",
        "mask=mask, other=0.0)", PRODUCERS),
    Bug("weighted twice on the way back", "fp8_mixture.py", "torch.ones_like(weights)", "weights", "test_fp8_producers.py"),
    Bug("scales of the weight transposed, few rows", "fp8_grouped_gemm_few_hopper_triton.py", "col0 // 128 * ws_row",
        "col0 // 128 * ws_column", GLUON),
    Bug("a buffer is free at once", "fp8_grouped_gemm_few_hopper_triton.py", "mbarrier.wait(free.index(stage)", "mbarrier.wait(ready.index(stage)",
        GLUON),
    Bug("the halves of a word changed over", "fp8_quantize_dual_hopper_triton.py", "gl.store(at, even_code, mask=there)",
        "gl.store(at, odd_code, mask=there)", GLUON),
    # moe_route, moe_permute, mla_decode
    Bug("the bias weighs", "moe_route.py", "weights = scores.gather(1, ids)", "weights = (scores if bias is None else scores + bias).gather(1, ids)",
        "test_moe_route.py"),
    Bug("a group is worth its best alone", "moe_route.py", "grouped.topk(2, dim=-1).values.sum(-1)", "grouped.amax(-1)", "test_moe_route.py"),
    Bug("ties to the highest", "moe_route_triton.py", "tl.min(tl.where(candidates & (keys == best[:, None]), lanes, NOTHING), 1)",
        "tl.max(tl.where(candidates & (keys == best[:, None]), lanes, -1), 1)", ROUTE, fast=True),
    Bug("a replayed choice counted as changed wherever it stands", "moe_route_triton.py", "tl.where(known & (experts == expert), 1, 0)",
        "tl.where(known & (experts == expert) & (experts == j), 1, 0)", ROUTE),
    Bug("gradient without the sum that weights are divided by", "moe_route_triton.py", "(dscores - (dot / total)[:, None])", "dscores", ROUTE),
    Bug("last expert not counted", "moe_route_triton.py", "mask=lanes < E)\n    tl.store(at + E", "mask=lanes < E - 1)\n    tl.store(at + E", ROUTE),
    Bug("order of the tokens not kept", "moe_permute.py", "    order = flat.sort(stable=True).indices\n",
        "    order = T * k - 1 - flat.flip(0).sort(stable=True).indices\n", "test_moe_permute.py"),
    Bug("rank counts itself", "moe_permute_triton.py", "(lanes[None, :] < lanes[:, None])", "(lanes[None, :] <= lanes[:, None])", PERMUTE),
    Bug("blocks before count the block itself", "moe_permute_triton.py", "tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 0)", PERMUTE),
    Bug("padding not cleared", "moe_permute_triton.py", "mask=mask & (slot >= 0), other=0.0)\n    if SCALED", "mask=mask, other=0.0)\n    if SCALED",
        PERMUTE),
    Bug("slots behind the end not cleared", "mla_decode.py", "    rows = rows.masked_fill(~there[..., None], 0)", "    rows = rows + 0",
        "test_mla_decode.py"),
    Bug("values with the rotated key in front", "mla_decode.py", "rows[..., :rank]", "rows[..., -rank:]", "test_mla_decode.py"),
    Bug("rotated part left out of the scores", "mla_decode_triton.py", "tl.dot(k, q_turned.T, tl.dot(c, q.T",
        "tl.dot(k * 0, q_turned.T, tl.dot(c, q.T", "test_mla_decode_triton.py"),
    Bug("sum not rescaled by a new maximum", "mla_decode_triton.py", "acc * alpha[None, :]", "acc", "test_mla_decode_triton.py"),
    Bug("a chunk shared that a prefix has only begun", "mla_decode_triton.py", "if begin + CHUNK <= prefix", "if begin < prefix",
        "test_mla_decode_triton.py"),
    Bug("weight of the first choice for all", "moe_permute_triton.py", "y *= tl.load(weights_ptr + rows * K + j",
        "y *= tl.load(weights_ptr + rows * K", PERMUTE),
]  # fmt: skip


def run_tests(kernels: Path, tests: str, interpreted: bool) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("ATHANOR_BACKEND", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(ROOT / "bench/overlay.py"), str(kernels), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), str(TESTS / tests)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def copy_of_kernels(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")))


def plant(bug: Bug, kernels: Path) -> None:
    path = kernels / bug.file
    text = path.read_text()
    assert text.count(bug.old) == 1, f"the text of {bug.what!r} occurs {text.count(bug.old)} times in kernels/{bug.file}: adapt this row of BUGS"
    path.write_text(text.replace(bug.old, bug.new))


def need_triton(bug: Bug) -> None:
    if bug.file.endswith("_triton.py"):
        pytest.importorskip("triton")


@pytest.mark.parametrize("bug", [pytest.param(b, marks=[] if b.fast else pytest.mark.slow, id=f"{b.file}-{b.what}".replace(" ", "-")) for b in BUGS])
def test_a_planted_bug_is_noticed(bug, tmp_path):
    need_triton(bug)
    kernels = copy_of_kernels(tmp_path)
    plant(bug, kernels)
    done = run_tests(kernels, bug.tests, bug.interpreted)
    # 1 = tests failed; anything else (2: not even collected, 5: nothing ran) shows nothing about the tests
    assert done.returncode == 1, f"survived, or did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert re.search(r"\d+ failed", done.stdout), done.stdout[-3000:]
    # what fails is a comparison: a copy that merely crashes would be noticed by anything
    assert re.search(r"(?m)^E\s+(AssertionError|assert |Failed)", done.stdout), done.stdout[-3000:]


@pytest.mark.parametrize("tests", [pytest.param(name, marks=[] if any(b.fast and b.tests == name for b in BUGS) else pytest.mark.slow)
                                   for name in sorted({bug.tests for bug in BUGS})])  # fmt: skip
def test_an_untouched_copy_passes(tests, tmp_path):
    bug = next(bug for bug in BUGS if bug.tests == tests)
    need_triton(bug)
    done = run_tests(copy_of_kernels(tmp_path), tests, bug.interpreted)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) >= 3, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_copy_is_what_runs(tmp_path):
    kernels = copy_of_kernels(tmp_path)
    code = "import sys, athanor.kernels; print(sys.modules['athanor.kernels.rope'].__file__)"
    (tmp_path / "where.py").write_text(code)
    done = subprocess.run([sys.executable, str(ROOT / "bench/overlay.py"), str(kernels), str(tmp_path / "where.py")], capture_output=True, text=True)
    assert done.stdout.strip() == str(kernels / "rope.py"), done.stderr


def test_every_bug_can_be_planted():
    """In the kernels as they are: the slow tests that plant them run seldom."""
    texts = {bug.file: (ROOT / "kernels" / bug.file).read_text() for bug in BUGS}
    assert not [f"{bug.file}: {bug.what}" for bug in BUGS if texts[bug.file].count(bug.old) != 1]


def test_every_kind_of_bug_is_planted():
    """The kinds that the design names; the rest of the table is more of them."""
    kinds = ["dropped mask", "wrong clip side", "missing 1/temperature", "off-by-one segment", "fp16 accumulation", "missing vocabulary tail mask",
             "missing grad scale", "swapped normaliser"]  # fmt: skip
    assert {kind for kind in kinds if any(bug.what == kind for bug in BUGS)} == set(kinds)
