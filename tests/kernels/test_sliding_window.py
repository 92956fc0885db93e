"""`window` of attention and paged_attention in every backend: the formula in fp64 with an explicit mask, and the bits of decode steps."""

import itertools
import os

import pytest
import torch

from athanor.kernels import attention, empty_kv_cache, paged_attention, strict_mode
from athanor.kernels.paged_attention import CHUNK

nan = torch.nan
BACKENDS = ["reference", "cpu", "triton_interpreter", pytest.param("triton_cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def place(request):
    """Backend and device."""
    backend, _, where = request.param.partition("_")
    if backend == "triton":
        pytest.importorskip("triton")
    if where == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: test_interpreter.py runs it in a process of its own")
    return backend, torch.device("cuda" if where == "cuda" else "cpu")


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, H, Hkv, d, generator, dtype=torch.float32):
    return [torch.randn(sum(lengths), h, d, generator=generator).to(dtype) for h in (H, Hkv, Hkv)]


def textbook(q, k, v, lengths, window, attend=torch.nn.functional.scaled_dot_product_attention):
    """Sequence by sequence in the dtype of the input, by PyTorch's attention: query i sees keys j with i - window < j <= i."""
    parts, repeat = [], q.shape[1] // k.shape[1]
    for x in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        a, b, c = (y.repeat_interleave(1 if y is x[0] else repeat, 1).transpose(0, 1)[None] for y in x)
        i, j = torch.arange(a.shape[2])[:, None], torch.arange(a.shape[2])[None]
        parts.append(attend(a, b, c, (j <= i) & (j > i - window))[0].transpose(0, 1))
    return torch.cat(parts)


def formula(q, k, v, seen):
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def plain_and_oracle(leaves, lengths, window, dout):
    """Outputs and gradients: PyTorch's in the dtype of the leaves, and the formula in fp64."""
    wide = [x.double() for x in leaves]
    return (differentiated(lambda *x: textbook(*x, lengths, window), leaves, dout),
            differentiated(lambda *x: textbook(*x, lengths, window, formula), wide, dout))  # fmt: skip


def differentiated(function, leaves, dout):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout.to(out)))]


