"""The producers of FP8 operands in Triton: the bits of the two kernels after each other."""

import math

import pytest
import torch

from athanor.kernels import (
    fp8_grouped_gemm,
    fp8_mixture,
    fp8_permute,
    fp8_quantize,
    fp8_rmsnorm,
    fp8_swiglu,
    fp8_swiglu_backward,
    moe_permute,
    moe_places,
    moe_unpermute,
    rmsnorm,
    swiglu,
)

pytest.importorskip("triton")
from athanor.kernels import fp8_producers_triton as module  # noqa: E402

# T, width, columns, wide, power_of_two, dtype: one number; odd; more than a tile of 128 x 128 each way.  bf16 on a GPU alone: the interpreter's casts
# truncate
CASES = [(1, 1, True, False, True, torch.float32), (37, 150, False, False, True, torch.float32), (130, 130, True, True, False, torch.float16),
         *(pytest.param(T, 768, *asked, torch.bfloat16, marks=pytest.mark.gpu) for T in (130, 1000)
           for asked in ((False, False, True), (False, True, True), (True, False, True), (True, True, False)))]  # fmt: skip


def same(produced, y, power_of_two):
    """Equal bits to what quantising y gives; one NaN is as good as another."""
    for got, block in ((produced.rows, (1, 128)), (produced.columns, (128, 1))):
        if got is None:
            continue
        want = fp8_quantize(y, block=block, power_of_two=power_of_two, backend="triton")
        a, b = (t.q.view(torch.uint8).clone() for t in (got, want))
        for codes in (a, b):
            codes[codes & 0x7F == 0x7F] = 0x7F
        assert torch.equal(a, b) and got.q.stride() == want.q.stride() and got.scales.stride() == want.scales.stride()
        assert torch.equal(got.scales.nan_to_num(nan=999), want.scales.nan_to_num(nan=999))
    if produced.wide is not None:
        assert torch.equal(produced.wide.nan_to_num(nan=999), y.nan_to_num(nan=999))


def numbers(generator, *shape, dtype=torch.float32):
    """Rows of different sizes, zeros, a NaN, an infinity, and more than 448 times the smallest in a row."""
    x = torch.randn(*shape, generator=generator) * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))
    if shape[0] > 4:
        x[1::7] = 0
        x[2, 3], x[-1, -1], x[4, :2] = math.nan, math.inf, torch.tensor([1e4, 1e-4])
    return x.to(dtype)


@pytest.mark.parametrize("T, F, columns, wide, power_of_two, dtype", CASES)
def test_swiglu_and_its_gradient(T, F, dtype, columns, wide, power_of_two, triton_device, poisoned, generator):
    gate_up, dy = numbers(generator, T, 2 * F, dtype=dtype).to(triton_device), numbers(generator, T, F, dtype=dtype).to(triton_device)
    asked = dict(columns=columns, wide=wide, power_of_two=power_of_two, backend="triton")
    leaf = gate_up.clone().requires_grad_()
    y = swiglu(leaf, backend="triton")
    same(fp8_swiglu(gate_up, **asked), y.detach(), power_of_two)
    same(fp8_swiglu_backward(gate_up, dy, **asked), torch.autograd.grad(y, leaf, dy)[0], power_of_two)


@pytest.mark.parametrize("T, D, columns, wide, power_of_two, dtype", CASES)
def test_rows_to_their_experts(T, D, dtype, columns, wide, power_of_two, triton_device, poisoned, generator):
    k, E = 2, 3
    ids = torch.randint(-1, E, (T, k), generator=generator, dtype=torch.int32).to(triton_device)
    x, weights = numbers(generator, T, D, dtype=dtype).to(triton_device), torch.rand(T, k, generator=generator).to(triton_device)
    asked = dict(columns=columns, wide=wide, power_of_two=power_of_two, backend="triton")
    rows, places = moe_permute(x, ids, E, align=16, backend="triton")
    same(fp8_permute(x, places, **asked), rows, power_of_two)
    cut = places._replace(source=places.source[: int(places.offsets[-1])])
    same(fp8_permute(x, cut, **asked), rows[: len(cut.source)], power_of_two)
    y = torch.zeros(rows.shape, dtype=dtype, device=triton_device, requires_grad=True)
    dy = torch.autograd.grad(moe_unpermute(y, weights, places, backend="triton"), y, x)[0]
    same(fp8_permute(x, places, weights=weights, **asked), dy, power_of_two)


