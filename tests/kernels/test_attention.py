import pytest
import torch

from athanor.kernels import attention
from athanor.kernels._dispatch import OPS
from athanor.kernels.attention import BUCKET_COST, bucket_plan

# one token; equal lengths; odd and zero lengths, enough spread for several buckets
LENGTHS = [[1], [64, 64, 64], [3, 0, 1, 70, 17, 70, 0, 200, 5, 16, 15]]
HEADS = [(4, 2, 24), (3, 3, 8), (4, 1, 5)]  # the default model's grouping, no grouping, one key head with an odd size


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def brute_force(q, k, v, lengths, scale):
    """Token by token: the scores of one query against every key up to it."""
    out, base, repeat = [], 0, q.shape[1] // k.shape[1]
    for n in lengths:
        for i in range(base, base + n):
            heads = []
            for h in range(q.shape[1]):
                keys, values = k[base : i + 1, h // repeat], v[base : i + 1, h // repeat]
                weights = torch.exp(keys @ q[i, h] * scale)
                heads.append(weights @ values / weights.sum())
            out.append(torch.stack(heads))
        base += n
    return torch.stack(out) if out else q * 1


def one_by_one(q, k, v, lengths, scale):
    """Textbook formula per sequence in the dtype of the input."""
    parts, repeat = [], q.shape[1] // k.shape[1]
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", a * scale, b)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), c))
    return torch.cat(parts)


def inputs(lengths, H, Hkv, d, generator, dtype=torch.float64):
    T = sum(lengths)
    return [torch.randn(T, h, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for h in (H, Hkv, Hkv)]


@pytest.mark.parametrize("H, Hkv, d", HEADS)
@pytest.mark.parametrize("lengths", [[1], [16, 16], [3, 0, 1, 17, 9], [0, 0], []])
def test_matches_brute_force_in_fp64_with_gradients(lengths, H, Hkv, d, close64, generator):
    q, k, v = inputs(lengths, H, Hkv, d, generator)
    out, expected = attention(q, k, v, offsets(lengths)), brute_force(q, k, v, lengths, d**-0.5)
    close64(out, expected)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True)
    want = torch.autograd.grad(expected, (q, k, v), dout, allow_unused=True)
    for name, a, b in zip("qkv", got, want, strict=True):
        if sum(lengths):
            close64(a, b, f"d{name}")


# queries and keys of each sequence: none of its tokens before the queries; one query; no query; nothing at all
PARTS = [(3, 3), (1, 9), (5, 22), (0, 4), (0, 0), (16, 17)]


def last_queries(q, parts):
    """Rows of q, one for each key, that are the last queries of each sequence."""
    ends, rows = 0, []
    for n, m in parts:
        ends += m
        rows += range(ends - n, ends)
    return q[torch.tensor(rows, device=q.device)]


def test_queries_of_the_last_keys_are_rows_of_the_whole_with_gradients(close64, generator):
    queries, keys = ([part[i] for part in PARTS] for i in range(2))
    everything, k, v = inputs(keys, 4, 2, 24, generator)
    q = last_queries(everything, PARTS)
    out = attention(q, k, v, offsets(queries), cu_seqlens_k=offsets(keys))
    expected = last_queries(brute_force(everything, k, v, keys, 24**-0.5), PARTS)
    close64(out, expected)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    got, want = (torch.autograd.grad(x, (everything, k, v), dout) for x in (out, expected))
    for name, a, b in zip("qkv", got, want, strict=True):
        close64(a, b, f"d{name}")


@pytest.mark.parametrize("lengths", LENGTHS[1:3])  # a single token has dq = 0 exactly in the textbook, which no relative rule can judge
def test_fp32_errs_no_more_than_the_textbook(lengths, within_rule, generator):
    q, k, v = inputs(lengths, 4, 2, 24, generator, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, plain, oracle = attention(q, k, v, offsets(lengths)), one_by_one(q, k, v, lengths, 24**-0.5), one_by_one(*wide, lengths, 24**-0.5)
    within_rule(out, plain, oracle)
    dout = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(plain, (q, k, v), dout), torch.autograd.grad(oracle, wide, dout.double())
    for name, a, b, c in zip("qkv", *grads, strict=True):
        within_rule(a, b, c, f"d{name}")


def test_no_token_sees_its_future_or_another_sequence(generator):
    lengths = [5, 3, 40]
    q, k, v = inputs(lengths, 4, 2, 24, generator, torch.float32)
    before = attention(q, k, v, offsets(lengths))
    k, v = k.detach().clone(), v.detach().clone()
    k[6], v[6] = 100.0, -1000.0  # second token of the second sequence
    after = attention(q, k, v, offsets(lengths))
    untouched = [*range(6), *range(8, 48)]
    assert torch.equal(before[untouched], after[untouched]) and (before[6:8] - after[6:8]).abs().amax((1, 2)).min() > 1
    v[6] = torch.nan  # even NaN stays within its sequence, although sequences share a padded bucket
    after = attention(q, k, v, offsets(lengths))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[8:], after[8:]) and torch.isnan(after[6:8]).all()


def test_plan_places_every_token_once_and_splits_where_it_pays():
    lengths = [10] * 300 + [80] * 100
    cu = tuple(offsets(lengths).tolist())
    index, inverse, buckets = bucket_plan(cu)
    assert buckets == ((100, 80), (300, 16)) and torch.equal(index[inverse], torch.arange(cu[-1]))
    few = [10] * 3 + [17]  # padding 3 sequences by one vector of 16 is cheaper than a second bucket
    assert bucket_plan(tuple(offsets(few).tolist()))[2] == ((4, 32),) and BUCKET_COST > 3 * 16


def test_scale_is_honoured(generator, close64):
    q, k, v = inputs([7], 2, 1, 4, generator)
    close64(attention(q, k, v, offsets([7]), scale=0.3), brute_force(q, k, v, [7], 0.3))


def test_bad_shapes_are_refused():
    q, k = torch.ones(4, 3, 2), torch.ones(4, 2, 2)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(q, k, k, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 3; wanted non-decreasing from 0 to T = 4"):
        attention(k, k, k, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="k and v .T, Hkv, d"):
        attention(k[:3], k, k, torch.tensor([0, 3]))
    for backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match="sequence 1 has 2 queries and 1 keys; wanted as many keys or more"):
            attention(k, k, k, torch.tensor([0, 2, 4]), cu_seqlens_k=torch.tensor([0, 3, 4]), backend=backend)
        with pytest.raises(ValueError, match="cu_seqlens_k runs from 0 to 5; wanted non-decreasing from 0 to U = 4"):
            attention(k[:2], k, k, torch.tensor([0, 2]), cu_seqlens_k=torch.tensor([0, 5]), backend=backend)
    with pytest.raises(ValueError, match="cu_seqlens_k is .3,.; wanted that of cu_seqlens, .2,"):
        attention(k, k, k, torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="cuda' cannot serve this call: tensors are on cpu"):
        attention(k, k, k, torch.tensor([0, 4]), backend="cuda")


@pytest.mark.gpu
def test_flash_on_the_gpu_lets_the_last_query_see_the_last_key(generator):
    parts = [(64, 192), (1, 130), (70, 70)]
    queries, keys = ([part[i] for part in parts] for i in range(2))
    everything, k, v = (x.detach().cuda() for x in inputs(keys, 4, 2, 64, generator, torch.bfloat16))
    cu = offsets(keys).cuda()
    if reason := OPS["attention"].why_not("cuda", q=everything, k=k, v=v, cu_seqlens=cu, cu_seqlens_k=cu):
        pytest.skip(reason)
    out = attention(last_queries(everything, parts), k, v, offsets(queries).cuda(), cu_seqlens_k=cu, backend="cuda")
    torch.testing.assert_close(out, last_queries(attention(everything, k, v, cu, backend="cuda"), parts), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[2], [128, 128], [3, 1, 70, 17, 200]])  # of one token alone dq and dk are 0, and twice no error is no error
def test_flash_on_the_gpu_errs_no_more_than_the_textbook(lengths, within_rule, generator):
    q, k, v = (x.detach().cuda().requires_grad_() for x in inputs(lengths, 4, 2, 64, generator, torch.bfloat16))
    cu_seqlens = offsets(lengths).cuda()
    if reason := OPS["attention"].why_not("cuda", q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens):
        pytest.skip(reason)
    out = attention(q, k, v, cu_seqlens, backend="cuda")
    dout = torch.randn(out.shape, generator=generator).to(out)
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    narrow = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    oracle, plain = one_by_one(*wide, lengths, 64**-0.5), one_by_one(*narrow, lengths, 64**-0.5)
    within_rule(out.cpu(), plain, oracle)
    grads = (torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(plain, narrow, dout.cpu()),
             torch.autograd.grad(oracle, wide, dout.double().cpu()))  # fmt: skip
    for a, b, c in zip(*grads, strict=True):
        within_rule(a.cpu(), b, c)
