"""fp8_quantize_many on CPU tensors: what fp8_quantize_dual makes of each matrix, in memory that stays where it is, and what it refuses."""

import pytest
import torch

from athanor.kernels import Quantized, fp8_quantize_dual, fp8_quantize_many
from athanor.kernels.fp8_quantize_many import empty_copy

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def some(generator):
    """A stack, a matrix of another type, one number, and nothing."""
    shapes = ((3, 130, 150), torch.float32), ((256, 128), BF16), ((1, 1), torch.float16), ((0, 3, 4), torch.float32)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes]
    return weights, [empty_copy(w.shape, w.device) for w in weights]


def parts(copies) -> list[torch.Tensor]:
    return [part for copy in copies for quantized in copy for part in quantized]


@pytest.mark.parametrize("power_of_two", [True, False])
def test_writes_what_each_matrix_alone_gives_and_moves_nothing(power_of_two, poisoned, generator):
    weights, copies = some(generator)
    places, versions = [p.data_ptr() for p in parts(copies)], [p._version for p in parts(copies)]
    for factor in (1, 3):  # the second time over the first
        for weight in weights:
            weight *= factor
        fp8_quantize_many(weights, copies, power_of_two=power_of_two)
        for weight, copy in zip(weights, copies, strict=True):
            for got, want in zip(copy, fp8_quantize_dual(weight, block=(128, 128), power_of_two=power_of_two), strict=True):
                assert torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8)) and torch.equal(got.scales, want.scales)
                assert got.q.stride() == want.q.stride()
    assert places == [p.data_ptr() for p in parts(copies)]
    assert all(p._version > v for p, v in zip(parts(copies), versions, strict=True))
    assert fp8_quantize_many([], []) is None


def test_masters_are_rounded_to_the_type_that_computes_first(generator):
    masters = [torch.randn(2, 140, 70, generator=generator), torch.randn(70, 140, generator=generator).to(BF16)]
    copies = [empty_copy(w.shape, w.device) for w in masters]
    fp8_quantize_many(masters, copies, dtype=BF16)
    for weight, copy in zip(masters, copies, strict=True):
        want = fp8_quantize_dual(weight.to(BF16), block=(128, 128))[0]
        assert torch.equal(copy[0].q.view(torch.uint8), want.q.view(torch.uint8)) and torch.equal(copy[0].scales, want.scales)
    unrounded = fp8_quantize_dual(masters[0], block=(128, 128))[0]
    assert not torch.equal(copies[0][0].q.view(torch.uint8), unrounded.q.view(torch.uint8))


def test_mismatches_are_refused(generator):
    (w, *_), (copy, *_) = some(generator)
    rows, columns = copy
    flat = torch.empty(3 * 150 * 144 + 1, dtype=torch.uint8).view(E4M3)
    refusals = [
        (([w], []), {}, r"copies has 0 entries; wanted 1"),
        (([w[0, 0]], [copy]), {}, r"weights\[0\] is \(150,\); wanted"),
        (([w, w.double()], [copy] * 2), {}, r"weights\[1\] is torch.float64; wanted"),
        (([w.to(BF16)], [copy]), {"dtype": torch.float16}, r"weights\[0\] is torch.bfloat16; wanted torch.float16"),
        (([w], [copy]), {"dtype": torch.float64}, r"dtype is torch.float64; wanted None"),
        (([torch.zeros(3, 150, 130).mT], [copy]), {}, r"weights\[0\] has strides \(19500, 1, 130\); wanted adjacent columns"),
        (([w], [copy[:1]]), {}, r"copies\[0\] has 1 layouts; wanted 2"),
        (([w], [(rows, rows)]), {}, r"copies\[0\]: q of columns is \(3, 130, 150\) .* with strides \(19500, 150, 1\); wanted .* \(21600, 1, 144\)"),
        (([w], [(Quantized(rows.q.float(), rows.scales), columns)]), {}, r"copies\[0\]: q of rows is .* torch.float32"),
        (([w], [(Quantized(rows.q, rows.scales.double()), columns)]), {}, r"copies\[0\]: scales of rows are \(3, 2, 2\) torch.float64"),
        (([w], [(rows, Quantized(columns.q, columns.scales[:1]))]), {}, r"copies\[0\]: scales of columns are \(1, 2, 2\)"),
        (([w], [(rows, Quantized(flat[1:].view(3, 150, 144)[..., :130].mT, columns.scales))]), {},
         r"copies\[0\]: q of columns begins at \d+; wanted a multiple"),
        (([w, w.to("meta")], [copy] * 2), {}, r"weights\[1\] is on meta; wanted cpu"),
    ]  # fmt: skip
    for arguments, options, message in refusals:
        with pytest.raises(ValueError, match="fp8_quantize_many: " + message):
            fp8_quantize_many(*arguments, **options)
