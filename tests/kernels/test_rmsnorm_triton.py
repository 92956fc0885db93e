"""rmsnorm in Triton against the formula in fp64, and what only a kernel can get wrong: tiles, strides, offsets, order of sums, recompilation."""

import mmap
import os
import re

import pytest
import torch

from athanor.kernels import rmsnorm

pytest.importorskip("triton")
from athanor.kernels import rmsnorm_triton as module  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# one row; tile rows missing; D odd; D a power of two; one more than a power of two with several tiles; one column; no row; no column
SIZES = [(1, 96), (5, 64), (33, 97), (24, 16), (9, 1025), (4, 1), (0, 8), (3, 0)]
NAMES = ("y", "s", "dx", "dresidual", "dweight")


def formula(x, weight, residual, eps):
    s = x if residual is None else x + residual
    return s * (s.square().mean(-1, keepdim=True) + eps).rsqrt() * weight, s


def oracle(x, weight, residual, dy, ds, eps=1e-6):
    """Values and gradients in fp64, the gradient written out.  The norm is taken of the rounded sum."""
    s = x if residual is None else x + residual  # rounds once
    wide, w, dy = s.double(), weight.double(), dy.double()
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, g = wide * rstd, dy * w
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True)) + (0 if ds is None else ds.double())
    exact = x.double() if residual is None else x.double() + residual.double()
    return n * w, exact, dx, dx, (dy * n).flatten(0, -2).sum(0)


def results(function, x, weight, residual, dy, ds):
    """function: (x, weight, residual) -> (y, s)."""
    leaves = [t for t in (x, weight, residual) if t is not None]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y, s = function(*leaves[:2], leaves[2] if residual is not None else None)
    outputs, upstream = ((y,), (dy,)) if ds is None else ((y, s), (dy, ds))
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return [t.detach().cpu() for t in (y, s, grads[0], grads[2] if residual is not None else grads[0], grads[1])]


def ours(backend="triton", eps=1e-6):
    def call(x, weight, residual):
        out = rmsnorm(x, weight, eps=eps, residual=residual, backend=backend)
        return out if residual is not None else (out, x)

    return call


def inputs(T, D, generator, dtype=torch.float32, device="cpu", residual=True):
    x, r, dy, ds = (torch.randn(T, D, generator=generator).to(device, dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(D, generator=generator)).to(device, dtype)
    return (x, weight, r, dy, ds) if residual else (x, weight, None, dy, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("T, D", SIZES)
def test_errs_no_more_than_the_formula(T, D, residual, dtype, triton_device, within_rule, generator):
    tensors = inputs(T, D, generator, dtype, triton_device, residual)
    got = results(ours(), *tensors)
    plain = results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    for name, a, b, c in zip(NAMES, got, plain, oracle(*tensors), strict=True):
        within_rule(a, b, c.cpu(), name)
    if residual:
        assert torch.equal(got[1], (tensors[0] + tensors[2]).cpu())  # the state is the same in every implementation


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("D", [70, 128, 97])  # a tail of one step; a multiple of the step; odd
def test_long_rows_are_walked_with_the_same_result(D, dtype, triton_device, within_rule, generator, monkeypatch):
    monkeypatch.setattr(module, "ONE_PASS", 32)
    monkeypatch.setattr(module, "LOOP_BLOCK", 64)
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "LONG_SLABS", 3)
    assert module.tile_of(D)[:2] == (1, 64)
    tensors = inputs(7, D, generator, dtype, triton_device)
    got, plain = results(ours(), *tensors), results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    for name, a, b, c in zip(NAMES, got, plain, oracle(*tensors), strict=True):
        within_rule(a, b, c.cpu(), name)


@pytest.mark.gpu
@pytest.mark.parametrize("T, D", [(300, 8192), (130, 16384), (130, 12289), (4097, 4096)])  # largest tile, walked, walked with a tail, several slabs
def test_production_tiles(T, D, within_rule, generator):
    tensors = inputs(T, D, generator, torch.bfloat16, "cuda")
    got, plain = results(ours(), *tensors), results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    for name, a, b, c in zip(NAMES, got, plain, oracle(*tensors), strict=True):
        within_rule(a, b, c.cpu(), name)


def test_eps_counts(triton_device, generator):
    x, weight, *_ = inputs(3, 20, generator, device=triton_device)
    y = rmsnorm(1e-4 * x, weight, eps=1e-2, backend="triton")
    want, _ = formula(1e-4 * x.double(), weight.double(), None, 1e-2)
    assert torch.allclose(y.double(), want, rtol=1e-5)


def test_dweight_over_many_rows_is_accurate_and_repeats_bit_for_bit(triton_device, within_rule, generator):
    tensors = inputs(4096, 24, generator, device=triton_device)  # 128 rows a tile here: 32 tiles, so the rows of several programs are added
    got = results(ours(), *tensors)
    plain = results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    within_rule(got[4], plain[4], oracle(*tensors)[4].cpu(), "dweight")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(ours(), *tensors), got, strict=True))


