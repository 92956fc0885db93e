"""fp8_quantize_many in Triton: the bits of fp8_quantize_dual for each matrix, through addresses in a table."""

import math

import pytest
import torch

from athanor.kernels import fp8_quantize_dual, fp8_quantize_many
from athanor.kernels.fp8_quantize_many import empty_copy

pytest.importorskip("triton")
from athanor.kernels import fp8_quantize_many_triton as module  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# One number; whole tiles; one more than a tile each way; odd, in a stack; nothing, in three ways; whole tiles again, behind the empty ones.
MATRICES = [((1, 1), FP32), ((256, 128), BF16), ((129, 129), FP32), ((3, 37, 300), BF16), ((0, 64), FP32), ((2, 5, 0), BF16), ((0, 8, 8), FP16),
            ((2, 128, 16), FP16)]  # fmt: skip


def numbers(shape, dtype, generator):
    """Matrices of different sizes; a tie, denormals of e4m3, a NaN of all ones, an infinity, a block of zeros, where there is room."""
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=generator))
    special = torch.tensor([0.0, -0.0, 448.0, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 17.0, 19.0])
    x.view(-1)[: min(x.numel(), len(special))] = special[: x.numel()]
    if shape == (129, 129):
        x[128, 7], x[5, 128], x[128, 128] = torch.tensor([-1], dtype=torch.int32).view(FP32), math.inf, 0.0
    if shape == (3, 37, 300):
        x[1, :, 128:256] = 0.0
    return x.to(dtype)


def same(copy, want):
    """Equal bits; one NaN is as good as another."""
    for got, wanted in zip(copy, want, strict=True):
        a, b = got.q.cpu().view(torch.uint8), wanted.q.view(torch.uint8)
        assert torch.equal(torch.where(a & 0x7F == 0x7F, 0x7F, a), torch.where(b & 0x7F == 0x7F, 0x7F, b))
        assert torch.equal(got.scales.cpu().nan_to_num(-1.0), wanted.scales.nan_to_num(-1.0)) and got.q.stride() == wanted.q.stride()


def run(weights, device, **options):
    """The copies, on the device, and what each matrix alone gives in the reference."""
    there = [weight.to(device) for weight in weights]
    copies = [empty_copy(weight.shape, device) for weight in weights]
    versions = [part._version for copy in copies for quantized in copy for part in quantized]
    fp8_quantize_many(there, copies, backend="triton", **options)
    parts = [part for copy in copies for quantized in copy for part in quantized]
    assert all(part._version > version for part, version in zip(parts, versions, strict=True))
    dtype = options.pop("dtype", None)
    return copies, [fp8_quantize_dual(w.to(dtype or w.dtype), block=(128, 128), backend="reference", **options) for w in weights]


@pytest.mark.parametrize("power_of_two", [True, False])
def test_gives_the_bits_of_each_matrix_alone(power_of_two, triton_device, poisoned, generator):
    for copy, want in zip(*run([numbers(*m, generator) for m in MATRICES], triton_device, power_of_two=power_of_two), strict=True):
        same(copy, want)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the interpreter, on the way to infinity
@pytest.mark.parametrize("dtype, u", [(BF16, 2.0**-8), (FP16, 2.0**-11)])
def test_masters_are_rounded_first(dtype, u, triton_device, poisoned, generator):
    """To the nearest, ties to even, up to infinity, NaN of all ones stays NaN; a matrix that has the type already beside them.

    Ties lie beside the middles of e4m3's numbers (1.0625 and 1.1875), so that the other neighbour would be another number there.
    """
    masters = torch.randn(2, 130, 144, generator=generator)
    masters[0, 0, :6] = torch.tensor([1.0625 + u, 1.0625 + 1.5 * u, 1.1875 - u, 1.1875 - 1.5 * u, -1.0625 - u, -1.1875 + u])
    masters[0, 129, 0], masters[1, 0, 130] = 3.4e38, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(FP32)
    weights = [masters, numbers((129, 129), FP32, generator), torch.randn(16, 32, generator=generator).to(dtype)]
    copies, want = run(weights, triton_device, dtype=dtype)
    for copy, wanted in zip(copies, want, strict=True):
        same(copy, wanted)
    assert want[0][0].scales[0, 1, 0].isnan() and want[0][0].scales[1, 0, 1].isnan() and want[0][0].scales[:, 0, 0].isfinite().all()
    assert not torch.equal(fp8_quantize_dual(masters, block=(128, 128))[0].q.view(torch.uint8), want[0][0].q.view(torch.uint8))


