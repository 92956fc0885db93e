import pytest
import torch

from athanor.kernels import rmsnorm, rope
from athanor.kernels.rmsnorm import in_rows
from athanor.kernels.rope_cpu import rotation_cpu

# half a head: one number, a part of 16, 16, one more, more than two times 16
SIZES = [(3, 1, 1, 2), (33, 4, 2, 24), (64, 4, 2, 32), (5, 2, 1, 34), (7, 3, 3, 70)]


def on_cpu(*args, **kwargs):
    return rope(*args, backend="cpu", **kwargs)


def plain(x, cos, sin, w=None):
    if w is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def inputs(T, H, Hkv, d, generator):
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    angle = 100 * randn(T, d // 2)
    return randn(T, H + 2 * Hkv, d).requires_grad_(), angle.cos(), angle.sin(), randn(d).requires_grad_(), randn(d).requires_grad_()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("T, H, Hkv, d", SIZES)
def test_errs_no_more_than_the_formula_among_poison(T, H, Hkv, d, norm, within_rule, poisoned, padded, generator):
    qkv, cos, sin, *weights = inputs(T, H, Hkv, d, generator)
    qkv, cos, sin = padded(qkv), padded(cos), padded(sin)
    q, k = qkv[:, :H], qkv[:, H : H + Hkv]
    assert in_rows(q)[0] is q and in_rows(k)[0] is k
    out = on_cpu(q, k, cos, sin, **(dict(zip(("q_weight", "k_weight"), weights, strict=True)) if norm else {}))
    upstream = [padded(torch.randn(x.shape, generator=generator)) for x in out]
    got = torch.autograd.grad(out, (qkv, *weights) if norm else (qkv,), upstream, retain_graph=True)
    assert all(x.is_contiguous() for x in out)
    wide = [t.detach().double().requires_grad_() for t in (qkv, cos, sin, *weights)]

    def both(qkv, cos, sin, *weights):
        weights = weights if norm else (None, None)
        return [plain(x, cos, sin, w) for x, w in zip((qkv[:, :H], qkv[:, H : H + Hkv]), weights, strict=True)]

    simple, exact = both(qkv, cos, sin, *weights), both(*wide)
    for a, b, c in zip(out, simple, exact, strict=True):
        within_rule(a, b, c)
    plain_gradients = torch.autograd.grad(simple, (qkv, *weights) if norm else (qkv,), upstream)
    exact_gradients = torch.autograd.grad(exact, (wide[0], *wide[3:]) if norm else wide[:1], [u.double() for u in upstream])
    for a, b, c in zip(got, plain_gradients, exact_gradients, strict=True):
        within_rule(a, b, c, "gradient")


@pytest.mark.parametrize("d", [8, 24, 32, 40, 128])
def test_qk_norm_has_the_bits_of_norm_then_rotation_for_any_threads(d, with_threads, generator):
    T, H, Hkv = 1501, 4, 2
    qkv, cos, sin, *weights = inputs(T, H, Hkv, d, generator)
    q, k = qkv[:, :H], qkv[:, H : H + Hkv]
    upstream = [torch.randn(T, h, d, generator=generator) for h in (H, Hkv)]

    def run(composed):
        if composed:
            out = on_cpu(*(rmsnorm(x, w, eps=1e-5, backend="cpu") for x, w in zip((q, k), weights, strict=True)), cos, sin)
        else:
            out = on_cpu(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
        return *out, *torch.autograd.grad(out, (qkv, *weights), upstream)

    first, *others = with_threads(lambda: run(False)) + with_threads(lambda: run(True))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    alone = on_cpu(q[7:9], k[7:9], cos[7:9], sin[7:9], q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    assert all(torch.equal(a[7:9], b) for a, b in zip(first, alone, strict=False))


def test_turning_back_is_the_gradient_and_a_bad_head_stays_alone(generator):
    qkv, cos, sin, *_ = inputs(6, 2, 1, 24, generator)
    q, k = qkv[:, :2], qkv[:, 2:3]
    out = on_cpu(q, k, cos, sin)
    back = on_cpu(*(x.detach() for x in out), cos, -sin)
    assert torch.equal(torch.autograd.grad(out, qkv, [x.detach() for x in out])[0][:, :3], torch.cat(back, 1))
    bad = qkv.detach().clone()
    bad[2, 1, 5] = torch.nan
    again = on_cpu(bad[:, :2], bad[:, 2:3], cos, sin)
    same = [(a == b).all(-1) for a, b in zip(out, again, strict=True)]
    assert (~same[0]).nonzero().tolist() == [[2, 1]] and same[1].all()


def test_no_tokens_and_other_dtypes():
    empty, angle, w = torch.empty(0, 2, 8, requires_grad=True), torch.empty(0, 4), torch.ones(8, requires_grad=True)
    out = on_cpu(empty, empty, angle, angle, q_weight=w, k_weight=w)
    gradients = torch.autograd.grad(sum(x.sum() for x in out), (empty, w))
    assert gradients[0].shape == (0, 2, 8) and not gradients[1].any()
    with pytest.raises(ValueError, match="rope: backend 'cpu' cannot serve this call: cos is torch.float64"):
        on_cpu(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 2).double(), torch.ones(1, 2).double())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("half", [1, 16, 35])
def test_rotations_are_right_to_the_last_bit(half, dtype, with_threads):
    """Up to 2^20 positions, of the angles as fp32 has them; rows are their own."""
    positions = torch.cat((torch.arange(-1, 200), torch.arange(1 << 20, (1 << 20) + 60), torch.arange(4001, 1 << 20, 9973)))
    frequencies = 1e6 ** -(torch.arange(half, dtype=torch.float32) / half)
    angles = (positions.float()[:, None] * frequencies).double()
    exact = angles.cos(), angles.sin()

    def run():
        got = rotation_cpu(positions.to(dtype), frequencies, 1.25)
        alone = rotation_cpu(positions[230:233].to(dtype), frequencies, 1.25)
        assert all(torch.equal(a, b[230:233]) for a, b in zip(alone, got, strict=True))
        return got

    first, *others = with_threads(run)
    for a, b in zip(first, exact, strict=True):
        assert ((a.double() - 1.25 * b).abs() <= 1.25 * 2**-23 * b.abs() + 1e-15).all()  # one rounding of the cosine, one of its product
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
