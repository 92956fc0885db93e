"""Captured steps on a CPU: replays compute with what the tensors hold by then, into the same memory, and what cannot be captured says so."""

import pytest
import torch

from athanor.cpu_graph import CpuGraph
from athanor.kernels import linear, rmsnorm, swiglu
from athanor.kernels._cpu import native, no_calls, recording, side_by_side


def test_a_replay_computes_with_new_values_into_the_same_memory():
    g = torch.Generator().manual_seed(0)
    x, weight, scale = torch.randn(32, 24, generator=g), torch.randn(48, 24, generator=g), torch.ones(24)
    total, count = torch.zeros(32, 24), torch.zeros((), dtype=torch.int64)

    def function():
        y = swiglu(linear(rmsnorm(x, scale), weight))  # two C++ kernels around a product
        total.add_(y)
        count.add_(1)
        wide = torch.where(y > 0, y, -1.0)
        return wide.view(4, 8, 24).sum(1), torch.topk(wide, 3).values

    with torch.inference_mode():
        graph = CpuGraph()
        result = graph.capture(function)
        assert graph.valid and int(count) == 1
        addresses = [r.data_ptr() for r in result]
        for _ in range(3):
            x.copy_(torch.randn(32, 24, generator=g))
            weight.mul_(0.5)
            before = total.clone()
            graph.replay()
            got, added = [r.clone() for r in result], total - before
            total.copy_(before)
            for a, b in zip(got, function(), strict=True):
                assert torch.equal(a, b)
            assert torch.allclose(added, total - before)
        assert int(count) == 7 and [r.data_ptr() for r in result] == addresses


def test_what_depends_on_data_is_not_captured():
    x = torch.tensor([1.0, -1.0, 2.0])
    for function in (lambda: x * 2 if bool((x > 0).any()) else x, lambda: x[x > 0]):
        graph = CpuGraph()
        graph.capture(function)
        assert not graph.valid


def test_kernels_alone_are_one_list_of_calls():
    x, weight = torch.randn(32, 24), torch.randn(48, 24)
    with torch.inference_mode():
        graph, mixed = CpuGraph(), CpuGraph()
        y = graph.capture(lambda: swiglu(linear(x, weight)))
        mixed.capture(lambda: swiglu(linear(x, weight)).add_(1))
        assert len(graph.native) == 2 and mixed.native is None
        x.normal_()
        seconds = side_by_side([[graph.native, graph.native]])
        assert torch.equal(y, swiglu(linear(x, weight))) and len(seconds) == 2 and min(seconds) > 0
        graph.drop()
        assert graph.native is None


def test_a_call_that_is_refused_says_which():
    """A row that is not there by the time of the replay."""
    table, indices, out = torch.randn(4, 3), torch.tensor([0, 3]), torch.zeros(2, 3)
    kept = no_calls()
    with recording(kept.extend):
        assert native().take_rows(table.data_ptr(), 4, 3, indices.data_ptr(), 2, out.data_ptr())
    assert torch.equal(out, table[indices])
    indices[0] = 1
    kept()
    assert torch.equal(out, table[indices])
    indices[1] = 4
    with pytest.raises(RuntimeError, match="take_rows: a captured call was refused"):
        kept()
    with pytest.raises(RuntimeError, match="take_rows"):
        side_by_side([[no_calls()], [kept]])