@pytest.mark.parametrize("T, D, wide, power_of_two, dtype", [
    (1, 1, True, True, torch.float32), (5, 300, False, True, torch.float32), (9, 128, True, False, torch.float16),
    pytest.param(2, 8200, True, True, torch.float32, marks=pytest.mark.slow),  # walked in steps
    *(pytest.param(300, D, True, True, torch.bfloat16, marks=pytest.mark.gpu) for D in (768, 7168, 16384)),
])  # fmt: skip
def test_rmsnorm(T, D, dtype, wide, power_of_two, triton_device, poisoned, generator):
    x, residual = (torch.randn(T, D, generator=generator).to(dtype).to(triton_device) for _ in range(2))
    w = torch.randn(D, generator=generator).to(dtype).to(triton_device)
    if T > 4:
        x[2, 3], x[1] = math.nan, 0
    same(fp8_rmsnorm(x, w, wide=wide, power_of_two=power_of_two, backend="triton"), rmsnorm(x, w, backend="triton"), power_of_two)
    produced, s = fp8_rmsnorm(x, w, residual=residual, wide=wide, power_of_two=power_of_two, backend="triton")
    y, want = rmsnorm(x, w, residual=residual, backend="triton")
    same(produced, y, power_of_two)
    assert torch.equal(s.nan_to_num(nan=999), want.nan_to_num(nan=999))


def test_what_lies_around_has_no_influence(triton_device, padded, generator):
    gate_up, dy, x, w = torch.randn(5, 40, generator=generator), torch.randn(5, 20, generator=generator), torch.randn(5, 40), torch.randn(40)
    places = moe_places(torch.randint(0, 3, (5, 2), generator=generator, dtype=torch.int32).to(triton_device), 3, backend="triton")
    at = lambda t: t.to(triton_device)  # noqa: E731
    strided = lambda t: padded(t).to(triton_device)  # noqa: E731
    for call in (lambda of: fp8_swiglu(of(gate_up), columns=True, backend="triton"), lambda of: fp8_permute(of(x), places, backend="triton"),
                 lambda of: fp8_swiglu_backward(of(gate_up), of(dy), columns=True, backend="triton"),
                 lambda of: fp8_rmsnorm(of(x), at(w), backend="triton")):  # fmt: skip
        for a, b in zip(call(strided), call(at), strict=True):
            assert (a is None and b is None) or (torch.equal(a.q.view(torch.uint8), b.q.view(torch.uint8)) and torch.equal(a.scales, b.scales))


@pytest.mark.slow
@pytest.mark.parametrize("wgrad", ["bf16", "fp8"])
def test_the_mixture_has_the_bits_of_separate_kernels(wgrad, triton_device, generator):
    dtype = torch.float32 if triton_device.type == "cpu" else torch.bfloat16
    T, D, F, k, E = 20, 48, 32, 2, 3
    ids = torch.randint(-1, E, (T, k), generator=generator, dtype=torch.int32).to(triton_device)
    tensors = [torch.randn(*shape, generator=generator).to(dtype).to(triton_device) for shape in ((T, D), (T, k), (E, 2 * F, D), (E, D, F), (T, D))]

    def separate(x, weights, gate_up, down):
        rows, places = moe_permute(x, ids, E, align=128, backend="triton")
        options = dict(wgrad=wgrad, backend="triton")
        a = swiglu(fp8_grouped_gemm(rows, gate_up, places.offsets, **options), backend="triton")
        return moe_unpermute(fp8_grouped_gemm(a, down, places.offsets, **options), weights, places, backend="triton")

    def joined(x, weights, gate_up, down):
        return fp8_mixture(x, weights, moe_places(ids, E, align=128, backend="triton"), gate_up, down, wgrad=wgrad, backend="triton")

    results = []
    for function in (separate, joined):
        leaves = [t.clone().requires_grad_() for t in tensors[:4]]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, tensors[4])])
    assert all(torch.equal(a, b) and b.abs().sum() > 0 for a, b in zip(*results, strict=True))


def test_neither_lengths_nor_addresses_compile_anew(launches):
    flat = torch.zeros(400 * 256)
    for R in range(1, 36):
        module.fp8_swiglu_triton(flat[: 256 * R].view(R, 256), False, False, True)
        module.fp8_permute_triton(flat[: 256 * R].view(R, 256), torch.zeros(R + 9, dtype=torch.int32)[R % 9 :], None, 2, False, False, True)
        module.fp8_rmsnorm_triton(flat[: 256 * R].view(R, 256), flat[:256], 1e-6, None, False, True)
    assert len(launches.keys) == 3, launches.keys


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    T, D, k = 300032, 1024, 8  # 2.46e9 numbers of the result
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    places = moe_places(torch.arange(T, device="cuda", dtype=torch.int32)[:, None].expand(T, k).contiguous() % 16, 16)
    got = fp8_permute(x, places, columns=True, backend="triton")
    last = places.source[-128:].long()
    same(type(got)(type(got.rows)(got.rows.q[-128:], got.rows.scales[-128:]), None, None), x[last // k], True)
