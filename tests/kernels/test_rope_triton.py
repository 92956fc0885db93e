"""rope in Triton, with and without QK norm, against the formula in fp64, and what only a kernel can get wrong: tiles, strides, offsets."""

import mmap
import os
import re

import pytest
import torch

from athanor.kernels import rmsnorm, rope

pytest.importorskip("triton")

from athanor.kernels import rope_triton as module  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# (T, H, Hkv, d): one token; heads and pairs no power of two; more heads than a tile holds; the narrowest head; no token
SIZES = [(1, 4, 2, 24), (5, 3, 1, 6), (2, 33, 5, 64), (3, 1, 1, 2), (0, 2, 1, 4)]
NAMES = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")


def inputs(T, H, Hkv, d, generator, dtype=torch.float32, device="cpu", norm=True):
    """Heads of a fused (T, H + 2 Hkv, d), upstream gradients, angles of positions that do not start at 0, and weights."""
    qkv, dqkv = (torch.randn(T, H + 2 * Hkv, d, generator=generator).to(device, dtype) for _ in range(2))
    positions = 3 + torch.arange(T, dtype=torch.float64)
    angle = positions[:, None] * 100.0 ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)
    weights = [(1 + 0.3 * torch.randn(d, generator=generator)).to(device, dtype) for _ in range(2)] if norm else []
    heads = qkv.split((H, Hkv, Hkv), 1)[:2]
    return [*heads, *weights], [angle.cos().to(device, dtype), angle.sin().to(device, dtype)], dqkv.split((H, Hkv, Hkv), 1)[:2]


def textbook(q, k, q_weight, k_weight, cos, sin):
    """The norm rounded to the dtype, then x cos + rotate_half(x) sin."""
    out = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            wide = x if x.dtype == torch.float64 else x.float()
            x = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).to(x.dtype)
        a, b = x.chunk(2, -1)
        out.append(x * cos.repeat(1, 2)[:, None] + torch.cat((-b, a), -1) * sin.repeat(1, 2)[:, None])
    return out


def oracle(leaves, angles, upstream):
    """Values and gradients in fp64, written out with complex numbers and the gradient of the norm; no rounding anywhere between."""
    cos, sin = (x.double().cpu() for x in angles)
    turn = torch.complex(cos, sin)[:, None]
    values, grads, dweights = [], [], []
    for i in range(2):
        x, dy = leaves[i].double().cpu(), upstream[i].double().cpu()
        half = x.shape[-1] // 2
        dn = torch.complex(dy[..., :half], dy[..., half:]) * turn.conj()
        dn = torch.cat((dn.real, dn.imag), -1)
        n = x
        if len(leaves) == 4:
            weight = leaves[2 + i].double().cpu()
            rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            unit, g = x * rstd, dn * weight
            n = unit * weight
            dweights.append((dn * unit).sum((0, 1)))
            dn = rstd * (g - unit * (g * unit).mean(-1, keepdim=True))
        y = torch.complex(n[..., :half], n[..., half:]) * turn
        values.append(torch.cat((y.real, y.imag), -1))
        grads.append(dn)
    return [*values, *grads, *dweights]


def results(function, leaves, angles, upstream):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves[:2], *(leaves[2:] or (None, None)), *angles)
    return [x.detach().cpu() for x in (*out, *torch.autograd.grad(out, leaves, upstream))]


def ours(q, k, q_weight, k_weight, cos, sin):
    return rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("T, H, Hkv, d", SIZES)
def test_errs_no_more_than_the_textbook(T, H, Hkv, d, norm, dtype, triton_device, within_rule, generator):
    given = inputs(T, H, Hkv, d, generator, dtype, triton_device, norm)
    for name, a, b, c in zip(NAMES[: 6 if norm else 4], results(ours, *given), results(textbook, *given), oracle(*given), strict=False):
        assert a.is_contiguous()
        within_rule(a, b, c, name)


