"""attention in Triton: values and gradients against PyTorch's attention in fp64, and the bits of a decode step for every token.

The interpreter's tiles are 16 query rows x 64 keys: 16, 4 or 2 positions with 1, 4 or 7 query heads to a key head.
"""

import itertools
import mmap

import pytest
import torch

from athanor.kernels import attention, paged_attention, strict_mode
from athanor.kernels.paged_attention import CHUNK

pytest.importorskip("triton")
from athanor.kernels.attention_triton import attention_triton  # noqa: E402
from athanor.kernels.paged_attention_triton import paged_attention_triton  # noqa: E402

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13
INT_MAX = 2**31 - 1
nan = torch.nan
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, H, Hkv, d, generator, dtype=torch.float32):
    return [torch.randn(sum(lengths), h, d, generator=generator).to(dtype) for h in (H, Hkv, Hkv)]


def textbook(q, k, v, lengths):
    """PyTorch's attention, sequence by sequence, in the dtype of the input."""
    out = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in (a, b, c))
        out.append(torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def differentiated(function, leaves, dout):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout.to(out)))]


def packed(leaves, lengths, dout, device, **options):
    cu = offsets(lengths).to(device)
    return differentiated(lambda q, k, v: attention(q, k, v, cu, backend="triton", **options), [x.to(device) for x in leaves], dout)


# zero lengths, one token, more than one tile of keys, a chunk and a token; query heads per key head 1, 4 and 7; heads aligned, odd, of 24
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("H, Hkv, d, lengths", [(2, 2, 16, [CHUNK + 1]), (4, 1, 24, [3, 0, 1, 17, 66, 0]), (7, 1, 5, [9, 1, 18])], ids=str)
def test_errs_no_more_than_pytorchs_attention(H, Hkv, d, lengths, dtype, triton_device, within_rule, generator):
    leaves = inputs(lengths, H, Hkv, d, generator, dtype)
    dout = torch.randn(leaves[0].shape, generator=generator).to(dtype)
    got = packed(leaves, lengths, dout, triton_device)
    plain, oracle = (differentiated(lambda *x: textbook(*x, lengths), [x.to(kind) for x in leaves], dout) for kind in (dtype, torch.float64))
    for a, b, c, what in zip(got, plain, oracle, ("out", "dq", "dk", "dv"), strict=True):
        within_rule(a, b, c, what)


@pytest.mark.parametrize("H, Hkv, parts", [(2, 2, [(5, 66), (0, 3), (20, 20), (3, CHUNK + 2)]), (7, 1, [(9, 18), (0, 0), (1, 70)])], ids=str)
def test_queries_of_the_last_keys_have_the_bits_of_the_whole(H, Hkv, parts, triton_device, rowwise_products, within_rule, generator):
    queries, keys = ([part[i] for part in parts] for i in range(2))
    everything, k, v = inputs(keys, H, Hkv, 16, generator)
    rows = torch.cat([torch.arange(end - n, end) for n, end in zip(queries, offsets(keys).tolist()[1:], strict=True)])
    dout = torch.zeros(everything.shape)
    dout[rows] = torch.randn(len(rows), H, 16, generator=generator)
    whole = packed((everything, k, v), keys, dout, triton_device)
    cu, cu_k = (offsets(n).to(triton_device) for n in (queries, keys))
    leaves = [x.to(triton_device) for x in (everything[rows], k, v)]
    out, *got = differentiated(lambda q, k, v: attention(q, k, v, cu, cu_seqlens_k=cu_k, backend="triton"), leaves, dout[rows])
    assert torch.equal(out, whole[0][rows])
    _, dq, dk, dv = differentiated(lambda *x: textbook(*x, keys), [x.double() for x in (everything, k, v)], dout)
    for a, b, c, what in zip(got, (whole[1][rows], *whole[2:]), (dq[rows], dk, dv), ("dq", "dk", "dv"), strict=True):
        within_rule(a, b, c, what)


