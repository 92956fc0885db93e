"""The C++ kernel of attention: values and gradients against the formula in fp64, and bits that nothing but the sequence decides."""


import pytest
import torch

from athanor.kernels import attention

# one token; tiles of 16 keys just full and just not; blocks of 32 rows and 128 keys crossed; empty and odd; more than one span of 256 positions
LENGTHS = [[1, 1], [15, 16, 17], [3, 0, 1, 70, 200, 5, 0], [300]]
# grouped queries 2, 1, 4, 8, 5, 3; d below, at and above a vector, no multiple of it, several
HEADS = [(4, 2, 32), (3, 3, 8), (4, 1, 24), (8, 1, 16), (5, 1, 40), (6, 2, 128), (2, 1, 5)]
NAMES = ("dq", "dk", "dv")


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def inputs(lengths, H, Hkv, d, generator):
    return [torch.randn(sum(lengths), h, d, generator=generator).requires_grad_() for h in (H, Hkv, Hkv)]


def textbook(q, k, v, lengths, scale):
    parts, repeat = [], q.shape[1] // k.shape[1]
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", a * scale, b)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), c))
    return torch.cat(parts)


def run(q, k, v, lengths, dout, **options):
    """Output and gradients of the cpu backend."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, offsets(lengths), backend="cpu", **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("H, Hkv, d", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_errs_no_more_than_the_textbook_and_its_gradients_no_more_than_pytorch(lengths, H, Hkv, d, scale, within_rule, generator):
    q, k, v = inputs(lengths, H, Hkv, d, generator)
    dout = torch.randn(q.shape, generator=generator)
    wide, used = [x.detach().double().requires_grad_() for x in (q, k, v)], d**-0.5 if scale is None else scale
    plain, oracle = textbook(q, k, v, lengths, used), textbook(*wide, lengths, used)
    out, *grads = run(q, k, v, lengths, dout, scale=scale)
    within_rule(out, plain, oracle)
    if max(lengths) > 1:  # a single token has dq = 0 exactly, which no relative rule can judge
        # PyTorch's attention also takes delta from the rounded output, dout . out, which the textbook's sum_j p dp does not
        plain = torch.autograd.grad(attention(q, k, v, offsets(lengths), scale=scale, backend="reference"), (q, k, v), dout)
        oracle = torch.autograd.grad(oracle, wide, dout.double())
        for name, a, b, c in zip(NAMES, grads, plain, oracle, strict=True):
            within_rule(a, b, c, name)


def test_scores_far_apart_neither_overflow_nor_vanish(within_rule, generator):
    lengths = [90]
    q, k, v = (x.detach() for x in inputs(lengths, 2, 1, 32, generator))
    out, *grads = run(100 * q, k, v, lengths, torch.ones_like(q))
    plain, oracle = (textbook(100 * a, b, c, lengths, 32**-0.5) for a, b, c in ((q, k, v), (q.double(), k.double(), v.double())))
    within_rule(out, plain, oracle)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("H, Hkv, d", [(4, 2, 32), (3, 1, 24), (2, 2, 8)])
def test_a_sequence_has_the_same_bits_alone_and_in_any_packing(H, Hkv, d, generator):
    lengths = [70, 1, 33, 0, 129, 300, 16]
    q, k, v = inputs(lengths, H, Hkv, d, generator)
    dout = torch.randn(q.shape, generator=generator)
    whole = [x.split(lengths) for x in run(q, k, v, lengths, dout)]
    parts = [x.split(lengths) for x in (q, k, v, dout)]
    for i, n in enumerate(lengths):
        a, b, c, g = (x[i] for x in parts)
        assert same(run(a, b, c, [n], g), [x[i] for x in whole])
    order = [5, 3, 0, 6, 2, 4, 1]
    a, b, c, g = (torch.cat([x[i] for i in order]) for x in parts)
    assert same(run(a, b, c, [lengths[i] for i in order], g), [torch.cat([x[i] for i in order]) for x in whole])


@pytest.mark.parametrize("H, Hkv, d", [(4, 2, 32), (5, 1, 24)])
def test_queries_of_the_last_keys_have_the_bits_of_the_whole(H, Hkv, d, within_rule, generator):
    parts = [(20, 53), (0, 7), (33, 33), (1, 300), (0, 0), (129, 400)]  # queries and keys; more than one block of keys and span of positions
    queries, keys = ([part[i] for part in parts] for i in range(2))
    everything, k, v = inputs(keys, H, Hkv, d, generator)
    rows = torch.cat([torch.arange(end - n, end) for n, end in zip(queries, offsets(keys).tolist()[1:], strict=True)])
    dout = torch.zeros(everything.shape)
    dout[rows] = torch.randn(len(rows), H, d, generator=generator)
    whole, dq, dk, dv = run(everything, k, v, keys, dout)
    q = everything.detach()[rows].requires_grad_()
    out = attention(q, k, v, offsets(queries), cu_seqlens_k=offsets(keys), backend="cpu")
    assert torch.equal(out, whole[rows])
    got = torch.autograd.grad(out, (q, k, v), dout[rows])
    wide = [x.detach().double().requires_grad_() for x in (everything, k, v)]
    oracle = torch.autograd.grad(textbook(*wide, keys, d**-0.5), wide, dout.double())
    for name, a, b, c in zip(NAMES, got, (dq[rows], dk, dv), (oracle[0][rows], *oracle[1:]), strict=True):
        within_rule(a, b, c, name)  # sums in other blocks
    assert not got[1][53:60].any() and not got[2][53:60].any()


@pytest.mark.parametrize("repeat", [1, 2, 3, 5])
def test_the_bits_of_a_token_do_not_depend_on_what_follows_it_in_its_sequence(repeat, generator):
    q, k, v = (x.detach() for x in inputs([200], 2 * repeat, 2, 32, generator))
    whole = attention(q, k, v, offsets([200]), backend="cpu")
    for n in range(1, 200):
        assert torch.equal(attention(q[:n], k[:n], v[:n], offsets([n]), backend="cpu"), whole[:n]), n


def test_the_bits_do_not_depend_on_the_threads(generator):
    lengths = [130, 700, 1, 260, 90, 513]  # work for seven threads, and sequences of several spans
    q, k, v = inputs(lengths, 4, 2, 32, generator)
    dout = torch.randn(q.shape, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(q, k, v, lengths, dout)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert same(run(q, k, v, lengths, dout), want)
    finally:
        torch.set_num_threads(before)


def test_slices_of_a_fused_projection_and_other_strides_give_the_same_bits(generator):
    lengths = [40, 25]
    qkv = torch.randn(65, 8, 24, generator=generator)
    q, k, v = qkv.split((4, 2, 2), 1)
    dout = torch.randn(4, 65, 24, generator=generator).transpose(0, 1)
    want = run(*(x.contiguous() for x in (q, k, v)), lengths, dout.contiguous())
    assert same(run(q, k, v, lengths, dout), want)
    crossed = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    assert crossed.stride(2) != 1 and same(run(*crossed.split((4, 2, 2), 1), lengths, dout), want)


def test_a_token_with_nan_reaches_those_that_see_it_and_no_other(generator):
    lengths = [50, 60, 40]
    q, k, v = (x.detach() for x in inputs(lengths, 4, 2, 24, generator))
    dout = torch.randn(q.shape, generator=generator)
    want = run(q, k, v, lengths, dout)
    for broken in range(3):
        x = [y.clone() for y in (q, k, v)]
        x[broken][73] = torch.nan  # token 23 of the second sequence
        out, *grads = run(*x, lengths, dout)
        reached = slice(73, 74) if broken == 0 else slice(73, 110)
        assert out[reached].isnan().all()
        assert torch.equal(out[: reached.start], want[0][: reached.start]) and torch.equal(out[reached.stop :], want[0][reached.stop :])
        for got, clean in zip(grads, want[1:], strict=True):
            assert torch.equal(got[:50], clean[:50]) and torch.equal(got[110:], clean[110:])


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths):
    q, k = torch.empty(0, 4, 16), torch.empty(0, 2, 16)
    assert [x.shape for x in run(q, k, k, lengths, torch.empty_like(q))] == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_serves_fp32_by_default_and_refuses_what_it_cannot_do():
    q = torch.ones(3, 2, 4, requires_grad=True)
    assert type(attention(q, q, q, offsets([3])).grad_fn).__name__ == "AttentionCpuFunctionBackward"
    with pytest.raises(ValueError, match="cpu' cannot serve this call: q is torch.bfloat16; the C.. kernels compute in fp32"):
        attention(*[q.bfloat16()] * 3, offsets([3]), backend="cpu")
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 4; wanted non-decreasing from 0 to T = 3"):
        attention(q, q, q, offsets([4]), backend="cpu")
    (grad,) = torch.autograd.grad(attention(q, q, q, offsets([3])).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
