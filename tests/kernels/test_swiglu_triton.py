"""swiglu in Triton against the formula in fp64, and what only a kernel can get wrong: tiles, strides, offsets, recompilation."""

import mmap
import os
import re

import pytest
import torch

from athanor.kernels import swiglu

pytest.importorskip("triton")

from athanor.kernels import swiglu_triton as module  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# one row and one column; both odd; one more than a tile is wide; tiles of several rows, the last not full; no row; no column
SIZES = [(1, 1), (33, 257), (3, 2049), (130, 96), (0, 64), (5, 0)]


def plain(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up  # the formula's exp overflows in fp16


def oracle(x, dy):
    """Values and gradients in fp64, the gradient written out."""
    (gate, up), dy = x.double().chunk(2, -1), dy.double()
    s = 1 / (1 + torch.exp(-gate))
    return gate * s * up, torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), -1)


def results(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach().cpu(), torch.autograd.grad(y, x, dy)[0].cpu()


def ours(x):
    return swiglu(x, backend="triton")


def inputs(T, F, generator, dtype=torch.float32, device="cpu"):
    return (3 * torch.randn(T, 2 * F, generator=generator)).to(device, dtype), torch.randn(T, F, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("T, F", SIZES)
def test_errs_no_more_than_the_formula(T, F, dtype, triton_device, within_rule, generator):
    x, dy = inputs(T, F, generator, dtype, triton_device)
    for name, a, b, c in zip(("y", "dx"), results(ours, x, dy), results(plain, x, dy), oracle(x.cpu(), dy.cpu()), strict=True):
        within_rule(a, b, c, name)


@pytest.mark.gpu
def test_production_size(within_rule, generator):
    x, dy = inputs(515, 12288, generator, torch.bfloat16, "cuda")
    for name, a, b, c in zip(("y", "dx"), results(ours, x, dy), results(plain, x, dy), oracle(x.cpu(), dy.cpu()), strict=True):
        within_rule(a, b, c, name)


def test_extreme_gates(triton_device):
    x = torch.tensor([[-1e4, 1e4, -88.0, -104.0, 88.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device=triton_device)
    y, dx = results(ours, x, torch.ones(1, 5, device=triton_device))
    want = oracle(x.cpu(), torch.ones(1, 5))
    assert torch.equal(y[0, :2], torch.tensor([0.0, 3e4])) and torch.isfinite(dx).all()
    assert torch.allclose(y.double(), want[0], rtol=2e-5, atol=1e-36) and torch.allclose(dx.double(), want[1], rtol=2e-5, atol=1e-35)


@pytest.mark.gpu
def test_largest_bf16_values(generator):
    big = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[big, -big, 1.0, 1.0, 0.5, big]], device="cuda", dtype=torch.bfloat16)
    y, dx = results(ours, x, torch.ones(1, 3, device="cuda", dtype=torch.bfloat16))
    assert y[0, 0] == big and y[0, 1] == 0 and torch.isfinite(y).all() and torch.isfinite(dx[0, [0, 1, 3, 4]]).all()


@pytest.mark.parametrize("layout", ["row step", "columns of a wider matrix", "transposed", "expanded", "every second column"])
def test_any_layout_gives_the_result_of_its_copy(layout, triton_device, generator):
    def made(T, n):
        return {
            "row step": lambda: torch.randn(2 * T, n, generator=generator)[::2],
            "columns of a wider matrix": lambda: torch.randn(T, n + 7, generator=generator)[:, 3 : n + 3],
            "transposed": lambda: torch.randn(n, T, generator=generator).T,
            "expanded": lambda: torch.randn(1, n, generator=generator).expand(T, n),
            "every second column": lambda: torch.randn(T, 2 * n, generator=generator)[:, ::2],
        }[layout]()

    x, dy = made(6, 20).to(triton_device), made(6, 10).to(triton_device)
    for a, b in zip(results(ours, x, dy), results(ours, x.contiguous(), dy.contiguous()), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
    if layout in ("row step", "columns of a wider matrix"):
        assert module.neighbours(x)[0] is x  # read in place
    x.requires_grad_()
    ours(x).sum().backward()  # a gradient of stride 0
    assert torch.allclose(x.grad.double().cpu(), oracle(x.detach().cpu(), torch.ones(6, 10))[1], atol=1e-5)


def test_upstream_gradient_scales(triton_device, generator):
    x, dy = inputs(6, 20, generator, device=triton_device)
    assert torch.equal(4 * results(ours, x, dy)[1], results(ours, x, 4 * dy)[1])


def test_nan_poisons_its_own_element_alone(triton_device, generator):
    x, dy = inputs(40, 30, generator, device=triton_device)
    x[7, 3] = torch.nan
    y, dx = results(ours, x, dy)
    assert torch.isnan(y).nonzero().tolist() == [[7, 3]] and torch.isnan(dx).nonzero().tolist() == [[7, 3], [7, 33]]


def test_a_row_has_the_same_bits_wherever_it_stands(triton_device, generator):
    x, dy = inputs(130, 97, generator, device=triton_device)
    whole = results(ours, x, dy)
    for rows in (torch.arange(0, 1), torch.arange(129, 130), torch.arange(60, 67), torch.randperm(130, generator=generator)):
        part = results(ours, x[rows.to(x.device)], dy[rows.to(x.device)])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results(ours, x, dy), whole, strict=True))  # and repeats bit for bit


def test_more_rows_than_a_grid_dimension_holds(triton_device, within_rule, generator):
    x, dy = inputs(65_537 * (128 if triton_device.type == "cuda" else 1), 1, generator, device=triton_device)
    for name, a, b, c in zip(("y", "dx"), results(ours, x, dy), results(plain, x, dy), oracle(x.cpu(), dy.cpu()), strict=True):
        within_rule(a, b, c, name)


def test_the_grid_of_many_wide_rows_is_one_dimensional(launches):
    module.swiglu_triton(torch.empty(1, 8200).expand(70_000, 8200))
    assert launches.grids == [(70_000 * 3,)]  # 4100 columns are three tiles


def test_offsets_beyond_two_to_the_31_elements(triton_device, generator):
    """Three rows 1.5 2^30 elements apart in memory that is never touched but for those rows: row 2 starts at element 3 2^30 > 2^31."""
    stride, F = 3 << 29, 20
    if triton_device.type == "cuda":
        memory = torch.empty(4 << 30, dtype=torch.float16, device="cuda")
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
    near = inputs(3, F, generator, torch.float16, triton_device)
    far = [memory.as_strided(t.shape, (stride, 1), at) for t, at in zip(near, (0, 2 * F), strict=True)]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    assert all(torch.equal(a, b) for a, b in zip(results(ours, *far), results(ours, *near), strict=True))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("case", module.ahead_of_time(), ids=lambda case: case.name)
def test_compiled_offsets_of_rows_are_products_of_64_bits(case):
    """Also for what the kernels write, which no view can place beyond 2^31 elements.  32 bits are left to the first column of a tile, below F."""
    products = re.findall(r"arith\.muli .* : (\S+)", case.compile(90).asm["ttir"])
    assert sum("i64" in kind for kind in products) >= 2 and [kind for kind in products if "i64" not in kind] == ["i32"], products


def test_no_number_of_rows_compiles_anew(launches, generator):
    for n in range(1, 51):
        x, dy = inputs(n, 48, generator)
        module.swiglu_triton(x.requires_grad_()).backward(dy)
    assert sorted(name for name, *_ in launches.keys) == ["swiglu_bwd_kernel", "swiglu_fwd_kernel"], launches.keys
    module.swiglu_triton(torch.ones(3, 2 * 47))  # another width does: the count can rise
    assert len(launches.keys) == 3


def test_refuses_fp64(triton_device):
    with pytest.raises(ValueError, match="fp64 is the reference's"):
        swiglu(torch.ones(2, 4, device=triton_device).double(), backend="triton")