@pytest.mark.gpu
@pytest.mark.parametrize("T, H, Hkv, d", [(4097, 32, 8, 128), (1000, 14, 2, 64), (333, 40, 8, 96)])  # Qwen3-8B; Qwen2.5-0.5B; no power of two
def test_production_sizes(T, H, Hkv, d, within_rule, generator):
    given = inputs(T, H, Hkv, d, generator, torch.bfloat16, "cuda")
    for name, a, b, c in zip(NAMES, results(ours, *given), results(textbook, *given), oracle(*given), strict=True):
        within_rule(a, b, c, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_the_fused_norm_rounds_where_the_separate_one_does(dtype, triton_device, generator):
    """Half precision shows it: without the rounding between norm and rotation about a third of the values differ."""
    leaves, (cos, sin), _ = inputs(40, 4, 2, 32, generator, dtype, triton_device)
    fused = ours(*leaves, cos, sin)
    apart = rope(*(rmsnorm(x, w, backend="triton") for x, w in zip(leaves[:2], leaves[2:], strict=True)), cos, sin, backend="triton")
    for a, b in zip(fused, apart, strict=True):
        # an ulp of fp32 in rstd, from another order of the sum of squares, may tip a rounding now and then
        assert torch.allclose(a, b, rtol=2e-6, atol=1e-6) if dtype == torch.float32 else (a != b).float().mean() < 0.02


def test_dweight_over_many_tokens_is_accurate_and_repeats_bit_for_bit(triton_device, within_rule, generator, monkeypatch):
    monkeypatch.setattr(module, "SLABS", 10)
    given = inputs(33, 128, 128, 8, generator, device=triton_device)  # 4224 heads each; runs of 4 tokens, the last of 1
    got = results(ours, *given)
    for name, a, b, c in zip(NAMES, got, results(textbook, *given), oracle(*given), strict=True):
        within_rule(a, b, c, name)
    for _ in range(2):  # the interpreter takes milliseconds per token, hence few tokens of many heads
        assert all(torch.equal(a, b) for a, b in zip(results(ours, *given), got, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_slices_of_a_fused_matrix_are_read_in_place(norm, triton_device, generator):
    leaves, angles, upstream = inputs(6, 4, 2, 16, generator, device=triton_device, norm=norm)
    assert not leaves[0].is_contiguous() and module.in_heads(leaves[0])[0] is leaves[0] and module.in_heads(leaves[1])[0] is leaves[1]
    want = results(ours, [x.contiguous() for x in leaves], angles, [x.contiguous() for x in upstream])
    assert all(torch.equal(a, b) for a, b in zip(results(ours, leaves, angles, upstream), want, strict=True))
    across = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in upstream]  # as attention in (H, T, d) hands it back
    columns = [torch.stack((x, x), -1).flatten(1)[:, ::2] for x in angles]
    spread = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in leaves[:2]]  # elements of a head apart: copied first
    assert all(torch.equal(a, b) for a, b in zip(results(ours, [*spread, *leaves[2:]], columns, across), want, strict=True))
    q = leaves[0].detach().requires_grad_()
    ours(q, leaves[1], *(leaves[2:] or (None, None)), *angles)[0].sum().backward()  # a gradient of stride 0, and none for k
    ones = [torch.ones_like(leaves[0]), torch.zeros_like(leaves[1])]
    assert torch.allclose(q.grad.double().cpu(), oracle(leaves, angles, ones)[2], atol=1e-5)


def test_frozen_weights(triton_device, generator):
    leaves, angles, upstream = inputs(6, 4, 2, 16, generator, device=triton_device)
    want = oracle(leaves, angles, upstream)
    q, k = (x.detach().requires_grad_() for x in leaves[:2])
    grads = torch.autograd.grad(ours(q, k, *leaves[2:], *angles), (q, k), upstream)
    assert all(torch.allclose(a.double().cpu(), b, atol=1e-5) for a, b in zip(grads, want[2:4], strict=True))
    weight = leaves[3].detach().requires_grad_()
    (grad,) = torch.autograd.grad(ours(*leaves[:3], weight, *angles), weight, upstream)
    assert torch.allclose(grad.double().cpu(), want[5], atol=1e-5)


def test_upstream_gradient_scales(triton_device, generator):
    leaves, angles, upstream = inputs(6, 4, 2, 16, generator, device=triton_device)
    once, four = results(ours, leaves, angles, upstream), results(ours, leaves, angles, [4 * x for x in upstream])
    assert all(torch.equal(4 * a, b) for a, b in zip(once[2:], four[2:], strict=True))


@pytest.mark.parametrize("size", [1e4, 1e18, 3e38])  # ordinary outliers; the last squares that fit fp32; beyond, where the norm gives zeros
def test_huge_values(size, triton_device, generator):
    leaves, angles, upstream = inputs(3, 2, 1, 16, generator, device=triton_device)
    leaves[:2] = [x.sign() * size for x in leaves[:2]]
    got, want = results(ours, leaves, angles, upstream), oracle(leaves, angles, upstream)
    assert all(torch.isfinite(x).all() for x in got)
    assert all(torch.allclose(a.double(), b if size < 1e19 else 0 * b, atol=1e-5) for a, b in zip(got[:2], want[:2], strict=True))


def test_nan_poisons_its_own_head_alone(triton_device, generator):
    leaves, angles, upstream = inputs(6, 4, 2, 16, generator, device=triton_device)
    leaves[0][3, 1, 5] = torch.nan
    q, k, dq, dk, *_ = results(ours, leaves, angles, upstream)
    assert all(torch.isnan(x).any(-1).nonzero().tolist() == [[3, 1]] for x in (q, dq)) and not torch.isnan(torch.cat((k, dk))).any()


@pytest.mark.parametrize("norm", [False, True])
def test_a_token_has_the_same_bits_wherever_it_stands(norm, triton_device, generator):
    leaves, angles, upstream = inputs(14, 3, 1, 16, generator, device=triton_device, norm=norm)
    whole = results(ours, leaves, angles, upstream)
    for rows in (torch.arange(0, 1), torch.arange(13, 14), torch.arange(6, 9), torch.randperm(14, generator=generator)):
        at = rows.to(triton_device)
        part = results(ours, [*(x[at] for x in leaves[:2]), *leaves[2:]], [x[at] for x in angles], [x[at] for x in upstream])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part[:4], whole[:4], strict=True))


