"""linear in Triton against fp64, and its promise: the bits of a row follow from that row and the weights alone.

The interpreter's tiles are 16 x 16 x 16; with K a multiple of 8 (fp16) or 4 (fp32) the operands come through tensor descriptors, else through masked
pointers.
"""

import pytest
import torch

from athanor.kernels import linear, strict_mode

pytest.importorskip("triton")
from athanor.kernels import linear_triton as module  # noqa: E402
from athanor.kernels.linear_triton import HOPPER, linear_triton, operands, tiles_of  # noqa: E402

inf, nan = torch.inf, torch.nan
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# T, K, N: one row; whole tiles; odd; one above a tile in each direction; nothing
SIZES = [(1, 16, 7), (32, 32, 48), (19, 37, 5), (17, 17, 17), (0, 16, 5)]


def inputs(T, K, N, generator, dtype=torch.float32, device="cpu"):
    """x, weight, bias.  Random signs and sizes, so that another order of a sum gives other bits."""
    return [torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in ((T, K), (N, K), (N,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("T, K, N", SIZES)
def test_errs_no_more_than_pytorchs(T, K, N, with_bias, dtype, triton_device, within_rule, generator):
    dy = torch.randn(T, N, generator=generator).to(dtype)

    def differentiated(function, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        y = function(*leaves)
        return [x.detach().cpu() for x in (y, *torch.autograd.grad(y, leaves, dy.to(y)))]

    leaves = inputs(T, K, N, generator, dtype)[: 2 + with_bias]
    got = differentiated(lambda *x: linear(*x, backend="triton"), [x.to(triton_device) for x in leaves])
    plain = differentiated(torch.nn.functional.linear, leaves)
    oracle = differentiated(torch.nn.functional.linear, [x.double() for x in leaves])
    for a, b, c, what in zip(got, plain, oracle, ("y", "dx", "dweight", "dbias"), strict=False):
        within_rule(a, b, c, what)


def parts_of(T, generator):
    """Rows of a call: 1, 7 and 64 from the start, the middle and the end, and all of them in random order."""
    pieces = [torch.arange(at, at + n) for n in (1, 7, 64) for at in (0, 13, T - n)]
    return [*pieces, torch.randperm(T, generator=generator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("T, K, N", [(150, 40, 21), (150, 37, 21), (4097, 16, 5)])  # descriptors, pointers, many rows
def test_a_row_has_the_same_bits_in_every_call(T, K, N, dtype, triton_device, rowwise_products, generator):
    if triton_device.type == "cuda":
        K, N = 100 * K, 100 * N
    x, weight, bias = inputs(T, K, N, generator, dtype, triton_device)
    whole = linear(x, weight, bias, backend="triton")
    for rows in parts_of(T, generator):
        assert torch.equal(linear(x[rows.to(x.device)], weight, bias, backend="triton"), whole[rows.to(x.device)]), len(rows)
    assert torch.equal(linear(x, weight, bias, backend="triton"), whole)


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_broken_row_breaks_itself_alone(bad, triton_device, rowwise_products, generator):
    x, weight, bias = inputs(40, 24, 21, generator, device=triton_device)
    want = linear(x, weight, bias, backend="triton")
    x[[3, 17]] = bad
    got, others = linear(x, weight, bias, backend="triton"), [i for i in range(40) if i not in (3, 17)]
    assert torch.equal(got[others], want[others]) and not torch.isfinite(got[[3, 17]]).any()


@pytest.mark.parametrize("K", [24, 21])
def test_what_lies_around_the_operands_has_no_influence(K, triton_device, rowwise_products, generator):
    x, weight, bias = inputs(19, K, 21, generator, device=triton_device)
    want = linear(x, weight, bias, backend="triton")
    for shift in (0, 1):  # aligned views and others
        wide_x, wide_w = (torch.full((len(t) + 5, 44), nan, device=triton_device) for t in (x, weight))
        wide_b = torch.full((40,), nan, device=triton_device)
        views = wide_x[:19, shift : shift + K], wide_w[:21, shift : shift + K], wide_b[shift : shift + 21]
        for view, t in zip(views, (x, weight, bias), strict=True):
            view.copy_(t)
        assert torch.equal(linear(*views, backend="triton"), want)
    assert torch.equal(linear(x.T.contiguous().T, weight, bias, backend="triton"), want)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_descriptors_and_pointers_give_equal_bits(dtype, triton_device, rowwise_products, generator):
    x, weight, bias = inputs(35, 40, 37, generator, dtype, triton_device)
    assert operands(x, weight, tiles_of(x, 37))["DESCRIPTORS"] == (triton_device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
    odd = torch.full((35, 43), nan, dtype=dtype, device=triton_device)[:, 1:41].copy_(x)
    assert not operands(odd, weight, tiles_of(x, 37))["DESCRIPTORS"]
    assert torch.equal(linear(odd, weight, bias, backend="triton"), linear(x, weight, bias, backend="triton"))


def test_one_operand_may_need_no_gradient(triton_device, generator):
    leaves = inputs(18, 16, 20, generator, device=triton_device)
    dy = torch.randn(18, 20, generator=generator).to(triton_device)

    def grads(*wanted):
        mine = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        return torch.autograd.grad(linear(*mine, backend="triton"), [mine[i] for i in wanted], dy)

    every = grads(0, 1, 2)
    assert all(torch.equal(grads(i)[0], every[i]) for i in range(3))


def test_neither_batches_nor_where_they_lie_compile_anew(launches):
    weight, bias, flat = torch.zeros(64, 32), torch.zeros(81), torch.zeros(200 * 32)
    for T in range(1, 51):
        linear_triton(flat[32 * (T % 4) :][: 32 * T].view(T, 32), weight, bias[T % 17 :][:64], flat.dtype)
    assert [name for name, *_ in launches.keys] == ["linear_fwd_kernel"]
    linear_triton(flat[: 32 * 5].view(5, 32), weight, None, flat.dtype)
    assert len(launches.keys) == 2  # a layer without bias is another kernel


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 65, 300])
@pytest.mark.parametrize("K, N", [(40, 37), (4096, 4096), (1000, 6144)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_tiles_give_the_same_bits(T, K, N, dtype, generator, monkeypatch):
    """One of them serves a decode step, another the training batch."""
    x, weight, bias = (t.cuda() for t in inputs(T, K, N, generator, dtype))
    results = []
    for tiles in HOPPER.values():
        monkeypatch.setattr(module, "HOPPER", dict.fromkeys(HOPPER, tiles))
        results.append(linear(x, weight, bias, backend="triton"))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.gpu
def test_strict_mode_serves_by_the_kernel():
    x, weight, bias = (t.cuda() for t in inputs(4097, 4096, 4096, torch.Generator().manual_seed(3), torch.bfloat16))
    with strict_mode():
        whole, alone = linear(x, weight, bias), linear(x[5:6], weight, bias)
        assert torch.equal(alone, whole[5:6]) and torch.equal(whole, linear(x, weight, bias, backend="triton"))
        with pytest.raises(ValueError, match="backend 'reference' cannot serve this call: strict mode is on"):
            linear(x, weight, bias, backend="reference")
        with pytest.raises(ValueError, match="no backend can serve this call in strict mode"):
            linear(x.double(), weight.double())
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.gpu
def test_outputs_beyond_two_to_the_31_elements():
    x, weight, _ = inputs(131073, 16, 16400, torch.Generator().manual_seed(3), torch.bfloat16, "cuda")
    y = linear(x, weight, backend="triton")
    assert torch.equal(y[-70:], linear(x[-70:], weight, backend="triton")) and torch.equal(y[:70], linear(x[:70], weight, backend="triton"))


def test_refuses_what_it_cannot_serve(triton_device):
    x = torch.ones(3, 4, device=triton_device)
    for args, reason in (((x.double(), x.double()), "fp64 is the reference's"), ((x.int(), x.int()), "x is torch.int32; the kernel takes"),
                         ((x, torch.ones(4, 5, device=triton_device).T), "the numbers of a row of weight are not neighbours in memory"),
                         ((x[:, :0], x[:, :0]), r"weight is \(3, 0\), which leaves nothing to multiply")):  # fmt: skip
        with pytest.raises(ValueError, match=f"linear: backend 'triton' cannot serve this call: .*{reason}"):
            linear(*args, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_fp32_sums_come_out_unrounded_and_row_by_row(dtype, triton_device, rowwise_products, generator):
    x, weight, _ = inputs(150, 40, 21, generator, dtype, triton_device)
    y = linear(x, weight, out_dtype=torch.float32, backend="triton")
    oracle = x.double() @ weight.double().T
    assert y.dtype == torch.float32 and (y.double() - oracle).abs().max() < 1e-5 * oracle.abs().max()
    assert torch.equal(y.to(dtype), linear(x, weight, backend="triton"))
    assert torch.equal(linear(x[13:20], weight, out_dtype=torch.float32, backend="triton"), y[13:20])
