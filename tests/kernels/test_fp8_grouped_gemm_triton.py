"""The FP8 grouped products in Triton, and on a Hopper those in Gluon ("cuda"), against fp64 products of the dequantised operands, element by element.

Rows, columns and scale blocks all have different sizes, so that a scale in the wrong place is an error of the size of the result: a test shows that
the bound would notice.  The interpreter's tiles are 16 x 16, on a GPU 128 x 128 or 128 x 256; a step of the sum is always a scale block of 128.
"""

import pytest
import torch

from athanor.kernels import Quantized, fp8_grouped_gemm, fp8_grouped_matmul, fp8_grouped_wgrad, fp8_quantize, fp8_quantize_dual, strict_mode
from athanor.kernels._dispatch import OPS
from athanor.kernels.fp8_quantize import dequantize

pytest.importorskip("triton")
from athanor.kernels import fp8_grouped_gemm_few_hopper_triton as few  # noqa: E402
from athanor.kernels import fp8_grouped_gemm_triton as module  # noqa: E402

nan = torch.nan
# tokens per expert, rows of none, N, K: around a tile of the interpreter, three scale blocks, the last smaller; one expert with all; nobody; the
# smallest N; rows that are no multiple of 16 bytes
CASES = [([0, 1, 15, 16, 17], 7, 144, 272), ([0, 40, 0], 0, 16, 128), ([0, 0], 5, 16, 128), ([20], 0, 17, 130)]
ON_GPU = [([0, 1, 127, 128, 129], 60, 272, 400), ([0, 700, 0], 3, 2048, 7168), ([64] * 9, 0, 1536, 2048), ([3], 0, 16, 128), ([300, 20], 0, 384, 512),
          # few rows: tiles of 16, 32 and 64 tokens
          ([5] * 128, 0, 1536, 2048), ([0, 1, 7, 8, 9, 16, 17, 40], 3, 272, 400), ([30, 0, 64, 65, 1], 2, 768, 640)]  # fmt: skip
SIZES = CASES + [pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU]


@pytest.fixture(params=["triton", "cuda", "cuda for many rows"])
def backend(request, triton_device):
    """cuda chooses by the number of rows, which are few in most of these tests; in strict mode it takes the kernel for many."""
    name, _, many = request.param.partition(" ")
    if name == "cuda" and (triton_device.type == "cpu" or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("needs a Hopper")
    with strict_mode(bool(many)):
        yield name


def sized(generator, *shape):
    """Each row of its own size."""
    return torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))