def packed(leaves, lengths, dout, device="cpu", **options):
    cu = offsets(lengths).to(device)
    return differentiated(lambda *x: attention(*x, cu, **options), [x.to(device) for x in leaves], dout)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# one key, an odd number, tiles of 16 keys, steps of 64 and blocks of 128 keys just crossed; heads aligned and odd; empty sequences
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 65, 129])
@pytest.mark.parametrize("H, Hkv, d, lengths", [(4, 2, 16, [3, 0, 4, 70, 33]), (5, 1, 24, [150])], ids=str)
def test_errs_no_more_than_pytorchs_attention(H, Hkv, d, lengths, window, place, within_rule, generator):
    backend, device = place
    if backend == "triton" and device.type == "cpu" and (window, H) not in ((1, 4), (5, 4)):
        pytest.skip("the interpreter is slow, two of them will do")
    leaves = inputs(lengths, H, Hkv, d, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    got = packed(leaves, lengths, dout, device, window=window, backend=backend)
    plain, oracle = plain_and_oracle(leaves, lengths, window, dout)
    for a, b, c, what in zip(got, plain, oracle, ("out", "dq", "dk", "dv"), strict=True):
        if window > 1 or what in ("out", "dv"):
            within_rule(a, b, c, what)
        else:  # of a token that sees itself alone they are 0, which no relative rule can judge
            assert a.abs().max() < 1e-5


@pytest.mark.parametrize("window", [3, 16, 300])
def test_the_reference_is_the_formula_in_fp64(window, close64, generator):
    lengths = [70, 0, 1, 33]
    leaves = inputs(lengths, 4, 2, 5, generator, torch.float64)
    dout = torch.randn(leaves[0].shape, generator=generator, dtype=torch.float64)
    for a, b in zip(packed(leaves, lengths, dout, window=window), plain_and_oracle(leaves, lengths, window, dout)[1], strict=True):
        close64(a, b)


def test_a_window_as_long_as_the_sequence_changes_no_bit(place, rowwise_products, generator):
    lengths = [20, 1]
    leaves = inputs(lengths, 4, 2, 16, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    run = dict(zip(("backend", "device"), place, strict=True))
    assert same(packed(leaves, lengths, dout, window=20, **run), packed(leaves, lengths, dout, **run))


def test_queries_of_the_last_keys_alone_see_the_same_window(place, rowwise_products, generator):
    backend, device = place
    queries, keys, window = [3, 9, 0], [70, 9, 5], 6
    leaves = inputs(keys, 4, 2, 16, generator)
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(queries, itertools.accumulate(keys), strict=True)])
    dout = torch.randn(len(last), 4, 16, generator=generator)
    sparse = torch.zeros(sum(keys), 4, 16).index_copy(0, last, dout)
    whole, *grads = packed(leaves, keys, sparse, device, window=window, backend=backend)
    cu, cu_k = offsets(queries).to(device), offsets(keys).to(device)
    part = [x.to(device) for x in (leaves[0][last], *leaves[1:])]
    got = differentiated(lambda *x: attention(*x, cu, cu_seqlens_k=cu_k, window=window, backend=backend), part, dout)
    for a, b in zip(got, (whole[last], grads[0][last], *grads[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[0], whole[last])


def cached(k, v, lengths, device="cpu", cpu_layout=False):
    """Keys and values of packed sequences in the blocks of a cache, NaN where nothing is, and the table of each sequence."""
    counts = [-(-n // 16) for n in lengths]
    shape = (sum(counts) + 1, k.shape[1], 16, k.shape[2])
    caches = [torch.empty(shape, dtype=k.dtype, device=device) for _ in range(2)]
    if cpu_layout:
        caches = empty_kv_cache(*shape, dtype=k.dtype, device="cpu")
    for cache in caches:
        cache.fill_(nan)
    tables, free = torch.zeros(len(lengths), max(counts), dtype=torch.int32), iter(range(sum(counts), 0, -1))
    for s, parts in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        for i in range(counts[s]):
            tables[s, i] = block = next(free)
            for cache, x in zip(caches, parts, strict=True):
                piece = x[i * 16 : (i + 1) * 16]
                cache[block, :, : len(piece)] = piece.transpose(0, 1)
    return *caches, tables


@pytest.mark.parametrize("window", [1, 7, 16, 61, 300])
@pytest.mark.parametrize("H, Hkv, d", [(4, 2, 24), (5, 1, 8), (1, 1, 40)])
def test_on_a_cpu_a_token_has_the_bits_of_its_decode_step_and_of_any_packing(H, Hkv, d, window, generator):
    lengths = [70, 1, 33, 0, 310, 16]
    leaves = inputs(lengths, H, Hkv, d, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    whole = packed(leaves, lengths, dout, window=window)
    key_cache, value_cache, tables = cached(*leaves[1:], lengths, cpu_layout=True)
    table = tables.repeat_interleave(torch.tensor(lengths), 0)
    lens = torch.cat([torch.arange(1, n + 1) for n in lengths]).int()
    assert torch.equal(paged_attention(leaves[0], key_cache, value_cache, table, lens, window=window), whole[0])
    for s, (a, b) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        if lengths[s]:
            alone = packed([x[a:b] for x in leaves], [lengths[s]], dout[a:b], window=window)
            assert same(alone, [x[a:b] for x in whole]), lengths[s]
    n = lengths[0] - 3  # and the bits do not depend on what follows
    assert torch.equal(attention(*(x[:n] for x in leaves), offsets([n]), window=window), whole[0][:n])


def test_on_a_cpu_nan_reaches_those_that_see_it_and_no_other(generator):
    lengths, window = [50, 60, 40], 9
    q, k, v = inputs(lengths, 4, 2, 24, generator)
    want = attention(q, k, v, offsets(lengths), window=window)
    for broken in (k, v):
        kept, broken[73] = broken[73].clone(), nan  # token 23 of the second sequence
        out = attention(q, k, v, offsets(lengths), window=window)
        assert out[73 : 73 + window].isnan().all() and torch.equal(out[:73], want[:73]) and torch.equal(out[73 + window :], want[73 + window :])
        broken[73] = kept


# windows of less than a chunk of the cache and of more; groups that share two chunks of which some rows see nothing
@pytest.mark.parametrize("window", [40, CHUNK + 70])
def test_decode_matches_fp64_and_sharing_a_prefix_changes_no_bit(place, window, rowwise_products, within_rule, generator):
    backend, device = place
    prefix, rows = 2 * CHUNK, [2 * CHUNK, 2 * CHUNK + 1, 2 * CHUNK + 39, 2 * CHUNK + 41, 3 * CHUNK + 45]
    lengths, H, Hkv, d = [*rows, 5, CHUNK + 3], 4, 2, 16
    q, k, v = torch.randn(len(lengths), H, d, generator=generator), *inputs(lengths, H, Hkv, d, generator)[1:]
    starts = offsets(lengths).tolist()
    for first in starts[1 : len(rows)]:
        k[first : first + prefix], v[first : first + prefix] = k[:prefix], v[:prefix]
    key_cache, value_cache, tables = cached(k, v, lengths, device, cpu_layout=backend == "cpu")
    tables[1 : len(rows), : prefix // 16] = tables[0, : prefix // 16]
    call = q.to(device), key_cache, value_cache, tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)
    groups = {"group_offsets": torch.tensor([0, len(rows)], dtype=torch.int32), "prefix_lens": torch.tensor([prefix], dtype=torch.int32)}
    options = {"window": window, "backend": backend, "return_lse": True}
    out, lse = (x.cpu() for x in paged_attention(*call, **options))
    shared = [x.cpu() for x in paged_attention(*call, **options, **{name: x.to(device) for name, x in groups.items()})]
    assert same(shared, (out, lse))
    plain, oracle, sums = [], [], []
    for row, end in enumerate(starts[1:]):
        seen = slice(max(starts[row], end - window), end)
        for kept, t in ((plain, torch.float32), (oracle, torch.float64)):
            a, b, c = (x.to(t).transpose(0, 1) for x in (q[row, None], k[seen].repeat_interleave(2, 1), v[seen].repeat_interleave(2, 1)))
            scores = a @ b.transpose(1, 2) * d**-0.5
            kept.append((scores.softmax(-1) @ c)[:, 0])
        sums.append(scores.logsumexp(-1)[:, 0])
    within_rule(out, torch.stack(plain), torch.stack(oracle), "out")
    assert torch.allclose(lse.double(), torch.stack(sums), atol=1e-5)


def test_in_triton_a_token_has_the_bits_of_its_decode_step(triton_device, rowwise_products, generator):
    window, lengths = 30, [9, CHUNK + 40]  # the last tokens see nothing of the first chunk
    q, k, v = (x.to(triton_device) for x in inputs(lengths, 2, 2, 16, generator))
    out = attention(q, k, v, offsets(lengths).to(triton_device), window=window, backend="triton")
    near = {0, 1, 29, 30, 31, 63, 64, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 29, CHUNK + 30}
    steps = [(s, n) for s, length in enumerate(lengths) for n in range(length) if triton_device.type == "cuda" or n in near or n == length - 1]
    key_cache, value_cache, tables = cached(k, v, lengths, triton_device)
    rows = torch.tensor([int(offsets(lengths)[s]) + n for s, n in steps]).to(q.device)
    table, lens = tables[[s for s, _ in steps]].to(q.device), torch.tensor([n + 1 for _, n in steps], dtype=torch.int32, device=q.device)
    with strict_mode():
        assert torch.equal(paged_attention(q[rows], key_cache, value_cache, table, lens, window=window, backend="triton"), out[rows])


def test_a_window_of_nothing_is_refused():
    x = torch.ones(3, 2, 16)
    with pytest.raises(ValueError, match="attention: window is 0; wanted at least 1 token, or None"):
        attention(x, x, x, offsets([3]), window=0)
    cache, i32 = torch.zeros(1, 2, 16, 16), torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="paged_attention: window is -1; wanted at least 1 token, or None"):
        paged_attention(x, cache, cache, i32, i32[:, 0], window=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [2, 100, 4096])
def test_flash_on_the_gpu_errs_no_more_than_the_textbook(window, within_rule, generator):
    lengths = [200, 3, 70]
    leaves = inputs(lengths, 4, 2, 64, generator, torch.bfloat16)
    dout = torch.randn(leaves[0].shape, generator=generator).bfloat16()
    try:
        got = packed(leaves, lengths, dout, "cuda", window=window, backend="cuda")
    except ValueError as error:
        pytest.skip(str(error))
    for a, b, c in zip(got, *plain_and_oracle(leaves, lengths, window, dout), strict=True):
        within_rule(a, b, c)