def test_a_run_of_several_tiles_is_added_whole(triton_device, within_rule, generator, monkeypatch):
    monkeypatch.setattr(module, "SLABS", 3)
    monkeypatch.setattr(module, "TILE", 32)
    tensors = inputs(37, 16, generator, device=triton_device)  # 19 tiles of 2 rows: 3 runs of 7, the last with 5 and half a tile
    got, plain = results(ours(), *tensors), results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    for name, a, b, c in zip(NAMES, got, plain, oracle(*tensors), strict=True):
        within_rule(a, b, c.cpu(), name)


def test_more_partial_sums_than_one_tile_of_the_second_level(triton_device):
    partials = torch.arange(70.0 * 33).view(70, 33).to(triton_device)  # small integers: exact in any order, so equality is a fair demand
    out = torch.empty(33, device=triton_device)
    module.sum_partials(partials, out)
    assert torch.equal(out, partials.double().sum(0).float())


def test_head_slices_of_a_fused_matrix_are_read_in_place(triton_device, generator):
    qkv = torch.randn(6, 7, 10, generator=generator).to(triton_device)
    weight = torch.rand(10, generator=generator).to(triton_device)
    x = qkv[:, 2:5]
    same, inner, outer, stride = module.in_rows(x)
    assert same is x and (inner, outer, stride) == (3, 70, 10)
    dy = torch.randn(6, 3, 20, generator=generator).to(triton_device)[:, :, 3:13]
    for a, b in zip(results(ours(), x, weight, None, dy, None), results(ours(), x.contiguous(), weight, None, dy.contiguous(), None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["transposed", "three strides", "expanded", "every second column", "row step", "four axes"])
def test_any_layout_gives_the_result_of_its_copy(layout, triton_device, generator):
    made = {
        "transposed": lambda: torch.randn(12, 5, generator=generator).T,
        "three strides": lambda: torch.randn(4, 6, 8, 12, generator=generator)[::2, ::2, ::2],
        "expanded": lambda: torch.randn(1, 12, generator=generator).expand(5, 12),
        "every second column": lambda: torch.randn(5, 24, generator=generator)[:, ::2],
        "row step": lambda: torch.randn(10, 12, generator=generator)[::2],
        "four axes": lambda: torch.randn(2, 3, 2, 12, generator=generator),
    }[layout]
    x, r, dy, ds = (made().to(triton_device) for _ in range(4))
    if layout == "transposed":
        x, r, dy, ds = (torch.randn(12, 5, generator=generator).to(triton_device).T for _ in range(4))
    weight = torch.rand(12, generator=generator).to(triton_device)
    got = results(ours(), x, weight, r, dy, ds)
    want = results(ours(), *(t.contiguous() for t in (x, weight, r, dy, ds)))
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got[:2], want[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_summed_output_has_a_gradient_of_stride_zero(triton_device, generator):
    x, weight, r, *_ = inputs(5, 12, generator, device=triton_device)
    x.requires_grad_()
    rmsnorm(x, weight, residual=r, backend="triton")[0].sum().backward()
    ones = torch.ones_like(r)
    want = oracle(x.detach(), weight, r, ones, None)[2]
    assert torch.allclose(x.grad.double(), want, atol=1e-6)


def test_a_part_of_the_gradients_can_be_asked_for(triton_device, generator):
    x, weight, r, dy, ds = inputs(6, 20, generator, device=triton_device)
    want = oracle(x, weight, r, dy, ds)
    leaf = r.clone().requires_grad_()
    y, s = rmsnorm(x, weight, residual=leaf, backend="triton")  # the weight is frozen
    assert torch.allclose(torch.autograd.grad((y, s), leaf, (dy, ds), retain_graph=True)[0].double(), want[3], atol=1e-6)
    assert torch.equal(torch.autograd.grad(s, leaf, ds)[0], ds)  # y is not used at all
    leaf = weight.clone().requires_grad_()
    y, _ = rmsnorm(x, leaf, residual=r, backend="triton")
    assert torch.allclose(torch.autograd.grad(y, leaf, dy)[0].double(), want[4], atol=1e-5)


def test_upstream_gradient_scales(triton_device, generator):
    x, weight, r, dy, ds = inputs(6, 20, generator, device=triton_device)
    once, four = results(ours(), x, weight, r, dy, ds), results(ours(), x, weight, r, 4 * dy, 4 * ds)
    assert all(torch.equal(4 * a, b) for a, b in zip(once[2:], four[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("size", [1e4, 1e18, 3e38])  # ordinary outliers; the last squares that fit fp32; beyond
def test_huge_values(size, dtype, triton_device, generator):
    x = (torch.randn(3, 40, generator=generator).sign() * size).to(dtype)
    ones = torch.ones(3, 40, dtype=dtype, device=triton_device)
    y, _, dx, _, dweight = results(ours(), x.to(triton_device), ones[0], None, ones, None)
    assert torch.allclose(y.float(), x.float().sign() if size < 1e19 else torch.zeros(3, 40), atol=1e-2)
    assert torch.isfinite(dx).all() and torch.isfinite(dweight).all() and bool((dx.abs() <= 3 / size).all())


def test_nan_poisons_its_own_row_alone(triton_device, generator):
    x, weight, r, dy, ds = inputs(40, 50, generator, device=triton_device)  # one tile of 32 rows holds the row and its neighbours
    x[7, 3] = torch.nan
    y, s, dx, _, _ = results(ours(), x, weight, r, dy, ds)
    alone = [i == 7 for i in range(40)]
    assert torch.isnan(y).any(1).tolist() == alone and torch.isnan(dx).any(1).tolist() == alone and int(torch.isnan(s).sum()) == 1


def test_a_row_has_the_same_bits_wherever_it_stands(triton_device, generator):
    tensors = inputs(130, 97, generator, device=triton_device)
    whole = results(ours(), *tensors)
    order = torch.randperm(130, generator=generator)
    for rows in (torch.arange(0, 1), torch.arange(129, 130), torch.arange(60, 67), order):
        x, weight, r, dy, ds = tensors
        part = results(ours(), *(t if t is weight else t[rows.to(t.device)] for t in tensors))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part[:4], whole[:4], strict=True))


def test_more_rows_than_a_grid_dimension_holds(triton_device, within_rule, generator):
    T = 65_537 * 3 if triton_device.type == "cuda" else 65_537  # 65,535 is the limit of the grid's y and z
    tensors = inputs(T, 2, generator, device=triton_device)
    got, plain = results(ours(), *tensors), results(lambda x, w, r: formula(x, w, r, 1e-6), *tensors)
    for name, a, b, c in zip(NAMES, got, plain, oracle(*tensors), strict=True):
        within_rule(a, b, c.cpu(), name)


def test_the_grid_of_many_long_rows_is_one_dimensional(launches):
    x = torch.empty(1, 4096).expand(70_000, 4096)
    module.rmsnorm_triton(x, torch.ones(4096), 1e-6)
    assert launches.grids == [(70_000,)]


def test_offsets_beyond_two_to_the_31_elements(triton_device, generator):
    """Three rows 1.5 2^30 elements apart in memory that is never touched but for those rows: row 2 starts at element 3 2^30 > 2^31."""
    stride, D = 3 << 29, 40
    if triton_device.type == "cuda":
        memory = torch.empty(4 << 30, dtype=torch.float16, device="cuda")
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
    far = [memory.as_strided((3, D), (stride, 1), i * D) for i in range(4)]  # x, residual, dy, ds side by side
    near = [torch.randn(3, D, generator=generator).to(triton_device, torch.float16) for _ in far]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    weight = torch.rand(D, generator=generator).to(triton_device, torch.float16)

    def run(x, r, dy, ds):
        return results(ours(), x, weight, r, dy, ds)

    assert all(torch.equal(a, b) for a, b in zip(run(*far), run(*near), strict=True))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("case", module.ahead_of_time(), ids=lambda case: case.name)
def test_compiled_offsets_of_rows_are_products_of_64_bits(case):
    """Also for what the kernels write, which no view can place beyond 2^31 elements.  32 bits are left to column numbers, which stay below D."""
    products = re.findall(r"arith\.muli .* : (\S+)", case.compile(90).asm["ttir"])
    narrow = [kind for kind in products if "i64" not in kind]
    assert products and len(narrow) == {"sum_partials_kernel": 1, "rmsnorm_long_dweight_kernel": 1}.get(case.kernel.__name__, 0), products


def test_no_number_of_rows_compiles_anew(launches, generator):
    weight = torch.ones(48, requires_grad=True)
    for n in range(1, 51):
        x = torch.randn(n, 48, generator=generator).requires_grad_()
        y, s = module.rmsnorm_triton(x, weight, 1e-6 * n, torch.randn(n, 48, generator=generator))
        (y + s).backward(torch.ones(n, 48))
    assert sorted(name for name, *_ in launches.keys) == ["rmsnorm_bwd_kernel", "rmsnorm_fwd_kernel", "sum_partials_kernel"], launches.keys
    module.rmsnorm_triton(torch.ones(3, 47), torch.ones(47), 1e-6)  # another width does: the count can rise
    assert len(launches.keys) == 4


def test_refuses_fp64(triton_device):
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        rmsnorm(torch.ones(2, 4, device=triton_device).double(), torch.ones(4, device=triton_device), backend="triton")