def operands(sizes, outside, N, K, generator, power_of_two=True):
    """x and w quantised, offsets, all on the CPU."""
    T = sum(sizes) + outside
    of_blocks = lambda n: torch.exp(torch.randn(-(-n // 128), generator=generator)).repeat_interleave(128)[:n]  # noqa: E731
    x, w = sized(generator, T, K) * of_blocks(K), sized(generator, len(sizes), N, K) * of_blocks(N)[:, None] * of_blocks(K) / K**0.5
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return fp8_quantize(x, power_of_two=power_of_two), fp8_quantize_dual(w, block=(128, 128), power_of_two=power_of_two)[0], offsets


def moved(quantized, device):
    """To a device with the strides kept."""
    q, scales = quantized
    if device.type == "cpu":
        return quantized
    place = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)  # noqa: E731
    return Quantized(place(q.view(torch.uint8)).view(q.dtype), place(scales))


def near(got, x, w, offsets):
    """Which elements lie within the bound; the products' own sums bound what the tensor core's fewer bits may cost."""
    a, b = dequantize(x, (1, 128), torch.float64), dequantize(w, (128, 128), torch.float64)
    ends = offsets.tolist()
    groups = [(i, j, t) for i, j, t in zip(ends, ends[1:], b, strict=False)]
    want = torch.cat([a[i:j] @ t.T for i, j, t in groups])
    products = torch.cat([a[i:j].abs() @ t.abs().T for i, j, t in groups])
    got = got[: ends[-1]].cpu()
    last = torch.finfo(got.dtype).eps
    # half an ulp of the result, and 2^-13 (GPU) of each product: fp32 sums, under the interpreter, lose 2^-24 of each partial sum
    return (got.double() - want).abs() <= last * want.abs() + (2.0**-12 if last > 1e-6 else 2.0**-20) * products


def out_dtype(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16  # the interpreter's casts to bf16 truncate


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("sizes, outside, N, K", SIZES)
def test_every_element_is_near(sizes, outside, N, K, power_of_two, backend, triton_device, poisoned, generator):
    x, w, offsets = operands(sizes, outside, N, K, generator, power_of_two)
    if backend == "cuda" and K % 16:
        pytest.skip("rows of 16 bytes")
    call = moved(x, triton_device), moved(w, triton_device), offsets.to(triton_device)
    y = fp8_grouped_matmul(*call, out_dtype=out_dtype(triton_device), backend=backend)
    assert y.shape == (sum(sizes) + outside, N) and near(y, x, w, offsets).all() and not y[sum(sizes) :].any()
    assert torch.equal(y, fp8_grouped_matmul(*call, out_dtype=out_dtype(triton_device), backend=backend))


def test_the_bound_notices_a_scale_in_the_wrong_place(generator):
    x, w, offsets = operands([40, 30], 0, 256, 256, generator)
    y = fp8_grouped_matmul(x, w, offsets, out_dtype=torch.float32, backend="reference")
    assert near(y, x, w, offsets).all()
    for scales in (w.scales.mT, w.scales.roll(1, 0), w.scales.roll(1, 2)):
        assert near(fp8_grouped_matmul(x, Quantized(w.q, scales), offsets, backend="reference"), x, w, offsets).double().mean() < 0.9
    for scales in (x.scales.roll(1, 0), x.scales.roll(1, 1)):
        assert near(fp8_grouped_matmul(Quantized(x.q, scales), w, offsets, backend="reference"), x, w, offsets).double().mean() < 0.9


def test_transposed_weights_give_the_product_with_their_columns(backend, triton_device, generator):
    """What dx takes: the columns of w, and the same scales by their strides."""
    _, _, offsets = operands([3, 0, 18], 0, 16, 16, generator)
    dy, w = fp8_quantize(sized(generator, 21, 272)), sized(generator, 3, 272, 144)
    columns = fp8_quantize_dual(w, block=(128, 128))[1]
    turned = Quantized(columns.q.mT, columns.scales.mT)
    call = moved(dy, triton_device), moved(turned, triton_device), offsets.to(triton_device)
    assert near(fp8_grouped_matmul(*call, out_dtype=out_dtype(triton_device), backend=backend), dy, turned, offsets).all()


def test_other_rows_have_no_influence(backend, triton_device, generator):
    (q, scales), w, offsets = operands([5, 0, 18, 3], 9, 32, 256, generator)
    call = lambda: (moved(Quantized(q, scales), triton_device), moved(w, triton_device), offsets.to(triton_device))  # noqa: E731
    options = dict(out_dtype=out_dtype(triton_device), backend=backend)
    want = fp8_grouped_matmul(*call(), **options)
    q.view(torch.uint8)[26:], scales[26:] = 0x7F, nan  # none's rows
    scales[24] = nan  # and one of the last expert
    w.scales[1] = nan  # the expert without tokens
    got = fp8_grouped_matmul(*call(), **options)
    same = [t for t in range(35) if t != 24]
    assert torch.equal(got[same], want[same]) and got[24].isnan().all()


def test_rows_that_are_not_asked_for_are_not_touched(backend, triton_device, generator):
    x, w, offsets = operands([5, 0, 18, 3], 9, 32, 256, generator)
    call = moved(x, triton_device), moved(w, triton_device), offsets.to(triton_device)
    want = fp8_grouped_matmul(*call, out_dtype=out_dtype(triton_device), backend=backend)
    wide = torch.full((40, 48), 7.0, device=triton_device, dtype=out_dtype(triton_device))
    fp8_grouped_matmul(*call, out=wide[2:37, 8:40], backend=backend)
    assert torch.equal(wide[2:28, 8:40], want[:26])
    wide[2:28, 8:40] = 7.0
    assert (wide == 7.0).all()


def test_both_forms_of_offsets_give_equal_bits(backend, triton_device, generator):
    x, w, offsets = operands([5, 0, 18, 3], 9, 32, 256, generator)
    x, w = moved(x, triton_device), moved(w, triton_device)
    forms = [form.to(triton_device, kind) for form in (offsets, offsets[1:]) for kind in (torch.int32, torch.int64)]
    results = [fp8_grouped_matmul(x, w, form, out_dtype=out_dtype(triton_device), backend=backend) for form in forms]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_has_the_same_bits_in_every_call(backend, triton_device, rowwise_products, generator):
    x, w, offsets = operands([37, 0, 30], 0, 32, 256, generator)
    w = moved(w, triton_device)
    call = lambda rows, ends: fp8_grouped_matmul(  # noqa: E731
        moved(Quantized(x.q[rows], x.scales[rows]), triton_device), w, torch.tensor(ends, device=triton_device), out_dtype=out_dtype(triton_device),
        backend=backend)  # fmt: skip
    whole = call(slice(0, 67), offsets.tolist())
    assert torch.equal(call(slice(20, 50), [0, 17, 17, 30]), whole[20:50])


GROUPS = [([128, 0, 256], 128, 40, 24), ([0, 0], 128, 16, 16), ([0, 384], 0, 17, 33)]


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("sizes, outside, N, K", GROUPS + [pytest.param([128, 0, 1280], 0, 272, 400, marks=pytest.mark.gpu)])
def test_weight_gradient(sizes, outside, N, K, power_of_two, backend, triton_device, poisoned, generator):
    T = sum(sizes) + outside
    of_blocks = torch.exp(torch.randn(T // 128, 1, generator=generator)).repeat_interleave(128, 0)
    dy, x = (fp8_quantize(sized(generator, n, T).T * of_blocks, block=(128, 1), power_of_two=power_of_two) for n in (N, K))
    dy.q.view(torch.uint8)[sum(sizes) :], dy.scales[sum(sizes) // 128 :] = 0x7F, nan
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    if backend == "cuda" and K % 4:
        pytest.skip("scales at multiples of 16 bytes")
    call = lambda: fp8_grouped_wgrad(moved(dy, triton_device), moved(x, triton_device), offsets.to(triton_device), len(sizes),  # noqa: E731
                                     out_dtype=out_dtype(triton_device), backend=backend).cpu()  # fmt: skip
    got = call()
    assert torch.equal(got, call())
    a, b = dequantize(dy, (128, 1), torch.float64), dequantize(x, (128, 1), torch.float64)
    last = torch.finfo(got.dtype).eps
    for e, (i, j) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        want, products = a[i:j].T @ b[i:j], a[i:j].abs().T @ b[i:j].abs()
        assert ((got[e].double() - want).abs() <= last * want.abs() + (2.0**-12 if last > 1e-6 else 2.0**-20) * products).all()


@pytest.mark.parametrize("wgrad", ["bf16", "fp8"])
def test_the_layer_is_that_of_the_reference(wgrad, backend, triton_device, generator):
    dtype = out_dtype(triton_device)
    x, w, dy = (sized(generator, *shape).to(dtype) for shape in ((384, 144), (3, 48, 144), (384, 48)))
    offsets = torch.tensor([0, 128, 128, 384])

    def layer(backend, device):
        a, b = (t.to(device).requires_grad_() for t in (x, w))
        y = fp8_grouped_gemm(a, b, offsets.to(device), wgrad=wgrad, backend=backend)
        return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, (a, b), dy.to(device)))]

    for got, want in zip(layer(backend, triton_device), layer("reference", torch.device("cpu")), strict=True):
        assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-7) * want.abs().max()


def test_neither_lengths_nor_addresses_compile_anew(launches):
    w, ws = torch.zeros(3, 16, 256, dtype=torch.float8_e4m3fn), torch.zeros(3, 1, 2)
    flat, offsets = torch.zeros(100 * 256, dtype=torch.float8_e4m3fn), torch.zeros(90, dtype=torch.int32)
    for T in range(1, 51):
        scales = torch.zeros(2, -(-T // 4) * 4)[:, :T].T
        x = flat[256 * (T % 4) :][: 256 * T].view(T, 256)
        module.fp8_grouped_matmul_triton(x, scales, w, ws, offsets[T % 9 :][:3], None, torch.bfloat16)
    assert sorted(name for name, *_ in launches.keys) == ["fill_outside_kernel", "fp8_grouped_gemm_kernel", "tile_map_kernel"]


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers(backend):
    T, K = 1 << 21, 1040  # 2.18e9
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    a = fp8_quantize(x)
    w = fp8_quantize_dual(torch.randn(2, 128, K, device="cuda") / K**0.5, block=(128, 128))[0]
    offsets = torch.tensor([0, T - 100, T], device="cuda")
    y = fp8_grouped_matmul(a, w, offsets, backend=backend)
    part = Quantized(a.q[-300:].cpu(), a.scales[-300:].cpu())
    assert near(y[-300:], part, Quantized(w.q.cpu(), w.scales.cpu()), torch.tensor([0, 200, 300])).all()


@pytest.mark.gpu
def test_a_captured_call_follows_the_offsets_and_never_waits_for_the_device(backend, generator):
    x, w, offsets = operands([3, 200, 0, 57], 0, 272, 512, generator)
    device = torch.device("cuda")
    call, others = (moved(x, device), moved(w, device), offsets.cuda()), torch.tensor([0, 130, 130, 131, 250], device=device)
    fp8_grouped_matmul(*call, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fp8_grouped_matmul(*call, backend=backend)
        call[2].copy_(others)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, fp8_grouped_matmul(*call, backend=backend)) and near(y, x, w, others.cpu()).all() and not y[250:].any()


@pytest.mark.parametrize("rows, experts, columns", [(1024, 128, 16), (1025, 128, 32), (2048, 128, 32), (4096, 128, 64), (4097, 128, None)])
def test_tiles_follow_the_rows_that_experts_have_on_average(rows, experts, columns):
    assert few.columns_of(rows, experts) == columns


@pytest.mark.gpu
def test_auto_takes_the_hopper_kernel_on_a_hopper(generator):
    x, w, offsets = operands([3, 20], 0, 272, 512, generator)
    (q, s), (qw, sw) = (moved(t, torch.device("cuda")) for t in (x, w))
    call = dict(x=q, x_scales=s, w=qw, w_scales=sw, offsets=offsets.cuda(), out=None, out_dtype=torch.bfloat16)
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert OPS["fp8_grouped_gemm"].resolve(call)[0] == ("cuda" if hopper else "triton")