def test_the_grid_of_many_tokens_is_one_dimensional(launches):
    q = torch.empty(1, 8, 64).expand(70_000, 8, 64)
    angle, weight = torch.empty(1, 32).expand(70_000, 32), torch.ones(64)
    module.rope_triton(q, q, angle, angle, weight, weight)
    assert launches.grids == [(70_000,)]


@pytest.mark.gpu
def test_more_tokens_than_a_grid_dimension_holds(within_rule, generator):
    given = inputs(65_600, 2, 1, 8, generator, device="cuda")
    for name, a, b, c in zip(NAMES, results(ours, *given), results(textbook, *given), oracle(*given), strict=True):
        within_rule(a, b, c, name)


@pytest.mark.parametrize("norm", [False, True])
def test_offsets_beyond_two_to_the_31_elements(norm, triton_device, generator):
    """Three tokens 1.5 2^30 elements apart in memory that is never touched but for those: token 2 starts at element 3 2^30 > 2^31."""
    stride = 3 << 29
    if triton_device.type == "cuda":
        memory = torch.empty(4 << 30, dtype=torch.float16, device="cuda")
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
    leaves, angles, upstream = inputs(3, 2, 1, 16, generator, torch.float16, triton_device, norm)

    def far(x, at):
        view = memory.as_strided(x.shape, (stride, *x.stride()[1:]), at)
        return view.copy_(x)

    far_leaves = [far(leaves[0], 0), far(leaves[1], 100), *leaves[2:]]
    got = results(ours, far_leaves, [far(x, 200 + 10 * i) for i, x in enumerate(angles)], [far(x, 300 + 100 * i) for i, x in enumerate(upstream)])
    assert all(torch.equal(a, b) for a, b in zip(got, results(ours, leaves, angles, upstream), strict=True))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("case", module.ahead_of_time(), ids=lambda case: case.name)
def test_compiled_offsets_of_tokens_are_products_of_64_bits(case):
    """Also for what the kernels write, which no view can place beyond 2^31 elements.  32 bits are left to offsets of heads within a token."""
    products = re.findall(r"arith\.muli .* : (\S+)", case.compile(90).asm["ttir"])
    narrow = [kind for kind in products if "i64" not in kind]
    assert len(products) - len(narrow) >= 5 and all(re.fullmatch(r"tensor<\d+x1xi32>", kind) for kind in narrow), products


@pytest.mark.parametrize("norm", [False, True])
def test_no_number_of_tokens_compiles_anew(norm, launches, generator):
    for n in range(1, 51):
        leaves, angles, upstream = inputs(n, 4, 2, 16, generator, norm=norm)
        leaves = [x.requires_grad_() for x in leaves]
        torch.autograd.backward(module.rope_triton(*leaves[:2], *angles, *leaves[2:], eps=1e-6 * n), upstream)
    # without norm the backward is the forward's kernel the other way round
    want = ["rope_fwd_kernel", "rope_norm_bwd_kernel", "sum_partials_kernel"] if norm else ["rope_fwd_kernel"] * 2
    assert sorted(name for name, *_ in launches.keys) == want, launches.keys
    module.rope_triton(torch.ones(3, 5, 16), torch.ones(3, 2, 16), torch.ones(3, 8), torch.ones(3, 8))  # another model does: the count can rise
    assert len(launches.keys) == len(want) + 1


def test_refuses_fp64(triton_device):
    x = torch.ones(2, 1, 4, device=triton_device).double()
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        rope(x, x, x[:, 0, :2], x[:, 0, :2], backend="triton")