def test_scale_is_honoured_forward_and_backward(triton_device, within_rule, generator):
    q, k, v = inputs([9], 2, 1, 16, generator)
    dout = torch.randn(q.shape, generator=generator)
    got = packed((q, k, v), [9], dout, triton_device, scale=1.0)
    # the scale as a factor of the queries, whose gradient it then multiplies
    wanted = [differentiated(lambda q, k, v: textbook(4 * q, k, v, [9]), [x.to(kind) for x in (q, k, v)], dout) for kind in (q.dtype, torch.float64)]
    for a, b, c in zip(got, *wanted, strict=True):
        within_rule(a, b, c)


def test_no_sequences_and_no_tokens(triton_device):
    for lengths in ([], [0], [0, 0]):
        empty = torch.zeros(0, 4, 16)
        out, dq, dk, dv = packed((empty, empty[:, :2], empty[:, :2]), lengths, empty, triton_device)
        assert out.shape == dq.shape == (0, 4, 16) and dk.shape == dv.shape == (0, 2, 16)


def cached(k, v, lengths, block, generator):
    """The packed keys and values in the blocks of a cache, in random order and NaN where nothing is, and the table of each sequence."""
    counts = [-(-n // block) for n in lengths]
    free = torch.randperm(1 + sum(counts), generator=generator).tolist()
    caches = [torch.full((len(free), k.shape[1], block, k.shape[2]), nan, dtype=k.dtype, device=k.device) for _ in range(2)]
    tables = torch.full((len(lengths), 1 + max(counts)), INT_MAX, dtype=torch.int32)
    for s, (count, *parts) in enumerate(zip(counts, k.split(lengths), v.split(lengths), strict=True)):
        for i in range(count):
            tables[s, i] = free.pop()
            for cache, x in zip(caches, parts, strict=True):
                piece = x[i * block : (i + 1) * block]
                cache[tables[s, i], :, : len(piece)] = piece.transpose(0, 1)
    return *caches, tables


# lengths around a chunk's end, and a third chunk of one token; the last with tiles of positions that cross the ends of chunks
DECODED = [(2, 2, 16, [CHUNK - 1, CHUNK, CHUNK + 1, 1]), (4, 1, 24, [5, 2 * CHUNK + 1]), (7, 1, 16, [CHUNK + 2])]
DECODED = [*((*size, torch.float32) for size in DECODED), (4, 1, 16, [CHUNK + 1], torch.float16),
           *(pytest.param(*size, torch.bfloat16, marks=pytest.mark.gpu) for size in DECODED)]  # fmt: skip


@pytest.mark.parametrize("H, Hkv, d, lengths, dtype", DECODED)
def test_a_token_has_the_bits_of_its_decode_step(H, Hkv, d, lengths, dtype, triton_device, rowwise_products, generator):
    q, k, v = (x.to(triton_device) for x in inputs(lengths, H, Hkv, d, generator, dtype))
    cu = offsets(lengths)
    out = attention(q, k, v, cu.to(triton_device), backend="triton")
    near = {0, 1, 15, 16, 63, 64, 100, *(CHUNK + i for i in (-2, -1, 0, 1)), *(2 * CHUNK + i for i in (-1, 0))}
    steps = [(s, n) for s, length in enumerate(lengths) for n in range(length) if triton_device.type == "cuda" or n in near or n == length - 1]
    key_cache, value_cache, tables = cached(k, v, lengths, 16, generator)
    rows = torch.tensor([int(cu[s]) + n for s, n in steps])
    table, lens = tables[[s for s, _ in steps]], torch.tensor([n + 1 for _, n in steps], dtype=torch.int32)
    call = [x.to(triton_device) for x in (q[rows.to(q.device)], key_cache, value_cache, table, lens)]
    with strict_mode():
        assert torch.equal(paged_attention(*call, backend="triton"), out[rows.to(q.device)])
    # and of a step that shares the chunks of its prefix with later ones
    late = torch.tensor([i for i, (s, n) in enumerate(steps) if s == len(lengths) - 1 and n >= CHUNK])
    if len(late):
        groups = {"group_offsets": torch.tensor([0, len(late)], dtype=torch.int32), "prefix_lens": torch.tensor([CHUNK], dtype=torch.int32)}
        picked = [x[late.to(x.device)] if i in (0, 3, 4) else x for i, x in enumerate(call)]
        with strict_mode():
            shared = paged_attention(*picked, **{name: x.to(triton_device) for name, x in groups.items()}, backend="triton")
        assert torch.equal(shared, out[rows[late].to(q.device)])


@pytest.mark.parametrize("H, Hkv, lengths", [(2, 2, [5, 66, 0, 1, 20]), (7, 1, [5, 0, 18, 1])])
def test_a_sequence_has_the_same_bits_alone_and_packed(H, Hkv, lengths, triton_device, rowwise_products, generator):
    """Gradients too."""
    leaves = inputs(lengths, H, Hkv, 16, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    whole = packed(leaves, lengths, dout, triton_device)
    assert all(torch.equal(a, b) for a, b in zip(packed(leaves, lengths, dout, triton_device), whole, strict=True))
    for s, (a, b) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        alone = packed([x[a:b] for x in leaves], [lengths[s]], dout[a:b], triton_device)
        assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, whole, strict=True)), lengths[s]


def test_more_sequences_than_one_step_of_the_search(triton_device, rowwise_products, generator):
    lengths = [n % 2 for n in range(66)] + [3]
    leaves = inputs(lengths, 2, 1, 16, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    whole = packed(leaves, lengths, dout, triton_device)
    last = packed([x[-3:] for x in leaves], [3], dout[-3:], triton_device)
    assert all(torch.equal(x, y[-3:]) for x, y in zip(last, whole, strict=True))
    assert torch.equal(whole[0][:-3], leaves[2][:-3].repeat_interleave(2, 1))  # a single token's output is its value


def test_no_token_sees_its_future_or_another_sequence(triton_device, rowwise_products, generator):
    lengths = [5, 3, 40]
    leaves = inputs(lengths, 4, 2, 16, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    before = packed(leaves, lengths, dout, triton_device)
    leaves[1][6], leaves[2][6] = 100.0, -1000.0  # second token of the second sequence
    after = packed(leaves, lengths, dout, triton_device)
    untouched = [*range(6), *range(8, 48)]
    assert torch.equal(before[0][untouched], after[0][untouched]) and (before[0][6:8] - after[0][6:8]).abs().amax((1, 2)).min() > 1
    leaves[2][6] = nan
    after = packed(leaves, lengths, dout, triton_device)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[8:], b[8:])
    assert after[0][6:8].isnan().all()


def test_views_of_one_projection_with_poison_around(triton_device, rowwise_products, generator):
    lengths = [18, 3]
    leaves = inputs(lengths, 4, 2, 16, generator)
    dout = torch.randn(leaves[0].shape, generator=generator)
    want = packed(leaves, lengths, dout, triton_device)
    wide = torch.full((23, 10, 20), nan, device=triton_device)
    views = [wide[1:22, heads, 4:] for heads in (slice(0, 4), slice(5, 7), slice(8, 10))]
    for view, x in zip(views, leaves, strict=True):
        view.copy_(x)
    got = packed(views, lengths, dout.transpose(1, 2).contiguous().transpose(1, 2), triton_device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]  # the elements of a head are no neighbours
    assert all(torch.equal(a, b) for a, b in zip(packed(across, lengths, dout, triton_device), want, strict=True))


def test_rows_beyond_two_to_the_31_elements(triton_device, rowwise_products, generator):
    """Rows 2^30 elements apart in memory that is never touched but for them."""
    lengths, stride = [1, 3], 1 << 30
    leaves = inputs(lengths, 2, 1, 16, generator, torch.float16)
    dout = torch.randn(leaves[0].shape, generator=generator)
    want = packed(leaves, lengths, dout, triton_device)
    if triton_device.type == "cuda":
        memory = torch.empty(4 * stride, dtype=torch.float16, device="cuda")
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 8 * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=torch.float16)
    far = [memory.as_strided(x.shape, (stride, 16, 1), 64 * i) for i, x in enumerate(leaves)]
    for x, near in zip(far, leaves, strict=True):
        x.copy_(near)
    assert all(torch.equal(a, b) for a, b in zip(packed(far, lengths, dout, triton_device), want, strict=True))


def test_neither_lengths_nor_counts_compile_anew_and_nothing_is_contracted(launches, generator):
    for n in range(1, 30):
        lengths = torch.randint(0, 5 + n, (n,), generator=generator).tolist() + [1]
        cu = torch.cat((torch.zeros(n % 4, dtype=torch.int32), offsets(lengths)))[n % 4 :]
        leaves = [x.requires_grad_() for x in inputs(lengths, 4, 2, 32, generator)]
        attention_triton(*leaves, cu, cu, 0.1 * n).sum().backward()
    assert sorted(name for name, *_ in launches.keys) == ["attention_dkv_kernel", "attention_dq_kernel", "attention_fwd_kernel"]
    table, lens = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    paged_attention_triton(torch.zeros(2, 4, 32), *torch.zeros(2, 3, 2, 16, 32), table, lens, 1.0, None, None, 64)
    # which of `a b + c d` a compiler contracts, and whether, may differ between two kernels with the same source
    exact = {name for name, _, options in launches.keys if "('enable_fp_fusion', False)" in options}
    assert exact == {"attention_fwd_kernel", "paged_attention_split_kernel", "paged_attention_merge_kernel"}


@pytest.mark.gpu
@pytest.mark.parametrize("H, Hkv, d", [(32, 8, 128), (28, 4, 128), (14, 2, 64)])
def test_strict_mode_serves_decode_bits_at_full_size(H, Hkv, d, within_rule):
    g = torch.Generator().manual_seed(5)
    lengths = [1, 255, 256, 257, 1000, 2049]
    leaves = inputs(lengths, H, Hkv, d, g, torch.bfloat16)
    q, k, v = (x.cuda() for x in leaves)
    cu = offsets(lengths)
    with strict_mode():
        out = attention(q, k, v, cu.cuda())
        with pytest.raises(ValueError, match="'cuda' cannot serve this call: (strict mode is on|flash-attn is not installed, and varlen_attn)"):
            attention(q, k, v, cu.cuda(), backend="cuda")
    key_cache, value_cache, tables = cached(k, v, lengths, 64, g)
    table = tables.repeat_interleave(torch.tensor(lengths), 0).cuda()
    lens = torch.cat([torch.arange(1, n + 1) for n in lengths]).int().cuda()
    with strict_mode():
        assert torch.equal(paged_attention(q, key_cache, value_cache, table, lens), out)
    dout = torch.randn(q.shape, generator=g).to(torch.bfloat16)
    got = packed(leaves, lengths, dout, "cuda")
    assert torch.equal(got[0], out.cpu())
    plain, oracle = (differentiated(lambda *x: textbook(*x, lengths), [x.to(kind) for x in leaves], dout) for kind in (dout.dtype, torch.float64))
    for a, b, c, what in zip(got, plain, oracle, ("out", "dq", "dk", "dv"), strict=True):
        within_rule(a, b, c, what)


def test_refuses_what_it_cannot_serve(triton_device):
    x, cu = torch.ones(3, 2, 16, device=triton_device), offsets([3]).to(triton_device)
    for (q, k), reason in (((x.double(), x.double()), "fp64 is the reference's"), ((x, x.half()), "q is torch.float32, k torch.float16"),
                           ((x.repeat(1, 1, 9), x.repeat(1, 1, 9)), "heads are of 144; the kernel keeps")):  # fmt: skip
        with pytest.raises(ValueError, match=f"attention: backend 'triton' cannot serve this call: .*{reason}"):
            attention(q, k, k, cu, backend="triton")