def test_what_lies_around_has_no_influence_and_is_not_written(triton_device, generator):
    """Experts and rows that are no neighbours, in memory that is NaN elsewhere; addresses and strides that are no multiples of 16."""
    wide = torch.full((3, 150, 310), math.nan)
    wide[1:, :140, 3:303] = torch.randn(2, 140, 300, generator=generator)
    weight = wide.to(triton_device)[1:, :140, 3:303]
    copy = empty_copy(weight.shape, triton_device)
    guard = torch.full((2 * 140 * 300 + 2,), 0x55, dtype=torch.uint8, device=triton_device)
    inside = copy[0]._replace(q=guard[1:-1].view(torch.float8_e4m3fn).view(2, 140, 300))
    fp8_quantize_many([weight], [(inside, copy[1])], backend="triton")
    same((inside, copy[1]), fp8_quantize_dual(wide[1:, :140, 3:303], block=(128, 128)))
    assert guard[0] == guard[-1] == 0x55


def test_the_table_is_kept_until_an_address_changes(triton_device, generator):
    weights = [torch.randn(2, 130, 64, generator=generator).to(triton_device) for _ in range(2)]
    copies = [empty_copy(w.shape, w.device) for w in weights]
    module.table_of.cache_clear()
    for _ in range(3):
        fp8_quantize_many(weights, copies, backend="triton")
    assert module.table_of.cache_info().misses == 1
    kept = weights[1]  # its address must not be given to the next
    weights[1] = 2 * weights[1]
    fp8_quantize_many(weights, copies, backend="triton")
    assert module.table_of.cache_info().misses == 2 and kept is not weights[1]
    same(copies[1], fp8_quantize_dual(weights[1].cpu(), block=(128, 128)))
    fp8_quantize_many(weights[::-1], copies[::-1], backend="triton")
    fp8_quantize_many(weights[:1], copies[:1], backend="triton")
    assert module.table_of.cache_info().misses == 4


def test_any_number_of_matrices_is_one_launch_and_compiles_once(launches):
    for n in (1, 2, 96):
        for width in (16, 32, 160):
            weights = [torch.zeros(2, 8 * (i + 1), width, dtype=(BF16, FP32)[i % 2]) for i in range(n)]
            copies = [empty_copy(w.shape, w.device) for w in weights]
            module.fp8_quantize_many_triton(weights[0], weights, copies, BF16, True)
    assert len(launches.grids) == 9 and len(launches.keys) == 1, launches.keys
    assert launches.grids[2] == (2 * 2,) and launches.grids[-1] == (sum(2 * 2 * -(-8 * (i + 1) // 128) for i in range(96)),)


@pytest.mark.gpu
def test_captured_graphs_read_the_new_numbers():
    weights = [torch.randn(4, 256, 512, device="cuda", dtype=BF16) for _ in range(3)]
    copies = [empty_copy(w.shape, w.device) for w in weights]
    fp8_quantize_many(weights, copies)
    total, graph = torch.zeros((), device="cuda", dtype=torch.float64), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.copy_(sum(copy[0].q.double().sum() for copy in copies))
    for weight in weights:
        weight.mul_(-3)
    fp8_quantize_many(weights, copies)
    graph.replay()
    assert float(total) == float(sum(fp8_quantize_dual(w.cpu(), block=(128, 128))[0].q.double().sum() for w in weights))  # exact in fp64


@pytest.mark.gpu
def test_a_stack_of_more_than_two_to_the_31_numbers():
    weight = torch.randn(18, 16384, 8192, device="cuda", dtype=BF16)  # 2.4e9
    copy = empty_copy(weight.shape, weight.device)
    fp8_quantize_many([weight[:1, :128], weight], [empty_copy((1, 128, 8192), weight.device), copy])
    for e in (0, 17):
        want = fp8_quantize_dual(weight[e].cpu(), block=(128, 128))
        same([q._replace(q=q.q[e], scales=q.scales[e]) for q in copy], want)
